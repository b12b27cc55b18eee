"""A tiny experiment for the tests of the harness; of a module, so that processes can share it."""

from collections.abc import Set
from functools import partial
from pathlib import Path
from typing import Any

from graftlm.reproduce.example import Data, Example
from graftlm.reproduce.experiment import Composition, Experiment, Goal, Models, Test, Training
from graftlm.reproduce.metrics import BITS_PER_BYTE, CHRF, PERPLEXITY
from graftlm.reproduce.systems import System
from tiny import character_tokenizer, save_model

WORDS = ["sand", "hand", "rain", "land", "song", "band", "bird", "wand"]


def made_up(group: str, number: int) -> list[Example]:
    """Texts, and the same with their letters backwards."""
    texts = [f"{WORDS[k % 8]} {k}" for k in range(number)]
    return [
        Example(
            group=group, source=text[::-1], target=f" {text}", opening=f"{group}: ", closing="\nB:"
        )
        for text in texts
    ]


def data(seed: int, *, size: int = 16) -> Data:
    """The same for every seed."""
    found = {name: made_up(name, 20) for name in ("Up", "Down")}
    return Data(
        composition=[e for some in found.values() for e in some[:size]],
        tests={
            "near": {n: some[16:18] for n, some in found.items()},
            "far": {"Up": found["Up"][18:]},
        },
        shots={name: some[:1] for name, some in found.items()},
        domain=[Example(group="text", source="", target=word) for word in WORDS],
        retention={"text": [Example(group="text", source="", target="a song of sand")]},
        notes={"made up": "yes"},
    )


def save_models(folder: Path) -> Models:
    """An anchor, and an augmenting model of other tokens before and after it was a specialist."""
    save_model(folder / "anchor", seed=1, max_position_embeddings=512)
    tokenizer = character_tokenizer([("a", "n"), ("an", "d")])
    size = {"vocab_size": len(tokenizer), "max_position_embeddings": 512}
    smaller = {"hidden_size": 16, "intermediate_size": 28, "num_hidden_layers": 3}
    for seed, name in ((2, "augmenting"), (3, "vanilla")):
        save_model(folder / name, seed=seed, **smaller, **size)
        tokenizer.save_pretrained(folder / name)
    return Models(
        anchor=folder / "anchor",
        augmenting={"augmenting": folder / "augmenting"},
        vanilla={"augmenting": folder / "vanilla"},
    )


def found(folder: Path, read: Set[str], device: str, *, models: Models) -> Models:
    """They are there already."""
    return models


def pipeline(example: Example, said: str) -> tuple[Example, str]:
    """What was said stands before the source."""
    return example, said


def experiment(models: Models, **changes: Any) -> Experiment:
    """On models of the tests."""
    options: dict[str, Any] = {
        "name": "tiny",
        "title": "Backwards",
        "about": "Made up.",
        "models": partial(found, models=models),
        "data": data,
        "tests": {
            "near": Test(metrics=(BITS_PER_BYTE, CHRF), stop="\n", answered=2, paper="None."),
            "far": Test(metrics=(BITS_PER_BYTE,)),
            "before": Test(metrics=(PERPLEXITY,)),
        },
        "composition": Composition(connections=((1, 1), (2, 2)), alignment="prefix"),
        "training": Training(
            examples=8,
            batch_size=4,
            learning_rate=1e-2,
            lora_learning_rate=1e-2,
            full_learning_rate=1e-3,
            domain_examples=8,
            bf16=False,
        ),
        "ablations": {
            "no-position": System(title="no position", composition={"position": "none"}),
            "half": System(title="half of D_C", data={"size": 8}),
        },
        "goals": (
            Goal(says="near is beaten", test="near", beats=("random",), level=0.05),
            Goal(says="English survives", test="before", at_most_ratio=1.01),
        ),
        "pipeline": pipeline,
    }
    return Experiment(**options | changes)
