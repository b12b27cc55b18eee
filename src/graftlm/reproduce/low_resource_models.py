"""The augmenting models of the low-resource experiment: before and after they are specialised."""

import os
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from graftlm.gguf import default_cache
from graftlm.reproduce.language_model import PRESETS, find_tokenizer, train_language_model
from graftlm.reproduce.low_resource_data import load_texts


@dataclass(frozen=True, kw_only=True, slots=True)
class Parents:
    """Folders of two models of one tokenizer.

    Args:
        vanilla: Trained on English alone.
        specialised: The same, trained on the language after.
    """

    vanilla: Path
    specialised: Path


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
    settings = PRESETS[preset]
    texts = load_texts(language, folder=folder)
    english = list(texts.english)[: settings.num_texts]
    foreign = list(texts.foreign)[: settings.num_texts]
    output = Path(output or default_cache() / "language-models")
    tokenizer = find_tokenizer([*english, *foreign], settings.vocabulary, output)
    vanilla = train_language_model(
        english,
        settings=settings,
        output=output,
        tokenizer=tokenizer,
        held_out=texts.held_out,
        seed=seed,
        device=device,
        console=console,
        title="English",
    )
    specialised = train_language_model(
        foreign,
        settings=settings,
        output=output,
        start_from=vanilla,
        held_out=texts.held_out,
        seed=seed,
        device=device,
        console=console,
        title=language.capitalize(),
    )
    return Parents(vanilla=vanilla, specialised=specialised)
