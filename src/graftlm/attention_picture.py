"""An explanation as pictures for documents: PNG, drawn by matplotlib."""

import math
import os
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import font_manager, ft2font
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure

from graftlm.config import Connection
from graftlm.explain import Explanation
from graftlm.labels import JOINER, labels_of

READ, CHANGE, WRITTEN, NOTHING = "#1f6f8b", "#c95c0a", "#6c4ab6", "#f6f8fa"
COLORS = LinearSegmentedColormap.from_list("read", [NOTHING, READ])
CELL, LONGEST, LABEL = 0.24, 14.0, 0.17  # inches: a cell, a side of a heatmap, a line of text
LONGEST_LABEL = 16  # characters
FONT = "DejaVu Sans"  # comes with matplotlib


def draw_attention(
    explanation: Explanation,
    path: str | os.PathLike[str],
    *,
    connection: int | None = None,
    head: int | None = None,
) -> None:
    """Draw heatmaps of who reads what: anchor tokens in rows, augmenting tokens in columns.

    Args:
        explanation: Of `ComposedForCausalLM.explain`.
        path: Where to.
        connection: Number of one connection, from 0; by default a heatmap for each.
        head: Number of one head, from 0; by default the mean over heads.

    Raises:
        ValueError: If there is no such connection or head.
    """
    chosen = range(len(explanation.connections)) if connection is None else [connection]
    check_choice(explanation, connection, head)
    maps = [
        weights.mean(0) if head is None else weights[head]
        for weights in (explanation.attention[k] for k in chosen)
    ]
    columns = 1 if len(maps) == 1 else 2
    lines = math.ceil(len(maps) / columns)
    sides = [max(side(n) for n in sizes) for sizes in zip(*(x.shape for x in maps), strict=True)]
    figure = Figure(
        figsize=((sides[1] + 2.2) * columns, (sides[0] + 2.0) * lines), layout="constrained"
    )
    grid: Any = figure.subplots(lines, columns, squeeze=False)
    for axes in grid.flat[len(maps) :]:
        axes.set_visible(False)
    for axes, k, weights in zip(grid.flat, chosen, maps, strict=False):
        draw_map(figure, axes, explanation, k, weights)
        heads = explanation.attention[k].shape[0]
        of = f"mean over {heads} heads" if head is None else f"head {head} of 0 to {heads - 1}"
        off = "" if explanation.scales[explanation.connections[k].augmenting] else ", switched off"
        axes.set_title(f"{name_of(explanation.connections[k])}\n{of}{off}", fontsize=9, loc="left")
    save(figure, path)


def check_choice(explanation: Explanation, connection: int | None, head: int | None) -> None:
    """Refuse what is not there.

    Raises:
        ValueError: Naming what there is.
    """
    last = len(explanation.connections) - 1
    if connection is not None and not 0 <= connection <= last:
        raise ValueError(f"connection is {connection}, but there are connections 0 to {last}")
    last = explanation.attention[0].shape[0] - 1
    if head is not None and not 0 <= head <= last:
        raise ValueError(f"head is {head}, but each connection has heads 0 to {last}")


