"""Draw an experiment: scores of all systems, and what they learned."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files only; a display may be missing

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from graftlm.reproduce.systems import OURS

OUR_COLOR, OTHER_COLOR = "#1f6f8b", "#b9c2c9"


def draw(folder: Path, results: Mapping[str, Any]) -> list[str]:
    """All plots; returns their file names."""
    names = [draw_scores(folder / "scores.png", results)]
    if results["losses"]:
        names.append(draw_losses(folder / "losses.png", results))
    return names


def save(figure: Figure, path: Path) -> str:
    """Write a figure whole or not at all; returns its file name."""
    temporary = path.with_name(path.name + ".part")
    figure.savefig(temporary, dpi=150, format="png")
    plt.close(figure)
    os.replace(temporary, path)
    return path.name


def bare(axes: Any, grid: str) -> None:
    """Keep only the axes that carry numbers."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, alpha=0.25)
    axes.set_axisbelow(True)


def draw_scores(path: Path, results: Mapping[str, Any]) -> str:
    """For each test and group the first metric of every system; lines are seeds' extremes."""
    panels = [
        (test, group, next(iter(results["metrics"][test])))
        for test, groups in results["table"].items()
        for group in groups
    ]
    names = list(reversed(results["systems"]))
    columns = min(len(panels), 4)
    lines = -(-len(panels) // columns)
    figure, grid = plt.subplots(
        lines,
        columns,
        figsize=(3.2 * columns + 1.2, (0.24 * len(names) + 1.1) * lines),
        layout="constrained",
        sharey=True,
        squeeze=False,
    )
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, (test, group, metric) in zip(grid.flat, panels, strict=False):
        cells = results["table"][test][group][metric]
        means = [cells[name]["mean"] for name in names]
        reach = [
            [mean - min(cells[n]["seeds"]) for n, mean in zip(names, means, strict=True)],
            [max(cells[n]["seeds"]) - mean for n, mean in zip(names, means, strict=True)],
        ]
        colors = [OUR_COLOR if name == OURS else OTHER_COLOR for name in names]
        axes.barh(names, means, xerr=reach, color=colors, error_kw={"elinewidth": 1})
        digits = results["metrics"][test][metric][1]
        for place, (mean, above) in enumerate(zip(means, reach[1], strict=True)):
            axes.annotate(
                f"{mean:.{digits}f}",
                (mean + above, place),  # behind the line of the seeds
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                fontsize=7,
            )
        axes.margins(x=0.18)
        lower = results["metrics"][test][metric][0]
        axes.set_title(f"{test}: {group}" if len(results["table"][test]) > 1 else test, fontsize=9)
        axes.set_xlabel(f"{metric} ({'lower' if lower else 'higher'} is better)", fontsize=8)
        axes.tick_params(labelsize=8)
        bare(axes, "x")
    return save(figure, path)


def draw_losses(path: Path, results: Mapping[str, Any]) -> str:
    """Training losses, a line for each system; seeds in the same colour."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for number, (name, seeds) in enumerate(results["losses"].items()):
        for k, losses in enumerate(seeds):
            if losses:
                steps, values = zip(*losses, strict=True)
                axes.plot(
                    steps,
                    values,
                    color=OUR_COLOR if name == OURS else f"C{number % 10}",
                    lw=2 if name == OURS else 1,
                    ls="-" if number < 10 else "--",
                    label=name if k == 0 else None,
                )
    axes.set_xlabel("update")
    axes.set_ylabel("training loss, nats a target token")
    axes.legend(fontsize=8, frameon=False, ncols=2)
    bare(axes, "y")
    return save(figure, path)
