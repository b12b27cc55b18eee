"""The flags of `graftlm reproduce translate`; `translate_experiment` does the work."""

import argparse
import shlex

SYSTEMS = ("anchor", "augmenting", "composed", "wrong-test", "lora", "wrong", "random", "prompt")


def add_arguments(parser: argparse.ArgumentParser, output: str = "translate") -> None:
    """Add the flags of `graftlm reproduce translate`."""
    parser.add_argument("--seeds", type=int, default=1, help="how many runs to average over")
    parser.add_argument(
        "--minutes",
        type=float,
        default=60.0,
        help="time for everything; sets how many pairs every system is trained on",
    )
    parser.add_argument("--examples", type=int, help="train on that many pairs instead")
    parser.add_argument("--tests", type=int, default=150, help="test pairs of each group")
    parser.add_argument(
        "--texts", type=int, default=48, help="how many of them to answer, for chrF and BLEU"
    )
    parser.add_argument(
        "--systems",
        nargs="+",
        choices=SYSTEMS,
        default=list(SYSTEMS),
        metavar="SYSTEM",
        help=f"which to compare; by default all: {', '.join(SYSTEMS)}",
    )
    parser.add_argument(
        "--jobs", type=int, default=1, help="how many systems to train and score at a time"
    )
    parser.add_argument(
        "--output",
        default=output,
        help="folder for report and plot; a run into the same one goes on where it stopped",
    )
    parser.add_argument("--device", help="cpu or cuda; by default a GPU where there is one")
    parser.add_argument("--no-plots", action="store_true", help="write no PNG file")


def main(args: argparse.Namespace) -> int:
    """Run what the flags ask for."""
    from graftlm.reproduce.translate_experiment import TRANSLATE, run  # torch; `--help` without

    run(TRANSLATE, command=command_line("translate", args), **options(args))
    return 0


def options(args: argparse.Namespace) -> dict:
    """The arguments of `run`."""
    return {
        "seeds": args.seeds,
        "minutes": args.minutes,
        "examples": args.examples,
        "tests": args.tests,
        "texts": args.texts,
        "systems": args.systems,
        "jobs": args.jobs,
        "output": args.output,
        "device": args.device,
        "plots": not args.no_plots,
    }


def command_line(experiment: str, args: argparse.Namespace) -> str:
    """The command as it can be repeated."""
    words = ["graftlm", "reproduce", experiment, "--seeds", str(args.seeds)]
    words += ["--minutes", f"{args.minutes:g}"] if args.examples is None else []
    words += ["--examples", str(args.examples)] if args.examples is not None else []
    words += ["--tests", str(args.tests), "--texts", str(args.texts)]
    words += ["--jobs", str(args.jobs)] if args.jobs > 1 else []
    if tuple(args.systems) != SYSTEMS:
        words += ["--systems", *args.systems]
    return shlex.join(words)
