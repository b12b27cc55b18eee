"""results.md and the plots, made of results.json alone."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

TITLES = {
    "training": "Training step",
    "memory": "Peak memory of a training step, above the loaded weights",
    "decoding": "Decoding",
    "growth": "Growth of time and memory with the work",
    "peers": "Other implementations",
}
MEGA, MILLI = 1e6, 1e-3


def write(folder: Path, sections: dict[str, Any]) -> None:
    """The tables and plots of all sections there are."""
    lines = ["# Measured costs", ""]
    for name, title in TITLES.items():
        if name in sections:
            lines += [f"## {title}", "", *about(sections[name]), ""]
            lines += [*tables(name, sections[name]["rows"]), ""]
    (folder / "results.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    for name, section in sections.items():
        if name == "growth":
            draw_curves(folder, section["rows"])
        else:
            draw_ratios(folder, name, section["rows"])


def about(section: dict[str, Any]) -> list[str]:
    """On what, when and how a section was measured."""
    run, machine = section["run"], section["run"]["hardware"]
    place = machine["gpu"] or machine["cpu"]
    gigabytes = machine["memory_bytes"] / 1e9
    lines = [
        f"`{run['command']}`, {run['date']}: {place}, {machine['cores']} cores, "
        f"{machine['threads']} threads, {gigabytes:.0f} GB, torch {machine['torch']}, "
        f"transformers {machine['transformers']}, peft {machine['peft']}.",
        "Medians, with the least and the most of all rounds in brackets. A ratio is taken round by",
        "round; *of the fastest* is that of each system's fastest round, which other programs on",
        "the machine disturb least; *by operations* is what it would be if nothing but the counted",
        "operations took time.",
    ]
    return lines if section["complete"] else [*lines, "**This run was stopped before its end.**"]


def tables(name: str, rows: list[dict[str, Any]]) -> Iterator[str]:
    """One table of what was measured, and one of the ratios."""
    if name == "growth":
        yield from curve_table(rows)
        return
    yield "| setting | what | median | of the fastest | by operations | goal | met |"
    yield "| --- | --- | ---: | ---: | ---: | ---: | --- |"
    for row in rows:
        label = label_of(row)
        for what, value in measured(row):
            yield f"| {label} | {what} | {value} | | | | |"
        for ratio in [*row.get("prefill_ratios", []), *row.get("ratios", [])]:
            yield f"| {label} | {ratio_line(ratio, row)}"
        if "not_measured" in row:
            yield f"| {label} | not measured: {row['not_measured']} | | | | | |"


def ratio_line(ratio: dict[str, Any], row: dict[str, Any]) -> str:
    """The cells behind the setting."""
    name = f"{ratio['name']}, prefill" if ratio in row.get("prefill_ratios", []) else ratio["name"]
    goal = "" if ratio["goal"] is None else f"≤ {ratio['goal']:g}"
    met = {True: "yes", False: "**no**", None: ""}[ratio["met"]]
    others = (ratio.get(key) for key in ("of_fastest", "by_flops"))
    fastest, by_flops = ("" if value is None else f"{value:.3f}" for value in others)
    cells = [f"**{name}**", ranged(ratio, 1, ".3f"), fastest, by_flops, goal, met]
    return " | ".join(cells) + " |"


def measured(row: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What was measured of each system, and how it reads."""
    for system, seconds in row.get("prefill_seconds", {}).items():
        yield f"{system}, prefill of one row", f"{ranged(seconds, MILLI, '.1f')} ms"
    for system, seconds in row.get("seconds", {}).items():
        yield system, f"{ranged(seconds, MILLI, '.1f')} ms"
        for part, median in seconds.get("parts", {}).items():
            yield f"{system}: {part}", f"{median / MILLI:.1f} ms"
    for system, held in row.get("bytes", {}).items():
        yield system, f"{held['peak'] / MEGA:.0f} MB above {held['loaded'] / MEGA:.0f} MB"
    for system, rate in row.get("tokens_per_second", {}).items():
        yield f"{system}, tokens/s", ranged(rate, 1, ".2f")


