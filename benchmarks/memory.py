"""Peak memory of a training step above the loaded weights, each system in a process of its own.

    python -m benchmarks.memory '{"system": "composed", "setting": {...}, "threads": 2}'

On Linux the kernel keeps the high-water mark of resident memory, and can be told to start anew.
"""

import ctypes
import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.models import Setting, build
from benchmarks.timing import Goal, judged, no_lap
from benchmarks.training_step import SYSTEMS

STEPS = 2  # the first makes the optimizer's state, the second has it from its beginning
GOAL = Goal(system="composed", against=("lora",), at_most=0.85)


class NotMeasuredError(Exception):
    """Says why."""


def peak_bytes(system: str, setting: Setting, threads: int) -> dict[str, int]:
    """Measure in a child process.

    Returns:
        `peak`, bytes above `loaded`, what the process held before the first step.

    Raises:
        NotMeasuredError: If this system cannot tell, or the child failed.
    """
    if setting.device == "cpu" and not Path("/proc/self/clear_refs").exists():
        raise NotMeasuredError("the high-water mark of memory is read from Linux's /proc")
    task = {"system": system, "setting": setting.to_dict(), "threads": threads}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", json.dumps(task)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent.parent,
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise NotMeasuredError(f"the process ended with {done.returncode}: {last}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(system: str, setting: Setting) -> dict[str, int]:
    """In the child: load, note what is held, run, and look how high it rose."""
    step = SYSTEMS[system](build(setting))
    loaded = start_watching(setting.device)
    for _ in range(STEPS):
        step(no_lap)
    return {"loaded": loaded, "peak": highest(setting.device) - loaded}


def start_watching(device: str) -> int:
    """Forget earlier peaks; bytes held now."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)  # what making the models freed is not theirs
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def highest(device: str) -> int:
    """The most bytes held since."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    return resident("VmHWM")


def resident(field: str) -> int:
    """A number of bytes in /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"/proc/self/status has no {field}")


def compare(setting: Setting, threads: int) -> dict[str, Any]:
    """The composed model's peak and LoRA's."""
    peaks = {name: peak_bytes(name, setting, threads) for name in ("composed", "lora")}
    ratio = peaks["composed"]["peak"] / peaks["lora"]["peak"]
    return {"setting": setting.to_dict(), "bytes": peaks, "ratios": [judged(GOAL, [ratio])]}


def main() -> None:
    """The child process."""
    task = json.loads(sys.argv[1])
    torch.set_num_threads(task["threads"])
    print(json.dumps(measure(task["system"], Setting.of(task["setting"]))))


if __name__ == "__main__":
    main()
