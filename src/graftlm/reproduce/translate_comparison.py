"""From the scores of all systems to tables: numbers, and how sure it is that they differ."""

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from graftlm.reproduce.translate_data import Corpus, Pair
from graftlm.reproduce.translate_evaluation import (
    Scores,
    bits_per_byte,
    bootstrap,
    chrf_and_bleu,
    num_bytes,
)
from graftlm.reproduce.translate_systems import CONTROLS

METRICS = ("bits per byte", "chrF", "BLEU")
LOWER_IS_BETTER = frozenset({"bits per byte"})
LEVEL = 0.05
Cell = dict[str, float]  # mean, deviation over seeds, and the largest p of all seeds
AllScores = Sequence[Mapping[str, Mapping[str, Mapping[str, Scores]]]]


def compare(corpus: Corpus, scores: AllScores) -> dict[str, Any]:
    """Tables by test, group, metric and system, and the verdict of each group."""
    table: dict[str, dict[str, dict[str, dict[str, Cell]]]] = {}
    for test, sets in corpus.tests.items():
        table[test] = {
            group: compare_group(
                pairs,
                [{name: tests[test][group] for name, tests in seed.items()} for seed in scores],
            )
            for group, pairs in sets.items()
        }
    return {"table": table, "beaten": verdicts(table)}


def compare_group(
    pairs: Sequence[Pair], seeds: Sequence[Mapping[str, Scores]]
) -> dict[str, dict[str, Cell]]:
    """All metrics of all systems on one set of pairs, over the seeds."""
    runs = [compare_seed(pairs, seed) for seed in seeds]
    return {
        metric: {
            system: over_seeds([run[metric][system] for run in runs]) for system in runs[0][metric]
        }
        for metric in METRICS
    }


def compare_seed(
    pairs: Sequence[Pair], scores: Mapping[str, Scores]
) -> dict[str, dict[str, dict[str, float]]]:
    """All metrics of all systems of one seed: score, and p of the difference to composed."""
    sizes = num_bytes(pairs)
    own = scores["composed"].bits
    table: dict[str, dict[str, dict[str, float]]] = {metric: {} for metric in METRICS}
    for name, found in scores.items():
        cell = {"score": bits_per_byte(found.bits, sizes)}
        if name != "composed":
            cell["p"] = bootstrap(own, found.bits, sizes)
        table["bits per byte"][name] = cell
    texts = {name: found.texts for name, found in scores.items()}
    references = [pair.target for pair in pairs[: len(texts["composed"])]]
    for name, metrics in chrf_and_bleu(texts, references, "composed").items():
        for metric, cell in metrics.items():
            table[metric][name] = cell
    return table


def over_seeds(cells: Sequence[Mapping[str, float]]) -> Cell:
    """Mean and deviation; of the p values the largest, so that each seed has to hold."""
    found = [cell["score"] for cell in cells]
    summary = {"mean": fmean(found), "deviation": stdev(found) if len(found) > 1 else 0.0}
    if "p" in cells[0]:
        summary["p"] = max(cell["p"] for cell in cells)
    return summary


def is_beaten(cells: Mapping[str, Cell], system: str, metric: str) -> bool:
    """Whether composed is better than a system, and surely so."""
    difference = cells["composed"]["mean"] - cells[system]["mean"]
    better = difference < 0 if metric in LOWER_IS_BETTER else difference > 0
    return better and cells[system]["p"] < LEVEL


def verdicts(
    table: Mapping[str, Mapping[str, Mapping[str, Mapping[str, Cell]]]],
) -> dict[str, dict[str, dict[str, list[str]]]]:
    """By test and metric: for each group the controls that composed beats for sure."""
    return {
        test: {
            metric: {
                group: [
                    name
                    for name in CONTROLS
                    if name in groups[group][metric]
                    and is_beaten(groups[group][metric], name, metric)
                ]
                for group in groups
            }
            for metric in METRICS
        }
        for test, groups in table.items()
    }
