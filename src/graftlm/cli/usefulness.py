"""What `graftlm inspect --usefulness` does: measure, rank and prune connections."""

import argparse
from pathlib import Path
from typing import Any

from graftlm.cli import options

PICTURE, NUMBERS, PRUNED = "usefulness.png", "usefulness.json", "pruned"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to measure on, and what to prune."""
    group = parser.add_argument_group("usefulness of connections")
    group.add_argument(
        "--usefulness",
        metavar="DATA",
        help="measure the loss on DATA (as for training) with each connection switched off",
    )
    group.add_argument("--limit", type=int, metavar="N", help="use the first N examples only")
    group.add_argument(
        "--prune", type=int, metavar="K", help="save a model with K connections in OUTPUT/pruned"
    )


def run(args: argparse.Namespace) -> int:
    """Measure, print, and write what was asked for.

    Raises:
        ValueError: If a result would be written over, or go nowhere.
    """
    if args.prune is not None and args.output is None:
        raise ValueError("--prune needs --output FOLDER, for the pruned model")
    from graftlm.cli.show import output
    from graftlm.pruning import prune
    from graftlm.usefulness import rank_connections

    if args.output is not None:
        check_output(Path(args.output), args.prune is not None)
    model = options.load_composed(args)
    console = output()
    settings: dict[str, Any] = {
        "limit": args.limit,
        "batch_size": args.batch_size,
        "max_length": args.length,
        "console": console,
    }
    pruning = None
    if args.prune is None:
        usefulness = rank_connections(model, args.usefulness, **settings)
    else:
        pruning = prune(model, args.usefulness, keep=args.prune, **settings)
        usefulness = pruning.usefulness
    show_usefulness(console, usefulness)
    if pruning is not None:
        show_pruning(console, pruning)
    if args.output is not None:
        write(Path(args.output), args, usefulness, pruning)
        console.print(f"Numbers and picture: {args.output}", markup=False, soft_wrap=True)
    return 0


def check_output(folder: Path, is_pruned: bool) -> None:
    """Refuse, before anything is measured, to write over results.

    Raises:
        ValueError: If the folder is a file, or holds such results.
    """
    from graftlm.pruning import check_absent

    if folder.is_file():
        raise ValueError(f"--output is {str(folder)!r}, which is a file; name a folder")
    for name in (NUMBERS, PICTURE, *((PRUNED,) if is_pruned else ())):
        check_absent(folder / name)


def write(folder: Path, args: argparse.Namespace, usefulness: Any, pruning: Any) -> None:
    """The pruned model first, then the picture and the numbers, which name it."""
    from graftlm._version import __version__
    from graftlm.pruning import write_json
    from graftlm.usefulness_picture import draw_usefulness

    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "graftlm": __version__,
        "model": args.folder,
        "data": args.usefulness,
        **usefulness.to_json(),
    }
    if pruning is not None:
        pruning.save_pretrained(folder / PRUNED)
        content["pruned"] = {"model": PRUNED, **pruning.to_json()}
    draw_usefulness(usefulness, folder / PICTURE, steps=() if pruning is None else pruning.steps)
    write_json(folder / NUMBERS, content)


# ---- tables ------------------------------------------------------------------------------


def show_usefulness(console: Any, usefulness: Any) -> None:
    """The loss without each part, the most useful first."""
    from graftlm.cli.show import show, table

    columns = ("loss", "change", "error")
    numbers = ("layer read", "anchor layer", *columns)
    shown = table("switched off", "layer read", "anchor layer", *columns, numbers=numbers)
    shown.add_row("nothing", "", "", f"{usefulness.loss:.4f}", "", "")
    for off in usefulness.connections:
        (c,) = off.connections
        layers = str(c.augmenting_layer), str(c.anchor_layer)
        shown.add_row(c.augmenting, *layers, *cells(off))
    for name, off in usefulness.augmenting.items():
        shown.add_row(f"all of {name}", "", "", *cells(off))
    shown.add_row("all (the anchor)", "", "", *cells(usefulness.anchor))
    show(console, "Usefulness", shown)
    total = sum(off.change for off in usefulness.connections)
    console.print(
        f"Nats a token, over {usefulness.num_labels:,} tokens with a loss in "
        f"{usefulness.num_examples:,} examples; error is the standard error of the change. The "
        f"changes of single connections sum up to {total:+.4f}, that of all together is "
        f"{usefulness.anchor.change:+.4f}: they do not add up (docs/pruning.md).\n",
        markup=False,
    )


def show_pruning(console: Any, pruning: Any) -> None:
    """What went, step by step, and what is left."""
    from graftlm.cli.show import show, table
    from graftlm.usefulness import label

    total, before = len(pruning.usefulness.connections), ()
    columns = ("connections left", "loss", "change", "error")
    shown = table("without", "layer read", "anchor layer", *columns, numbers=columns)
    for step in pruning.steps:
        (c,) = (c for c in step.connections if c not in before)
        layers = str(c.augmenting_layer), str(c.anchor_layer)
        shown.add_row(c.augmenting, *layers, str(total - len(step.connections)), *cells(step))
        before = step.connections
    show(console, "Pruning", shown)
    kept = ", ".join(map(label, pruning.model.config.connections))
    console.print(
        f"Kept: {kept}. Loss {pruning.loss:.4f}; {pruning.usefulness.loss:.4f} before, "
        f"{pruning.usefulness.anchor.loss:.4f} of the anchor.\n",
        markup=False,
    )


def cells(off: Any) -> tuple[str, str, str]:
    """Loss, change and error in a row of a table."""
    error = "" if off.error is None else f"{off.error:.4f}"
    return f"{off.loss:.4f}", f"{off.change:+.4f}", error
