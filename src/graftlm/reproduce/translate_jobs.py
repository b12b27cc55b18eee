"""Train and score one system of one seed: a job, whose outcome is kept so that a run can go on."""

import gc
import hashlib
import json
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers.utils import logging as transformers_logging

from graftlm.reproduce.kv_report import write_text
from graftlm.reproduce.translate_data import Corpus, training_order
from graftlm.reproduce.translate_evaluation import Scores, System, bits, translate
from graftlm.reproduce.translate_systems import TRAINED, UNTRAINED, Workshop, encode_wrong
from graftlm.reproduce.translate_training import TrainingSettings, fit

TestScores = dict[str, dict[str, Scores]]  # by test and group


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A system to train and score; "composed" scores itself with another sentence's states too.

    Args:
        name: Key of `SYSTEMS`.
        wrong_test: Whether to score that too.
    """

    name: str
    seed: int
    wrong_test: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """What all jobs of a run share.

    Args:
        examples: Training pairs of each system.
        texts: Test pairs of each group that are answered; all are scored by likelihood.
        folder: Where outcomes and composed models are kept.
    """

    workshop: Workshop
    corpus: Corpus
    training: TrainingSettings
    examples: int
    texts: int
    folder: Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What came out of a job.

    Args:
        scores: By system: its own, and those of "wrong-test".
        losses: Step and mean loss since the last entry; none if it was not trained.
        parameters: What `Workshop` counted.
        seconds: For training and scoring.
    """

    scores: dict[str, TestScores]
    losses: list[tuple[int, float]]
    parameters: dict[str, int]
    seconds: dict[str, float]


def jobs_of(systems: Sequence[str], seeds: int) -> list[Job]:
    """All jobs of a run; systems that are not trained are the same for every seed."""
    return [
        Job(name=name, seed=seed, wrong_test=name == "composed" and "wrong-test" in systems)
        for seed in range(seeds)
        for name in (*TRAINED, *UNTRAINED)
        if name in systems and (seed == 0 or name in TRAINED)
    ]


def outcomes(
    study: Study, jobs: Sequence[Job], processes: int, console: Console
) -> Iterator[tuple[Job, Outcome]]:
    """The outcomes of all jobs as they come: those that are kept first."""
    missing = []
    for job in jobs:
        kept = read_outcome(study, job)
        if kept is None:
            missing.append(job)
        else:
            yield job, kept
    if processes == 1:
        for job in missing:
            yield job, run_job(study, job, console)
        return
    threads = max(1, torch.get_num_threads() // processes)
    gpus = visible_gpus() if study.workshop.device == "cuda" else []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        futures = {pool.submit(run_alone, study, job, threads, gpus): job for job in missing}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool as error:
            raise OSError(
                "a process that trained or scored a system was killed, perhaps because memory ran "
                f"out; what is finished is kept in {study.folder}: run again, with fewer --jobs"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def visible_gpus() -> list[str]:
    """Names of the GPUs that this process may use."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(k) for k in range(torch.cuda.device_count())]


def run_alone(study: Study, job: Job, threads: int, gpus: Sequence[str]) -> Outcome:
    """A job in a process of its own, which sees one of the GPUs."""
    if gpus:  # before CUDA starts in this process; Trainer would use all that it sees
        (number,) = multiprocessing.current_process()._identity
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]
    torch.set_num_threads(threads)
    transformers_logging.disable_progress_bar()
    return run_job(study, job, Console(quiet=True))


def run_job(study: Study, job: Job, console: Console) -> Outcome:
    """Train and score a fresh system, and keep the outcome."""
    start = time.perf_counter()
    system = study.workshop.make(job.name, job.seed)
    losses = train(study, job, system, console) if job.name in TRAINED else []
    trained = time.perf_counter()
    scores = {job.name: score(system, study)}
    if job.name == "composed":
        system.model.save_pretrained(study.folder / f"composed-{job.seed}")
    if job.wrong_test:
        tokenizer = system.tokenizer
        other = replace(system, encode=lambda pairs: encode_wrong(pairs, tokenizer))
        scores["wrong-test"] = score(other, study)
    outcome = Outcome(
        scores=scores,
        losses=losses,
        parameters=dict(study.workshop.parameters),
        seconds={
            f"training {job.name}": trained - start,
            f"scoring {job.name}": time.perf_counter() - trained,
        },
    )
    keep_outcome(study, job, outcome)
    del system
    gc.collect()
    return outcome


def train(study: Study, job: Job, system: System, console: Console) -> list[tuple[int, float]]:
    """Train a fresh system on the pairs of its seed, the same for all systems."""
    choice = study.workshop.composition
    pairs = training_order(
        study.corpus.training, study.examples, study.training.batch_size, job.seed
    )
    return fit(
        system.model,
        system.encode(pairs),
        system.collate,
        study.training,
        learning_rate=choice.lora_learning_rate if job.name == "lora" else choice.learning_rate,
        seed=job.seed,
        title=f"{job.name}, seed {job.seed}",
        console=console,
        device=study.workshop.device,
    )


def score(system: System, study: Study) -> TestScores:
    """Score a system on all tests."""
    return {
        test: {
            group: Scores(bits=bits(system, pairs), texts=translate(system, pairs[: study.texts]))
            for group, pairs in sets.items()
        }
        for test, sets in study.corpus.tests.items()
    }


# ---- kept outcomes -----------------------------------------------------------------------


def outcome_path(study: Study, job: Job) -> Path:
    """Where the outcome of a job is kept; another setting has another place."""
    return study.folder / "answers" / f"{job.name}-{job.seed}-{fingerprint(study, job)[:12]}.json"


def fingerprint(study: Study, job: Job | None = None) -> str:
    """Changes with everything that an outcome depends on but the machine."""
    workshop = study.workshop
    told = {
        "job": None if job is None else asdict(job),
        "composition": asdict(workshop.composition),
        # Folders converted from GGUF files are named by the files' hashes.
        "models": [Path(p).name for p in (workshop.anchor_path, workshop.augmenting_path)],
        "device": workshop.device.partition(":")[0],
        "training": asdict(study.training),
        "bf16": workshop.bf16,
        "examples": study.examples,
        "texts": study.texts,
        "corpus": asdict(study.corpus),
        "versions": [version(name) for name in ("graftlm", "torch", "transformers", "peft")],
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def keep_outcome(study: Study, job: Job, outcome: Outcome) -> None:
    """Write down what came out of a job."""
    path = outcome_path(study, job)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(asdict(outcome), ensure_ascii=False) + "\n")


def read_outcome(study: Study, job: Job) -> Outcome | None:
    """What came out of this very job before, if it ran."""
    path = outcome_path(study, job)
    if not path.exists():
        return None
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    scores = {
        name: {
            test: {group: Scores(**found) for group, found in sets.items()}
            for test, sets in tests.items()
        }
        for name, tests in record["scores"].items()
    }
    losses = [(step, loss) for step, loss in record["losses"]]
    return Outcome(**record | {"scores": scores, "losses": losses})
