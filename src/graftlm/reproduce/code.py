"""CALM, section 4.3, on open models: a general model reads a model of code.

Completion (HumanEval, which runs the programs), text to code, and code to text, on Python
functions of packages that training never showed.
"""

from collections.abc import Set
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

from graftlm.reproduce.code_data import GROUPS, load_data
from graftlm.reproduce.domain import shuffled_pieces
from graftlm.reproduce.example import Data, Example
from graftlm.reproduce.experiment import Composition, Experiment, Goal, Models, Test, Training
from graftlm.reproduce.metrics import BITS_PER_BYTE, CHRF, PASS_AT_1, PERPLEXITY
from graftlm.reproduce.real_models import require_model
from graftlm.reproduce.systems import SYSTEMS, System

ANCHOR, CODER = "smollm2-135m-instruct", "qwen2.5-coder-0.5b-instruct"
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
ABLATIONS = {
    "4-connections": System(
        title="4 connections", composition={"connections": ((9, 7), (17, 15), (22, 22), (23, 28))}
    ),
    "no-position": System(title="no position (the paper)", composition={"position": "none"}),
    "committed": System(title="sees finished words only", composition={"alignment": "committed"}),
    "dc-10%": System(title="a tenth of D_C, ten times", training={"distinct": 60}),
}


def experiment(
    preset: str = "small", *, no_programs: bool = False, examples: int | None = None
) -> Experiment:
    """One preset.

    Args:
        preset: `quick` looks whether everything runs, `small` takes hours on 2 cores, `paper`
            wants a GPU.
        no_programs: Leave out HumanEval, whose tests run programs that models wrote.
        examples: Training examples seen; None takes the preset's.
    """
    seen, num_tests, answered = SIZES[preset]
    tests = {
        "HumanEval": Test(
            metrics=(PASS_AT_1,),
            most_tokens=LONGEST_PROGRAM,
            answered=answered if preset == "quick" else None,
            paper="The paper: m_A 19.5, m_B 16.4, CALM 22.5, LoRA 18.3, random 20.1, vanilla 20.0.",
        ),
        "other packages": Test(
            metrics=(CHRF, BITS_PER_BYTE), most_tokens=LONGEST_PROGRAM, answered=answered
        ),
        "CodeI/O": Test(metrics=(BITS_PER_BYTE,)),
        "before": Test(metrics=(PERPLEXITY,), paper="English news."),
    }
    if no_programs:
        del tests["HumanEval"]
    return Experiment(
        name="code",
        title="Python (CALM, section 4.3)",
        about="m_A is Qwen2.5-Coder-0.5B-Instruct, m_B SmolLM2-135M-Instruct, the smaller of the "
        "two. D_C: documented functions of installed packages, three tasks in one: complete "
        "the body, write the function from a sentence, say what it does. Packages are held out "
        "whole. pass@1 is greedy.",
        models=models,
        data=partial(data, num_tests=num_tests, no_programs=no_programs),
        tests=tests,
        composition=COMPOSITION,
        training=replace(TRAINING, examples=examples or seen, domain_examples=examples or seen),
        # The coder as it was before it learned code is not to be had as a package.
        systems={name: system for name, system in SYSTEMS.items() if name != "vanilla"},
        ablations=ABLATIONS,
        goals=(
            Goal(
                says="composed beats m_B and every control on docstrings in chrF with p < 0.05",
                test="other packages",
                group=GROUPS[0],
                beats=("anchor", "wrong-test", "wrong", "random", "self", "prompt", "lora"),
                level=0.05,
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
        changes={"preset": preset},
    )


@cache
def data(seed: int, *, num_tests: int, no_programs: bool) -> Data:
    """The same for every seed: held-out packages are what they are."""
    del seed
    found = load_data(num_tests=num_tests)
    found = replace(found, domain=shuffled_pieces(found.domain))
    if not no_programs:
        return found
    return replace(found, tests={k: v for k, v in found.tests.items() if k != "HumanEval"})


def models(folder: Path, read: Set[str]) -> Models:
    """A general model and a model of code, as `make models CODER=1` fetches them."""
    del folder, read
    return Models(anchor=require_model(ANCHOR), augmenting={"coder": require_model(CODER)})


def pipeline(example: Example, said: str) -> tuple[Example, str]:
    """What the coder answers stands before the question, as a draft."""
    return replace(example, opening=f"Draft:\n{said}\n\n{example.opening}"), ""
