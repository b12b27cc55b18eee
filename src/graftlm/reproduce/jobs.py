"""Train and score one system of one seed: a job, whose outcome is kept so that a run can go on."""

import hashlib
import json
import multiprocessing
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers.utils import logging as transformers_logging

from graftlm.reproduce import cost
from graftlm.reproduce.answering import ask, judged, say
from graftlm.reproduce.encoding import Features, padded_tokens, training_order
from graftlm.reproduce.example import Data, Example
from graftlm.reproduce.experiment import Experiment, Models, Test, Training
from graftlm.reproduce.files import write_text
from graftlm.reproduce.fitting import fit
from graftlm.reproduce.metrics import Answer
from graftlm.reproduce.runner import Runner, make_runner, misread, trainable
from graftlm.reproduce.systems import SAME_TRAINING, System

Answers = dict[str, dict[str, list[Answer]]]  # by test and group


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A system to train and score.

    Args:
        name: Key of the experiment's systems.
        also: Systems that are the same but for how they are tested.
    """

    name: str
    seed: int
    also: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """What all jobs of a run share.

    Args:
        folder: Where outcomes and composed models are kept.
        run_code: Whether programs that models wrote may be run.
    """

    experiment: Experiment
    models: Models
    folder: Path
    device: str
    run_code: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What came out of a job.

    Args:
        answers: By system: the job's own, and those in `also`.
        losses: Step and mean loss since the last entry; none if it was not trained.
        cost: What it took; see `cost.Cost`.
    """

    answers: dict[str, Answers]
    losses: list[tuple[int, float]]
    cost: cost.Cost


def jobs_of(experiment: Experiment, systems: Sequence[tuple[str, int]]) -> list[Job]:
    """All jobs of a run, seed by seed, so that a stopped run has whole seeds.

    Args:
        systems: Names and how many seeds of each.
    """
    asked = dict(systems)
    return [
        Job(
            name=name,
            seed=seed,
            also=tuple(
                other
                for other, same in SAME_TRAINING.items()
                if same == name and seed < asked.get(other, 0)
            ),
        )
        for seed in range(max(asked.values()))
        for name, seeds in asked.items()
        if seed < seeds and name not in SAME_TRAINING
    ]


def outcomes(
    study: Study, jobs: Sequence[Job], processes: int, console: Console
) -> Iterator[tuple[Job, Outcome]]:
    """The outcomes of all jobs as they come: those that are kept first."""
    hashes = data_hashes(study.experiment, jobs)
    # What is not trained is the same for every seed with the same data, and done once.
    wanted: dict[Path, list[Job]] = {}
    for job in jobs:
        wanted.setdefault(outcome_path(study, job, hashes[job]), []).append(job)
    missing = []
    for path, same in wanted.items():
        if path.exists():
            kept = read_outcome(path)
            yield from ((job, kept) for job in same)
        else:
            missing.append(path)
    for path, outcome in made(study, missing, processes, console, wanted):
        yield from ((job, outcome) for job in wanted[path])


def data_hashes(experiment: Experiment, jobs: Sequence[Job]) -> dict[Job, str]:
    """A fingerprint of each job's examples."""
    known: dict[str, str] = {}
    found = {}
    for job in jobs:
        changes = experiment.system(job.name).data
        key = hash_of([job.seed, changes])
        if key not in known:
            known[key] = hash_of(asdict(experiment.data(job.seed, **changes)))
        found[job] = known[key]
    return found


def made(
    study: Study,
    paths: Sequence[Path],
    processes: int,
    console: Console,
    wanted: Mapping[Path, Sequence[Job]],
) -> Iterator[tuple[Path, Outcome]]:
    """Run what is not kept, one by one or in several processes."""
    if processes == 1:
        for path in paths:
            yield path, run_job(study, wanted[path][0], path, console)
        return
    threads = max(1, torch.get_num_threads() // processes)
    gpus = visible_gpus() if study.device == "cuda" else []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, max_tasks_per_child=1) as pool:
        futures = {
            pool.submit(run_alone, study, wanted[path][0], path, threads, gpus): path
            for path in paths
        }
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


def run_alone(study: Study, job: Job, path: Path, threads: int, gpus: Sequence[str]) -> Outcome:
    """A job in a process of its own, which sees one of the GPUs."""
    if gpus:  # before CUDA starts in this process; Trainer would use all that it sees
        (number,) = multiprocessing.current_process()._identity
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]
    torch.set_num_threads(threads)
    transformers_logging.disable_progress_bar()
    return run_job(study, job, path, Console(quiet=True))


