"""CALM, section 4.3, on open models: a general model reads a model of code.

Completion (HumanEval, which runs the programs), text to code, and code to text, on Python
functions of packages that training never showed.
"""

from collections.abc import Callable, Sequence, Set
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

from graftlm.reproduce import code_models, language_model
from graftlm.reproduce.code_data import draw, load_data, new_tests
from graftlm.reproduce.code_sources import COMPLETE, DESCRIBE, load_codexglue, load_mbpp
from graftlm.reproduce.code_tests import END_OF_ANSWER, is_over
from graftlm.reproduce.domain import shuffled_pieces
from graftlm.reproduce.example import Data, Example
from graftlm.reproduce.experiment import Composition, Experiment, Goal, Models, Test, Training
from graftlm.reproduce.metrics import BITS_PER_BYTE, CHRF, PASS_AT_1, PERPLEXITY
from graftlm.reproduce.own_models import OwnModels, find, on_own_models
from graftlm.reproduce.real_models import require_model
from graftlm.reproduce.systems import SYSTEMS, System

ANCHOR, CODER = "smollm2-135m-instruct", "qwen2.5-coder-0.5b-instruct"
CODER_TITLE = "Qwen2.5-Coder-0.5B-Instruct"
LAYERS = (24, 30)  # of the coder and the anchor
# The coder's late layers know the code best, and the anchor needs layers left to use it.
COMPOSITION = Composition(
    connections=((9, 3), (13, 7), (17, 11), (20, 15), (22, 19), (23, 22), (23, 25), (23, 28)),
    width=192,
    num_heads=6,
    position="distance",
    alignment="prefix",
)
TRAINING = Training(
    examples=600,
    batch_size=4,
    learning_rate=1e-3,
    lora_learning_rate=2e-3,
    full_learning_rate=1e-4,
    domain_examples=600,
)
SIZES = {  # training examples, tests of a group, answers
    "quick": (8, 2, 2),
    "small": (600, 100, 40),
    "paper": (60_000, 1000, 1000),
}
LONGEST_PROGRAM = 200  # tokens of a completion; 95 of 100 solutions are shorter
# All but what shows how far one gets: m_A itself, and fine-tuning all of m_B.
CONTROLS = (
    *("anchor", "pipeline", "wrong-test", "wrong", "random", "self", "prompt"),
    *("lora", "lora-domain"),
)
ABLATIONS = {
    "4-connections": System(
        title="4 connections", composition={"connections": ((9, 7), (17, 15), (22, 22), (23, 28))}
    ),
    "no-position": System(title="no position (the paper)", composition={"position": "none"}),
    "committed": System(title="sees finished words only", composition={"alignment": "committed"}),
    "dc-10%": System(title="a tenth as many examples, ten times", training={"distinct": 0.1}),
}


