"""Sentences to translate into English: what is trained on, what is held out, and the prompts.

Chapters are held out whole, and of their verses those that say again what a training verse says
are dropped: the text repeats itself. A second test is the Declaration of Human Rights.
"""

import random
from collections.abc import Iterable, Sequence
from pathlib import Path

from graftlm.reproduce.example import Data, Example
from graftlm.reproduce.near_duplicates import unlike
from graftlm.reproduce.packages import fetch
from graftlm.reproduce.translate_sources import (
    DECLARATION,
    ENGLISH,
    LANGUAGES,
    QURAN,
    Language,
    Verse,
    declaration_pairs,
    read_verses,
)

TEST_CHAPTERS = frozenset(range(6, 115, 6))
DEVELOPMENT_CHAPTERS = frozenset(range(9, 115, 12))  # what settings were chosen by
SHORTEST, LONGEST = 20, 120  # characters of a verse; the longest ones would eat the budget
LONGEST_PARAGRAPH = 250  # characters of the Declaration
LARGEST_RATIO = 2.0  # of lengths; beyond it a translation joins several verses


def example(language: Language, source: str, target: str) -> Example:
    """A sentence of a language, to be said in English."""
    return Example(
        group=language.name,
        source=source,
        target=f" {target}",
        opening=f"{language.name}: ",
        closing="\nEnglish:",
    )


def load_data(folder: Path | None = None, *, num_tests: int = 150, num_shots: int = 4) -> Data:
    """The verses and the Declaration in all languages.

    Args:
        folder: Where the archives are, or are put.
        num_tests: Test verses of each language, drawn once and for all.
        num_shots: Examples in a few-shot prompt.
    """
    quran, declaration = fetch(QURAN, folder), fetch(DECLARATION, folder)
    english = read_verses(quran, ENGLISH)
    splits = {
        language.name: split(language, zip(read_verses(quran, language), english, strict=True))
        for language in LANGUAGES
    }
    composition = [e for sides in splits.values() for e in sides["training"]]
    # What training says in another language counts too.
    new = {name: unlike(sides["test"], composition) for name, sides in splits.items()}
    return Data(
        composition=composition,
        development=[e for sides in splits.values() for e in draw(sides["development"], 60)],
        tests={
            "verses": {name: draw(found, num_tests) for name, found in new.items()},
            "declaration": {
                language.name: [
                    example(language, source, target)
                    for source, target in declaration_pairs(declaration, language)
                    if SHORTEST <= len(target) <= LONGEST_PARAGRAPH
                ]
                for language in LANGUAGES
            },
        },
        shots={name: few_shots(sides["training"], num_shots) for name, sides in splits.items()},
        notes={
            "verses dropped because training says the same": {
                name: len(sides["test"]) - len(new[name]) for name, sides in splits.items()
            }
        },
    )


def split(language: Language, verses: Iterable[tuple[Verse, Verse]]) -> dict[str, list[Example]]:
    """One language's verses by chapter."""
    sides: dict[str, list[Example]] = {"training": [], "development": [], "test": []}
    for theirs, ours in verses:
        if is_usable(theirs.text, ours.text):
            side = "development" if theirs.chapter in DEVELOPMENT_CHAPTERS else "training"
            side = "test" if theirs.chapter in TEST_CHAPTERS else side
            sides[side].append(example(language, theirs.text, ours.text))
    return sides


def draw(examples: Sequence[Example], number: int) -> list[Example]:
    """Some examples, always the same."""
    return random.Random(0).sample(list(examples), min(number, len(examples)))


def is_usable(source: str, target: str) -> bool:
    """Whether both sides are of fair length, and of about the same."""
    lengths = len(source), len(target)
    in_range = min(lengths) >= SHORTEST and max(lengths) <= LONGEST
    return in_range and max(lengths) <= LARGEST_RATIO * min(lengths)


def few_shots(training: Sequence[Example], number: int) -> list[Example]:
    """Examples of middling length, spread over the training pairs."""
    middling = [pair for pair in training if 40 <= len(pair.source) <= 80]
    return [middling[len(middling) * (2 * k + 1) // (2 * number)] for k in range(number)]
