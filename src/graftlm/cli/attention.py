"""What `graftlm inspect --attention` does: explain one text, and draw it."""

import argparse
import json
from pathlib import Path
from typing import Any

from graftlm.cli import options

PAGE, PICTURE, UPDATES, NUMBERS = (
    *("attention.html", "attention.png"),
    *("updates.png", "explanation.json"),
)
FOLDER = "attention"
NUM_ROWS = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The text, and how to go on with it."""
    group = parser.add_argument_group("attention (docs/reading-pictures.md)")
    group.add_argument(
        "--attention",
        metavar="TEXT",
        help="show what each token of TEXT reads, and draw it in OUTPUT "
        f"(default: {FOLDER}, where it replaces what is there)",
    )
    group.add_argument(
        "--generate", type=int, metavar="N", help="let the model write up to N tokens behind TEXT"
    )


def run(args: argparse.Namespace) -> int:
    """Explain, print, and write pictures, page and numbers.

    Raises:
        ValueError: If the results would go into a file.
    """
    from graftlm.cli.show import output

    folder = Path(args.output or FOLDER)
    if folder.is_file():
        raise ValueError(f"--output is {str(folder)!r}, which is a file; name a folder")
    model = options.load_composed(args)
    explanation = model.explain(args.attention, max_new_tokens=args.generate or 0)
    console = output()
    show_changes(console, explanation)
    show_bridges(console, explanation)
    write(folder, explanation)
    console.print(
        f"Page, pictures and numbers: {folder}", markup=False, highlight=False, soft_wrap=True
    )
    return 0


def write(folder: Path, explanation: Any) -> None:
    """Page, pictures and numbers, each whole or not at all."""
    from graftlm.attention_page import attention_page
    from graftlm.attention_picture import draw_attention, draw_update_share

    folder.mkdir(parents=True, exist_ok=True)
    draw_attention(explanation, folder / PICTURE)
    draw_update_share(explanation, folder / UPDATES)
    numbers = json.dumps(explanation.to_json(), ensure_ascii=False, allow_nan=False)
    for name, text in ((PAGE, attention_page(explanation)), (NUMBERS, numbers)):
        temporary = folder / f".{name}"
        temporary.write_text(text + "\n", encoding="utf-8", newline="\n")
        temporary.replace(folder / name)


def show_changes(console: Any, explanation: Any) -> None:
    """Where composed and anchor differ most, and what each would write there."""
    from graftlm.cli.show import show, table
    from graftlm.labels import labels_of

    labels = labels_of(explanation.tokens)
    numbers = ("token", "KL, nats")
    shown = table("token", "behind", "KL, nats", "composed", "anchor", numbers=numbers)
    # What the numbers of page and file round to 0 is no change.
    order = [k for k in explanation.divergence.argsort()[::-1] if explanation.divergence[k] > 5e-7]
    for k in order[:NUM_ROWS]:
        best = [top(explanation.next_tokens[part][k][0]) for part in ("composed", "anchor")]
        behind = labels[k] + (" (written)" if k >= explanation.num_prompt else "")
        nats = explanation.divergence[k]
        size = f"{nats:.4f}" if nats >= 0.00005 else "< 0.0001"
        shown.add_row(str(k + 1), plain(behind), size, *best)
    nowhere = "Nowhere: the composed model is the anchor here."
    show(console, "Where composition changes what comes next", shown if order else nowhere)


def show_bridges(console: Any, explanation: Any) -> None:
    """How much each bridge does."""
    from graftlm.cli.show import show, table
    from graftlm.labels import labels_of

    labels, columns = labels_of(explanation.tokens), ("mean", "greatest")
    numbers = ("layer read", "anchor layer", *columns)
    shown = table(
        "augmenting model", "layer read", "anchor layer", *columns, "behind", numbers=numbers
    )
    for c, share in zip(explanation.connections, explanation.update_share, strict=True):
        layers = str(c.augmenting_layer), str(c.anchor_layer)
        sizes = f"{share.mean():.3f}", f"{share.max():.3f}"
        shown.add_row(c.augmenting, *layers, *sizes, plain(labels[int(share.argmax())]))
    show(console, "Size of the updates, over that of the hidden states", shown)
    for name, scale in explanation.scales.items():
        if scale == 0:
            console.print(f"{name} is switched off (scale 0), so it is not read.\n", markup=False)


def top(token: tuple[str, float]) -> Any:
    """A likely token with its probability."""
    from graftlm.labels import visible

    return plain(f"{visible(token[0])}  {token[1]:.1%}")


def plain(text: str) -> Any:
    """Text in which brackets are brackets."""
    from rich.text import Text

    return Text(text)