def draw_map(
    figure: Figure, axes: Any, explanation: Explanation, connection: int, weights: np.ndarray
) -> None:
    """One heatmap with the tokens' texts and a scale."""
    name = explanation.connections[connection].augmenting
    rows, columns = weights.shape
    norm = PowerNorm(0.5, vmin=0, vmax=float(weights.max(initial=0)) or 1.0)
    image = axes.imshow(
        weights if columns else np.zeros((rows, 1)),
        cmap=COLORS,
        norm=norm,
        aspect="auto",
        interpolation="nearest",
    )
    label_tokens(axes.yaxis, explanation.tokens, explanation.num_prompt)
    label_tokens(axes.xaxis, explanation.augmenting_tokens[name], None)
    axes.xaxis.tick_top()
    axes.tick_params(axis="x", rotation=90)
    axes.set_ylabel("anchor tokens", fontsize=8)
    axes.set_xlabel(f"tokens of {name}", fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if explanation.num_prompt < rows:
        axes.axhline(explanation.num_prompt - 0.5, color=WRITTEN, lw=1)
    bar = figure.colorbar(image, ax=axes, shrink=0.6, aspect=25, pad=0.02)
    bar.ax.tick_params(labelsize=7)
    bar.outline.set_visible(False)


def draw_update_share(explanation: Explanation, path: str | os.PathLike[str]) -> None:
    """Draw, token by token, how far composed and anchor differ and what each bridge adds.

    Args:
        explanation: Of `ComposedForCausalLM.explain`.
        path: Where to.
    """
    rows = [(explanation.divergence, CHANGE, "KL(composed ‖ anchor), nats")]
    rows += [
        (share, READ, f"{name_of(connection)}, norm of update / norm of hidden state")
        for share, connection in zip(explanation.update_share, explanation.connections, strict=True)
    ]
    length = len(explanation.tokens)
    width = max(4.0, side(length)) + 1.5
    figure = Figure(figsize=(width, 1.0 * len(rows) + 1.2), layout="constrained")
    grid: Any = figure.subplots(len(rows), 1, sharex=True, squeeze=False)
    for axes, (numbers, color, title) in zip(grid.flat, rows, strict=True):
        axes.bar(range(length), numbers, color=color, width=0.85)
        axes.set_title(title, fontsize=8, loc="left", pad=2)
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.01)
    axes = grid.flat[-1]
    label_tokens(axes.xaxis, explanation.tokens, explanation.num_prompt)
    axes.tick_params(axis="x", rotation=90, length=0)
    save(figure, path)


def side(length: int) -> float:
    """How long a side of so many tokens is, in inches; cells of long texts are smaller."""
    return min(max(length, 4) * CELL, LONGEST)


def name_of(connection: Connection) -> str:
    """A connection in words."""
    return (
        f"{connection.augmenting}: layer {connection.augmenting_layer} → "
        f"anchor layer {connection.anchor_layer}"
    )


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a picture whole or not at all."""
    path = Path(path)
    temporary = path.with_name(path.name + ".part")
    figure.savefig(temporary, dpi=110, format="png")
    os.replace(temporary, path)


# ---- token texts -------------------------------------------------------------------------


def label_tokens(axis: Any, texts: Sequence[str], num_prompt: int | None) -> None:
    """Write tokens along an axis, as many as there is room for.

    Args:
        axis: Of matplotlib.
        texts: The tokens.
        num_prompt: Those from this one on are marked as written by the model; None marks none.
    """
    step = max(1, math.ceil(len(texts) * LABEL / LONGEST))
    places = list(range(0, len(texts), step))
    labels = labels_of(texts)
    shown = [shortened(labels[k]) for k in places]
    fonts = fonts_for(shown)
    axis.set_ticks(places)
    made = axis.set_ticklabels(
        [drawable(label, fonts) for label in shown],
        fontsize=8,
        fontfamily=list(fonts),
        parse_math=False,  # a text may hold dollars
    )
    for place, label in zip(places, made, strict=True):
        if num_prompt is not None and place >= num_prompt:
            label.set_color(WRITTEN)


def shortened(label: str) -> str:
    """A long label cut, but never between a letter and its marks."""
    if len(label) <= LONGEST_LABEL:
        return label
    end = LONGEST_LABEL - 1
    while end and unicodedata.category(label[end])[0] == "M":
        end -= 1
    return label[:end] + "…"


def fonts_for(labels: Iterable[str]) -> dict[str, frozenset[int]]:
    """Fonts to draw labels with, and the characters each has; as few as needed."""
    wanted = {ord(c) for label in labels for c in label}
    fonts = {FONT: characters_of(font_manager.findfont(FONT))}
    wanted -= fonts[FONT]
    if wanted:
        for font in font_manager.fontManager.ttflist:
            # The last-resort font has a box for everything, which tells nobody anything.
            if font.name.startswith("Last Resort") or not wanted:
                continue
            found = characters_of(font.fname)
            if wanted & found:
                fonts[font.name] = found
                wanted -= found
    return fonts


def characters_of(path: str) -> frozenset[int]:
    """The code points a font has glyphs for."""
    return frozenset(ft2font.FT2Font(path).get_charmap())


def drawable(label: str, fonts: dict[str, frozenset[int]]) -> str:
    """A label with the numbers of characters that no font here has, such as U+72D0."""
    known = frozenset().union(*fonts.values())
    return "".join(
        c if ord(c) in known else "" if c == JOINER else f"U+{ord(c):04X} " for c in label
    ).rstrip()
