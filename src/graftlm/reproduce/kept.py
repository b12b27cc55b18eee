"""What came out of a job, and where it is kept, so that a stopped run can go on."""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from graftlm.reproduce import cost
from graftlm.reproduce.experiment import Experiment, Models, Test
from graftlm.reproduce.files import write_text
from graftlm.reproduce.metrics import Answer
from graftlm.reproduce.own_models import FILES

FORMAT = 2  # of a kept outcome
Answers = dict[str, dict[str, list[Answer]]]  # by test and group


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A system to train and score.

    Args:
        name: Key of the experiment's systems.
        also: Systems that are the same but for how they are tested. They always come along: once
            the model is gone, it would have to be trained again for them.
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
    """Changes with everything that an outcome depends on but the machine and the code.

    So one that computes in float32 goes on where another stopped that does in bfloat16.
    """
    experiment, models = study.experiment, study.models
    system = experiment.system(job.name)
    paths = [models.anchor, *models.augmenting.values()]
    if system.reads_model == "vanilla":
        paths += list((models.vanilla or {}).values())
    return hash_of(
        {
            "format": FORMAT,
            "name": job.name,
            "seed": seed_of(study, job),
            "also": job.also,
            "system": asdict(replace(system, title="")),  # what a row is called changes nothing
            "composition": asdict(experiment.composition),
            "training": asdict(experiment.training),
            "tests": {name: told(test) for name, test in experiment.tests.items()},
            "models": [mark_of(path) for path in paths],
            "in_bf16": experiment.in_bf16,
            "data": data_hash,
            "device": study.device.partition(":")[0],
            # Without a build's own part: 2.13.0+cpu computes what 2.13.0 does.
            "versions": [
                version(name).partition("+")[0] for name in ("graftlm", "torch", "transformers")
            ],
        }
    )


def told(test: Test) -> list[Any]:
    """What an answer depends on in a test."""
    needs = sorted({metric.needs for metric in test.metrics})
    return [needs, test.stop, test.most_tokens, test.answered]


def mark_of(path: Path) -> str:
    """The bytes of a model's weights, configuration and tokenizer."""
    digest = hashlib.sha256()
    files = {file for kind in FILES for file in path.glob(kind) if file.is_file()}
    for file in sorted(files):
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
