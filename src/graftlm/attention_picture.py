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
from matplotlib.text import Text

from graftlm.config import Connection
from graftlm.explain import Explanation
from graftlm.labels import JOINER, labels_of

READ, CHANGE, WRITTEN, NOTHING = "#1f6f8b", "#c95c0a", "#6c4ab6", "#f6f8fa"
COLORS = LinearSegmentedColormap.from_list("read", [NOTHING, READ])
CELL, LONGEST, LABEL = 0.24, 14.0, 0.17  # inches: a cell, a side of a heatmap, a line of text
LONGEST_LABEL, LABEL_SIZE = 16, 10  # characters, points
INCH = 100  # dots, while texts are measured
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
    figure = Figure(layout="constrained")
    grid: Any = figure.subplots(lines, columns, squeeze=False)
    for axes in grid.flat[len(maps) :]:
        axes.set_visible(False)
    rooms = [
        draw_map(figure, axes, explanation, k, weights, title_of(explanation, k, head))
        for axes, k, weights in zip(grid.flat, chosen, maps, strict=False)
    ]
    width, height = (max(lengths) for lengths in zip(*rooms, strict=True))
    figure.set_size_inches(width * columns, height * lines)
    save(figure, path)


def title_of(explanation: Explanation, connection: int, head: int | None) -> str:
    """What a heatmap shows, in two lines."""
    found = explanation.connections[connection]
    heads = explanation.attention[connection].shape[0]
    of = f"mean over {heads} heads" if head is None else f"head {head} (of 0 to {heads - 1})"
    off = "" if explanation.scales[found.augmenting] else ", switched off"
    return f"{name_of(found)}\n{of}{off}"


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
    figure: Figure,
    axes: Any,
    explanation: Explanation,
    connection: int,
    weights: np.ndarray,
    title: str,
) -> tuple[float, float]:
    """One heatmap with the tokens' texts and a scale.

    Returns:
        Width and height in inches that it wants, with all that is written around it.
    """
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
    axes.xaxis.tick_top()
    left = label_tokens(axes.yaxis, explanation.tokens, explanation.num_prompt, "anchor tokens")
    above = label_tokens(axes.xaxis, explanation.augmenting_tokens[name], None, f"tokens of {name}")
    turn(above, columns)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if explanation.num_prompt < rows:
        axes.axhline(explanation.num_prompt - 0.5, color=WRITTEN, lw=1)
    bar = figure.colorbar(image, ax=axes, shrink=0.6, aspect=25, pad=0.02)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)
    heading = axes.set_title(title, fontsize=10, loc="left", pad=10)
    beside, top = extent(left)[0], extent(above)[1] + extent([heading])[1]
    # The margins hold the axes' titles, and at the right the scale.
    width = beside + 0.4 + max(side(columns) + 0.8, extent([heading])[0])
    return width, side(rows) + top + 0.65


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
    figure = Figure(layout="constrained")
    grid: Any = figure.subplots(len(rows), 1, sharex=True, squeeze=False)
    headings = []
    for axes, (numbers, color, title) in zip(grid.flat, rows, strict=True):
        axes.bar(range(length), numbers, color=color, width=0.85)
        headings.append(axes.set_title(title, fontsize=9, loc="left", pad=2))
        axes.tick_params(labelsize=8)
        axes.tick_params(axis="x", length=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.01)
    axis = grid.flat[-1].xaxis
    labels = label_tokens(axis, explanation.tokens, explanation.num_prompt, "anchor tokens")
    turn(labels, length)
    width = max(4.0, side(length), extent(headings)[0])
    figure.set_size_inches(width + 0.9, len(rows) + 0.4 + extent(labels)[1])
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


def label_tokens(axis: Any, texts: Sequence[str], num_prompt: int | None, title: str) -> list[Text]:
    """Write tokens along an axis, as many as there is room for, and the title of the axis.

    Tokens are numbered, from 1, where some have no label or two that differ are cut to the same.

    Args:
        axis: Of matplotlib.
        texts: The tokens.
        num_prompt: Those from this one on are marked as written by the model; None marks none.
        title: What the tokens are; how they are labelled is added.
    """
    step = max(1, math.ceil(len(texts) * LABEL / LONGEST))
    places = list(range(0, len(texts), step))
    whole = labels_of(texts)[::step]
    fonts = fonts_for(label[:LONGEST_LABEL] for label in whole)
    shown = [shortened(label, fonts) for label in whole]
    if step > 1 or len(set(shown)) < len(set(whole)):
        shown = [f"{place + 1}: {label}" for place, label in zip(places, shown, strict=True)]
        title += ", numbered" if step == 1 else f", one in {step} labelled, with its number"
    axis.set_label_text(title, fontsize=9)
    axis.set_ticks(places)
    made = axis.set_ticklabels(
        shown,
        fontsize=LABEL_SIZE,
        fontfamily=list(fonts),
        parse_math=False,  # a text may hold dollars
    )
    for place, label in zip(places, made, strict=True):
        if num_prompt is not None and place >= num_prompt:
            label.set_color(WRITTEN)
    return made


def turn(labels: Sequence[Text], num_tokens: int) -> None:
    """Turn the labels below or above columns that are wider than their place."""
    if labels:
        room = side(num_tokens) / len(labels)
        for label in labels:
            if extent([label])[0] > 0.95 * room:
                label.set_rotation(90)


def extent(texts: Sequence[Text]) -> tuple[float, float]:
    """Width of the widest and height of the highest, in inches."""
    boxes = [text.get_window_extent(dpi=INCH) for text in texts]
    sizes = [(box.width / INCH, box.height / INCH) for box in boxes]
    return max((w for w, _ in sizes), default=0.0), max((h for _, h in sizes), default=0.0)


def shortened(label: str, fonts: dict[str, frozenset[int]]) -> str:
    """A label as it is drawn, cut where that is long, but never between a letter and its marks."""
    drawn = drawable(label, fonts)
    if len(drawn) <= LONGEST_LABEL:
        return drawn
    ends = [
        n
        for n in range(1, min(len(label), LONGEST_LABEL))
        if not is_drawn_mark(label[n], fonts) and len(drawable(label[:n], fonts)) < LONGEST_LABEL
    ]
    return drawable(label[: max(ends, default=1)], fonts) + "…"


def is_drawn_mark(character: str, fonts: dict[str, frozenset[int]]) -> bool:
    """Whether this is drawn onto the letter before it; a mark without a glyph is a number."""
    return unicodedata.category(character)[0] == "M" and drawable(character, fonts) == character


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
