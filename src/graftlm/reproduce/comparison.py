"""From the answers of all systems to tables, costs and verdicts: what results.json holds."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

from graftlm.reproduce.example import Data
from graftlm.reproduce.experiment import Experiment, Goal, Test
from graftlm.reproduce.kept import Answers, Outcome
from graftlm.reproduce.metrics import Metric, Rows
from graftlm.reproduce.statistics import Cell, compare, share_of_gain
from graftlm.reproduce.systems import OURS

Found = Mapping[str, Mapping[int, Answers]]  # by system and seed
Table = dict[str, dict[str, dict[str, dict[str, Cell]]]]  # by test, group, metric and system


def tables(experiment: Experiment, data: Sequence[Data], found: Found) -> Table:
    """All numbers."""
    made: Table = {}
    for name, test in experiment.tests.items():
        groups = (data[0].retention if name == "before" else data[0].tests.get(name)) or {}
        for group in groups:
            for metric in test.metrics:
                rows = {
                    system: [
                        rows_of(metric, test, data[seed], name, group, answers)
                        for seed, answers in sorted(seeds.items())
                    ]
                    for system, seeds in found.items()
                }
                cells = compare(metric, rows, OURS)
                made.setdefault(name, {}).setdefault(group, {})[metric.name] = cells
    return made


def rows_of(
    metric: Metric, test: Test, data: Data, name: str, group: str, answers: Answers
) -> Rows:
    """What a metric gives for each example of one seed."""
    examples = (data.retention if name == "before" else data.tests[name])[group]
    size = len(examples) if metric.needs == "bits" else test.answered
    return metric.rows(examples[:size], answers[name][group][:size])


def gains(experiment: Experiment, table: Table) -> dict[str, Any]:
    """Which share of our gain over the anchor each control has, by test, group and metric."""
    return {
        test: {
            group: {
                metric: {
                    system: share_of_gain(cells, system, OURS, "anchor")
                    for system in cells
                    if system not in (OURS, "anchor")
                }
                for metric, cells in metrics.items()
            }
            for group, metrics in groups.items()
        }
        for test, groups in table.items()
    }


def costs(outcomes: Mapping[str, Mapping[int, Outcome]]) -> dict[str, Any]:
    """Means over the seeds of what each system took."""
    made = {}
    for name, seeds in outcomes.items():
        taken: list[dict[str, Any]] = [asdict(outcome.cost) for outcome in seeds.values()]
        machines = sorted({one.pop("machine") for one in taken})
        means = {key: mean([one[key] for one in taken]) for key in taken[0]}
        made[name] = means | {"machine": "; ".join(machines)}
    return made


def mean(values: Sequence[float | None]) -> float | None:
    """Of what is known."""
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def verdicts(experiment: Experiment, table: Table) -> list[dict[str, Any]]:
    """Each goal: met, missed, or not measured, and by what numbers."""
    return [{"says": goal.says} | judge(experiment, goal, table) for goal in experiment.goals]


def judge(experiment: Experiment, goal: Goal, table: Table) -> dict[str, Any]:
    """Whether a goal is met in each of its groups."""
    test = experiment.tests[goal.test]
    metric = next(m for m in test.metrics if goal.metric in (None, m.name))
    lines, verdict = [], []
    for group, metrics in table.get(goal.test, {}).items():
        if goal.group not in (None, group):
            continue
        cells = metrics[metric.name]
        for text, met in checks(goal, metric, cells):
            lines.append(f"{group}: {text}")
            verdict.append(met)
    met = None if not verdict or None in verdict else True
    met = False if False in verdict else met  # whatever else was not measured
    return {"met": met, "numbers": lines}


def checks(goal: Goal, metric: Metric, cells: Mapping[str, Cell]) -> list[tuple[str, bool | None]]:
    """What a goal asks of one group."""
    if OURS not in cells:
        return [("composed was not run", None)]
    ours = cells[OURS].mean
    made: list[tuple[str, bool | None]] = []
    if goal.at_least is not None:
        made.append((f"{ours:.{metric.digits}f} (goal {goal.at_least:g})", ours >= goal.at_least))
    made += ratio_checks(goal, ours, cells)
    for name in goal.beats:
        if name not in cells:
            made.append((f"{name} was not run", None))
            continue
        against = cells[name].against
        assert against is not None
        ahead = -against.difference if metric.lower_is_better else against.difference
        sure = goal.level is None or against.p_corrected < goal.level
        won = ahead >= goal.margin and ahead > 0 and sure
        made.append((f"{ahead:+.{metric.digits}f} over {name} (p {against.p_corrected:.4f})", won))
    return made


def ratio_checks(
    goal: Goal, ours: float, cells: Mapping[str, Cell]
) -> list[tuple[str, bool | None]]:
    """The composed model's number against the anchor's."""
    if goal.at_most_ratio is None and goal.at_least_ratio is None:
        return []
    if "anchor" not in cells:
        return [("the anchor was not run", None)]
    base = cells["anchor"].mean
    ratio = ours / base if base else float("inf")
    low, high = goal.at_least_ratio or 0.0, goal.at_most_ratio or float("inf")
    return [(f"{ratio:.3f} times m_B's ({base:.4g})", low <= ratio <= high)]


def cells_as_json(table: Table) -> Any:
    """The table as plain dictionaries."""
    return {
        test: {
            group: {
                metric: {system: asdict(cell) for system, cell in cells.items()}
                for metric, cells in metrics.items()
            }
            for group, metrics in groups.items()
        }
        for test, groups in table.items()
    }


def curves(
    outcomes: Mapping[str, Mapping[int, Outcome]],
) -> dict[str, list[list[tuple[int, float]]]]:
    """Training losses by system and seed."""
    return {
        name: [outcome.losses for _, outcome in sorted(seeds.items())]
        for name, seeds in outcomes.items()
        if any(outcome.losses for outcome in seeds.values())
    }