def run_job(study: Study, job: Job, path: Path, console: Console) -> Outcome:
    """Train and score a fresh system, and keep the outcome in a file."""
    experiment = study.experiment
    system = experiment.system(job.name)
    data = experiment.data(job.seed, **system.data)
    watched = cost.Meter(study.device)
    shots = data.shots if system.trains is None else {}
    runner = make_runner(
        experiment, study.models, system, job.seed, shots=shots, device=study.device
    )
    losses, batch, padded = [], [], 0
    if system.trains:
        losses, batch, padded = train(study, job, system, runner, data, console)
    watched.trained()
    answers, tokens, seconds = score(study, system, runner, data)
    found = {job.name: answers}
    for other in job.also:
        found[other], _, _ = score(study, experiment.system(other), misread(runner), data)
    if job.name == "composed":
        runner.model.save_pretrained(study.folder / "composed" / str(job.seed))
    outcome = Outcome(
        answers=found,
        losses=losses,
        cost=watched.cost(
            runner,
            batch=batch,
            padded=padded,
            weights=trainable(runner.model) if system.trains else 0,
            tokens_per_second=tokens / seconds if seconds else None,
        ),
    )
    keep_outcome(path, outcome)
    return outcome


def settings_of(experiment: Experiment, system: System) -> Training:
    """The training of one system."""
    return replace(experiment.training, **system.training)


def train(
    study: Study, job: Job, system: System, runner: Runner, data: Data, console: Console
) -> tuple[list[tuple[int, float]], Features, int]:
    """Train a fresh system on the examples of its seed.

    Returns:
        Step and mean loss since the last entry; a batch as it was trained on; and how many tokens
        all batches had, padding included.
    """
    settings = settings_of(study.experiment, system)
    rate = {
        "bridges": settings.learning_rate,
        "lora": settings.lora_learning_rate,
        "anchor": settings.full_learning_rate,
    }[system.trains or "bridges"]
    losses: list[tuple[int, float]] = []
    features: Features = []
    padded = 0
    for title, examples in stages(system, runner, data, settings, job.seed):
        before = losses[-1][0] if losses else 0
        features = runner.encode(examples)
        padded += padded_tokens(features, settings.batch_size)
        found = fit(
            runner,
            features,
            settings,
            learning_rate=rate,
            seed=job.seed,
            title=f"{job.name}{title}, seed {job.seed}",
            console=console,
            device=study.device,
        )
        losses += [(before + step, loss) for step, loss in found]
    return losses, features[: settings.batch_size], padded


