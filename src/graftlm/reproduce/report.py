"""Write an experiment down: results.json, report.md, and report.html, one file with its plots."""

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from rich import box
from rich.console import Console
from rich.table import Table

from graftlm.reproduce.files import write_text
from graftlm.reproduce.systems import OURS

LEVEL = 0.05
WORDS = {True: "met", False: "missed", None: "not measured"}
LEGEND = (
    f"`*` composed is better, `†` it is worse, with p < {LEVEL} after Holm's correction over the "
    "systems of a column: paired bootstrap over examples and, where there are several, seeds "
    "(10,000 resamples) that both have, and not below p of a t-test over three seeds and more. "
    "± is the deviation over seeds. The share of gain: how much of what composed gains over m_B "
    "alone a row gains too."
)
Results = Mapping[str, Any]


def write_report(folder: Path, results: Results, *, plots: bool) -> None:
    """Write `results.json`, the reports and the plots."""
    names = []
    if plots:
        from graftlm.reproduce.plots import draw  # matplotlib is slow to import

        names = draw(folder, results)
    write_text(folder / "results.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    images = {name: base64.b64encode((folder / name).read_bytes()).decode() for name in names}
    shown = {
        "r": results,
        "tables": tables(results),
        "cost": cost_table(results),
        "legend": LEGEND,
        "words": WORDS,
        "settings": flatten(results["settings"]),
        "plots": names,
        "images": images,
    }
    for kind in ("md", "html"):
        environment = Environment(
            loader=PackageLoader("graftlm.reproduce"),
            autoescape=kind == "html",
            trim_blocks=True,
            lstrip_blocks=True,
        )
        page = environment.get_template(f"report.{kind}.j2").render(shown)
        write_text(folder / f"report.{kind}", page)


def tables(results: Results) -> list[dict[str, Any]]:
    """One table a test, and one for its ablations."""
    made = []
    ablations = results["ablations"]
    main = [name for name in results["systems"] if name not in ablations]
    for test, groups in results["table"].items():
        sizes = results["sizes"][test]
        asked = results["answered"][test]
        counts = ", ".join(
            f"{group}: {sizes[group]} examples"
            + (f" ({asked} answered)" if asked is not None and asked < sizes[group] else "")
            for group in groups
        )
        caption = " ".join(filter(None, [f"{counts}.", results["paper"].get(test)]))
        title = "What m_B could do before" if test == "before" else test
        made.append(table(results, test, main, title, caption))
        if ablations:
            made.append(table(results, test, [OURS, *ablations], f"{title}: ablations", caption))
        if len(results["systems"]) > 1:
            made.append(difference_table(results, test, title))
    return made


def difference_table(results: Results, test: str, title: str) -> dict[str, Any]:
    """How far composed is from each system, and how sure that is."""
    groups, metrics = results["table"][test], results["metrics"][test]
    columns = [(group, metric) for group in groups for metric in metrics]
    others = [name for name in results["systems"] if name != OURS]
    rows = []
    for name in others:
        cells = [
            difference_text(groups[group][metric][name]["against"], metrics[metric][1])
            for group, metric in columns
        ]
        rows.append([results["systems"][name], *cells])
    return {
        "title": f"{title}: composed less the others",
        "caption": "With the interval of 95 % of the resamples, and p after Holm's correction.",
        "head": ["system", *(column_name(group, metric, groups) for group, metric in columns)],
        "rows": rows,
    }


def difference_text(against: Mapping[str, Any], digits: int) -> str:
    """A difference, its interval and its p."""
    size, low, high = (f"{against[name]:+.{digits}f}" for name in ("difference", "low", "high"))
    return f"{size} ({low} to {high}), p {against['p_corrected']:.2g}"


def table(
    results: Results, test: str, systems: Sequence[str], title: str, caption: str
) -> dict[str, Any]:
    """A row for each system; a column for each group and metric, and the share of the gain."""
    groups = results["table"][test]
    metrics = results["metrics"][test]
    first = next(iter(metrics))
    columns = [(group, metric) for group in groups for metric in metrics]
    head = ["system", *(column_name(g, m, groups) for g, m in columns), "share of gain", "seeds"]
    rows = []
    for name in systems:
        cells = [
            cell_text(groups[group][metric][name], *metrics[metric]) for group, metric in columns
        ]
        shares = [
            share
            for group in groups
            if (share := results["gains"][test][group][first].get(name)) is not None
        ]
        # A gain that is chance has no shares worth showing.
        share = (
            f"{100 * sum(shares) / len(shares):.0f} %"
            if shares and gained(groups, first, metrics[first][0])
            else ""
        )
        rows.append([results["systems"][name], *cells, share, str(results["seeds"][name])])
    return {"title": title, "caption": caption, "head": head, "rows": rows}


def column_name(group: str, metric: str, groups: Mapping[str, Any]) -> str:
    """A column's head; the only group of a test needs no name."""
    return metric if len(groups) == 1 else f"{group}, {metric}"


def gained(groups: Mapping[str, Any], metric: str, lower_is_better: bool) -> bool:
    """Whether composed is better than the anchor in every group, and surely so."""
    found = [metrics[metric].get("anchor", {}).get("against") for metrics in groups.values()]
    return all(against is not None and is_ahead(against, lower_is_better) for against in found)


def is_ahead(against: Mapping[str, Any], lower_is_better: bool) -> bool:
    """Whether composed is better, and surely so."""
    better = (against["difference"] < 0) == lower_is_better
    return better and against["p_corrected"] < LEVEL


def cell_text(cell: Mapping[str, Any], lower_is_better: bool, digits: int) -> str:
    """A number with its deviation and its mark."""
    text = f"{cell['mean']:.{digits}f}"
    if len(cell["seeds"]) > 1:
        text += f" ± {cell['deviation']:.{digits}f}"
    against = cell["against"]
    if against is None or against["p_corrected"] >= LEVEL:
        return text
    return f"{text} {'*' if is_ahead(against, lower_is_better) else '†'}"


def cost_table(results: Results) -> dict[str, Any]:
    """What each system took."""
    head = ["system", "weights that train", "training PFLOPs", "seconds"]
    head += ["peak memory", "tokens/s", "measured on"]
    rows = []
    for name, cost in results["costs"].items():
        trained = cost["weights"]
        rows.append(
            [
                results["systems"][name],
                f"{trained:,.0f}" if trained else "",
                f"{cost['flops'] / 1e15:.3g}" if trained else "",
                f"{cost['training_seconds']:.0f}" if trained else "",
                f"{cost['peak_bytes'] / 1e9:.2f} GB" if cost["peak_bytes"] else "",
                f"{cost['generated_per_second']:.0f}" if cost["generated_per_second"] else "",
                cost["machine"],
            ]
        )
    return {
        "head": head,
        "rows": rows,
        "caption": "Means over seeds. Seconds: of training, loading included; peak memory: of the "
        "process in training (in answering, if nothing trains), everything included; tokens/s: "
        "generated in the tests, all batches together, the prompts' reading included. What else "
        "ran on the machine is in them.",
    }


def print_summary(results: Results, console: Console) -> None:
    """The first metric of each test, in the terminal, and the goals."""
    for test, groups in results["table"].items():
        first, (lower, digits) = next(iter(results["metrics"][test].items()))
        shown = Table(title=f"{test}: {first}", box=box.SIMPLE)
        shown.add_column("system", no_wrap=True)
        for group in groups:
            shown.add_column(group, justify="right")
        for name in results["systems"]:
            cells = [cell_text(groups[group][first][name], lower, digits) for group in groups]
            shown.add_row(name, *cells, style="bold" if name == OURS else None)
        console.print(shown)
    for goal in results["goals"]:
        console.print(f"{WORDS[goal['met']]}: {goal['says']}", highlight=False)


def flatten(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Name nested settings with dots."""
    pairs: list[tuple[str, Any]] = []
    for name, value in settings.items():
        if isinstance(value, Mapping):
            pairs += flatten(value, f"{prefix}{name}.")
        else:
            pairs.append((prefix + name, value))
    return pairs
