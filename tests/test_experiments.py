"""The harness of the experiments, on tiny models: the whole way, folders, processes, flags."""

import argparse
import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

import tiny_experiment
from graftlm import ComposedForCausalLM
from graftlm.reproduce import (
    code,
    flags,
    hardware,
    jobs,
    kept,
    kv_arithmetic,
    kv_two_models,
    low_resource,
    metrics,
    run,
    runner,
    translate,
)
from graftlm.reproduce.example import Data
from graftlm.reproduce.experiment import Experiment, Models, Test
from graftlm.reproduce.systems import SYSTEMS

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return tiny_experiment.save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def experiment(models: Models) -> Experiment:
    return tiny_experiment.experiment(models)


# ---- the whole way -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [
        ("anchor", "pipeline", "composed", "lora", "full"),
        pytest.param(tuple(SYSTEMS), marks=pytest.mark.slow),
    ],
)
def test_the_whole_experiment(
    tmp_path: Path, experiment: Experiment, names: tuple[str, ...]
) -> None:
    asked = [(name, 1 + (name == "composed")) for name in [*names, *experiment.ablations]]
    results = run.run(
        experiment, systems=asked, output=tmp_path, device="cpu", console=QUIET, command="it"
    )
    cells = results["table"]["near"]["Up"]["chrF"]
    assert set(cells) == {name for name, _ in asked}
    assert len(cells["composed"]["seeds"]) == 2
    assert cells["composed"]["against"] is None
    assert cells["lora"]["against"]["seeds"] == 1
    # Untrained models of 100 characters or so find all of them about equally likely.
    assert 50 < results["table"]["before"]["text"]["perplexity"]["anchor"]["mean"] < 200
    assert {goal["says"] for goal in results["goals"]} == {"near is beaten", "English survives"}
    weights = {name: cost["weights"] for name, cost in results["costs"].items()}
    assert weights["anchor"] == 0 < weights["composed"] < weights["full"]
    assert results["costs"]["composed"]["flops"] > 0
    assert json.loads((tmp_path / "results.json").read_text())["command"] == "it"
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "<script" not in page
    assert "http" not in page.replace("http-equiv", "")
    text = (tmp_path / "report.md").read_text()
    for words in (
        "| **composed (CALM)** |",
        "What m_B could do before",
        "near: ablations",
        "near: composed less the others",
        "None.",
    ):
        assert words in text
    assert ComposedForCausalLM.from_pretrained(tmp_path / "composed" / "1").num_parameters() > 0


def drawn_here(seed: int) -> Data:
    """The examples of an experiment, which takes minutes to draw: not in processes of jobs."""
    assert multiprocessing.parent_process() is None
    return tiny_experiment.data(seed)


