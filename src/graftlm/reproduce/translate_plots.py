"""Draw one experiment on real models: what each system scored on each group."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files only; a display may be missing

import matplotlib.pyplot as plt
import numpy as np

from graftlm.reproduce.kv_plots import bare, save
from graftlm.reproduce.translate_comparison import METRICS
from graftlm.reproduce.translate_systems import SYSTEMS

COLORS = {
    "anchor": "#b9c0c7",
    "augmenting": "#c98b2b",
    "composed": "#1f6f8b",
    "wrong-test": "#d8a7a0",
    "wrong": "#b5655b",
    "random": "#8f7aa8",
    "prompt": "#6fa3a0",
    "lora": "#4d5964",
}


def plot_scores(results: Mapping[str, Any], path: Path) -> str:
    """Bars of each system: a row of plots a test, a column a metric."""
    tests = results["table"]
    figure, all_axes = plt.subplots(
        len(tests),
        len(METRICS),
        figsize=(13, 3.4 * len(tests)),
        layout="constrained",
        squeeze=False,
    )
    for row, (test, groups) in zip(all_axes, tests.items(), strict=True):
        for axes, metric in zip(row, METRICS, strict=True):
            known = [s for s in SYSTEMS if s in next(iter(groups.values()))[metric]]
            width = 0.85 / len(known)
            places = np.arange(len(groups))
            for offset, system in enumerate(known):
                cells = [cells[metric][system] for cells in groups.values()]
                axes.bar(
                    places + (offset - (len(known) - 1) / 2) * width,
                    [cell["mean"] for cell in cells],
                    width,
                    yerr=[cell["deviation"] for cell in cells],
                    error_kw={"lw": 0.8},
                    color=COLORS[system],
                    label=system,
                )
            axes.set_xticks(places, list(groups))
            axes.set_title(f"{test}: {metric}")
            bare(axes)
    handles, labels = all_axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return save(figure, path)