def stages(
    system: System, runner: Runner, data: Data, settings: Training, seed: int
) -> Iterator[tuple[str, list[Example]]]:
    """What is trained on, in order; the model is made ready for each part as it is asked for."""

    def drawn(examples: Sequence[Example], size: int) -> list[Example]:
        return training_order(
            examples, size, settings.batch_size, seed, by_length=settings.by_length
        )

    if system.learns == "domain":
        size = settings.domain_examples - settings.domain_examples % settings.batch_size
        yield " (domain)", list(islice(cycle(data.domain), size))  # in the order they came in
    composition = list(data.composition)[: settings.distinct]
    if not system.one_by_one:
        yield "", drawn(composition, settings.examples)
        return
    known: set[str] = set()
    names = list(runner.model.config.augmenting_configs)
    for name in names:
        known.add(name)
        for connection, bridge in zip(
            runner.model.config.connections, runner.model.bridges, strict=True
        ):
            bridge.requires_grad_(connection.augmenting == name)
        usable = [e for e in composition if set(e.facts.get("needs", ())) <= known]
        yield f" ({name})", drawn(usable, settings.examples // len(names))


def score(study: Study, system: System, runner: Runner, data: Data) -> tuple[Answers, int, float]:
    """Answers to all tests, and how many tokens were generated in how many seconds."""
    answers: Answers = {}
    tokens, seconds = 0, 0.0
    for name, groups in {**data.tests, "before": data.retention}.items():
        test = study.experiment.tests.get(name)
        for group, examples in groups.items() if test else ():
            start = time.perf_counter()
            found = answer(study, system, runner, examples, test)
            answers.setdefault(name, {})[group] = found
            said = [a.text for a in found if a.text]
            if said:
                seconds += time.perf_counter() - start
                tokens += sum(map(len, runner.tokenizer(said)["input_ids"]))
    return answers, tokens, seconds


def answer(
    study: Study, system: System, runner: Runner, examples: Sequence[Example], test: Any
) -> list[Answer]:
    """A system's answers; those of the pipeline begin with what the augmenting model said."""
    experiment = study.experiment
    options = {"batch_size": experiment.answer_batch, "run_code": study.run_code}
    if system.alone != "pipeline" or not all(example.source for example in examples):
        return ask(runner, examples, test, **options)
    changed, beginnings = through_text(study, examples, test)
    beginnings += [""] * (len(examples) - len(beginnings))
    own = replace(test, metrics=tuple(m for m in test.metrics if m.needs != "tests"))
    answers = [
        replace(found, text=None if found.text is None else beginning + found.text)
        for found, beginning in zip(ask(runner, changed, own, **options), beginnings, strict=True)
    ]
    if any(metric.needs == "tests" for metric in test.metrics):
        answers = judged(examples, answers, study.run_code)
    return answers


def through_text(
    study: Study, examples: Sequence[Example], test: Test
) -> tuple[list[Example], list[str]]:
    """What the anchor is given once the augmenting model has spoken."""
    experiment = study.experiment
    assert experiment.pipeline is not None
    speaker = make_runner(
        experiment,
        study.models,
        System(title="", trains=None, alone="augmenting"),
        0,
        shots={},
        device=study.device,
    )
    asks = experiment.asks or (lambda example: example)
    questions = [asks(example) for example in examples]
    said = say(speaker, questions, test, experiment.answer_batch)
    pairs = [
        experiment.pipeline(example, text)
        for example, (text, _) in zip(examples, said, strict=True)
    ]
    return [example for example, _ in pairs], [beginning for _, beginning in pairs]


# ---- kept outcomes -----------------------------------------------------------------------


def hash_of(told: Any) -> str:
    """A fingerprint of something that JSON can hold."""
    text = json.dumps(told, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def outcome_path(study: Study, job: Job, data_hash: str) -> Path:
    """Where the outcome of a job is kept; another setting has another place."""
    mark = fingerprint(study, job, data_hash)[:12]
    return study.folder / "answers" / f"{job.name}-{seed_of(study, job)}-{mark}.json"


def seed_of(study: Study, job: Job) -> int:
    """The seed, as far as it makes a difference."""
    return job.seed if study.experiment.system(job.name).trains else 0


def fingerprint(study: Study, job: Job, data_hash: str) -> str:
    """Changes with everything that an outcome depends on but the machine and the code."""
    experiment, models = study.experiment, study.models
    system = experiment.system(job.name)
    paths = [models.anchor, *models.augmenting.values()]
    if system.reads_model == "vanilla":
        paths += list((models.vanilla or {}).values())
    return hash_of(
        {
            "name": job.name,
            "seed": seed_of(study, job),
            "also": job.also,
            "system": asdict(system),
            "composition": asdict(experiment.composition),
            "training": asdict(experiment.training),
            "tests": {name: told(test) for name, test in experiment.tests.items()},
            "models": [mark_of(path) for path in paths],
            "in_bf16": experiment.in_bf16,
            "data": data_hash,
            "device": study.device.partition(":")[0],
            "versions": [version(name) for name in ("graftlm", "torch", "transformers")],
        }
    )


def told(test: Test) -> list[Any]:
    """What an answer depends on in a test."""
    needs = sorted({metric.needs for metric in test.metrics})
    return [needs, test.stop, test.most_tokens, test.answered]


def mark_of(path: Path) -> str:
    """The bytes of a model's weights."""
    digest = hashlib.sha256()
    for file in sorted(path.glob("*.safetensors")):
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def keep_outcome(path: Path, outcome: Outcome) -> None:
    """Write down what came out of a job."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(asdict(outcome), ensure_ascii=False) + "\n")


def read_outcome(path: Path) -> Outcome:
    """What came out of a job before."""
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return Outcome(
        answers={
            name: {
                test: {group: [Answer(**a) for a in found] for group, found in groups.items()}
                for test, groups in tests.items()
            }
            for name, tests in record["answers"].items()
        },
        losses=[(step, loss) for step, loss in record["losses"]],
        cost=cost.Cost(**record["cost"]),
    )