def ranged(found: dict[str, float], unit: float, form: str) -> str:
    """Median (least–most)."""
    median, low, high = (format(found[key] / unit, form) for key in ("median", "min", "max"))
    return f"{median} ({low}–{high})" if low != high else median


def label_of(row: dict[str, Any]) -> str:
    """A setting in words."""
    setting = row["setting"]
    words = [
        f"{setting['batch']}×{setting['length']}",
        f"{setting['connections']} connections{', narrow' * setting.get('narrow', False)}",
        " + ".join(setting["augmenting"]),
        setting["dtype"],
    ]
    if setting["checkpointing"]:
        words.append("checkpointing")
    if row.get("compiled"):
        words.append("static cache, compiled")
    if "peer" in row:
        words = [row["peer"], row["measured"], *words]
    return ", ".join(words)


def curve_table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """A table of all curves, a point a line."""
    yield "| curve | at | measured | expected |"
    yield "| --- | ---: | ---: | ---: |"
    for row in rows:
        if "not_measured" in row:
            yield f"| {row['curve']} | | not measured: {row['not_measured']} | |"
            continue
        unit, name = unit_of(row)
        for at, value, wanted in zip(row["at"], row["measured"], row["expected"], strict=True):
            cells = (f"{number / unit:.1f} {name}" for number in (value, wanted))
            yield f"| {row['curve']} | {at} | {' | '.join(cells)} |"


def unit_of(row: dict[str, Any]) -> tuple[float, str]:
    """Of a curve's numbers."""
    return (MILLI, "ms") if row["y"] == "seconds" else (MEGA, "MB")


def draw_curves(folder: Path, rows: list[dict[str, Any]]) -> None:
    """A plot for each curve: points measured, a line expected."""
    for row in rows:
        if "not_measured" in row:
            continue
        unit, name = unit_of(row)
        scaled = {
            key: [value / unit for value in row[key]]
            for key in ("measured", "low", "high", "expected")
        }
        below = [m - low for m, low in zip(scaled["measured"], scaled["low"], strict=True)]
        above = [high - m for m, high in zip(scaled["measured"], scaled["high"], strict=True)]
        figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
        axes.plot(
            row["at"], scaled["expected"], color="0.6", label=f"expected: {row['expected_is']}"
        )
        axes.errorbar(
            row["at"], scaled["measured"], [below, above], fmt="o", capsize=3, label="measured"
        )
        axes.set_title(row["curve"])
        axes.set_xlabel(row["x"])
        axes.set_ylabel(f"{row['y'].replace('bytes', name).replace('seconds', name)}")
        axes.set_ylim(bottom=0)
        axes.set_xlim(left=0)
        axes.legend()
        figure.savefig(folder / f"{row['curve'].replace(', ', '_').replace(' ', '_')}.png", dpi=120)
        plt.close(figure)


def draw_ratios(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    """All ratios of a section: a point with its spread, and a bar where the goal is."""
    found = [
        (f"{ratio['name']}\n{label_of(row)}", ratio)
        for row in rows
        for ratio in row.get("ratios", [])
    ]
    if not found:
        return
    figure, axes = plt.subplots(figsize=(9, 0.5 * len(found) + 1.2), layout="constrained")
    for place, (_, ratio) in enumerate(found):
        colour = {True: "tab:green", False: "tab:red", None: "tab:blue"}[ratio["met"]]
        axes.plot([ratio["min"], ratio["max"]], [place, place], color=colour)
        axes.plot(ratio["median"], place, "o", color=colour)
        if ratio["goal"] is not None:
            axes.plot(ratio["goal"], place, "|", color="black", markersize=14)
    axes.axvline(1, color="0.8", zorder=0)
    axes.set_yticks(range(len(found)), [label for label, _ in found], fontsize=7)
    axes.invert_yaxis()
    axes.set_title(f"{TITLES[name]} (black: goal)")
    figure.savefig(folder / f"{name}.png", dpi=120)
    plt.close(figure)
