"""`graftlm plan`: what a composition will take, counted from configurations alone."""

import argparse
from typing import Any

from graftlm.cli import options

TFLOPS, LINK = 125.0, 100.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Models, bridges, devices and work."""
    parser.usage = (
        "graftlm plan --anchor MODEL --augmenting [NAME=]MODEL --devices 8x80GB [options]"
    )
    options.add_models(parser, required=True)
    group = parser.add_argument_group("devices")
    group.add_argument(
        "--devices", metavar="NxMGB", required=True, help="how many, and the memory of each"
    )
    group.add_argument(
        "--tflops",
        type=float,
        default=TFLOPS,
        help=f"what each sustains (default: {TFLOPS:g}, 40 %% of an A100's peak in bfloat16)",
    )
    group.add_argument(
        "--link",
        type=float,
        default=LINK,
        metavar="GB/S",
        help=f"what each receives from the others (default: {LINK:g})",
    )
    group = parser.add_argument_group("work")
    group.add_argument(
        "--batch-size", type=int, default=1, metavar="N", help="examples of a device (default: 1)"
    )
    group.add_argument(
        "--length", type=int, default=2048, metavar="N", help="tokens an example (default: 2048)"
    )
    group.add_argument(
        "--checkpointing", action="store_true", help="compute layers again, to keep less"
    )
    group.add_argument(
        "--context", type=int, default=8192, metavar="N", help="when serving (default: 8192)"
    )
    group.add_argument(
        "--requests", type=int, default=8, metavar="N", help="contexts served at once (default: 8)"
    )
    options.add_bridges(parser)
    group = parser.add_argument_group("loading")
    group.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="precision of the frozen models; by default that of their files",
    )


def run(args: argparse.Namespace) -> int:
    """Compose without weights, count, and show."""
    from graftlm import planning
    from graftlm.cli.show import output, show_composition
    from graftlm.recipe import Recipe

    devices = planning.parse_devices(args.devices, flops=args.tflops * 1e12, link=args.link * 1e9)
    recipe = Recipe.from_mapping(
        {
            "anchor": args.anchor,
            "augmenting": options.named(args.augmenting),
            "data": "none",
            "output_dir": "none",
            **options.given(args, *options.BRIDGE_OPTIONS, "dtype"),
        },
        "the command",
    )
    model = planning.compose_without_weights(recipe)
    console = output()
    show_composition(console, model)
    work = planning.Work(
        batch_size=args.batch_size,
        length=args.length,
        checkpointing=args.checkpointing,
        context=args.context,
        requests=args.requests,
    )
    fits = show_plan(console, planning.make_plan(model, work, devices), work, devices)
    return 0 if fits else 1


def show_plan(console: Any, plan: Any, work: Any, devices: Any) -> bool:
    """Print what training and serving take; returns whether both fit in some layout."""
    from graftlm.cli.show import show, table
    from graftlm.sizes import readable_bytes

    layouts = {name: sum(parts.values()) for name, parts in plan.memory.items()}
    shown = table("per device", *layouts, numbers=tuple(layouts))
    for part in dict.fromkeys(part for parts in plan.memory.values() for part in parts):
        cells = (parts.get(part) for parts in plan.memory.values())
        shown.add_row(part, *("" if cell is None else readable_bytes(cell) for cell in cells))
    shown.add_row("together", *(readable_bytes(total) for total in layouts.values()))
    verdicts = ("yes" if total <= devices.memory else "NO" for total in layouts.values())
    shown.add_row(f"fits into {readable_bytes(devices.memory)}", *verdicts)
    show(console, "Memory", shown)

    shown = table("one training step of a device", "", numbers=("",))
    shown.add_row("tokens", f"{work.batch_size * work.length:,}")
    shown.add_row("forward", f"{plan.training.forward / 1e12:,.3g} TFLOP")
    shown.add_row("backward", f"{plan.training.backward / 1e12:,.3g} TFLOP")
    for name, seconds in plan.seconds.items():
        shown.add_row(f"expected time, {name}", f"{seconds:.3g} s")
    shown.add_row("a context when serving", f"{plan.serving.prefill / 1e12:,.3g} TFLOP")
    shown.add_row("a token behind it", f"{plan.serving.token / 1e9:,.3g} GFLOP")
    show(console, "Work", shown)
    console.print(
        "Counted without weights, as if the models shared their tokens, attention over all pairs "
        "of tokens. Times assume that each "
        f"device sustains {devices.flops / 1e12:g} TFLOP/s and receives "
        f"{devices.link / 1e9:g} GB/s (--tflops, --link); nothing else takes time.",
        markup=False,
    )
    misfits = [name for name, total in layouts.items() if total > devices.memory]
    for name in misfits:
        missing = readable_bytes(layouts[name] - devices.memory)
        console.print(f"warning: {name} does not fit, by {missing} a device", markup=False)
    *training, serving = layouts
    return serving not in misfits and not set(training) <= set(misfits)
