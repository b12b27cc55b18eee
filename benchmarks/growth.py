"""How time and memory grow with the work, beside what counting says they should.

Operations are counted while the systems warm up, bytes on tensors without storage
(`graftlm.planning`); an expected curve of times has the counted slope and the measured height.
"""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from benchmarks import decoding
from benchmarks.memory import NotMeasuredError, peak_bytes
from benchmarks.models import Setting, build
from benchmarks.timing import Times, measure, no_lap
from benchmarks.training_step import composed
from graftlm.planning import training_cost


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """One quantity against one kind of work.

    Args:
        name: Of the plot's file.
        x: What grows, as the axis says it.
        points: (how much, the setting with that much).
        rounds: At most so many, where one takes minutes.
    """

    name: str
    x: str
    points: list[tuple[int, Setting]]
    rounds: int = 3


def curves(base: Setting, *, quick: bool) -> list[Curve]:
    """What is varied, one thing at a time."""
    lengths = [128, 256, 512] if quick else [128, 256, 512, 1024, 2048]
    long = [256, 512] if quick else [512, 1024, 2048, 4096, 8192]
    batches = [1, 2] if quick else [1, 2, 4, 8]
    numbers = [1, 4, 15] if quick else [1, 2, 4, 7, 15, 30]
    models = [1, 2] if quick else [1, 2, 3, 4]
    if base.size == "tiny":
        lengths, long, numbers = [8, 16], [8, 16], [1, 4]
    short = replace(base, length=min(lengths[0], 128))
    small = replace(short, augmenting=("tenth",))
    return [
        Curve(
            name="length",
            x="tokens of a row",
            points=[(n, replace(base, length=n)) for n in lengths],
        ),
        Curve(
            name="length_checkpointed",
            x="tokens of a row, with gradient checkpointing",
            points=[(n, replace(base, length=n, checkpointing=True)) for n in long],
            rounds=1,
        ),
        Curve(
            name="batch",
            x=f"rows of {short.length} tokens",
            points=[(n, replace(short, batch=n)) for n in batches],
        ),
        Curve(
            name="connections",
            x=f"connections ({short.length} tokens)",
            points=[(n, replace(short, connections=n)) for n in numbers],
        ),
        Curve(
            name="models",
            x=f"augmenting models ({short.length} tokens)",
            points=[(n, replace(small, augmenting=("tenth",) * n)) for n in models],
        ),
    ]


def prompts(base: Setting, *, quick: bool) -> Curve:
    """Decoding behind longer and longer prompts."""
    lengths = [64, 256, 1024] if quick else [64, 256, 1024, 2048, 4096, 8192]
    if base.size == "tiny":
        lengths = [8, 16]
    return Curve(
        name="prompt",
        x="tokens of the prompt",
        points=[(n, replace(base, length=n)) for n in lengths],
    )


def times(curve: Curve, rounds: int) -> dict[str, Any]:
    """Seconds of the composed training step at each point."""
    steps = {str(n): composed(build(setting)) for n, setting in curve.points}
    rounds = min(rounds, curve.rounds)
    measured = measure(steps, rounds=rounds, device=curve.points[0][1].device)
    return timed(f"training time, {curve.name}", curve, measured)


def token_times(curve: Curve, tokens: int) -> dict[str, Any]:
    """Seconds of a decoded token at each point."""
    systems = {}
    for n, setting in curve.points:
        systems[str(n)] = decoding.decoders(build(setting), setting.batch)["composed"]
        systems[str(n)].prefill(no_lap)
    steps = {name: system.step for name, system in systems.items()}
    measured = measure(steps, rounds=tokens, device=curve.points[0][1].device, warmups=3)
    return timed(f"decoding time, {curve.name}", curve, measured)


def timed(name: str, curve: Curve, measured: Times) -> dict[str, Any]:
    """A row of times, and times in proportion to the operations counted."""
    seconds = measured.summary()
    keys = [str(n) for n, _ in curve.points]
    slope = statistics.median(seconds[key]["median"] / seconds[key]["flops"] for key in keys)
    return {
        "curve": name,
        "x": curve.x,
        "y": "seconds",
        "settings": [setting.to_dict() for _, setting in curve.points],
        "at": [n for n, _ in curve.points],
        "measured": [seconds[key]["median"] for key in keys],
        "low": [seconds[key]["min"] for key in keys],
        "high": [seconds[key]["max"] for key in keys],
        "expected": [slope * seconds[key]["flops"] for key in keys],
        "expected_is": "in proportion to the operations counted",
    }


def memory(curve: Curve, threads: int) -> dict[str, Any]:
    """Peak bytes above the loaded weights at each point."""
    name = f"training memory, {curve.name}"
    try:
        measured = [peak_bytes("composed", setting, threads)["peak"] for _, setting in curve.points]
    except NotMeasuredError as error:
        return {"curve": name, "not_measured": str(error)}
    return {
        "curve": name,
        "x": curve.x,
        "y": "bytes above the loaded weights",
        "settings": [setting.to_dict() for _, setting in curve.points],
        "at": [n for n, _ in curve.points],
        "measured": measured,
        "low": measured,
        "high": measured,
        "expected": [counted_bytes(setting) for _, setting in curve.points],
        "expected_is": "counted by graftlm plan",
    }


def counted_bytes(setting: Setting) -> int:
    """What is kept for the backward pass, and the bridges' gradients and AdamW's state."""
    model = build(setting).compose()
    cost = training_cost(
        model.config,
        batch_size=setting.batch,
        length=setting.length,
        checkpointing=setting.checkpointing,
    )
    trained = sum(p.numel() * p.element_size() for p in model.bridges.parameters())
    return cost.kept + cost.passing + 3 * trained


def rows(base: Setting, *, quick: bool, rounds: int, threads: int) -> Iterable[dict[str, Any]]:
    """All curves, one after the other."""
    for curve in curves(base, quick=quick):
        yield times(curve, rounds)
        yield memory(curve, threads)
        if curve.name == "connections":
            yield token_times(curve, 4 * rounds)
    yield token_times(prompts(base, quick=quick), 4 * rounds)
