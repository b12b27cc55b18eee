"""Write down one key-value experiment: table, report.md, results.json and plots."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rich import box
from rich.table import Table

from graftlm.reproduce.kv_data import SPLITS

MODELS = ("m_A", "m_B", "composed")
TITLES = {"m_A": "m_A, augmenting", "m_B": "m_B, anchor", "composed": "composed (CALM)"}
COLUMNS = (
    *(("KV-SUBS", split) for split in SPLITS),
    ("NUM-MATH", "numbers"),
    *(("KV-MATH", split) for split in SPLITS),
)
# The paper's Table 1, in percent; it does not say how its keys were split.
PAPER = {
    "KV-SUBS": {"m_A": 98.1, "m_B": 0.0, "composed": 92.9},
    "NUM-MATH": {"m_A": 4.2, "m_B": 73.7, "composed": 72.0},
    "KV-MATH": {"m_A": 0.7, "m_B": 0.0, "composed": 84.3},
}
Accuracy = dict[str, dict[str, float]]  # model -> "TASK split" -> percent


def summarize(runs: Sequence[Accuracy]) -> dict[str, dict[str, dict[str, float]]]:
    """Mean and sample deviation over the seeds, for each model, task and split."""
    return {
        model: {
            column: {
                "mean": fmean(run[model][column] for run in runs),
                "deviation": stdev(run[model][column] for run in runs) if len(runs) > 1 else 0.0,
            }
            for column in runs[0][model]
        }
        for model in runs[0]
    }


def rows(results: Mapping[str, Any]) -> list[list[str]]:
    """The cells of our Table 1: task, split, then the paper's three numbers and ours."""
    num_seeds = len(results["seeds"])
    cells = []
    for task, split in COLUMNS:
        row = [task, split, *(f"{PAPER[task][model]:.1f}" for model in MODELS)]
        for model in MODELS:
            score = results["accuracy"][model][f"{task} {split}"]
            deviation = f" ± {score['deviation']:.1f}" if num_seeds > 1 else ""
            row.append(f"{score['mean']:.1f}{deviation}")
        cells.append(row)
    return cells


def rich_table(results: Mapping[str, Any]) -> Table:
    """The paper's Table 1 beside ours, narrow enough for a terminal of 80 columns."""
    table = Table(title="CALM, Table 1: key-value arithmetic, exact match in %", box=box.SIMPLE)
    table.add_column("task", no_wrap=True)
    table.add_column("keys", no_wrap=True)
    for owner in ("paper", "ours"):
        for model in ("m_A", "m_B", "CALM"):
            style = "bold" if (owner, model) == ("ours", "CALM") else None
            table.add_column(f"{owner}\n{model}", justify="right", style=style, no_wrap=True)
    cells = rows(results)
    for i, (task, split, *scores) in enumerate(cells):
        scores[3:5] = [score.split()[0] for score in scores[3:5]]  # deviations: of ours only
        table.add_row(task, split, *scores, end_section=task != cells[(i + 1) % len(cells)][0])
    return table


def report(results: Mapping[str, Any], plots: Sequence[str]) -> str:
    """The experiment in Markdown."""
    settings, parameters = results["settings"], results["parameters"]
    held_out = results["accuracy"]["composed"]["KV-MATH all-held-out"]
    num_seeds = len(results["seeds"])
    lines = [
        "# Key-value arithmetic (CALM, section 4.1)",
        "",
        f"With bridges trained on {100 * settings['task']['held_in']:.0f} % of the keys, the "
        f"composed model solves {held_out['mean']:.1f} % of the expressions whose keys its "
        f"training never showed; neither parent can. {results['expressions']} expressions a set, "
        f"greedy decoding, exact match, {num_seeds} seed{'s' * (num_seeds > 1)}"
        + (", mean ± deviation." if num_seeds > 1 else "."),
        "",
        "| task | keys | paper m_A | paper m_B | paper CALM | m_A | m_B | **composed** |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        *("| " + " | ".join(row) + " |" for row in rows(results)),
        "",
        "The paper does not say how its keys were split. `held-in`: keys of the composition data, "
        "in other expressions; `mixed`: some of either kind; `all-held-out`: only keys that the "
        "bridges never saw.",
        "",
        "By number of keys, all held out: "
        + ", ".join(
            f"{terms} keys {score['mean']:.1f} %"
            for terms, score in sorted(results["by_terms"].items())
        )
        + " (KV-MATH, composed).",
        "",
        "## What was run",
        "",
        f"- Command: `{results['command']}`",
        f"- Parameters: m_A {parameters['m_A']:,}, m_B {parameters['m_B']:,} (both frozen), "
        f"bridges {parameters['bridges']:,} (trained; "
        f"{100 * parameters['bridges'] / parameters['m_B']:.0f} % of m_B)",
        f"- Seconds: {', '.join(f'{name} {s:.0f}' for name, s in results['seconds'].items())}",
        f"- Versions: {', '.join(f'{name} {v}' for name, v in results['versions'].items())}; "
        f"device {results['device']}",
        "",
        "| setting | value |",
        "| --- | --- |",
        *(f"| {name} | `{value}` |" for name, value in flatten(settings)),
        "",
        *(f"![{Path(plot).stem}]({plot})" for plot in plots),
        "",
    ]
    return "\n".join(lines)


def flatten(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Name nested settings with dots."""
    pairs: list[tuple[str, Any]] = []
    for name, value in settings.items():
        if isinstance(value, Mapping):
            pairs += flatten(value, f"{prefix}{name}.")
        else:
            pairs.append((prefix + name, value))
    return pairs


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_results(folder: Path, results: Mapping[str, Any], plots: Sequence[str]) -> None:
    """Write `results.json` and `report.md`."""
    write_text(folder / "results.json", json.dumps(results, indent=2) + "\n")
    write_text(folder / "report.md", report(results, plots))
