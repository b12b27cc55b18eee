"""Run the key-value arithmetic of CALM, section 4.1: compose, train the bridges, score, report.

The augmenting model knows what each key stands for, the anchor knows how to add; the bridges
learn on a fifth of the keys to bring the two together, and are scored on all of them.
"""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import track
from transformers import set_seed
from transformers.utils import logging as transformers_logging

from graftlm import Connection, compose
from graftlm.reproduce.kv_data import (
    COMPOSITIONS,
    TASKS,
    KVTask,
    composition_examples,
    draw_values,
    key_evaluation,
    numeric_evaluation,
    split_keys,
)
from graftlm.reproduce.kv_evaluation import (
    evaluation_examples,
    exact_matches,
    look_inside,
    percent,
    scores_by_terms,
)
from graftlm.reproduce.kv_parents import PARENTS, SHIPPED, load_parents, train_parents
from graftlm.reproduce.kv_report import rich_table, summarize, write_results
from graftlm.reproduce.kv_training import FitSettings, fit, lesson_of

NUM_EXPRESSIONS = 1000  # in each evaluation set
NUM_WATCHED = 100  # of each, looked at while training; nothing is chosen by them
SHARES = ("KV-MATH", "KV-SUBS", "KV-MATH at once", "NUM-MATH")
WATCHED = ("KV-MATH all-held-out", "KV-MATH held-in", "KV-SUBS all-held-out", "NUM-MATH numbers")


@dataclass(frozen=True, kw_only=True, slots=True)
class CompositionSettings:
    """Which layers are connected, (augmenting, anchor), and how the bridges are trained.

    The paper takes every fourth layer of m_A, so one of our four, and spreads the connections
    evenly over m_B, so its last. Here the last layer of m_A, whose states hold what it would say
    next, is read by the two last layers of m_B: one connection more than the paper's rule gives.
    """

    connections: tuple[tuple[int, int], ...]
    num_heads: int
    position: Literal["none", "distance", "rotary"] = "distance"
    fit: FitSettings


SETTINGS = {
    "small": CompositionSettings(
        connections=((3, 2), (3, 3)),
        num_heads=8,
        fit=FitSettings(steps=600, batch_size=96, learning_rate=1e-3, weight_decay=0.5),
    ),
    # Never run, as its parents; see kv_parents.
    "paper": CompositionSettings(
        connections=((5, 6), (5, 7)),
        num_heads=8,
        fit=FitSettings(steps=10_000, batch_size=128, learning_rate=5e-4, weight_decay=0.05),
    ),
}


def run(
    *,
    preset: str = "small",
    dc: str = "mix",
    seeds: int = 1,
    steps: int | None = None,
    output: str | Path = "kv-arithmetic",
    from_scratch: bool = False,
    device: str | None = None,
    plots: bool = True,
    console: Console | None = None,
    command: str = "",
) -> dict[str, Any]:
    """Compose, train the bridges, score all models, and leave a report in a folder.

    Args:
        preset: `small` runs on a laptop; `paper` has the paper's numbers and wants a GPU.
        dc: What the composition data holds: `math` or `subs` (the paper says both), `mix`, or
            `direct`; see `kv_data.COMPOSITIONS`.
        seeds: How often to run, with other held-in keys, data and fresh bridges each time.
        steps: Training steps; None takes the preset's.
        from_scratch: Train the parents too, into `output/parents`, instead of using the shipped.
        device: `cpu` or `cuda`; None takes a GPU where there is one.

    Returns:
        What `results.json` holds.

    Raises:
        ValueError: If an argument is none of the above, or no parents ship for the preset.
    """
    check(preset, dc, seeds, steps, from_scratch)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    console = console or Console()
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    transformers_logging.disable_progress_bar()
    task, settings = TASKS[preset], SETTINGS[preset]
    if steps is not None:
        settings = replace(settings, fit=replace(settings.fit, steps=steps))
    clock = Clock()
    parents = SHIPPED
    if from_scratch:
        parents = folder / "parents"
        train_parents(preset, task, parents, console=console, use_cpu=device == "cpu")
        clock.lap("parents")
    runs = [
        run_seed(task, settings, dc, seed, parents, device=device, console=console, clock=clock)
        for seed in range(seeds)
    ]
    results = {
        "command": command,
        "accuracy": summarize([run["accuracy"] for run in runs]),
        "by_terms": summarize([{"composed": run["by_terms"]} for run in runs])["composed"],
        "seeds": list(range(seeds)),
        "expressions": NUM_EXPRESSIONS,
        "parameters": runs[0].pop("parameters"),
        "seconds": clock.seconds,
        "settings": {
            "preset": preset,
            "dc": dc,
            "shares": dict(zip(SHARES, COMPOSITIONS[dc], strict=True)),
            "task": asdict(task),
            "composition": asdict(settings),
            "parents": {name: asdict(parent) for name, parent in PARENTS[preset].items()},
        },
        "versions": {name: version(name) for name in ("graftlm", "torch", "transformers")},
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
        "threads": torch.get_num_threads(),
        "runs": runs,
    }
    names = draw_plots(folder, results) if plots else []
    for seed_run in runs:
        seed_run.pop("attention", None)
    write_results(folder, results, names)
    console.print(rich_table(results))
    console.print(f"Report, results and plots are in {folder.resolve()}")
    return results


