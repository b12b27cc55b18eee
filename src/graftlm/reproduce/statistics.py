"""Compare systems: means over seeds, paired bootstraps, and corrections for many comparisons."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import numpy as np

from graftlm.reproduce.metrics import Metric, Rows

RESAMPLES = 10_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Ours against another system on one set of examples.

    Args:
        difference: Ours less theirs, mean over the seeds both have.
        low, high: 95 % of the resampled differences lie between.
        p: How probable so large a difference is by chance; two-sided.
        p_corrected: The same, if all comparisons with ours on these examples are to hold at once
            (Holm).
        seeds: That both have.
    """

    difference: float
    low: float
    high: float
    p: float
    p_corrected: float
    seeds: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One system's number.

    Args:
        seeds: The score of each seed.
        against: Ours compared with it; None for ours.
    """

    mean: float
    deviation: float
    seeds: list[float]
    against: Comparison | None = None


def compare(
    metric: Metric, rows: Mapping[str, Sequence[Rows]], ours: str, resamples: int = RESAMPLES
) -> dict[str, Cell]:
    """All systems on one set of examples.

    Args:
        rows: By system, for each seed what `metric.rows` gave.
        ours: The system that others are compared with.
    """
    cells = {}
    for name, seeds in rows.items():
        scores = [float(metric.score(found.sum(0))) for found in seeds]
        deviation = stdev(scores) if len(scores) > 1 else 0.0
        cells[name] = Cell(mean=fmean(scores), deviation=deviation, seeds=scores)
    others = [name for name in rows if name != ours]
    if ours not in rows or not others:
        return cells
    found = {name: bootstrap(metric, rows[ours], rows[name], resamples) for name in others}
    corrected = holm({name: comparison.p for name, comparison in found.items()})
    for name, comparison in found.items():
        cell = cells[name]
        cells[name] = Cell(
            mean=cell.mean,
            deviation=cell.deviation,
            seeds=cell.seeds,
            against=Comparison(
                difference=comparison.difference,
                low=comparison.low,
                high=comparison.high,
                p=comparison.p,
                p_corrected=corrected[name],
                seeds=comparison.seeds,
            ),
        )
    return cells


def bootstrap(
    metric: Metric, ours: Sequence[Rows], theirs: Sequence[Rows], resamples: int
) -> Comparison:
    """Resample seeds and, in all of them alike, examples; paired.

    p is how often a resampled difference lies as far from the observed one as that lies from
    zero, as in sacrebleu's paired bootstrap. With one seed, only examples are resampled: the
    result then says nothing about other seeds. A few seeds resampled show less than their spread,
    so p is at least that of a paired t-test over the seeds, from three on.
    """
    seeds = min(len(ours), len(theirs))
    pairs = list(zip(ours[:seeds], theirs[:seeds], strict=True))
    by_seed = [float(metric.score(a.sum(0)) - metric.score(b.sum(0))) for a, b in pairs]
    observed = fmean(by_seed)
    rng = np.random.default_rng(0)
    size = min(len(a) for a, _ in pairs)
    differences = np.empty(resamples)
    chunk = 500  # of resamples at a time, for memory
    for start in range(0, resamples, chunk):
        number = min(chunk, resamples - start)
        weights = rng.multinomial(size, np.full(size, 1 / size), size=number).astype(float)
        drawn = rng.integers(seeds, size=(number, seeds))
        scores = np.stack(
            [metric.score(weights @ a[:size]) - metric.score(weights @ b[:size]) for a, b in pairs]
        )  # (seeds, resamples)
        differences[start : start + number] = np.take_along_axis(scores.T, drawn, 1).mean(1)
    extreme = np.abs(differences - differences.mean()) >= abs(observed)
    low, high = np.quantile(differences, [0.025, 0.975])
    p = max((int(extreme.sum()) + 1) / (resamples + 1), p_of_seeds(by_seed))
    return Comparison(
        difference=observed, low=float(low), high=float(high), p=p, p_corrected=p, seeds=seeds
    )


def p_of_seeds(differences: Sequence[float]) -> float:
    """Of a paired t-test, two-sided; 0, which decides nothing, where there is none."""
    if len(differences) < 3 or len(set(differences)) == 1:
        return 0.0
    from scipy.stats import ttest_1samp

    return float(ttest_1samp(differences, 0.0).pvalue)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's correction: the family-wise error stays below the level if all are tested at it."""
    corrected: dict[str, float] = {}
    largest = 0.0
    for place, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[name]))
        corrected[name] = largest
    return corrected


def share_of_gain(cells: Mapping[str, Cell], name: str, ours: str, base: str) -> float | None:
    """How much of our gain over the anchor a control has too; None if there is no gain."""
    if base not in cells or ours not in cells:
        return None
    gain = cells[ours].mean - cells[base].mean
    return (cells[name].mean - cells[base].mean) / gain if gain else None
