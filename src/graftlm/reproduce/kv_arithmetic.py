"""CALM, section 4.1: arithmetic over memorised keys, with every control the paper left out.

The augmenting model knows what each key stands for, the anchor knows how to add; the bridges
learn on a fifth of the keys to bring the two together, and are scored on all of them.
"""

import random
from collections.abc import Callable, Set
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

from graftlm.reproduce import kv_data, kv_parents
from graftlm.reproduce.example import Data, Example
from graftlm.reproduce.experiment import Composition, Experiment, Goal, Models, Test, Training
from graftlm.reproduce.kv_lessons import introduced
from graftlm.reproduce.metrics import EXACT_MATCH
from graftlm.reproduce.systems import SYSTEMS, System

# The paper takes every fourth layer of m_A, so one of our four, and spreads the connections
# evenly over m_B, so its last. Here the last layer of m_A, whose states hold what it would say
# next, is read by the two last layers of m_B: one connection more than the paper's rule gives.
SETTINGS = {
    "quick": (
        Composition(connections=((3, 2), (3, 3)), num_heads=8, position="distance"),
        Training(
            examples=32 * 20,
            batch_size=32,
            learning_rate=3e-3,
            lora_learning_rate=3e-3,
            full_learning_rate=1e-3,
            domain_examples=32 * 10,
            weight_decay=0.5,
            by_length=False,
        ),
        50,
    ),
    "small": (
        Composition(connections=((3, 2), (3, 3)), width=256, num_heads=16, position="distance"),
        Training(
            examples=48 * 1200,
            batch_size=48,
            learning_rate=3e-3,
            lora_learning_rate=2e-3,
            full_learning_rate=1e-3,
            domain_examples=48 * 3460,  # as many as m_A learned from
            weight_decay=0.5,
            bf16=False,  # no faster at this size
        ),
        1000,
    ),
    # Never run, as its parents; see kv_parents.
    "paper": (
        Composition(connections=((5, 6), (5, 7)), num_heads=8, position="distance"),
        Training(
            examples=128 * 10_000,
            batch_size=128,
            learning_rate=5e-4,
            lora_learning_rate=1e-3,
            full_learning_rate=5e-4,
            domain_examples=256 * 20_000,
            weight_decay=0.05,
            by_length=False,
        ),
        1000,
    ),
}
ABLATIONS = {
    "1-connection": System(
        title="one connection, last to last", composition={"connections": ((3, 3),)}
    ),
    "4-connections": System(
        title="every layer to its like",
        composition={"connections": ((0, 0), (1, 1), (2, 2), (3, 3))},
    ),
    "low": System(
        title="into m_B's two lowest layers", composition={"connections": ((3, 0), (3, 1))}
    ),
    "4-heads": System(title="4 heads instead of 16", composition={"num_heads": 4}),
    "width-64": System(title="a quarter of the width", composition={"width": 64}),
    "no-position": System(title="no position (the paper)", composition={"position": "none"}),
    "rotary": System(title="rotary position", composition={"position": "rotary"}),
    "no-norm": System(title="neither normalisation nor unit", composition={"variant": "paper"}),
    "gate": System(title="a gate that starts at zero", composition={"gate": True}),
    "bare": System(
        title="the paper's bare equations",
        composition={"variant": "paper", "position": "none"},
    ),
    "dc-10%": System(title="a tenth of D_C, ten times", training={"distinct": 0.1}),
    "dc-1%": System(title="a hundredth of D_C, a hundred times", training={"distinct": 0.01}),
    "dc-subs": System(title="D_C of substitutions (section 4.1)", data={"dc": "subs"}),
    "dc-math": System(title="D_C of arithmetic (section 3.2)", data={"dc": "math"}),
}
# m_B's embeddings of letters are nearly one (their cosine is 0.94): it learned to pass them over.
# Three things that a fair comparison here asks of what trains m_B's own weights (docs/log.md).
# Adapters of its linear maps alone do not learn a key's value, not one of 150. The bridges'
# weight decay would take from it what it knows. And with D_C after the domain's lessons, not
# among them, it forgets the keys that D_C does not show.
DECAY = {"weight_decay": 0.01}
TUNED = {
    "lora": replace(SYSTEMS["lora"], trains="lora-embeddings", training=DECAY),
    "lora-domain": System(
        title="LoRA on domain data and D_C, mixed",
        trains="lora-embeddings",
        learns="mixed",
        training=DECAY,
    ),
    "full": System(
        title="full fine-tuning on domain data and D_C, mixed",
        trains="anchor",
        learns="mixed",
        training=DECAY,
    ),
}
DOMAIN_SIZE = 166_400  # what m_A learned from; a preset that sees more gets more, in one course
ABOUT = (
    "m_A knows {keys:,} keys, m_B adds numbers, both are small Llamas; bridges learn on "
    "{share:.0f} % of the keys. KV-SUBS replaces keys by their values, NUM-MATH adds numbers, "
    "KV-MATH adds keys, worked out: the substitution is written first and the answer counts. "
    "held-in: keys of D_C in other expressions; mixed: some of either kind; all-held-out: only "
    "keys that D_C never showed (the paper does not say which it scored). Greedy decoding, exact "
    "match in percent."
)


