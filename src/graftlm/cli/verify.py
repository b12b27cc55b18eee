"""`graftlm verify`: prove the claims of exactness on the user's own models."""

import argparse
from typing import Any

from graftlm.cli import options
from graftlm.cli.generate import load


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The folder, and where its base models are."""
    parser.usage = "graftlm verify FOLDER [options]"
    parser.epilog = "Ends with status 1 if any check fails."
    parser.add_argument("folder", metavar="FOLDER", help="a composed model")
    parser.add_argument("--seed", type=int, default=0, help="of the random tokens (default: 0)")
    options.add_models(parser, required=False)
    options.add_loading(parser)


def run(args: argparse.Namespace) -> int:
    """Run every check and print the measured differences."""
    from graftlm.cli.show import output, show, table
    from graftlm.verification import verify

    # The checks recompute the fingerprints, and show which one differs.
    model = load(args, check_bases=False)
    checks = verify(model, seed=args.seed)
    numbers = ("measured", "allowed")
    shown = table("claim", "holds", *numbers, "compared", numbers=numbers)
    for check in checks:
        measured, allowed = (
            "" if number is None else f"{number:.3g}" for number in (check.measured, check.allowed)
        )
        shown.add_row(check.claim, "yes" if check.passed else "NO", measured, allowed, check.detail)
    console = output()
    show(console, "Checks", shown)
    failed = sum(not check.passed for check in checks)
    show_precision(console, model)
    console.print(f"{failed} of {len(checks)} failed" if failed else f"all {len(checks)} hold")
    return 1 if failed else 0


def show_precision(console: Any, model: Any) -> None:
    """Say how a closer look is had, where models compute too coarsely for one.

    A bfloat16 has eight bits: what it allows for rounding can hide a small fault. Packed weights
    have a precision of their own, which no option changes.
    """
    from torch import finfo, float32

    from graftlm.packing import computing_dtype, quantization_of

    parts = (model.anchor, *model.augmenting.values())
    if any(map(quantization_of, parts)):
        return
    coarsest = max(map(computing_dtype, parts), key=lambda dtype: finfo(dtype).eps)
    if finfo(coarsest).eps > finfo(float32).eps:
        name = str(coarsest).removeprefix("torch.")
        console.print(
            f"In {name} much is allowed for rounding; --dtype float32 looks "
            f"{finfo(coarsest).eps / finfo(float32).eps:,.0f} times more closely."
        )
