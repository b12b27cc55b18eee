"""Other implementations of CALM beside ours: the same shapes, one thread, in turns.

A peer is a checkout that the user names, recognised by its files, and runs with a Python that has
what it needs (docs/benchmarks.md). Nothing of it is part of this project.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.memory import NotMeasuredError
from benchmarks.models import NARROWER, Setting, anchor_config, connections, narrowed
from benchmarks.timing import Goal, judged, spread

DRIVER = Path(__file__).with_name("peer_driver.py")
# What tells the checkouts apart, and the family of the models that both compose. The
# x-transformers of the one have Llama's layers.
KINDS = {
    "calm": (Path("model/calm.py"), "gemma"),
    "calm-pytorch": (Path("CALM_pytorch/CALM.py"), "llama"),
}
NUM_CONNECTIONS = 6


def kind_of(path: Path) -> str:
    """Which implementation a checkout holds.

    Raises:
        NotMeasuredError: If none that is known.
    """
    for kind, (file, _) in KINDS.items():
        if (path / file).exists():
            return kind
    files = " or ".join(str(file) for file, _ in KINDS.values())
    raise NotMeasuredError(f"{path} holds no implementation known here (no {files})")


def rows(path: Path, python: str, *, size: str, quick: bool) -> Iterator[dict[str, Any]]:
    """A training step and decoding, each of the peer and of ours."""
    setting = Setting(size=size, connections=NUM_CONNECTIONS, length=16 if size == "tiny" else 512)
    try:
        kind = kind_of(path)
    except NotMeasuredError as error:
        row = {"peer": path.name, "measured": "nothing", "setting": setting.to_dict()}
        yield row | {"not_measured": str(error)}
        return
    task = {"path": str(path.resolve()), "length": setting.length, "steps": 1 if quick else 3}
    task |= {"prompt": min(64, setting.length), "tokens": 16 if quick else 128}
    task |= shapes(size) | {"family": KINDS[kind][1]}
    runs = 1 if quick else 2
    for name, summarise in {"step": steps, "decoding": speeds}.items():
        row = {"peer": kind, "measured": name, "setting": setting.to_dict()}
        try:
            found = in_turns(kind, python, task | {"task": name}, runs)
        except NotMeasuredError as error:
            yield row | {"not_measured": str(error)}
        else:
            yield row | summarise(kind, found)


def shapes(size: str) -> dict[str, Any]:
    """The anchor, an augmenting model of half its width, and what connects them."""
    config = anchor_config(size)
    pairs = connections(NUM_CONNECTIONS, ["augmenting"], config.num_hidden_layers)
    return {
        "anchor": narrowed(config, 1).to_dict(),
        "augmenting": narrowed(config, NARROWER["half"]).to_dict(),
        "connections": [(c.augmenting_layer, c.anchor_layer) for c in pairs],
    }


def in_turns(kind: str, python: str, task: dict[str, Any], runs: int) -> dict[str, list[Any]]:
    """Several processes of the peer and of ours, alternately."""
    found: dict[str, list[Any]] = {kind: [], "graftlm": []}
    for _ in range(runs):
        found[kind].append(run(python, task | {"kind": kind}))
        found["graftlm"].append(run(sys.executable, task | {"kind": "graftlm"}))
    return found


def run(python: str, task: dict[str, Any]) -> dict[str, Any]:
    """One process.

    Raises:
        NotMeasuredError: If it failed, with the last line it wrote.
    """
    ours = task["kind"] == "graftlm"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    if not ours:
        environment.pop("PYTHONPATH", None)  # which may lead to what is only ours
    done = subprocess.run(
        [python, str(DRIVER), json.dumps(task)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise NotMeasuredError(f"{task['kind']} with {python} ended with {last}")
    return json.loads(done.stdout.splitlines()[-1])


def steps(kind: str, found: dict[str, list[Any]]) -> dict[str, Any]:
    """Times and peaks of a training step."""
    goal = Goal(system="graftlm", against=(kind,), at_most=1.0)
    seconds = {name: [s for run in runs for s in run["seconds"]] for name, runs in found.items()}
    ratios = [a / b for a, b in zip(seconds["graftlm"], seconds[kind], strict=True)]
    held = {
        name: max(({"peak": r["peak"], "loaded": r["loaded"]} for r in runs), key=peak_of)
        for name, runs in found.items()
    }
    memory = judged(goal, [held["graftlm"]["peak"] / held[kind]["peak"]])
    return {
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "bytes": held,
        "trained": {name: runs[0]["trained"] for name, runs in found.items()},
        "versions": {name: runs[0]["versions"] for name, runs in found.items()},
        "ratios": [
            judged(goal, ratios) | {"name": f"{goal.name}, time"},
            memory | {"name": f"{goal.name}, memory"},
        ],
    }


def peak_of(held: dict[str, int]) -> int:
    """For finding the highest."""
    return held["peak"]


def speeds(kind: str, found: dict[str, list[Any]]) -> dict[str, Any]:
    """Tokens a second, and the ratio of the times that a token takes."""
    rates = {name: [run["tokens_per_second"] for run in runs] for name, runs in found.items()}
    goal = Goal(system="graftlm", against=(kind,), at_most=1.0)
    ratios = [b / a for a, b in zip(rates["graftlm"], rates[kind], strict=True)]
    return {
        "tokens_per_second": {name: spread(values) for name, values in rates.items()},
        "versions": {name: runs[0]["versions"] for name, runs in found.items()},
        "ratios": [judged(goal, ratios) | {"name": f"{goal.name}, time of a token"}],
    }
