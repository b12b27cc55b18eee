"""CALM, section 4.2, on open data: translate from a language that the anchor does not know.

The augmenting model is a small Llama that the command trains itself, first on English and then on
the language's text alone; the anchor is SmolLM2-135M-Instruct. D_C is a small aligned part.
"""

from collections.abc import Set
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

from graftlm.reproduce.domain import shuffled_pieces
from graftlm.reproduce.example import Data, Example
from graftlm.reproduce.experiment import Composition, Experiment, Goal, Models, Test, Training
from graftlm.reproduce.language_model import PRESETS
from graftlm.reproduce.low_resource_data import load_data
from graftlm.reproduce.low_resource_models import train_parents
from graftlm.reproduce.metrics import BITS_PER_BYTE, CHRF, PERPLEXITY
from graftlm.reproduce.own_models import OwnModels, find, on_own_models
from graftlm.reproduce.real_models import require_model
from graftlm.reproduce.systems import SYSTEMS, System

ANCHOR = "smollm2-135m-instruct"
LAYERS = (PRESETS["small"].num_layers, 30)  # of m_A and m_B, for whom the connections are
# The small model's middle and last layers, spread over the anchor; many narrow bridges learn
# faster than a few wide ones (docs/log.md).
COMPOSITION = Composition(
    connections=((2, 3), (3, 7), (3, 11), (4, 15), (4, 19), (5, 22), (5, 25), (5, 28)),
    width=192,
    num_heads=6,
    position="distance",
    alignment="prefix",
)
TRAINING = Training(
    examples=1500,
    batch_size=4,
    learning_rate=1.5e-3,
    lora_learning_rate=2e-3,
    full_learning_rate=1e-4,
    domain_examples=1500,
)
SIZES = {  # training examples, tests, answers
    "quick": (8, 4, 2),
    "small": (1800, 200, 100),
    "paper": (30_000, 1000, 1000),
}
ABLATIONS = {
    "4-connections": System(
        title="4 connections", composition={"connections": ((2, 7), (3, 14), (4, 21), (5, 28))}
    ),
    "low": System(
        title="into the anchor's lower half",
        composition={"connections": tuple((k // 2 + 2, 2 * k) for k in range(8))},
    ),
    "full-width": System(title="full width", composition={"width": None, "num_heads": None}),
    "no-position": System(title="no position (the paper)", composition={"position": "none"}),
    "committed": System(title="sees finished words only", composition={"alignment": "committed"}),
    "gate": System(title="a gate that starts at zero", composition={"gate": True}),
    "dc-10%": System(title="a tenth of D_C, repeated", training={"distinct": 0.1}),
}


def experiment(
    preset: str = "small",
    *,
    language: str = "chichewa",
    examples: int | None = None,
    anchor: str | None = None,
    augmenting: str | None = None,
    vanilla: str | None = None,
) -> Experiment:
    """One preset and language.

    Args:
        preset: `quick` looks whether everything runs, `small` takes hours on 2 cores, `paper` has
            a larger augmenting model and wants a GPU.
        language: chichewa, guarani or xhosa.
        examples: Training examples seen; None takes the preset's.
        anchor, augmenting, vanilla: Models in the place of SmolLM2-135M-Instruct and of those that
            the command trains; see `own_models.find`.
    """
    own = find(anchor, augmenting, vanilla)
    seen, num_tests, answered = SIZES[preset]
    data_of = partial(data, language=language, num_tests=num_tests)
    name = language.capitalize()
    tests = {
        test: Test(metrics=(CHRF, BITS_PER_BYTE), stop="\n", answered=answered)
        for test in load_tests(language)
    }
    first = next(iter(tests))
    has_read = f"a small Llama, has read English and then {name} text, none of it aligned"
    made = Experiment(
        name="low-resource",
        title=f"Low-resource translation (CALM, section 4.2): {name} to English",
        about=f"m_A, {own.title('augmenting', has_read)}; m_B is "
        f"{own.title('anchor', 'SmolLM2-135M-Instruct')}; "
        "D_C is a small aligned part of the language's text, and a plain "
        "English text for every five pairs, so that English survives. "
        "chrF of greedy answers and bits per byte of the reference.",
        models=partial(models, language=language, preset=preset, own=own),
        data=data_of,
        tests=tests | {"before": Test(metrics=(PERPLEXITY,), paper="English news.")},
        composition=COMPOSITION,
        training=replace(TRAINING, examples=examples or seen, domain_examples=seen),
        systems=dict(SYSTEMS),
        ablations=ABLATIONS,
        goals=(
            Goal(
                says="composed beats LoRA on D_C, random and vanilla m_A in chrF with p < 0.01",
                test=first,
                beats=("lora", "random", "vanilla"),
                level=0.01,
            ),
            Goal(
                says="English perplexity worsens by less than 1 %",
                test="before",
                at_most_ratio=1.01,
            ),
        ),
        pipeline=pipeline,
        in_bf16=True,
        changes={"preset": preset, "language": language}
        | {"anchor": anchor, "augmenting": augmenting, "vanilla": vanilla},
    )
    trained = None if own.augmenting else PRESETS[preset].num_layers
    return on_own_models(made, own, layers=LAYERS, trained=trained)


def load_tests(language: str) -> list[str]:
    """The names of a language's tests."""
    return list(data(0, language=language, num_tests=1).tests)


@cache
def data(seed: int, *, language: str, num_tests: int) -> Data:
    """The same for every seed: held-out texts are what they are."""
    del seed
    found = load_data(language, num_tests=num_tests)
    return replace(found, domain=shuffled_pieces(found.domain))


def models(
    folder: Path, read: Set[str], device: str, *, language: str, preset: str, own: OwnModels
) -> Models:
    """The anchor, and the augmenting model before and after it learned the language.

    Trained models are kept in the cache; a later run finds them.
    """
    del folder, read
    anchor = own.anchor or require_model(ANCHOR)
    if own.augmenting:
        vanilla = {language: own.vanilla} if own.vanilla else None
        return Models(anchor=anchor, augmenting={language: own.augmenting}, vanilla=vanilla)
    parents = train_parents(language, preset=preset, device=device)
    return Models(
        anchor=anchor,
        augmenting={language: parents.specialised},
        vanilla={language: parents.vanilla},
    )


def pipeline(example: Example, said: str) -> tuple[Example, str]:
    """What the augmenting model says next stands beside the sentence, as a hint."""
    return replace(example, closing=f"\nHint: {said}{example.closing}"), ""
