"""Draw what connections are good for."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure

from graftlm.usefulness import SwitchedOff, Usefulness, label


def draw_usefulness(
    usefulness: Usefulness,
    path: str | os.PathLike[str],
    *,
    steps: Sequence[SwitchedOff] = (),
) -> None:
    """Write a PNG: the change of the loss without each part, and with ever fewer connections.

    Args:
        usefulness: What was measured.
        path: Of the picture.
        steps: Of a `Pruning`; without them there is one panel only.
    """
    num_bars = 1 + len(usefulness.augmenting) + len(usefulness.connections)
    height = 1.2 + 0.26 * max(num_bars, 8)
    figure = Figure(figsize=(6 if not steps else 11, height), layout="constrained")
    panels = figure.subplots(1, 2 if steps else 1, squeeze=False)[0]
    draw_changes(panels[0], usefulness)
    if steps:
        draw_steps(panels[1], usefulness, steps)
    temporary = Path(path).with_name(f".{Path(path).name}")
    figure.savefig(temporary, dpi=150, format="png")
    temporary.replace(path)


def draw_changes(axes: Any, usefulness: Usefulness) -> None:
    """A bar for each connection, each augmenting model and all together, with standard errors."""
    colors = {name: colormaps["tab10"](k % 10) for k, name in enumerate(usefulness.augmenting)}
    singles = usefulness.connections
    bars = [(label(off.connections[0]), off, off.connections[0].augmenting) for off in singles]
    bars += [(f"all of {name}", off, name) for name, off in usefulness.augmenting.items()]
    bars.append(("every connection", usefulness.anchor, ""))
    bare(axes)
    for row, (_, off, name) in enumerate(bars):
        axes.barh(row, off.change, color=colors.get(name, "0.6"), xerr=off.error, ecolor="0.3")
    axes.axhline(len(singles) - 0.5, color="0.8", linewidth=0.8)
    axes.axvline(0, color="0.3", linewidth=0.8)
    axes.set_yticks(range(len(bars)), [text for text, _, _ in bars])
    axes.set_ylim(len(bars) - 0.5, -0.5)
    axes.set_xlabel("loss without it, minus loss with everything on (nats a token)")
    axes.set_title("Switched off, one by one", loc="left", fontsize=10)


def draw_steps(axes: Any, usefulness: Usefulness, steps: Sequence[SwitchedOff]) -> None:
    """The loss after each step from everything on towards the anchor, a row a step."""
    total = len(usefulness.connections)
    texts, losses, before = [f"all {total} on"], [usefulness.loss], ()
    for step in steps:
        (gone,) = set(step.connections) - set(before)
        texts.append(f"{label(gone)} gone, {total - len(step.connections)} left")
        losses.append(step.loss)
        before = step.connections
    bare(axes)
    axes.plot(losses, range(len(losses)), "o-", color="0.2")
    axes.axvline(usefulness.anchor.loss, color="0.6", linestyle="--", label="anchor alone")
    axes.legend(frameon=False, fontsize=8, loc="best")
    axes.set_yticks(range(len(texts)), texts)
    axes.set_ylim(len(texts) - 0.5, -0.5)
    axes.set_xlabel("loss (nats a token)")
    axes.set_title("Pruned, the least missed first", loc="left", fontsize=10)


def bare(axes: Any) -> None:
    """Keep only the axes that carry numbers."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