def experiment(
    preset: str = "small",
    *,
    no_programs: bool = False,
    mbpp: str | None = None,
    codexglue: Sequence[str] = (),
    examples: int | None = None,
    anchor: str | None = None,
    augmenting: str | None = None,
    vanilla: str | None = None,
    train_coder: bool = False,
) -> Experiment:
    """One preset.

    Args:
        preset: `quick` looks whether everything runs, `small` takes hours on 2 cores, `paper`
            wants a GPU.
        no_programs: Leave out HumanEval, whose tests run programs that models wrote.
        mbpp: The file of MBPP, to test on it too.
        codexglue: Files of CodeXGLUE's code-to-text task in Python, to test on them too.
        examples: Training examples seen; None takes the preset's.
        anchor, augmenting, vanilla: Models in the place of SmolLM2-135M-Instruct and
            Qwen2.5-Coder-0.5B-Instruct; see `own_models.find`.
        train_coder: Whether the command trains the augmenting model; see `code_models`.

    Raises:
        ValueError: If MBPP is asked for, but no programs, or an augmenting model beside one that
            is to be trained.
    """
    if train_coder and augmenting:
        raise ValueError(
            f"--augmenting {augmenting} is another model than the one that --train-coder trains; "
            "give one of the two"
        )
    own = find(anchor, augmenting, vanilla)
    if no_programs and mbpp:
        raise ValueError(
            f"--mbpp {mbpp} tests programs that models write, which --no-programs leaves out; "
            "give one of the two"
        )
    has_vanilla = train_coder or own.vanilla is not None
    seen, num_tests, answered = SIZES[preset]
    tests = {
        "HumanEval": Test(
            metrics=(PASS_AT_1,),
            needs_no_more=is_over,
            most_tokens=LONGEST_PROGRAM,
            answered=answered if preset == "quick" else None,
            paper="The paper: m_A 19.5, m_B 16.4, CALM 22.5, LoRA 18.3, random 20.1, vanilla 20.0.",
        ),
        # An empty line ends what is asked for, and divides the examples of a prompt.
        "other packages": Test(metrics=(CHRF, BITS_PER_BYTE), stop="\n\n", answered=answered),
        "CodeI/O": Test(metrics=(BITS_PER_BYTE,)),
        "before": Test(metrics=(PERPLEXITY,), paper="English news."),
    }
    if no_programs:
        del tests["HumanEval"]
    if mbpp:
        tests["MBPP"] = Test(metrics=(PASS_AT_1,), stop=END_OF_ANSWER, most_tokens=LONGEST_PROGRAM)
    if codexglue:
        tests["CodeXGLUE"] = tests["other packages"]
    data_of = partial(
        data, num_tests=num_tests, programs=not no_programs, mbpp=mbpp, codexglue=tuple(codexglue)
    )
    trained = "a small Llama that has read English news and then Python packages"
    made = Experiment(
        name="code",
        title="Python (CALM, section 4.3)",
        about=f"m_A is {own.title('augmenting', trained if train_coder else CODER_TITLE)}, "
        f"m_B {own.title('anchor', 'SmolLM2-135M-Instruct')}. "
        "D_C: documented functions of installed packages, three tasks in one: complete "
        "the body, write the function from a sentence, say what it does; and a plain English "
        "text for every five, so that English survives. Packages are held out whole. pass@1 is "
        "greedy.",
        models=partial(models, own=own, lessons=data_of if train_coder else None, preset=preset),
        data=data_of,
        tests=tests,
        composition=COMPOSITION,
        training=replace(TRAINING, examples=examples or seen, domain_examples=seen),
        # The coder as it was before it learned code is not to be had as a package.
        systems={n: s for n, s in SYSTEMS.items() if n != "vanilla" or has_vanilla},
        ablations=ABLATIONS,
        goals=(
            *(
                Goal(
                    says=f"composed beats m_B and every control on {title} with p < 0.05",
                    test=test,
                    group=group,
                    beats=CONTROLS + (("vanilla",) if has_vanilla else ()),
                    level=0.05,
                )
                for test, group, title in (
                    ("other packages", DESCRIBE, "docstrings (chrF)"),
                    ("HumanEval", COMPLETE, "HumanEval"),
                )
                if test in tests
            ),
            Goal(
                says="English perplexity worsens by less than 1 %",
                test="before",
                at_most_ratio=1.01,
            ),
        ),
        pipeline=pipeline,
        in_bf16=True,
        answer_batch=24,
        changes={"preset": preset, "mbpp": mbpp, "codexglue": list(codexglue)}
        | {"anchor": anchor, "augmenting": augmenting, "vanilla": vanilla}
        | {"train_coder": train_coder},
    )
    layers = language_model.PRESETS[preset].num_layers if train_coder else None
    return on_own_models(made, own, layers=LAYERS, trained=layers)


@cache
def data(
    seed: int, *, num_tests: int, programs: bool, mbpp: str | None, codexglue: tuple[str, ...]
) -> Data:
    """The same for every seed: held-out packages are what they are."""
    del seed
    found = load_data(num_tests=num_tests)
    tests = {name: some for name, some in found.tests.items() if programs or name != "HumanEval"}
    if mbpp:
        tests["MBPP"] = {"MBPP": draw(unseen(load_mbpp(mbpp), found, "--mbpp"), num_tests)}
    if codexglue:
        found_there = unseen(load_codexglue(*codexglue), found, "--codexglue")
        tests["CodeXGLUE"] = {DESCRIBE: draw(found_there, num_tests)}
    return replace(found, domain=shuffled_pieces(found.domain), tests=tests)


def unseen(examples: Sequence[Example], data: Data, option: str) -> list[Example]:
    """Those like none of D_C, and of which no long run is in the domain.

    Raises:
        ValueError: If none is left.
    """
    texts = [text.target for text in data.domain]
    left = new_tests({"": examples}, data.composition, texts)[""]
    if not left:
        raise ValueError(
            f"all {len(examples)} examples of {option} are like some that models train on; "
            "give a file of code that is not installed here"
        )
    return left


def models(
    folder: Path,
    read: Set[str],
    device: str,
    *,
    own: OwnModels,
    lessons: Callable[[int], Data] | None,
    preset: str,
) -> Models:
    """A general model and a model of code, as `make models CODER=1` fetches them.

    Args:
        lessons: The data of a seed, of which the coder is to be trained; None takes one that is
            there.
    """
    del folder, read
    anchor = own.anchor or require_model(ANCHOR)
    if lessons is not None:
        parents = code_models.train_coder(lessons(0), preset=preset, device=device)
        return Models(
            anchor=anchor,
            augmenting={"coder": parents.specialised},
            vanilla={"coder": parents.vanilla},
        )
    return Models(
        anchor=anchor,
        augmenting={"coder": own.augmenting or require_model(CODER)},
        vanilla={"coder": own.vanilla} if own.vanilla else None,
    )


def pipeline(example: Example, said: str) -> tuple[Example, str]:
    """What the coder answers stands before the question, as a draft."""
    return replace(example, opening=f"Draft:\n{said}\n\n{example.opening}"), ""