def check(preset: str, dc: str, seeds: int, steps: int | None, from_scratch: bool) -> None:
    """Refuse what cannot be run, before anything is loaded."""
    for name, value, known in (("preset", preset, SETTINGS), ("dc", dc, COMPOSITIONS)):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    for name, number in (("seeds", seeds), ("steps", 1 if steps is None else steps)):
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    if preset != "small" and not from_scratch:
        raise ValueError(f"preset {preset!r} ships no parents; add from_scratch (--from-scratch)")


class Clock:
    """Seconds spent on each named part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Count the time since the last lap under a name."""
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.last
        self.last = now


def run_seed(
    task: KVTask,
    settings: CompositionSettings,
    dc: str,
    seed: int,
    parents: Path,
    *,
    device: str,
    console: Console,
    clock: Clock,
) -> dict[str, Any]:
    """One composition: its accuracy and its parents', its learning curve, what it looks at."""
    set_seed(seed)
    augmenting, anchor, tokenizer = load_parents(parents, device)
    num_parameters = {
        name: sum(weight.numel() for weight in model.parameters())
        for name, model in (("m_A", augmenting), ("m_B", anchor))
    }
    composed = compose(
        anchor,
        augmenting,
        connections=[
            Connection(augmenting_layer=i, anchor_layer=j) for i, j in settings.connections
        ],
        num_heads=settings.num_heads,
        position=settings.position,
    )
    values = draw_values(task)
    sets = evaluation_examples(task, values, seed, NUM_EXPRESSIONS)
    held_in, held_out = split_keys(task, values, seed)
    exclude = {e for split in key_evaluation(task, held_in, held_out, seed).values() for e in split}
    examples = composition_examples(
        task,
        values,
        held_in,
        dc=dc,
        size=settings.fit.steps * settings.fit.batch_size,
        seed=seed,
        exclude=exclude | set(numeric_evaluation(task)),
    )
    curve: list[dict[str, Any]] = []

    def look(step: int) -> None:
        composed.eval()
        watched = {
            name: percent(exact_matches(composed, tokenizer, sets[name][:NUM_WATCHED]))
            for name in WATCHED
        }
        composed.train()
        curve.append({"step": step, "accuracy": watched})

    clock.lap("preparation")
    look(0)
    losses = fit(
        composed,
        tokenizer,
        [lesson_of(example) for example in examples],
        settings.fit,
        seed=seed,
        title=f"bridges, seed {seed}",
        console=console,
        use_cpu=device == "cpu",
        look=look,
        look_every=max(1, settings.fit.steps // 8),
    )
    composed.eval()
    clock.lap("composition")
    models = {"m_A": augmenting, "m_B": anchor, "composed": composed}
    matches = {
        (model, name): exact_matches(models[model], tokenizer, sets[name])
        for model, name in track(
            [(model, name) for model in models for name in sets],
            description=f"scores, seed {seed}",
            console=console,
        )
    }
    clock.lap("evaluation")
    return {
        "seed": seed,
        "accuracy": {
            model: {name: percent(matches[model, name]) for name in sets} for model in models
        },
        "by_terms": scores_by_terms(sets, matches),
        "losses": losses,
        "curve": curve,
        "parameters": num_parameters
        | {"bridges": sum(weight.numel() for weight in composed.bridges.parameters())},
        "attention": look_inside(composed, tokenizer, sets["KV-MATH all-held-out"]),
    }


def draw_plots(folder: Path, results: Mapping[str, Any]) -> list[str]:
    """Draw what there is to see; returns the file names."""
    from graftlm.reproduce import kv_plots  # matplotlib takes a second to import

    return [
        kv_plots.plot_accuracy(results, folder / "accuracy.png"),
        kv_plots.plot_curves(results, folder / "curves.png"),
        kv_plots.plot_attention(**results["runs"][0]["attention"], path=folder / "attention.png"),
    ]
