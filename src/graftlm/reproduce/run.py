"""Run an experiment: make models and data, train and score all systems, compare, report."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers.utils import logging as transformers_logging

from graftlm.reproduce import comparison
from graftlm.reproduce.experiment import Experiment
from graftlm.reproduce.files import write_text
from graftlm.reproduce.hardware import hardware
from graftlm.reproduce.jobs import jobs_of, outcomes
from graftlm.reproduce.kept import Job, Outcome, Study
from graftlm.reproduce.metrics import CHRF
from graftlm.reproduce.report import flatten, print_summary, write_report
from graftlm.reproduce.sandbox import guards
from graftlm.reproduce.systems import OURS, SAME_TRAINING

MARK = "experiment.json"  # whose report a folder holds


def run(
    experiment: Experiment,
    *,
    systems: Sequence[tuple[str, int]],
    output: str | Path,
    jobs: int = 1,
    device: str | None = None,
    run_code: bool = False,
    plots: bool = True,
    console: Console | None = None,
    command: str = "",
) -> dict[str, Any]:
    """Train and score systems, and leave a report in a folder.

    Args:
        systems: Names, and how many seeds of each.
        output: Folder for the report, the plots, the composed models and every answer; what was
            answered there before in the same setting is not done again.
        jobs: How many systems to train and score at a time, each in a process of its own.
        device: `cpu` or `cuda`; None takes a GPU where there is one.
        run_code: Whether programs that models wrote may be run, in a child process.

    Returns:
        What `results.json` holds.

    Raises:
        ValueError: If a system does not exist or cannot be run, a number is not positive, or the
            folder holds another experiment's report.
        ImportError: If a library is not installed that an experiment or a system needs.
        RuntimeError: If programs are to be run on a machine that cannot hold them in.
    """
    check(experiment, systems, jobs, run_code)
    console = console or Console()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    folder = Path(output)
    check_folder(folder, experiment)
    held_in = isolation(experiment, console)
    transformers_logging.disable_progress_bar()
    start = time.perf_counter()
    study = Study(
        experiment=experiment,
        models=experiment.models(
            folder, {experiment.system(n).reads_model for n, _ in systems}, device
        ),
        folder=folder,
        device=device,
        run_code=run_code,
    )
    claim(folder, experiment)
    asked = dict(systems)
    found: dict[str, dict[int, Any]] = {}
    taken: dict[str, dict[int, Outcome]] = {}
    for job, outcome in outcomes(study, jobs_of(experiment, systems), jobs, console):
        for name, answers in outcome.answers.items():
            if job.seed < asked.get(name, 0):
                found.setdefault(name, {})[job.seed] = answers
        taken.setdefault(job.name, {})[job.seed] = outcome
        console.print(done(job, outcome))
    order = [name for name, _ in systems if name in found]
    data = [experiment.data(seed) for seed in range(max(seeds for _, seeds in systems))]
    table = comparison.tables(experiment, data, {name: found[name] for name in order})
    results = {
        "command": command,
        "experiment": experiment.name,
        "title": experiment.title,
        "about": experiment.about,
        "systems": {name: experiment.system(name).title for name in order},
        "ablations": [name for name in order if name in experiment.ablations],
        "seeds": {name: len(found[name]) for name in order},
        "metrics": {
            name: {m.name: [m.lower_is_better, m.digits] for m in test.metrics}
            for name, test in experiment.tests.items()
        },
        "paper": {name: test.paper for name, test in experiment.tests.items() if test.paper},
        "sizes": {
            name: {group: len(examples) for group, examples in groups.items()}
            for name, groups in {**data[0].tests, "before": data[0].retention}.items()
        },
        "answered": {name: test.answered for name, test in experiment.tests.items()},
        "table": comparison.cells_as_json(table),
        "gains": comparison.gains(experiment, table),
        "goals": comparison.verdicts(experiment, table),
        "costs": comparison.costs(taken),
        "losses": comparison.curves(taken),
        "samples": samples(data[0], {name: found[name] for name in order}),
        "notes": dict(data[0].notes) | held_in,
        "settings": {
            "composition": asdict(experiment.composition),
            "training": asdict(experiment.training),
            "composition examples": len(data[0].composition),
            "domain examples": len(data[0].domain),
        }
        | dict(experiment.changes),
        "seconds": time.perf_counter() - start,
        "hardware": hardware(device, jobs),
        "versions": {
            name: version(name)
            for name in ("graftlm", "torch", "transformers", *scored_by(experiment))
        },
    }
    write_report(folder, results, plots=plots)
    print_summary(results, console)
    console.print(f"report.md, report.html and results.json are in {folder.resolve()}")
    return results


def check(
    experiment: Experiment, systems: Sequence[tuple[str, int]], jobs: int, run_code: bool
) -> None:
    """Refuse what cannot be run, before anything is loaded."""
    known = {**experiment.systems, **experiment.ablations}
    for name, seeds in systems:
        if name not in known:
            raise ValueError(f"system {name!r} is none of {', '.join(known)}")
        if seeds < 1:
            raise ValueError(f"seeds must be at least 1, got {seeds} for {name}")
        trained = SAME_TRAINING.get(name)
        if trained is not None and seeds > dict(systems).get(trained, 0):
            raise ValueError(
                f"{name} is {trained}, tested in another way, so it cannot have more seeds: ask "
                f"for {trained}:{seeds} too"
            )
    if OURS not in dict(systems):
        raise ValueError("systems lacks 'composed', with which the others are compared")
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    if runs_programs(experiment) and not run_code:
        raise ValueError(
            "this experiment runs programs that models wrote, in a child process with limits; "
            "say that it may with --allow-code-execution, or leave these tests out "
            "(--no-programs and no --mbpp)"
        )
    wanted = {"sacrebleu"} if scored_by(experiment) else set()
    if any(known[name].has_adapters for name, _ in systems):
        wanted.add("peft")
    if max(seeds for _, seeds in systems) > 1:
        wanted.add("scipy")
    missing = sorted(name for name in wanted if find_spec(name) is None)
    if missing:
        raise ImportError(
            f"{missing[0]} is not installed, which this experiment needs; "
            "run: pip install 'graftlm[reproduce]'"
        )


def scored_by(experiment: Experiment) -> tuple[str, ...]:
    """The library that scores, where one does."""
    has_chrf = any(metric is CHRF for test in experiment.tests.values() for metric in test.metrics)
    return ("sacrebleu",) if has_chrf else ()


def runs_programs(experiment: Experiment) -> bool:
    """Whether a test runs programs that models wrote."""
    return any(m.needs == "tests" for test in experiment.tests.values() for m in test.metrics)


def isolation(experiment: Experiment, console: Console) -> dict[str, str]:
    """What holds in the programs that models write, for the report; a warning if it is little."""
    if not runs_programs(experiment):
        return {}
    held = guards()
    if missing := {"landlock", "seccomp"} - set(held):
        console.print(
            f"Warning: this machine has no {' and no '.join(sorted(missing))}, so programs that "
            "models write may read your files or reach the network (reproduce/sandbox.py); better "
            "run this in a container",
            markup=False,
        )
    return {"programs held in by": ", ".join(held)}


def settings_in(experiment: Experiment) -> dict[str, Any]:
    """What the reports of a folder have in common."""
    told = {
        "experiment": experiment.name,
        **experiment.changes,
        "examples": experiment.training.examples,
        "tests": sorted(experiment.tests),
        "training": asdict(experiment.training),
        "composition": asdict(experiment.composition),
    }
    return dict(flatten(json.loads(json.dumps(told))))


def claim(folder: Path, experiment: Experiment) -> None:
    """Write down whose reports a folder holds."""
    write_text(folder / MARK, json.dumps(settings_in(experiment)) + "\n")


def check_folder(folder: Path, experiment: Experiment) -> None:
    """Make a folder, or see that it is this experiment's in these settings.

    Raises:
        ValueError: If it is another's, whose report would be lost.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / MARK).exists():
        return
    found, mine = json.loads((folder / MARK).read_text("utf-8")), settings_in(experiment)
    others = sorted(name for name in {*found, *mine} if found.get(name) != mine.get(name))
    if others:
        theirs, ours = ({name: one.get(name) for name in others} for one in (found, mine))
        raise ValueError(
            f"{str(folder)!r} holds results of {theirs}, not of {ours}; name another folder with "
            "--output"
        )


def done(job: Job, outcome: Outcome) -> str:
    """A line for a finished job."""
    loss = f", loss {outcome.losses[-1][1]:.3f}" if outcome.losses else ""
    seconds = outcome.cost.training_seconds
    return f"{job.name}, seed {job.seed}: trained {seconds:.0f} s{loss}"


def samples(data: Any, found: dict[str, dict[int, Any]]) -> list[dict[str, Any]]:
    """The first example of each group, with what the systems made of it."""
    return [
        {
            "test": test,
            "group": group,
            "prompt": examples[0].prompt,
            "target": examples[0].target,
            "answers": {
                name: seeds[0][test][group][0].text
                for name, seeds in found.items()
                if 0 in seeds and test in seeds[0]
            },
        }
        for test, groups in data.tests.items()
        for group, examples in groups.items()
        if examples
    ]
