"""The flags of `graftlm reproduce kv-arithmetic`; `kv_experiment` does the work."""

import argparse
import shlex

PRESETS = ("small", "paper")
COMPOSITIONS = ("math", "subs", "mix", "direct")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `graftlm reproduce kv-arithmetic`."""
    parser.add_argument("--preset", choices=PRESETS, default="small")
    parser.add_argument(
        "--dc",
        choices=COMPOSITIONS,
        default="mix",
        help="composition data: answers worked out or substitutions (the paper says both), answers "
        "with plain sums, or answers at once",
    )
    parser.add_argument("--seeds", type=int, default=1, help="how many runs to average over")
    parser.add_argument("--steps", type=int, help="training steps of the bridges")
    parser.add_argument(
        "--from-scratch", action="store_true", help="train the parents too (20 to 30 minutes)"
    )
    parser.add_argument("--output", default="kv-arithmetic", help="folder for report and plots")
    parser.add_argument("--device", help="cpu or cuda; by default a GPU where there is one")
    parser.add_argument("--no-plots", action="store_true", help="write no PNG files")


def main(args: argparse.Namespace) -> int:
    """Run what the flags ask for."""
    command = ["graftlm", "reproduce", "kv-arithmetic", "--preset", args.preset, "--dc", args.dc]
    command += ["--seeds", str(args.seeds)]
    command += ["--steps", str(args.steps)] if args.steps is not None else []
    command += ["--from-scratch"] if args.from_scratch else []
    from graftlm.reproduce.kv_experiment import run  # torch; `--help` does without

    run(
        preset=args.preset,
        dc=args.dc,
        seeds=args.seeds,
        steps=args.steps,
        output=args.output,
        from_scratch=args.from_scratch,
        device=args.device,
        plots=not args.no_plots,
        command=shlex.join(command),
    )
    return 0
