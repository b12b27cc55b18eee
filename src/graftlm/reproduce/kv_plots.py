"""Draw one key-value experiment: accuracies, learning curves, what the bridges look at."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files only; a display may be missing

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from graftlm.reproduce.kv_report import COLUMNS, MODELS, PAPER, TITLES

COLORS = {"m_A": "#c98b2b", "m_B": "#7a8794", "composed": "#1f6f8b"}


def save(figure: Figure, path: Path) -> str:
    """Write a figure whole or not at all; returns its file name."""
    temporary = path.with_name(path.name + ".part")
    figure.savefig(temporary, dpi=150, format="png")
    plt.close(figure)
    os.replace(temporary, path)
    return path.name


def bare(axes: Any) -> None:
    """Keep only the axes that carry numbers."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    axes.set_axisbelow(True)


def plot_accuracy(results: Mapping[str, Any], path: Path) -> str:
    """Bars per model for each task and split, with the paper's numbers as marks."""
    figure, axes = plt.subplots(figsize=(11, 5), layout="constrained")
    width = 0.27
    places = np.arange(len(COLUMNS)) + np.array([{"K": 0.0, "N": 0.25}[t[0]] for t, _ in COLUMNS])
    places[4:] += 0.5
    for offset, model in enumerate(MODELS, start=-1):
        scores = [results["accuracy"][model][f"{task} {split}"] for task, split in COLUMNS]
        means = [score["mean"] for score in scores]
        deviations = [score["deviation"] for score in scores] if len(results["seeds"]) > 1 else None
        x = places + offset * width
        axes.bar(
            x, means, width, yerr=deviations, capsize=2, label=TITLES[model], color=COLORS[model]
        )
        marks = [PAPER[task][model] for task, _ in COLUMNS]
        spreads = deviations or [0] * len(means)
        for place, mean, spread, mark in zip(x, means, spreads, marks, strict=True):
            height = mean + spread + 1
            if -2 < mark - height < 5:  # the mark would lie on the number
                height = mark + 1.8
            axes.text(place, height, f"{mean:.1f}", ha="center", fontsize=7.5)
        label = "the paper" if model == "composed" else None
        look = {"marker": "D", "color": "white", "edgecolor": "black", "lw": 0.8, "zorder": 3}
        axes.scatter(x, marks, 16, label=label, **look)
    axes.set_xticks(places, [f"{task}\n{split}" for task, split in COLUMNS])
    axes.set_ylim(0, 112)
    axes.set_yticks(range(0, 101, 20))
    axes.set_ylabel("exact match, %")
    best = results["accuracy"]["composed"]["KV-MATH all-held-out"]["mean"]
    axes.set_title(
        f"Key-value arithmetic: {best:.1f} % of KV-MATH on keys the bridges never saw", loc="left"
    )
    bare(axes)
    axes.legend(ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.14), frameon=False)
    return save(figure, path)


def plot_curves(results: Mapping[str, Any], path: Path) -> str:
    """Training loss, and accuracy on unseen expressions as training goes."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for seed, run in zip(results["seeds"], results["runs"], strict=True):
        left.plot(*zip(*run["losses"], strict=True), lw=1.2, label=f"seed {seed}")
    left.set(xlabel="step", ylabel="loss on completions", yscale="log")
    last = [run["losses"][-1][1] for run in results["runs"]]
    left.set_title(f"Training loss: ends at {np.mean(last):.3f}", loc="left")
    left.legend(frameon=False)
    names = list(results["runs"][0]["curve"][0]["accuracy"])
    for name, color in zip(names, ("#7fb3c4", "#1f6f8b", "#c98b2b", "#7a8794"), strict=False):
        curves = [
            [(point["step"], point["accuracy"][name]) for point in run["curve"]]
            for run in results["runs"]
        ]
        for curve in curves:
            right.plot(*zip(*curve, strict=True), color=color, lw=0.7, alpha=0.4)
        mean = np.mean(curves, axis=0)
        right.plot(*mean.T, color=color, lw=2, marker="o", ms=3.5, label=name)
    right.set(xlabel="step", ylabel="exact match, %", ylim=(0, 103))
    goal = np.mean(
        [run["curve"][-1]["accuracy"]["KV-MATH all-held-out"] for run in results["runs"]]
    )
    right.set_title(f"Unseen expressions: KV-MATH, held-out keys at {goal:.0f} %", loc="left")
    right.legend(frameon=False, fontsize=8)
    bare(left)
    bare(right)
    return save(figure, path)


def plot_attention(
    maps: Sequence[tuple[str, Any]], tokens: Sequence[str], prompt_length: int, path: Path
) -> str:
    """Which of the augmenting model's tokens each bridge reads at each of the anchor's tokens.

    Args:
        maps: Per bridge, its name and its attention `(heads, seq, seq)`.
        tokens: Of the prompt and of what the composed model went on to say.
        prompt_length: How many of them are the prompt.
    """
    figure, panels = plt.subplots(
        1, len(maps), figsize=(1 + 5.6 * len(maps), 6.6), layout="constrained", squeeze=False
    )
    # Positions whose next token is written by the model: the prompt's last one and the answer.
    writing = slice(prompt_length - 1, len(tokens) - 1)
    for axes, (name, weights) in zip(panels[0], maps, strict=True):
        mean = np.asarray(weights).mean(axis=0)
        axes.imshow(mean, cmap="viridis", vmin=0, vmax=1, aspect="equal")
        axes.set_xticks(range(len(tokens)), tokens, fontsize=7, rotation=90)
        axes.set_yticks(range(len(tokens)), tokens, fontsize=7)
        axes.tick_params(length=0)
        axes.axhline(prompt_length - 0.5, color="white", lw=0.8)
        share = np.diagonal(mean)[writing].mean()
        axes.set_title(
            f"{name}\nwhile answering, {100 * share:.0f} % goes to m_A's state of the same token",
            fontsize=10,
        )
        axes.set_xlabel("m_A's token, read from")
    panels[0][0].set_ylabel("m_B's token, reading")
    figure.colorbar(
        panels[0][0].images[0], ax=list(panels[0]), shrink=0.7, label="attention, mean over heads"
    )
    figure.suptitle(f"Bridges over held-out keys: {''.join(tokens[1:])}")
    return save(figure, path)