@pytest.mark.slow
def test_a_stopped_experiment_goes_on(
    tmp_path: Path, experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In two processes; then nothing is done again, and another setting is done anew."""
    experiment = replace(experiment, data=drawn_here)
    asked: Any = {
        "systems": [("composed", 1), ("lora", 1), ("anchor", 2)],
        "output": tmp_path,
        "device": "cpu",
        "console": QUIET,
        "plots": False,
    }
    first = run.run(experiment, jobs=2, **asked)
    ran: list[str] = []
    run_job = jobs.run_job

    def spy(study: Any, job: Any, *others: Any) -> Any:
        ran.append(job.name)
        return run_job(study, job, *others)

    monkeypatch.setattr(jobs, "run_job", spy)
    again = run.run(experiment, **asked)
    assert not ran
    assert [again[key] for key in ("table", "losses")] == [
        first[key] for key in ("table", "losses")
    ]
    next((tmp_path / "answers").glob("lora-0-*.json")).unlink()
    alone = run.run(experiment, **asked)
    assert ran == ["lora"]
    ours, theirs = alone["losses"]["lora"][0], first["losses"]["lora"][0]
    assert ours[0][1] == pytest.approx(theirs[0][1], 1e-6)  # the very same start
    changed = replace(experiment.composition, num_heads=2)
    with pytest.raises(ValueError, match="composition.num_heads"):
        run.run(replace(experiment, composition=changed), **asked)
    (tmp_path / run.MARK).unlink()
    run.run(replace(experiment, composition=changed), **asked)
    assert sorted(ran[1:]) == ["anchor", "composed", "lora"]  # the anchor once, not for each seed


def test_an_outcome_is_kept_under_what_it_depends_on(
    tmp_path: Path, experiment: Experiment, models: Models
) -> None:
    def path(**changed: Any) -> Path:
        system = replace(experiment.systems["composed"], **changed)
        systems = {**experiment.systems, "composed": system}
        other = replace(experiment, systems=systems)
        study = kept.Study(experiment=other, models=models, folder=tmp_path, device="cpu")
        return kept.outcome_path(study, kept.Job(name="composed", seed=0), "data")

    assert path(title="another name for the same row") == path()
    assert path(composition={"width": 16}) != path()


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.json", "vocab.json", "merges.txt"]
)
def test_a_model_is_known_by_its_files(models: Models, tmp_path: Path, name: str) -> None:
    copied = shutil.copytree(models.anchor, tmp_path / "anchor")
    (copied / "tokenizer").mkdir()  # a folder counts for nothing
    before = kept.mark_of(copied)
    assert before == kept.mark_of(models.anchor)
    with (copied / name).open("ab") as file:
        file.write(b" ")
    assert kept.mark_of(copied) != before


class FailingPool:
    """Processes whose first job failed; notes what the user had been told when they were ended."""

    def __init__(self, error: Exception, console: Console):
        self.error, self.console, self.told = error, console, ""

    def __call__(self, *args: Any, **kwargs: Any) -> "FailingPool":
        return self

    def __enter__(self) -> "FailingPool":
        return self

    def __exit__(self, *args: Any) -> None:
        pass

    def submit(self, *args: Any) -> Future:
        future: Future = Future()
        future.set_exception(self.error)
        return future

    def shutdown(self, **kwargs: Any) -> None:
        self.told = self.console.export_text()


@pytest.mark.parametrize(
    ("error", "kind", "message", "told"),
    [
        # All processes end with it, and nobody knows which job it was at.
        (BrokenProcessPool("killed"), OSError, "was killed, perhaps because memory ran out", ""),
        (
            KeyError("x"),
            KeyError,
            "x",
            "composed, seed 0, failed (KeyError('x')); what runs now still ends and is kept",
        ),
    ],
)
def test_a_failed_job_is_told_before_the_others_end(
    experiment: Experiment,
    models: Models,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    kind: type[Exception],
    message: str,
    told: str,
) -> None:
    console = Console(record=True, width=120, file=io.StringIO())
    pool = FailingPool(error, console)
    monkeypatch.setattr(jobs, "ProcessPoolExecutor", pool)
    study = kept.Study(experiment=experiment, models=models, folder=tmp_path, device="cpu")
    with pytest.raises(kind, match=message):
        list(jobs.outcomes(study, jobs.jobs_of(experiment, [("composed", 1)]), 2, console))
    assert pool.told.strip() == told


def seen_gpu(number: int) -> str:
    """What a process of the pool may use."""
    del number
    return os.environ["CUDA_VISIBLE_DEVICES"]


@pytest.mark.slow
def test_each_process_takes_a_free_gpu_and_gives_it_back() -> None:
    """More processes than GPUs, one after another: each takes one, and gives it back."""
    context = multiprocessing.get_context("spawn")
    free = context.SimpleQueue()
    for gpu in ("3", "5"):
        free.put(gpu)
    with ProcessPoolExecutor(
        2,
        mp_context=context,
        max_tasks_per_child=1,
        initializer=jobs.prepare_process,
        initargs=(1, free),
    ) as pool:
        found = list(pool.map(seen_gpu, range(5), timeout=300))
    assert set(found) <= {"3", "5"}
    assert sorted(free.get() for _ in range(2)) == ["3", "5"]
    assert free.empty()


ORPHAN = """
import multiprocessing, os, sys, time
from graftlm.reproduce import jobs

def work():
    jobs.prepare_process(1, None)
    print(os.getpid(), flush=True)
    time.sleep(600)

if __name__ == "__main__":
    multiprocessing.get_context("spawn").Process(target=work).start()
"""


@pytest.mark.slow
def test_a_run_that_is_killed_leaves_no_process_at_work(tmp_path: Path) -> None:
    """They went on for the hour that their system took."""
    script = tmp_path / "orphan.py"
    script.write_text(ORPHAN)
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as started:
        assert started.stdout is not None
        worker = int(started.stdout.readline())
        started.kill()
        try:
            started.communicate(timeout=30)  # the pipe is open for as long as the worker lives
        except subprocess.TimeoutExpired:
            os.kill(worker, signal.SIGKILL)
            pytest.fail("the worker lived on for 30 seconds")


def test_all_gpus_that_may_be_used_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert jobs.visible_gpus() == ["3", "5"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert jobs.visible_gpus() == ["0", "1"]


def test_a_trainer_keeps_to_one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        hardware, "TrainingArguments", lambda **settings: SimpleNamespace(n_gpu=4, **settings)
    )
    args: Any = hardware.on_one_device(max_steps=3)
    assert (args._n_gpu, args.max_steps) == (1, 3)


def test_a_gpu_answers_more_at_a_time_unless_their_length_depends_on_it(
    experiment: Experiment, tmp_path: Path
) -> None:
    models = Models(anchor=tmp_path, augmenting={})
    study = kept.Study(experiment=experiment, models=models, folder=tmp_path, device="cuda:0")
    limited, unlimited = Test(metrics=(), most_tokens=20), Test(metrics=())
    size = experiment.answer_batch
    assert jobs.answer_batch(study, limited) == 8 * size
    assert jobs.answer_batch(study, unlimited) == size
    assert jobs.answer_batch(replace(study, device="cpu"), limited) == size


def test_a_machine_slow_in_bfloat16_computes_in_float32(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    wished = replace(experiment, in_bf16=True, training=replace(experiment.training, bf16=True))
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert runner.suited(wished, "cpu") == wished
    for device in ("cuda", "cuda:1"):
        slow = runner.suited(wished, device)
        assert (slow.in_bf16, slow.training.bf16) == (False, False)
        assert slow == replace(wished, in_bf16=False, training=slow.training)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert not runner.suited(wished, "cpu").in_bf16


def test_what_is_tested_twice_is_trained_once(experiment: Experiment) -> None:
    """Whether it is asked for or not, so that it can be added without training again."""
    alone = jobs.jobs_of(experiment, [("composed", 2)])
    assert alone == jobs.jobs_of(experiment, [("composed", 2), ("wrong-test", 1)])
    assert [job.also for job in alone] == [("wrong-test",)] * 2


def test_what_is_only_tested_is_known_by_its_tests(experiment: Experiment) -> None:
    """Another D_C is trained on anew, and what does not train is not asked again."""
    both = jobs.jobs_of(experiment, [("anchor", 1), ("composed", 1)])
    before = jobs.data_hashes(experiment, both)
    other = replace(experiment, data=partial(experiment.data, size=4))
    after = jobs.data_hashes(other, both)
    assert [before[job] == after[job] for job in both] == [True, False]


def test_a_folder_is_one_experiments(experiment: Experiment, tmp_path: Path) -> None:
    other = replace(experiment, training=replace(experiment.training, examples=12))
    run.check_folder(tmp_path, other)  # which then failed: nothing is claimed
    run.check_folder(tmp_path, experiment)
    run.claim(tmp_path, experiment)
    run.check_folder(tmp_path, experiment)
    with pytest.raises(ValueError, match=r"holds results of .*'examples': 8.*--output"):
        run.check_folder(tmp_path, other)


def test_missing_libraries_are_named_before_anything_runs(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "find_spec", lambda name: None)
    for systems, name in (
        ([("composed", 1)], "sacrebleu"),
        ([("composed", 1), ("lora", 1)], "peft"),
        ([("composed", 2)], "sacrebleu"),
    ):
        with pytest.raises(ImportError, match=f"{name} is not installed, which this experiment"):
            run.run(experiment, systems=systems, output=tmp_path / "none", console=QUIET)
    assert not (tmp_path / "none").exists()


def test_weak_isolation_of_programs_is_said(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    console = Console(record=True, quiet=False, width=200)
    programs = replace(experiment, tests={"near": Test(metrics=(metrics.PASS_AT_1,))})
    monkeypatch.setattr(run, "guards", lambda: ("limits", "seccomp", "audit"))
    found = run.isolation(programs, console)
    assert found == {"programs held in by": "limits, seccomp, audit"}
    assert "has no landlock, so programs" in console.export_text()
    assert run.isolation(experiment, console) == {}


@pytest.mark.parametrize(
    ("systems", "jobs_at_once", "message"),
    [
        ([("nonsense", 1)], 1, "system 'nonsense' is none of augmenting"),
        ([("anchor", 1)], 1, "systems lacks 'composed'"),
        ([("composed", 0)], 1, "seeds must be at least 1, got 0 for composed"),
        ([("composed", 1)], 0, "jobs must be at least 1, got 0"),
        ([("composed", 1), ("wrong-test", 2)], 1, "wrong-test is composed, tested in another way"),
    ],
)
def test_what_cannot_be_run_is_refused(
    systems: Any, jobs_at_once: int, message: str, experiment: Experiment, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        run.run(experiment, systems=systems, output=tmp_path, jobs=jobs_at_once, console=QUIET)


def test_programs_are_not_run_unasked(experiment: Experiment, tmp_path: Path) -> None:
    tests = {"near": Test(metrics=(metrics.PASS_AT_1,))}
    with pytest.raises(ValueError, match="runs programs that models wrote"):
        run.run(replace(experiment, tests=tests), systems=[("composed", 1)], output=tmp_path)


# ---- goals and flags ---------------------------------------------------------------------


def test_each_setting_has_its_folder() -> None:
    def folder(name: str, *words: str) -> str:
        parser = argparse.ArgumentParser()
        flags.add_arguments(parser, name)
        return flags.output_folder(parser.parse_args(words), name)

    assert folder("kv-arithmetic") == "kv-arithmetic"
    assert folder("kv-arithmetic", "--seeds", "5", "--jobs", "2") == "kv-arithmetic"
    assert (
        folder("kv-arithmetic", "--preset", "quick", "--dc", "subs") == "kv-arithmetic-subs-quick"
    )
    assert folder("low-resource", "--language", "guarani") == "low-resource-guarani"
    found = folder("code", "--no-programs", "--codexglue", "a/test.jsonl", "b/more.jsonl")
    assert found == "code-test-more-no-programs"
    assert folder("code", "--output", "x") == "x"


def test_systems_are_named_with_their_seeds() -> None:
    main, ablations = ["anchor", "composed", "lora"], ["gate"]
    named = flags.named_systems(["main", "lora:1", "gate:2"], 5, main, ablations)
    assert named == [("anchor", 5), ("composed", 5), ("lora", 1), ("gate", 2)]
    assert flags.named_systems(["all"], 1, main, ablations)[-1] == ("gate", 1)
    with pytest.raises(ValueError, match="'x' is not a number of seeds"):
        flags.named_systems(["lora:x"], 1, main, ablations)


@pytest.mark.parametrize("module", [kv_arithmetic, kv_two_models, low_resource, code, translate])
@pytest.mark.parametrize("preset", flags.PRESETS)
def test_goals_are_of_what_there_is(
    module: Any, preset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(low_resource, "load_tests", lambda language: ["books"])  # fetches nothing
    experiment = module.experiment(preset)
    assert experiment.goals
    for goal in experiment.goals:
        assert goal.test in experiment.tests
        assert set(goal.beats) <= set(experiment.systems)


# ---- two models --------------------------------------------------------------------------


def test_each_half_of_the_keys_has_its_model() -> None:
    experiment = kv_two_models.experiment("quick")
    data = experiment.data(0)
    for test in ("KV-MATH", "KV-SUBS"):
        assert set(data.tests[test]) == {"first half", "second half", "both"}
    needs = {tuple(e.facts["needs"]) for e in data.composition}
    assert needs == {(), ("first",), ("second",), ("first", "second")}
    scored = {e.source for groups in data.tests.values() for g in groups.values() for e in g}
    assert not scored & {e.source for e in data.composition}
