"""Write down one experiment on real models: tables, report.md, results.json and a plot."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from graftlm.reproduce.kv_report import flatten, write_text
from graftlm.reproduce.translate_comparison import (
    LEVEL,
    LOWER_IS_BETTER,
    METRICS,
    Cell,
    is_beaten,
)
from graftlm.reproduce.translate_systems import CONTROLS, SYSTEMS

DIGITS = {"bits per byte": 3, "chrF": 1, "BLEU": 1}


def cell_text(cells: Mapping[str, Cell], system: str, metric: str) -> str:
    """A number with its deviation, and a star if composed is better for sure."""
    cell = cells[system]
    text = f"{cell['mean']:.{DIGITS[metric]}f}"
    if cell["deviation"]:
        text += f" ± {cell['deviation']:.{DIGITS[metric]}f}"
    if system == "composed":
        return text
    if is_beaten(cells, system, metric):
        return f"{text} *"
    return f"{text} †" if is_better(cells, system, metric) else text


def is_better(cells: Mapping[str, Cell], system: str, metric: str) -> bool:
    """Whether a system is better than composed, and surely so."""
    difference = cells[system]["mean"] - cells["composed"]["mean"]
    better = difference < 0 if metric in LOWER_IS_BETTER else difference > 0
    return better and cells[system]["p"] < LEVEL


def rows(results: Mapping[str, Any], test: str) -> list[list[str]]:
    """System, then all metrics of each group."""
    groups = results["table"][test]
    known = next(iter(groups.values()))[METRICS[0]]
    return [
        [
            system,
            *(
                cell_text(groups[group][metric], system, metric)
                for group in groups
                for metric in METRICS
            ),
        ]
        for system in SYSTEMS
        if system in known
    ]


def rich_tables(results: Mapping[str, Any]) -> list[Table]:
    """One table a test, and of each group the two numbers that fit into a terminal."""
    tables = []
    for test, groups in results["table"].items():
        table = Table(title=f"{results['title']}: {test}", box=box.SIMPLE)
        table.add_column("system", no_wrap=True)
        for group in groups:
            table.add_column(f"{group}\nbits/byte", justify="right", no_wrap=True)
            table.add_column("\nchrF", justify="right", no_wrap=True)
        for system, *cells in rows(results, test):
            kept = [cell for k, cell in enumerate(cells) if k % len(METRICS) < 2]
            table.add_row(system, *kept, style="bold" if system == "composed" else None)
        tables.append(table)
    tables[-1].caption = f"* composed is better with p < {LEVEL}; † it is worse with p < {LEVEL}"
    return tables


def verdict_lines(results: Mapping[str, Any]) -> list[str]:
    """In how many groups composed beats every control."""
    known = next(iter(next(iter(results["table"].values())).values()))[METRICS[0]]
    asked = [control for control in CONTROLS if control in known]
    lines = []
    for test, metrics in results["beaten"].items():
        for metric, groups in metrics.items():
            whole = [group for group, beaten in groups.items() if set(beaten) == set(asked)]
            rest = "; ".join(
                f"{group}: not {', '.join(c for c in asked if c not in beaten)}"
                for group, beaten in groups.items()
                if group not in whole
            )
            lines.append(
                f"- {test}, {metric}: composed beats every control in {len(whole)} of "
                f"{len(groups)}" + (f" ({rest})" if rest else "")
            )
    return lines


def markdown_tables(results: Mapping[str, Any]) -> list[str]:
    """All numbers, a table for each test."""
    lines: list[str] = []
    for test, groups in results["table"].items():
        head = [f"{group} {metric}" for group in groups for metric in METRICS]
        counts = ", ".join(f"{number} {group}" for group, number in results["tests"][test].items())
        lines += [
            f"### {test} ({counts})",
            "",
            "| system | " + " | ".join(head) + " |",
            "| --- |" + " ---: |" * len(head),
            *(
                "| " + " | ".join([SYSTEMS[system], *cells]) + " |"
                for system, *cells in rows(results, test)
            ),
            "",
        ]
    return lines


def report(results: Mapping[str, Any], plots: Sequence[str]) -> str:
    """The report as Markdown."""
    parameters = results["parameters"]
    shown = results["examples_shown"]
    lines = [
        f"# {results['title']}",
        "",
        f"{results['about']}",
        "",
        f"Seeds: {len(results['seeds'])}. Each trained system saw the same {results['examples']:,} "
        f"pairs (of {results['training_pairs']:,}) in the same order; one model for all groups.",
        "",
        *markdown_tables(results),
        f"`*` composed is better, `†` it is worse, with p < {LEVEL}: paired bootstrap over "
        "sentences, 1,000 resamples; for chrF and BLEU sacrebleu's own. Of several seeds the "
        "largest p counts. Bits per byte: of the reference, without the end of the text. chrF and "
        f"BLEU: of the first {results['texts']} pairs of each group.",
        "",
        "## Does composed beat every control?",
        "",
        *verdict_lines(results),
        "",
        "## What they say",
        "",
        *(line for row in shown for line in example_lines(row)),
        "## What was run",
        "",
        f"- Command: `{results['command']}`",
        "- Parameters: " + ", ".join(f"{name} {count:,}" for name, count in parameters.items()),
        "- Test pairs dropped because a training pair says the same: "
        + ", ".join(f"{group} {number}" for group, number in results["dropped"].items()),
        f"- Seconds: {', '.join(f'{name} {s:.0f}' for name, s in results['seconds'].items())}",
        f"- Versions: {', '.join(f'{name} {v}' for name, v in results['versions'].items())}; "
        f"device {results['device']}, {results['threads']} threads",
        "",
        "| setting | value |",
        "| --- | --- |",
        *(f"| {name} | `{value}` |" for name, value in flatten(results["settings"])),
        "",
        *(f"![{Path(plot).stem}]({plot})" for plot in plots),
        "",
    ]
    return "\n".join(lines)


def example_lines(row: Mapping[str, str]) -> list[str]:
    """One test pair, and what each system made of it."""
    known = [name for name in ("source", "target", *SYSTEMS) if name in row]
    quoted = [f"- {name}: {' '.join(row[name].split())}" for name in known]
    return [f"{row['test']}, {row['group']}:", "", *quoted, ""]


def write_results(folder: Path, results: Mapping[str, Any], *, plots: bool) -> None:
    """Write `results.json`, `report.md` and the plot."""
    names = []
    if plots:
        from graftlm.reproduce.translate_plots import plot_scores  # matplotlib is slow to import

        names.append(plot_scores(results, folder / "scores.png"))
    write_text(folder / "results.json", json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    write_text(folder / "report.md", report(results, names))
