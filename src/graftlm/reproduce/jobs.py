"""Train and score one system of one seed: a job. What came out is kept; see `kept`."""

import multiprocessing
import multiprocessing.util
import os
import random
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers.utils import logging as transformers_logging

from graftlm.reproduce import cost
from graftlm.reproduce.answering import Generated, ask, judged, say
from graftlm.reproduce.encoding import Features, padded_tokens, spread, training_order
from graftlm.reproduce.example import Data, Example
from graftlm.reproduce.experiment import Experiment, Test, Training
from graftlm.reproduce.fitting import fit
from graftlm.reproduce.kept import (
    Answers,
    Job,
    Outcome,
    Study,
    hash_of,
    keep_outcome,
    outcome_path,
    read_outcome,
)
from graftlm.reproduce.metrics import Answer
from graftlm.reproduce.runner import Runner, make_runner, misread, showing
from graftlm.reproduce.systems import SAME_TRAINING, System

GPU_BATCHES = 8  # of those that a CPU answers at a time


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
                if same == name and other in experiment.systems
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
    """A fingerprint of each job's examples; what does not train is only tested on some."""
    known: dict[str, str] = {}
    found = {}
    for job in jobs:
        system = experiment.system(job.name)
        key = hash_of([job.seed, system.data, bool(system.trains)])
        if key not in known:
            data = data_of(experiment, job)
            if not system.trains:
                data = replace(data, composition=(), domain=(), development=(), notes={})
            known[key] = hash_of(asdict(data))
        found[job] = known[key]
    return found


