"""A small model of code, for where none can be had: trained on packages' source text."""

import os

from rich.console import Console

from graftlm.reproduce.code_sources import WRITE
from graftlm.reproduce.example import Data
from graftlm.reproduce.language_model import PRESETS
from graftlm.reproduce.specialists import Parents, train_specialist


def train_coder(
    data: Data,
    *,
    preset: str = "small",
    output: str | os.PathLike[str] | None = None,
    device: str = "cpu",
    console: Console | None = None,
) -> Parents:
    """Train a model on English news and then on the source text of packages that are for training.

    Args:
        data: The experiment's: the plain texts of D_C are the news, the domain is the source text.
        preset: A key of `language_model.PRESETS`.
        output: Where models are kept; by default in graftlm's cache.
        device: Where to train.
        console: Where progress is shown.
    """
    tests = data.tests["other packages"][WRITE]
    return train_specialist(
        ("English", list(dict.fromkeys(e.target for e in data.composition if not e.source))),
        ("Python", [example.target for example in data.domain]),
        settings=PRESETS[preset],
        held_out={
            "Python, other packages": [example.target for example in tests],
            "English, news": [example.target for example in data.retention["text"]],
        },
        output=output,
        device=device,
        console=console,
    )
