"""The flags of `graftlm reproduce EXPERIMENT`: those all share, and each experiment's own.

Nothing here imports torch, so that `--help` answers at once.
"""

import argparse
import shlex
from pathlib import Path
from typing import Any

from graftlm.reproduce.systems import SYSTEMS

PRESETS = ("quick", "small", "paper")
COMPOSITIONS = ("math", "subs", "mix", "direct")
SEEDS = 1


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    """Add the flags of one experiment."""
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        default="small",
        help="quick: does it run; small: on 2 cores; paper: as large as the paper's, on a GPU",
    )
    parser.add_argument(
        "--systems",
        nargs="+",
        default=["main"],
        metavar="SYSTEM",
        help="which to compare: main (all but ablations), ablations, all, or names, each with "
        "its own number of seeds if wanted, as in lora:3; most experiments know "
        f"{', '.join(SYSTEMS)}; docs/experiments.md names all of each",
    )
    parser.add_argument("--seeds", type=int, default=SEEDS, help="how many runs to average over")
    parser.add_argument("--examples", type=int, help="training examples that each system sees")
    parser.add_argument(
        "--jobs", type=int, default=1, help="how many systems to train and score at a time"
    )
    parser.add_argument(
        "--output",
        help="folder for the report, by default named after the experiment and what differs from "
        "its defaults; a run into the same one goes on where it stopped",
    )
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        help="by default a GPU where there is one; CUDA_VISIBLE_DEVICES says which",
    )
    parser.add_argument("--no-plots", action="store_true", help="draw nothing")
    OWN.get(name, lambda _: None)(parser)


def kv_arguments(parser: argparse.ArgumentParser) -> None:
    """Of the key-value experiment."""
    parser.add_argument(
        "--dc",
        choices=COMPOSITIONS,
        default="mix",
        help="composition data: answers worked out or substitutions (the paper says both), answers "
        "with plain sums, or answers at once",
    )


def model_arguments(parser: argparse.ArgumentParser) -> None:
    """Of experiments that run on models of the user's too."""
    parser.add_argument("--anchor", metavar="MODEL", help="m_B: a folder, a GGUF file or a hub id")
    parser.add_argument("--augmenting", metavar="MODEL", help="m_A, in the place of the default")


def vanilla_argument(parser: argparse.ArgumentParser) -> None:
    """Of experiments that compare with m_A before it became a specialist."""
    parser.add_argument(
        "--vanilla", metavar="MODEL", help="what the model of --augmenting was before"
    )


def language_arguments(parser: argparse.ArgumentParser) -> None:
    """Of the low-resource experiment."""
    model_arguments(parser)
    vanilla_argument(parser)
    parser.add_argument("--language", choices=("chichewa", "guarani", "xhosa"), default="chichewa")


def code_arguments(parser: argparse.ArgumentParser) -> None:
    """Of the code experiment."""
    model_arguments(parser)
    vanilla_argument(parser)
    parser.add_argument(
        "--train-coder",
        action="store_true",
        help="train a small m_A on installed packages, and compare with what it was before",
    )
    parser.add_argument(
        "--allow-code-execution",
        action="store_true",
        help="run the programs that models write, in a child process with limits",
    )
    parser.add_argument(
        "--no-programs", action="store_true", help="leave out HumanEval, which runs programs"
    )
    parser.add_argument("--mbpp", metavar="FILE", help="mbpp.jsonl, to test on it too")
    parser.add_argument(
        "--codexglue",
        nargs="+",
        default=[],
        metavar="FILE",
        help="files of CodeXGLUE's code-to-text task in Python, to test on them too",
    )


OWN = {
    "kv-arithmetic": kv_arguments,
    "low-resource": language_arguments,
    "code": code_arguments,
    "translate": model_arguments,
}
SHARED = {"systems", "seeds", "jobs", "output", "device", "no_plots", "allow_code_execution"}


def choices(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """What the experiment's own function is asked: all flags but those of the run."""
    parser = argparse.ArgumentParser()
    add_arguments(parser, name)
    given = {action.dest for action in parser._actions} - SHARED - {"help"}
    return {flag: getattr(args, flag) for flag in sorted(given)}


def output_folder(args: argparse.Namespace, name: str) -> str:
    """What `--output` says, or the experiment's name with all that was chosen of it.

    Different settings go to different folders, or one's report would replace the other's.
    """
    if args.output is not None:
        return args.output
    parser = argparse.ArgumentParser()
    add_arguments(parser, name)
    chosen = choices(args, name)
    words = [name]
    for flag in sorted(flag for flag in chosen if chosen[flag] != parser.get_default(flag)):
        value = chosen[flag]
        words += [flag.replace("_", "-")] if value is True else named(value)
    return "-".join(words)


def named(value: Any) -> list[str]:
    """A chosen value, or several, as part of a folder's name; of files the last part."""
    return [Path(str(one)).stem for one in (value if isinstance(value, list) else [value])]


def named_systems(
    words: list[str], seeds: int, main: list[str], ablations: list[str]
) -> list[tuple[str, int]]:
    """Systems and their numbers of seeds, in the order of the tables.

    Raises:
        ValueError: If a number of seeds is none.
    """
    groups = {"main": main, "ablations": ablations, "all": [*main, *ablations]}
    found: dict[str, int] = {}
    for word in words:
        name, _, number = word.partition(":")
        if number and not number.isdigit():
            raise ValueError(f"--systems {word}: {number!r} is not a number of seeds")
        for system in groups.get(name, [name]):
            found[system] = int(number) if number else seeds
    order = {system: place for place, system in enumerate(groups["all"])}
    return sorted(found.items(), key=lambda item: order.get(item[0], len(order)))


def command_line(args: argparse.Namespace, name: str) -> str:
    """The command as it can be repeated: what differs from the defaults."""
    parser = argparse.ArgumentParser()
    add_arguments(parser, name)
    words = ["graftlm", "reproduce", name]
    for action in parser._actions:
        value = getattr(args, action.dest, action.default)
        if action.dest != "help" and value != action.default:
            words.append(action.option_strings[-1])
            if value is not True:
                words += [str(v) for v in value] if isinstance(value, list) else [str(value)]
    return shlex.join(words)
