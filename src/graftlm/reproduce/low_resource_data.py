"""Data of the low-resource experiment: translate a language of which few aligned texts are known.

The augmenting model knows the language from text alone, the anchor knows English, and D_C is a
small aligned part of that text. Whole books of the Bible, and whole parts of programs, are held
out; of these, what training says again in either language is dropped.
"""

import hashlib
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from graftlm.reproduce.domain import REPLAY, with_replay
from graftlm.reproduce.example import Data, Example, plain
from graftlm.reproduce.low_resource_sources import (
    CHICHEWA_BIBLE,
    ENGLISH_BIBLE,
    FIREFOX,
    KOLIBRI,
    NEWS,
    Row,
    bible_rows,
    firefox_rows,
    kolibri_rows,
    news,
    tidy,
)
from graftlm.reproduce.near_duplicates import unlike
from graftlm.reproduce.packages import Package, fetch
from graftlm.reproduce.translate_sources import DECLARATION, Language, declaration_pairs

TEST_BOOKS = ("mark", "ruth", "james", "jonah", "amos", "1john")
DEVELOPMENT_BOOKS = ("joel", "philippians")  # what settings were chosen by
TEST_PARTS, DEVELOPMENT_PARTS = 4, 1  # of twelve of a browser's files
KOLIBRI_TEST_PARTS = 6  # of twelve of a learning platform's parts
FEWEST_WORDS = 6  # in English; less is a button's label
SHORTEST, LONGEST = 20, 200  # characters of a side; the longest ones would eat the budget
LONGEST_PARAGRAPH = 250  # characters of the Declaration
LARGEST_RATIO = 2.0  # of lengths; beyond it a translation says more or less
NUM_DEVELOPMENT, NUM_RETENTION, NUM_SHOTS = 60, 60, 5
LONGEST_NEWS = 1000  # characters of a text whose perplexity is measured
LICENCES = {
    CHICHEWA_BIBLE: "MIT; of the translation itself nothing is said",
    ENGLISH_BIBLE: "the text is in the public domain; the package is published without a licence",
    KOLIBRI: "MIT",
    DECLARATION: "MIT",
    NEWS: "LGPL-2.1; the news in it, the Lee background corpus, are for research",
    **dict.fromkeys(FIREFOX.values(), "MPL-2.0"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Material:
    """What there is in one language, split.

    Args:
        name: Of the language.
        declaration: Its code in the package of the Declaration.
        packages: Where it is from.
        training: What D_C may be drawn from, in the order of the text.
        extra: Of these only the text in the language is used, by the augmenting model.
        development: What settings are chosen by.
        tests: Held-out rows by the name of the test.
        num_composition: How many pairs D_C has, unless another number is asked for.
    """

    name: str
    declaration: str
    packages: Sequence[Package]
    training: Sequence[Row]
    extra: Sequence[Row] = ()
    development: Sequence[Row]
    tests: Mapping[str, Sequence[Row]]
    num_composition: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Texts:
    """What the two augmenting models are trained on, and held-out texts by name.

    Args:
        foreign: Texts in the language; what makes a model a specialist.
        english: Texts in English; what it knows before.
        held_out: In both languages.
    """

    foreign: Sequence[str]
    english: Sequence[str]
    held_out: Mapping[str, Sequence[str]] = field(default_factory=dict)


def load_data(
    language: str = "chichewa",
    *,
    num_tests: int = 200,
    num_composition: int | None = None,
    folder: Path | None = None,
) -> Data:
    """The data of one language: a small D_C, tests, and the text of the augmenting model.

    Args:
        language: chichewa, guarani or xhosa.
        num_tests: Pairs of each test at most, drawn once and for all; and of the English texts.
        num_composition: Pairs in D_C, drawn once and for all; a larger D_C holds a smaller one.
            By default 1,500 of Chichewa, 400 of Guarani, 100 of Xhosa.
        folder: Where the packages are, or are put.

    Returns:
        The data, with counts and sources in `notes`; D_C has a plain English text for every five
        pairs.

    Raises:
        ValueError: If there is no such language, or if a number is too small or too large.
        FileNotFoundError: If a package cannot be fetched.
    """
    if num_tests < 1:
        raise ValueError(f"num_tests must be at least 1, got {num_tests}")
    material = load_material(language, folder)
    usable = pairs_of(material.name, material.training)
    composition = draw_composition(usable, material, num_composition)
    tests, dropped = draw_tests(material, num_tests)
    english = news(folder)[:NUM_RETENTION]
    tests["declaration (UDHR)"] = declaration(material, folder)
    return Data(
        composition=with_replay(composition, *plain_english(material, folder)),
        tests={test: {material.name: examples} for test, examples in tests.items()},
        development=draw(pairs_of(material.name, material.development), NUM_DEVELOPMENT),
        shots={material.name: few_shots(composition)},
        domain=[plain(text) for text in foreign_documents(material)],
        retention={"text": [plain(short(text)) for text in english[:num_tests]]},
        notes=notes(material, composition, len(usable), tests, dropped),
    )


def load_texts(language: str = "chichewa", *, folder: Path | None = None) -> Texts:
    """What the augmenting model is trained on: English first, then the language.

    Nothing of the tests, of the development pairs or of the retention texts is in it.

    Args:
        language: chichewa, guarani or xhosa.
        folder: Where the packages are, or are put.

    Raises:
        ValueError: If there is no such language.
        FileNotFoundError: If a package cannot be fetched.
    """
    material = load_material(language, folder)
    english = list(chain(*plain_english(material, folder)))
    held_out = {}
    for test, tested in material.tests.items():
        book = [row for row in tested if row.unit.startswith("mark ")] or tested
        held_out[f"{material.name}, {test}"] = documents((r.unit, r.foreign) for r in book)
        held_out[f"English, {test}"] = documents((r.unit, r.english) for r in book)
    held_out["English, news"] = [short(text) for text in news(folder)[:NUM_RETENTION]]
    return Texts(foreign=foreign_documents(material), english=english, held_out=held_out)


def plain_english(material: Material, folder: Path | None) -> tuple[list[str], list[str]]:
    """The English side of what is trained on, and news."""
    rows = [*material.training, *material.extra]
    return documents((row.unit, row.english) for row in rows), news(folder)[NUM_RETENTION:]


# ---- languages ---------------------------------------------------------------------------


def load_material(language: str, folder: Path | None = None) -> Material:
    """What there is in a language.

    Raises:
        ValueError: If nothing is.
    """
    loaders: dict[str, Callable[[Path | None], Material]] = {
        "chichewa": chichewa,
        "guarani": lambda folder: browser_language("Guarani", "gn", "gug", 400, folder),
        "xhosa": lambda folder: browser_language("Xhosa", "xh", "xho", 100, folder),
    }
    if language not in loaders:
        raise ValueError(f"language {language!r} is none of {', '.join(loaders)}")
    return loaders[language](folder)


def chichewa(folder: Path | None = None) -> Material:
    """The Bible by books, and a learning platform by its parts, for the text alone."""
    rows, messages = bible_rows(folder), kolibri_rows(folder)
    held_out = [row for row in messages if share(row.unit) < KOLIBRI_TEST_PARTS]
    return Material(
        name="Chichewa",
        declaration="nya_chechewa",
        packages=(CHICHEWA_BIBLE, ENGLISH_BIBLE, KOLIBRI, DECLARATION, NEWS),
        training=[row for row in rows if book(row) not in TEST_BOOKS + DEVELOPMENT_BOOKS],
        extra=[row for row in messages if share(row.unit) >= KOLIBRI_TEST_PARTS],
        development=[row for row in rows if book(row) in DEVELOPMENT_BOOKS],
        tests={
            "held-out books": [row for row in rows if book(row) in TEST_BOOKS],
            "interface (Kolibri)": held_out,
        },
        num_composition=1500,
    )


def browser_language(
    name: str, code: str, declaration: str, num_composition: int, folder: Path | None
) -> Material:
    """What a browser says, by its files."""
    rows = firefox_rows(code, folder)
    tested = TEST_PARTS + DEVELOPMENT_PARTS
    return Material(
        name=name,
        declaration=declaration,
        packages=(FIREFOX[code], FIREFOX["en-gb"], DECLARATION, NEWS),
        training=[row for row in rows if share(row.unit) >= tested],
        development=[row for row in rows if TEST_PARTS <= share(row.unit) < tested],
        tests={"held-out files": [row for row in rows if share(row.unit) < TEST_PARTS]},
        num_composition=num_composition,
    )


def book(row: Row) -> str:
    """The book of a verse, whose unit is a chapter."""
    return row.unit.split()[0]


def share(unit: str) -> int:
    """Which of twelve parts a unit falls into, always the same."""
    return int(hashlib.sha256(unit.encode()).hexdigest(), 16) % 12


# ---- examples ----------------------------------------------------------------------------


def example(name: str, foreign: str, english: str) -> Example:
    """A text to translate into English."""
    return Example(
        group=name,
        source=foreign,
        target=f" {english}",
        opening=f"{name}: ",
        closing="\nEnglish:",
    )


def short(text: str) -> str:
    """A text whose perplexity counts, cut at a word."""
    return text if len(text) <= LONGEST_NEWS else text[:LONGEST_NEWS].rsplit(" ", 1)[0]


def pairs_of(name: str, rows: Iterable[Row]) -> list[Example]:
    """The rows of fair length on both sides, each once."""
    usable = [row[1:] for row in rows if is_usable(row.foreign, row.english, LONGEST)]
    return [example(name, foreign, english) for foreign, english in dict.fromkeys(usable)]


def is_usable(foreign: str, english: str, longest: int) -> bool:
    """Whether both sides are of fair length, and of about the same."""
    lengths = len(foreign), len(english)
    in_range = min(lengths) >= SHORTEST and max(lengths) <= longest
    is_sentence = len(english.split()) >= FEWEST_WORDS
    return is_sentence and in_range and max(lengths) <= LARGEST_RATIO * min(lengths)


def draw(examples: Sequence[Example], number: int) -> list[Example]:
    """Some examples, always the same."""
    return random.Random(0).sample(examples, min(number, len(examples)))


def draw_composition(
    usable: Sequence[Example], material: Material, number: int | None
) -> list[Example]:
    """D_C; the first of one shuffled list, so that a larger one holds a smaller one.

    Raises:
        ValueError: If there are not so many pairs.
    """
    number = material.num_composition if number is None else number
    if not 1 <= number <= len(usable):
        raise ValueError(
            f"num_composition is {number}, but {material.name} has {len(usable)} pairs to train "
            "on; ask for 1 at least, and for no more"
        )
    return random.Random(0).sample(usable, len(usable))[:number]


def draw_tests(
    material: Material, number: int
) -> tuple[dict[str, list[Example]], dict[str, dict[str, int]]]:
    """The tests, without what training says again, and how many there were and were dropped."""
    rows = [*material.training, *material.extra, *material.development]
    known = [example(material.name, row.foreign, row.english) for row in rows]
    # What several verses of one chapter say is known too.
    foreign = documents((row.unit, row.foreign) for row in rows)
    english = documents((row.unit, row.english) for row in rows)
    known += [example(material.name, *sides) for sides in zip(foreign, english, strict=True)]
    tests, dropped = {}, {}
    for test, held_out in material.tests.items():
        pairs = pairs_of(material.name, held_out)
        new = unlike(pairs, known)
        dropped[test] = {"usable": len(pairs), "dropped": len(pairs) - len(new)}
        tests[test] = draw(new, number)
    return tests, dropped


def declaration(material: Material, folder: Path | None) -> list[Example]:
    """The paragraphs of the Declaration of Human Rights."""
    language = Language(material.name, "", material.declaration)
    pairs = declaration_pairs(fetch(DECLARATION, folder), language)
    return [
        example(material.name, tidy(foreign), tidy(english))
        for foreign, english in pairs
        if is_usable(foreign, english, LONGEST_PARAGRAPH)
    ]


def few_shots(examples: Sequence[Example]) -> list[Example]:
    """The first examples of middling length, for a prompt."""
    middling = [one for one in examples if 40 <= len(one.source) <= 90]
    return (middling or list(examples))[:NUM_SHOTS]


# ---- texts -------------------------------------------------------------------------------


def foreign_documents(material: Material) -> list[str]:
    """What the augmenting model becomes a specialist by."""
    return documents((row.unit, row.foreign) for row in [*material.training, *material.extra])


def documents(rows: Iterable[tuple[str, str]]) -> list[str]:
    """One text of each unit, in order: a chapter, or what a part of a program says."""
    units: dict[str, list[str]] = {}
    for unit, text in rows:
        units.setdefault(unit, []).append(text)
    return [" ".join(texts) for texts in units.values()]


def notes(
    material: Material,
    composition: Sequence[Example],
    num_usable: int,
    tests: Mapping[str, Sequence[Example]],
    dropped: Mapping[str, Mapping[str, int]],
) -> dict[str, Any]:
    """Counts and sources, for the report."""
    return {
        "language": material.name,
        "composition": {
            "pairs": len(composition),
            "of": num_usable,
            "plain texts": len(composition) // REPLAY,
        },
        "domain": {
            "rows": len(material.training) + len(material.extra),
            "characters": sum(map(len, foreign_documents(material))),
        },
        "tests": {
            test: {"pairs": len(some), **dropped.get(test, {})} for test, some in tests.items()
        },
        "sources": [
            f"{package.name} {package.version} ({package.registry}): {LICENCES[package]}"
            for package in material.packages
        ],
    }