def experiment(
    preset: str = "small", *, dc: str = "mix", examples: int | None = None
) -> Experiment:
    """One preset of the experiment.

    Args:
        preset: `quick` looks whether everything runs, `small` runs on a laptop; `paper` has the
            paper's numbers, wants a GPU, and was never run.
        dc: What the composition data holds; see `kv_data.COMPOSITIONS`.
        examples: Training examples seen; None takes the preset's.
    """
    composition, training, number = SETTINGS[preset]
    if examples is not None:
        training = replace(training, examples=examples)
    task = kv_data.TASKS["paper" if preset == "paper" else "small"]
    return Experiment(
        name="kv-arithmetic",
        title="Key-value arithmetic (CALM, section 4.1)",
        about=ABOUT.format(keys=task.num_keys, share=100 * task.held_in),
        models=partial(models, preset=preset),
        data=partial(
            data,
            task=task,
            dc=dc,
            size=training.examples,
            number=number,
            domain_size=max(DOMAIN_SIZE, training.domain_examples),
        ),
        tests={
            "KV-MATH": Test(
                metrics=(EXACT_MATCH,), paper="The paper: m_A 0.7, m_B 0.0, CALM 84.3."
            ),
            "KV-SUBS": Test(
                metrics=(EXACT_MATCH,), paper="The paper: m_A 98.1, m_B 0.0, CALM 92.9."
            ),
            "NUM-MATH": Test(
                metrics=(EXACT_MATCH,),
                paper="What m_B could do before. The paper: m_A 4.2, m_B 73.7, CALM 72.0.",
            ),
        },
        composition=composition,
        training=training,
        systems=SYSTEMS | TUNED,
        ablations=ABLATIONS,
        goals=(
            Goal(
                says="KV-MATH on held-out keys is at least 95 %",
                test="KV-MATH",
                group="all-held-out",
                at_least=95,
            ),
            Goal(
                says="composed beats random, self and wrong-input m_A by 50 points",
                test="KV-MATH",
                group="all-held-out",
                beats=("random", "self", "wrong", "wrong-test"),
                margin=50,
                level=0.01,
            ),
            Goal(
                says="numeric arithmetic keeps at least 98 % of m_B's",
                test="NUM-MATH",
                at_least_ratio=0.98,
            ),
        ),
        pipeline=pipeline,
        answer_batch=250,
        changes={"preset": preset, "dc": dc},
    )


def models(folder: Path, read: Set[str], device: str, *, preset: str) -> Models:
    """The shipped parents and, where it is read, m_A's twin that never learned a key."""
    shipped = kv_parents.SHIPPED if preset != "paper" else folder / "parents"
    parents = kv_parents.ensure(shipped, ("augmenting", "anchor"), preset, device)
    vanilla = {}
    if "vanilla" in read:
        made = kv_parents.ensure(folder / "models" / preset, ("vanilla",), preset, device)
        vanilla = {"augmenting": made["vanilla"]}
    return Models(
        anchor=parents["anchor"],
        augmenting={"augmenting": parents["augmenting"]},
        vanilla=vanilla,
    )


@cache
def data(
    seed: int, *, task: kv_data.KVTask, dc: str, size: int, number: int, domain_size: int = 0
) -> Data:
    """The examples of one split of the keys."""
    values = kv_data.draw_values(task)
    held_in, held_out = kv_data.split_keys(task, values, seed)
    scored = kv_data.key_evaluation(task, held_in, held_out, seed, number)
    numeric = kv_data.numeric_evaluation(task, number)
    exclude = {e for split in scored.values() for e in split} | set(numeric)
    return Data(
        composition=[
            example_of(e)
            for e in kv_data.composition_examples(
                task, values, held_in, dc=dc, size=size, seed=seed, exclude=exclude
            )
        ],
        tests={
            "KV-MATH": sets(scored, lambda e: kv_data.math_example(e, values)),
            "KV-SUBS": sets(scored, lambda e: kv_data.subs_example(e, values)),
            "NUM-MATH": {"numbers": [example_of(kv_data.numeric_example(e)) for e in numeric]},
        },
        domain=domain(task, values, exclude, domain_size),
    )


def sets(
    scored: dict[str, list[kv_data.Expression]],
    make: Callable[[kv_data.Expression], kv_data.Example],
) -> dict[str, list[Example]]:
    """A test's examples by split."""
    return {split: [example_of(make(e)) for e in found] for split, found in scored.items()}


def example_of(example: kv_data.Example) -> Example:
    """In the harness's words; the arrow is the closing, so that a control can swap expressions."""
    return Example(
        group="numbers" if "<" not in example.prompt else "keys",
        source=example.prompt.removesuffix("->"),
        closing="->",
        target=example.completion,
        facts={"counts": example.scored},
    )


def domain(
    task: kv_data.KVTask,
    values: dict[str, int],
    exclude: set[kv_data.Expression],
    size: int,
) -> list[Example]:
    """KV-SUBS over all keys, more and more of them, as m_A learned it.

    It does not end: in D_C the answer follows the same substitution of the same prompt.
    """
    rng = random.Random(f"domain {task.seed}")
    keys = list(values)
    found: list[Example] = []
    while len(found) < size:
        known = keys[: introduced(len(found) / size, len(keys))]
        expression = kv_data.draw_expression(rng, known, task.operators, task.training_terms)
        if expression not in exclude:
            made = example_of(kv_data.subs_example(expression, values))
            found.append(replace(made, ends=False))
    return found


def pipeline(example: Example, said: str) -> tuple[Example, str]:
    """The anchor works out what the augmenting model wrote in the place of the keys."""
    written = said.split("->")[0]
    return replace(example, source=written), f"{written}->"
