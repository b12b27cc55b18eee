"""Measure what composing costs, as ratios within one run.

    python -m benchmarks                       about 85 minutes on 2 cores
    python -m benchmarks --quick --only training,decoding
    python -m benchmarks --only peers --peer CHECKOUT --peer-python PYTHON

Writes results.json, results.md and plots into a folder; sections already there are measured anew if
they are asked for, and kept if not.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks import compiled, decoding, growth, memory, peers, report, training_step
from benchmarks.memory import NotMeasuredError
from benchmarks.models import SIZES, Setting, build
from benchmarks.results import Results
from benchmarks.timing import measure

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What the command line asks for.

    Args:
        base: What all settings start from: the size, the precision and the device.
        quick: Leave out what takes long.
        rounds, threads: Of every measurement.
        peers: Checkouts of other implementations.
        peer_python: The interpreter they run with.
    """

    base: Setting
    quick: bool
    rounds: int
    threads: int
    peers: tuple[Path, ...] = ()
    peer_python: str = sys.executable

    @property
    def is_tiny(self) -> bool:
        """Whether this is a test of the benchmarks themselves."""
        return self.base.size == "tiny"


def training(options: Options) -> Iterator[Row]:
    """Times of a training step: the paper's spacing, from the middle on, and narrow bridges."""
    shapes = [(2, 128), (1, 512)] if options.quick else [(2, 128), (1, 512), (1, 2048)]
    settings = [
        replace(options.base, batch=batch, length=length, connections=connections, narrow=narrow)
        for batch, length in ([(2, 16)] if options.is_tiny else shapes)
        for narrow in ((False, True) if length in (16, 512) else (False,))
        for connections in training_step.GOALS
    ]
    settings += [replace(s, augmenting=("tenth",)) for s in settings if s.length == 512]
    for setting in settings:
        case = build(setting)
        systems = {name: make(case) for name, make in training_step.SYSTEMS.items()}
        # The longest takes minutes; its rounds differ least.
        rounds = min(options.rounds, 3) if setting.length > 512 else options.rounds
        times = measure(systems, rounds=rounds, device=setting.device)
        yield {
            "setting": setting.to_dict(),
            "seconds": times.summary(),
            "ratios": times.ratios(training_step.GOALS[str(setting.connections)]),
        }


def peaks(options: Options) -> Iterator[Row]:
    """Peak memory of a training step, with and without checkpointing, in both precisions."""
    for dtype in ("float32", "bfloat16"):
        for connections in training_step.GOALS:
            for checkpointing in (False, True):
                setting = replace(
                    options.base,
                    length=16 if options.is_tiny else 512,
                    connections=connections,
                    checkpointing=checkpointing,
                    dtype=dtype,
                )
                try:
                    yield memory.compare(setting, options.threads)
                except NotMeasuredError as error:
                    yield {"setting": setting.to_dict(), "not_measured": str(error)}


def tokens(options: Options) -> Iterator[Row]:
    """Times of single decoding steps."""
    prompts = [64, 1024] if options.quick else [64, 1024, 8192]
    for prompt in [8] if options.is_tiny else prompts:
        for batch in (1, 8):
            for narrow in (False, True) if prompt in (8, 1024) else (False,):
                setting = replace(options.base, batch=batch, length=prompt, narrow=narrow)
                prefills = options.rounds if prompt < 1024 else 1
                yield decoding.compare(setting, tokens=4 * options.rounds, prefills=prefills)
                yield compiled.compare(setting, tokens=64, rounds=options.rounds)


def curves(options: Options) -> Iterator[Row]:
    """How time and memory grow."""
    yield from growth.rows(
        options.base,
        quick=options.quick,
        rounds=min(options.rounds, 3),
        threads=options.threads,
    )


def others(options: Options) -> Iterator[Row]:
    """The named checkouts of other implementations."""
    for path in options.peers:
        yield from peers.rows(
            path,
            options.peer_python,
            size="tiny" if options.is_tiny else "small",
            quick=options.quick,
        )


SECTIONS: dict[str, Callable[[Options], Iterator[Row]]] = {
    "training": training,
    "memory": peaks,
    "decoding": tokens,
    "growth": curves,
    "peers": others,
}


def parse(words: list[str] | None) -> argparse.Namespace:
    """The command line."""
    has_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="short prompts and few points: a few minutes")
    add("--only", default="", help=f"sections, of {','.join(SECTIONS)} (default: all)")
    add("--shape", choices=SIZES, default="large" if has_gpu else "small", help="the models' size")
    add("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU")
    add("--device", default="cuda" if has_gpu else "cpu")
    add("--threads", type=int, default=os.cpu_count(), help="default: one a core")
    add("--rounds", type=int, help="default: 5, or 3 with --quick")
    add("--output", type=Path, default=Path(__file__).parent / "results", help="folder")
    add("--peer", type=Path, action="append", default=[], help="a checkout; may be repeated")
    add("--peer-python", default=sys.executable, help="the interpreter the peers run with")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> None:
    """Measure what is asked, a section at a time."""
    asked = parse(words)
    names = [name for name in asked.only.split(",") if name] or list(SECTIONS)
    unknown = sorted(set(names) - set(SECTIONS))
    if unknown:
        raise SystemExit(f"there is no section {unknown[0]!r}, only {', '.join(SECTIONS)}")
    torch.set_num_threads(asked.threads)
    transformers.logging.set_verbosity_error()
    default_dtype = "bfloat16" if asked.device.startswith("cuda") else "float32"
    options = Options(
        base=Setting(size=asked.shape, dtype=asked.dtype or default_dtype, device=asked.device),
        quick=asked.quick,
        rounds=asked.rounds or (3 if asked.quick else 5),
        threads=asked.threads,
        peers=tuple(asked.peer),
        peer_python=asked.peer_python,
    )
    results = Results(asked.output, asked.device, asked.threads)
    for name in names:
        if name == "peers" and not options.peers:
            continue  # what an earlier run measured of them stays
        results.begin(name)
        for row in SECTIONS[name](options):
            results.add(name, row)
            print(name, row.get("curve") or report.label_of(row), flush=True)
        results.finish(name)
        report.write(asked.output, results.sections)
    print(asked.output / "results.md")


if __name__ == "__main__":
    main()
