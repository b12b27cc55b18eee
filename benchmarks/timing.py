"""Timing several systems against each other: in turns, so that a machine's drift hits all alike."""

import gc
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch

from graftlm.planning import flop_counter

# One run of a system. It calls `lap(name)` behind each part that is to be reported on its own.
Lap = Callable[[str], None]
Step = Callable[[Lap], Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Goal:
    """A ratio of times (or bytes) that must not be exceeded.

    Args:
        system: The measured one.
        against: One system, or several whose sum counts.
        at_most: The goal; None if the ratio is for information.
    """

    system: str
    against: tuple[str, ...]
    at_most: float | None = None

    @property
    def name(self) -> str:
        """As tables show it."""
        below = " + ".join(self.against)
        return f"{self.system} / {f'({below})' if len(self.against) > 1 else below}"


class Watch:
    """Seconds since the start, and of each lap."""

    def __init__(self, device: str):
        self.is_cuda = device.startswith("cuda")
        self.laps: dict[str, float] = {}
        self.start = self.last = self.now()

    def now(self) -> float:
        """The time, once the device has done its work."""
        if self.is_cuda:
            torch.cuda.synchronize()
        return perf_counter()

    def lap(self, name: str) -> None:
        """End a part."""
        now = self.now()
        self.laps[name], self.last = now - self.last, now

    def stop(self) -> dict[str, float]:
        """Seconds of each lap and of all."""
        return self.laps | {"total": self.now() - self.start}


@dataclass(frozen=True, slots=True)
class Times:
    """What was measured: for each system, seconds by part in each round, and operations a run."""

    rounds: dict[str, list[dict[str, float]]]
    flops: dict[str, int]

    def totals(self, system: str) -> list[float]:
        """Seconds of a system in each round."""
        return [seconds["total"] for seconds in self.rounds[system]]

    def summary(self) -> dict[str, Any]:
        """For the results: each system's seconds and their parts."""
        return {
            name: spread(self.totals(name))
            | {"flops": self.flops.get(name)}
            | {
                "parts": {
                    part: statistics.median(seconds[part] for seconds in rounds)
                    for part in rounds[0]
                    if part != "total"
                }
            }
            for name, rounds in self.rounds.items()
        }

    def ratios(self, goals: Sequence[Goal]) -> list[dict[str, Any]]:
        """Each goal's ratio, round by round, and what the operations alone would make it."""
        made = []
        for goal in goals:
            if {goal.system, *goal.against} <= set(self.rounds):
                parts = zip(*map(self.totals, goal.against), strict=True)
                against = [sum(seconds) for seconds in parts]
                ours = self.totals(goal.system)
                found = judged(goal, [a / b for a, b in zip(ours, against, strict=True)])
                fastest = min(ours) / min(against)  # little disturbed by what else runs
                made.append(found | {"of_fastest": fastest, "by_flops": self.by_flops(goal)})
        return made

    def by_flops(self, goal: Goal) -> float | None:
        """What a ratio would be if nothing but operations took time."""
        if not self.flops:
            return None
        return self.flops[goal.system] / sum(self.flops[name] for name in goal.against)


def measure(
    systems: Mapping[str, Step], *, rounds: int, device: str, warmups: int = 1, count: bool = True
) -> Times:
    """Run all systems once a round, each round in another order.

    Args:
        systems: By name.
        rounds: How many count.
        device: Where they run.
        warmups: Rounds before that.
        count: Whether to count operations, in the first of them; not possible in compiled code.
    """
    flops: dict[str, int] = {}
    names = list(systems)
    for number in range(warmups):
        for name in names:
            with flop_counter() if count and number == 0 else nullcontext() as counter:
                systems[name](no_lap)
            if counter is not None:
                flops[name] = counter.get_total_flops()
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    gc.collect()
    gc.disable()  # as timeit does: what is collected is seldom the garbage of who is measured
    try:
        for number in range(rounds):
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                watch = Watch(device)
                systems[name](watch.lap)
                taken[name].append(watch.stop())
            gc.collect()
    finally:
        gc.enable()
    return Times(taken, flops)


def no_lap(part: str) -> None:
    """For runs that are not timed."""


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and extremes."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def judged(goal: Goal, ratios: Sequence[float]) -> dict[str, Any]:
    """A goal's ratios, and whether their median meets it."""
    found = spread(ratios)
    met = None if goal.at_most is None else found["median"] <= goal.at_most
    return {"name": goal.name, "goal": goal.at_most, "met": met} | found
