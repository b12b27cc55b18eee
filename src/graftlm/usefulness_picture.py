"""Draw what connections are good for."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure

from graftlm.config import Connection
from graftlm.usefulness import SwitchedOff, Usefulness


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
    figure = Figure(figsize=(6 if not steps else 10.5, height), layout="constrained")
    panels = figure.subplots(1, 2 if steps else 1, squeeze=False)[0]
    draw_changes(panels[0], usefulness)
    if steps:
        draw_steps(panels[1], usefulness, steps)
    temporary = Path(path).with_name(f".{Path(path).name}")
    figure.savefig(temporary, dpi=150, format="png")
    temporary.replace(path)


def label(connection: Connection) -> str:
    """A connection in few characters, as `--connect` has it."""
    return f"{connection.augmenting}:{connection.augmenting_layer}-{connection.anchor_layer}"


def draw_changes(axes: Any, usefulness: Usefulness) -> None:
    """A bar for each connection, each augmenting model and all together, with standard errors."""
    colors = {name: colormaps["tab10"](k % 10) for k, name in enumerate(usefulness.augmenting)}
    singles = usefulness.connections
    bars = [(label(off.connections[0]), off, off.connections[0].augmenting) for off in singles]
    bars += [(f"all of {name}", off, name) for name, off in usefulness.augmenting.items()]
    bars.append(("every connection", usefulness.anchor, None))
    bare(axes)
    for row, (_, off, name) in enumerate(bars):
        axes.barh(row, off.change, color=colors.get(name, "0.6"), xerr=off.error, ecolor="0.3")
    axes.axhline(len(singles) - 0.5, color="0.8", linewidth=0.8)
    axes.axvline(0, color="0.3", linewidth=0.8)
    axes.set_yticks(range(len(bars)), [text for text, _, _ in bars])
    axes.invert_yaxis()
    axes.set_xlabel("loss without it, minus loss with everything on (nats a token)")
    axes.set_title("Switched off, one by one", loc="left", fontsize=10)


def draw_steps(axes: Any, usefulness: Usefulness, steps: Sequence[SwitchedOff]) -> None:
    """The loss against the number of connections, between everything on and the anchor."""
    total = len(usefulness.connections)
    counts = [total, *(total - len(step.connections) for step in steps)]
    bare(axes)
    axes.plot(counts, [usefulness.loss, *(step.loss for step in steps)], "o-", color="0.2")
    removed: set[Connection] = set()
    for step in steps:
        (gone,) = set(step.connections) - removed
        removed.add(gone)
        place = (total - len(step.connections), step.loss)
        axes.annotate(
            f"without {label(gone)}",
            place,
            xytext=(4, 6),
            textcoords="offset points",
            fontsize=7,
            rotation=30,
        )
    axes.axhline(usefulness.anchor.loss, color="0.6", linestyle="--")
    axes.annotate(
        "anchor alone",
        (total, usefulness.anchor.loss),
        xytext=(0, 3),
        textcoords="offset points",
        fontsize=8,
        color="0.4",
    )
    axes.set_xlim(total + 0.5, min(counts) - 1.0)
    axes.set_xticks(counts)
    axes.margins(y=0.15)
    axes.set_xlabel("connections left")
    axes.set_ylabel("loss (nats a token)")
    axes.set_title("Pruned, the least missed first", loc="left", fontsize=10)


def bare(axes: Any) -> None:
    """Keep only the axes that carry numbers."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