def data_of(experiment: Experiment, job: Job) -> Data:
    """The examples of a job."""
    return experiment.data(job.seed, **experiment.system(job.name).data)


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
            job = wanted[path][0]
            yield path, run_job(study, job, data_of(study.experiment, job), path, console)
        return
    threads = max(1, torch.get_num_threads() // processes)
    context = multiprocessing.get_context("spawn")
    free = context.SimpleQueue()
    gpus = visible_gpus() if study.device == "cuda" else []
    for number in range(processes if gpus else 0):
        free.put(gpus[number % len(gpus)])
    with ProcessPoolExecutor(
        processes,
        mp_context=context,
        max_tasks_per_child=1,
        initializer=prepare_process,
        initargs=(threads, free if gpus else None),
    ) as pool:
        jobs = {path: wanted[path][0] for path in paths}
        # To draw the data takes minutes in some experiments: it is done here, not in each process.
        futures = {
            pool.submit(run_alone, study, job, data_of(study.experiment, job), path): path
            for path, job in jobs.items()
        }
        try:
            for future in as_completed(futures):
                error = future.exception()
                if error is not None and not isinstance(error, BrokenProcessPool):
                    job = jobs[futures[future]]
                    console.print(
                        f"{job.name}, seed {job.seed}, failed ({error!r}); what runs now still "
                        "ends and is kept",
                        markup=False,
                    )
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


def prepare_process(threads: int, free: Any) -> None:
    """Take a GPU that is free, before CUDA starts here, and give it back at the end.

    Args:
        free: A queue of the names of GPUs; None if there are none.
    """
    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    transformers_logging.disable_progress_bar()
    if free is not None:
        gpu = os.environ["CUDA_VISIBLE_DEVICES"] = free.get()
        multiprocessing.util.Finalize(None, free.put, args=(gpu,), exitpriority=0)


def end_with_parent() -> None:
    """Wait for the run that started this process: one that is killed would leave it at work."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def run_alone(study: Study, job: Job, data: Data, path: Path) -> Outcome:
    """A job in a process of its own."""
    return run_job(study, job, data, path, Console(quiet=True))


def run_job(study: Study, job: Job, data: Data, path: Path, console: Console) -> Outcome:
    """Train and score a fresh system, and keep the outcome in a file."""
    experiment = study.experiment
    system = experiment.system(job.name)
    watched = cost.Meter(study.device)
    shots = data.shots if system.trains is None else {}
    if system.alone == "pipeline":
        shots = shots_through_text(study, data)
    runner = make_runner(
        experiment, study.models, system, job.seed, shots=shots, device=study.device
    )
    trained = Trained()
    if system.trains:
        trained = train(study, job, system, runner, data, console)
    watched.trained()
    generated = Generated()
    found = {job.name: score(study, system, runner, data, generated)}
    for other in job.also:
        found[other] = score(study, experiment.system(other), misread(runner), data, Generated())
    if job.name == "composed":
        runner.model.save_pretrained(study.folder / "composed" / str(job.seed))
    outcome = Outcome(
        answers=found,
        losses=trained.losses,
        cost=watched.cost(
            runner,
            batch=trained.batch,
            padded=trained.padded,
            weights=trained.weights,
            generated_per_second=generated.tokens_per_second,
        ),
    )
    keep_outcome(path, outcome)
    return outcome


@dataclass(kw_only=True, slots=True)
class Trained:
    """What training a system came to.

    Args:
        losses: Step and mean loss since the last entry.
        batch: One as it was trained on.
        padded: How many tokens all batches had, padding included.
        weights: How many weights were trained, at any time.
    """

    losses: list[tuple[int, float]] = field(default_factory=list)
    batch: Features = field(default_factory=list)
    padded: int = 0
    weights: int = 0


def settings_of(experiment: Experiment, system: System) -> Training:
    """The training of one system."""
    return replace(experiment.training, **system.training)


def train(
    study: Study, job: Job, system: System, runner: Runner, data: Data, console: Console
) -> Trained:
    """Train a fresh system on the examples of its seed."""
    settings = settings_of(study.experiment, system)
    rate = {
        "bridges": settings.learning_rate,
        "lora": settings.lora_learning_rate,
        "lora-embeddings": settings.lora_learning_rate,
        "anchor": settings.full_learning_rate,
    }[system.trains or "bridges"]
    trained, sizes = Trained(), {}
    for title, examples in stages(system, runner, data, settings, job.seed):
        before = trained.losses[-1][0] if trained.losses else 0
        features = runner.encode(examples)
        trained.batch = features[: settings.batch_size]
        trained.padded += padded_tokens(features, settings.batch_size)
        sizes |= {n: p.numel() for n, p in runner.model.named_parameters() if p.requires_grad}
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
        trained.losses += [(before + step, loss) for step, loss in found]
    trained.weights = sum(sizes.values())
    return trained


def stages(
    system: System, runner: Runner, data: Data, settings: Training, seed: int
) -> Iterator[tuple[str, list[Example]]]:
    """What is trained on, in order; the model is made ready for each part as it is asked for."""

    def drawn(examples: Sequence[Example], size: int) -> list[Example]:
        return training_order(
            examples, size, settings.batch_size, seed, by_length=settings.by_length
        )

    composition = list(data.composition)
    if settings.distinct is not None:
        size = max(1, round(settings.distinct * min(len(composition), settings.examples)))
        composition = random.Random(seed).sample(composition, size)
    domain: list[Example] = []
    if system.learns != "composition":
        size = settings.domain_examples - settings.domain_examples % settings.batch_size
        domain = list(islice(cycle(data.domain), size))  # in the order they came in
    if system.learns == "mixed":
        parts = domain, drawn(composition, settings.examples)
        yield " (domain and composition)", spread(parts, settings.batch_size)
        return
    if domain:
        yield " (domain)", domain
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


def score(
    study: Study, system: System, runner: Runner, data: Data, generated: Generated
) -> Answers:
    """Answers to all tests; what is generated for them is added to `generated`."""
    answers: Answers = {}
    for name, groups in {**data.tests, "before": data.retention}.items():
        test = study.experiment.tests.get(name)
        for group, examples in groups.items() if test else ():
            found = answer(study, system, runner, data, examples, test, generated)
            answers.setdefault(name, {})[group] = found
    return answers


def answer(
    study: Study,
    system: System,
    runner: Runner,
    data: Data,
    examples: Sequence[Example],
    test: Any,
    generated: Generated,
) -> list[Answer]:
    """A system's answers; those of the pipeline begin with what the augmenting model said."""
    asking = partial(ask, test=test, batch_size=answer_batch(study, test), generated=generated)
    if system.alone != "pipeline" or not all(example.source for example in examples):
        return asking(runner, examples, run_code=study.run_code)
    spoken = Generated()
    pairs = through_text(study, speaker_of(study), data.shots, examples, test, spoken)
    generated.seconds += spoken.seconds
    found = asking(runner, [changed for changed, _ in pairs], run_code=None)
    answers = [
        replace(one, text=None if one.text is None else beginning + one.text)
        for one, (_, beginning) in zip(found, pairs, strict=True)
    ]
    if any(metric.needs == "tests" for metric in test.metrics):
        asked = examples[: test.answered]
        answers[: len(asked)] = judged(asked, answers[: len(asked)], study.run_code)
    return answers


def answer_batch(study: Study, test: Test) -> int:
    """How many examples are answered at a time: more on a GPU, which few leave idle.

    Unless how long an answer may be depends on the others of its batch: it stays what it is.
    """
    wide = study.device.startswith("cuda") and test.most_tokens is not None
    return study.experiment.answer_batch * (GPU_BATCHES if wide else 1)


def speaker_of(study: Study) -> Runner:
    """The augmenting model, which speaks in the pipeline."""
    speaker = System(title="", trains=None, alone="augmenting")
    return make_runner(study.experiment, study.models, speaker, 0, shots={}, device=study.device)


def shots_through_text(study: Study, data: Data) -> dict[str, list[Example]]:
    """The examples of a prompt with what the augmenting model says to them.

    Asked about one of them, it is shown the others.
    """
    tests: dict[str, Test] = {}
    for name, groups in data.tests.items():
        for group in groups if name in study.experiment.tests else ():
            tests.setdefault(group, study.experiment.tests[name])
    speaker = speaker_of(study) if data.shots else None
    made: dict[str, list[Example]] = {}
    for group, shots in data.shots.items():
        for shot in shots if group in tests else ():
            others = {group: [one for one in shots if one is not shot]}
            assert speaker is not None
            pairs = through_text(study, speaker, others, [shot], tests[group], Generated())
            made.setdefault(group, []).extend(changed for changed, _ in pairs)
    return made


def through_text(
    study: Study,
    speaker: Runner,
    shots: Mapping[str, Sequence[Example]],
    examples: Sequence[Example],
    test: Test,
    generated: Generated,
) -> list[tuple[Example, str]]:
    """What the anchor is given once the augmenting model has spoken; what its answer begins with.

    Args:
        speaker: The augmenting model.
        shots: Examples that it is shown.
        generated: What it says is added to it.
    """
    experiment = study.experiment
    assert experiment.pipeline is not None
    asks = experiment.asks or (lambda example: example)
    questions = [asks(example) for example in examples]
    whole = replace(test, needs_no_more=None)  # what is said is read, not run
    said = say(showing(speaker, shots), questions, whole, answer_batch(study, test), generated)
    return [
        experiment.pipeline(example, text)
        for example, (text, _) in zip(examples, said, strict=True)
    ]
