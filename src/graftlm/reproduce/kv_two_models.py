"""What CALM, section 3.2, leaves untested: two augmenting models, each knowing half of the keys.

One anchor reads both; expressions mix both halves. `one-by-one` trains the first one's bridges,
then adds the second without training the first one's again.
"""

from collections.abc import Sequence, Set
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

from graftlm.reproduce import kv_arithmetic, kv_data, kv_parents
from graftlm.reproduce.example import Data, Example
from graftlm.reproduce.experiment import Experiment, Goal, Models, Test
from graftlm.reproduce.kv_lessons import keys_of
from graftlm.reproduce.metrics import EXACT_MATCH
from graftlm.reproduce.systems import OURS, SYSTEMS, System

HALVES = ("first", "second")
TWO = {
    "anchor": SYSTEMS["anchor"],
    OURS: System(title="**composed with both, trained together**"),
    "one-by-one": System(title="the second added, the first one's bridges kept", one_by_one=True),
    "first": System(title="composed with the first only", only=("first",)),
    "second": System(title="composed with the second only", only=("second",)),
    "wrong-test": SYSTEMS["wrong-test"],
    "random": System(title="composed with two random models", reads_model="random"),
    "lora": kv_arithmetic.TUNED["lora"],
}


def experiment(preset: str = "small", *, examples: int | None = None) -> Experiment:
    """One preset; see `kv_arithmetic.experiment`."""
    base = kv_arithmetic.experiment(preset, examples=examples)
    task = kv_data.TASKS["paper" if preset == "paper" else "small"]
    number = kv_arithmetic.SETTINGS[preset][2]
    return replace(
        base,
        name="kv-two-models",
        title="Two augmenting models, each knowing half of the keys (CALM, section 3.2)",
        about="The first model knows one half of the keys, the second the other; the anchor adds. "
        "Bridges learn on a fifth of the keys of either half; all numbers are of keys that D_C "
        "never showed: of the first half only, of the second only, and of both in one expression. "
        "Greedy decoding, exact match in percent.",
        models=partial(models, preset=preset),
        data=partial(data, task=task, size=base.training.examples, number=number),
        tests={
            "KV-MATH": Test(metrics=(EXACT_MATCH,)),
            "KV-SUBS": Test(metrics=(EXACT_MATCH,)),
            "NUM-MATH": Test(metrics=(EXACT_MATCH,), paper="What m_B could do before."),
        },
        systems=TWO,
        ablations={},
        goals=(
            Goal(
                says="both halves in one expression: at least 80 %",
                test="KV-MATH",
                group="both",
                at_least=80,
            ),
            Goal(
                says="either model alone is beaten where halves mix",
                test="KV-MATH",
                group="both",
                beats=("first", "second"),
                margin=30,
                level=0.01,
            ),
        ),
        pipeline=None,
        changes={"preset": preset},
    )


def models(folder: Path, read: Set[str], device: str, *, preset: str) -> Models:
    """The shipped anchor, and two models that are trained here."""
    del read
    shipped = kv_parents.SHIPPED if preset != "paper" else folder / "parents"
    anchor = kv_parents.ensure(shipped, ("anchor",), preset, device)["anchor"]
    halves = kv_parents.ensure(folder / "models" / preset, HALVES, preset, device)
    return Models(anchor=anchor, augmenting=halves)


@cache
def data(seed: int, *, task: kv_data.KVTask, size: int, number: int) -> Data:
    """The examples of one split of the keys, told apart by what they need."""
    values = kv_data.draw_values(task)
    owner = {key: name for name in HALVES for key in keys_of(name, list(values))}
    held_in, held_out = kv_data.split_keys(task, values, seed)
    scored = scored_expressions(task, held_out, owner, seed, number)
    numeric = kv_data.numeric_evaluation(task, number)
    exclude = {e for group in scored.values() for e in group} | set(numeric)
    drawn = kv_data.composition_examples(
        task, values, held_in, dc="mix", size=size, seed=seed, exclude=exclude
    )
    return Data(
        composition=[with_needs(kv_arithmetic.example_of(example), owner) for example in drawn],
        tests={
            "KV-MATH": kv_arithmetic.sets(scored, lambda e: kv_data.math_example(e, values)),
            "KV-SUBS": kv_arithmetic.sets(scored, lambda e: kv_data.subs_example(e, values)),
            "NUM-MATH": {
                "numbers": [kv_arithmetic.example_of(kv_data.numeric_example(e)) for e in numeric]
            },
        },
    )


def scored_expressions(
    task: kv_data.KVTask, held_out: Sequence[str], owner: dict[str, str], seed: int, number: int
) -> dict[str, list[kv_data.Expression]]:
    """Expressions over held-out keys of the first half, of the second, and of both."""
    first, second = ([key for key in held_out if owner[key] == name] for name in HALVES)
    both = kv_data.key_evaluation(task, first, second, seed, number)
    return {
        "first half": both["held-in"],
        "second half": both["all-held-out"],
        "both": both["mixed"],
    }


def with_needs(example: Example, owner: dict[str, str]) -> Example:
    """Note which models an expression needs."""
    keys = [f"<{part.split('>')[0]}>" for part in example.source.split("<")[1:]]
    return replace(example, facts={**example.facts, "needs": sorted({owner[k] for k in keys})})
