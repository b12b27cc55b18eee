"""Tables of a composed model, for people."""

import sys
from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from graftlm.causal_lm import ComposedForCausalLM
from graftlm.config import ComposedConfig
from graftlm.sizes import bridge_parameters, part_sizes, readable_bytes, trainable_share


def output() -> Console:
    """The console on stdout: plain where there is no terminal, and then never cut off."""
    if sys.stdout.isatty():
        return Console(highlight=False)
    return Console(highlight=False, width=200, soft_wrap=False)


def table(*columns: str, numbers: tuple[str, ...] = ()) -> Table:
    """An empty table; columns of numbers are set flush right."""
    made = Table(box=None, pad_edge=False, header_style="dim")
    for column in columns:
        made.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    return made


def show(console: Console, title: str, shown: Table | str) -> None:
    """Print a table, or a sentence in place of one, under its title."""
    console.print(f"[bold]{title}[/bold]")
    console.print(shown, "", sep="\n")


def show_composition(console: Console, model: ComposedForCausalLM) -> None:
    """Connections, and parameters part by part."""
    show_connections(console, model.config)
    show_parameters(console, model)


def show_connections(console: Console, config: ComposedConfig) -> None:
    """Which layer reads which."""
    shown = table(
        "augmenting model",
        "layer read",
        "anchor layer",
        "alignment",
        "scale",
        numbers=("layer read", "anchor layer", "scale"),
    )
    for c in config.connections:
        scale = config.scales[c.augmenting]
        layers = str(c.augmenting_layer), str(c.anchor_layer)
        shown.add_row(c.augmenting, *layers, config.alignments[c.augmenting], f"{scale:g}")
    show(console, "Connections", shown)


def show_parameters(console: Console, model: ComposedForCausalLM) -> None:
    """Each part's parameters, those that train, and its memory."""
    sizes = part_sizes(model)
    columns = ("parameters", "trainable", "memory")
    shown = table("part", *columns, numbers=columns)
    for name, size in sizes.items():
        if name == "bridges":
            for part, number in bridge_parameters(model).items():
                shown.add_row(f"  {part}, all bridges", f"{number:,}", f"{number:,}", "")
        shown.add_row(
            name,
            f"{size.num_parameters:,}",
            f"{size.num_trainable:,}",
            readable_bytes(size.num_bytes),
        )
    show(console, "Parameters", shown)
    bridge = model.model.bridge_config
    console.print(
        f"{trainable_share(sizes):.2%} of all parameters train. Bridges: {bridge.num_heads} heads, "
        f"width {bridge.width}, position {bridge.position}, norm {yes(bridge.norm)}, "
        f"gate {yes(bridge.gate)}, bias {yes(bridge.bias)}; reads {model.config.reads}.\n",
        markup=False,
    )


def show_memory(console: Console, memory: Mapping[str, int]) -> None:
    """What training takes, item by item."""
    shown = table("part", "bytes", numbers=("bytes",))
    for name, number in memory.items():
        shown.add_row(name, readable_bytes(number))
    shown.add_row("together", readable_bytes(sum(memory.values())))
    show(console, "Memory for training, estimated", shown)


def yes(flag: bool) -> str:
    """A switch in words."""
    return "yes" if flag else "no"
