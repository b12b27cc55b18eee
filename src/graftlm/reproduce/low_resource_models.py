"""The augmenting models of the low-resource experiment: before and after they are specialised."""

import os
from pathlib import Path

from rich.console import Console

from graftlm.reproduce.language_model import PRESETS
from graftlm.reproduce.low_resource_data import load_texts
from graftlm.reproduce.specialists import Parents, train_specialist


def train_parents(
    language: str = "chichewa",
    *,
    preset: str = "small",
    output: str | os.PathLike[str] | None = None,
    folder: Path | None = None,
    seed: int = 0,
    device: str = "cpu",
    console: Console | None = None,
) -> Parents:
    """Train the augmenting models of a language, or find them where they were trained before.

    Args:
        language: chichewa, guarani or xhosa.
        preset: quick (seconds), small (about ten minutes a model on one core) or paper (a GPU).
        output: Where models are kept; by default in graftlm's cache.
        folder: Where the packages with the texts are, or are put.
        seed: Of the first weights and of the order of the texts.
        device: Where to train.
        console: Where progress is shown.

    Returns:
        The folders of both models.

    Raises:
        ValueError: If there is no such language or preset.
        FileNotFoundError: If a package cannot be fetched.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset {preset!r} is none of {', '.join(PRESETS)}")
    texts = load_texts(language, folder=folder)
    return train_specialist(
        ("English", texts.english),
        (language.capitalize(), texts.foreign),
        settings=PRESETS[preset],
        held_out=texts.held_out,
        output=output,
        seed=seed,
        device=device,
        console=console,
    )
