"""A small language model before and after it became a specialist."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from graftlm.gguf import default_cache
from graftlm.reproduce.language_model import (
    LanguageModelSettings,
    find_tokenizer,
    train_language_model,
)

Texts = tuple[str, Sequence[str]]  # what they are called, and they


@dataclass(frozen=True, kw_only=True, slots=True)
class Parents:
    """Folders of two models of one tokenizer.

    Args:
        vanilla: Trained on general text alone.
        specialised: The same, trained on the specialist's texts after.
    """

    vanilla: Path
    specialised: Path


def train_specialist(
    general: Texts,
    special: Texts,
    *,
    settings: LanguageModelSettings,
    held_out: Mapping[str, Sequence[str]],
    output: str | os.PathLike[str] | None = None,
    seed: int = 0,
    device: str = "cpu",
    console: Console | None = None,
) -> Parents:
    """Train a model on general texts and then on others, or find both where it was done before.

    Args:
        general, special: The texts in their order of learning; `settings.num_texts` of each.
        held_out: Texts by name, on which either is scored.
        output: Where models are kept; by default in graftlm's cache.
        seed: Of the first weights and of the order of the texts.
        device: Where to train.
        console: Where progress is shown.
    """
    first, second = (list(texts)[: settings.num_texts] for _, texts in (general, special))
    output = Path(output or default_cache() / "language-models")
    vanilla = train_language_model(
        first,
        settings=settings,
        output=output,
        tokenizer=find_tokenizer([*first, *second], settings.vocabulary, output),
        held_out=held_out,
        seed=seed,
        device=device,
        console=console,
        title=general[0],
    )
    specialised = train_language_model(
        second,
        settings=settings,
        output=output,
        start_from=vanilla,
        held_out=held_out,
        seed=seed,
        device=device,
        console=console,
        title=special[0],
    )
    return Parents(vanilla=vanilla, specialised=specialised)
