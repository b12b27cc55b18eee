"""Options that several verbs share."""

import argparse
from typing import Any

BRIDGE_OPTIONS = (
    "every",
    "connections",
    "variant",
    "position",
    "num_heads",
    "width",
    "gate",
    "bias",
    "reads",
    "alignment",
    "distance_unit",
    "bridge_dtype",
)


def add_models(parser: argparse.ArgumentParser, required: bool) -> None:
    """The anchor and the augmenting models."""
    group = parser.add_argument_group("models")
    group.add_argument(
        "--anchor", metavar="MODEL", required=required, help="folder, GGUF file or hub id"
    )
    group.add_argument(
        "--augmenting",
        metavar="[NAME=]MODEL",
        action="append",
        required=required,
        help="folder, GGUF file or hub id; repeat it, with names, for several",
    )


def add_loading(parser: argparse.ArgumentParser) -> None:
    """How base models are loaded."""
    group = parser.add_argument_group("loading")
    group.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="precision of the frozen models; by default that of their files",
    )
    group.add_argument("--device-map", metavar="MAP", help="as in transformers, such as auto")
    group.add_argument(
        "--quantize",
        metavar="[NAME=]SCHEME",
        action="append",
        help="pack the weights of the frozen models: 8bit, 4bit (bitsandbytes) or int8wo "
        "(torchao); NAME is anchor or one of --augmenting, repeat it for several",
    )
    group.add_argument(
        "--trust-remote-code",
        action="store_true",
        default=None,
        help="run code that comes with the models",
    )


def add_bridges(parser: argparse.ArgumentParser) -> None:
    """What the bridges look like, and where they are."""
    group = parser.add_argument_group("bridges")
    group.add_argument(
        "--every", type=int, metavar="N", help="connect every N-th augmenting layer (default: 4)"
    )
    group.add_argument(
        "--connect",
        dest="connections",
        action="append",
        metavar="[NAME:]I-J",
        help="connect augmenting layer I to anchor layer J instead; repeat it for several",
    )
    group.add_argument(
        "--variant",
        choices=("graftlm", "paper"),
        help="normalised inputs and known distances (default), or the bare equations",
    )
    group.add_argument(
        "--position",
        choices=("none", "distance", "rotary"),
        help="what a bridge knows of positions; by default what the variant says",
    )
    group.add_argument(
        "--num-heads",
        type=int,
        metavar="N",
        help="heads of a bridge (default: the anchor's)",
    )
    group.add_argument(
        "--width",
        type=int,
        metavar="N",
        help="width of a bridge's attention (default: the anchor's)",
    )
    group.add_argument(
        "--gate", action="store_true", default=None, help="scale each update by a learned number"
    )
    group.add_argument(
        "--bias", action="store_true", default=None, help="biases in the bridges' linear maps"
    )
    group.add_argument(
        "--reads",
        choices=("sequence", "prompt"),
        help="what the augmenting models get: every token (default), or the prompt only",
    )
    group.add_argument(
        "--alignment",
        choices=("auto", "identity", "committed", "prefix", "char_end"),
        help="which tokens the anchor sees of a model with a tokenizer of its own: those no "
        "further text can change (committed, the default there), or all of the text so far",
    )
    group.add_argument(
        "--distance-unit",
        choices=("characters", "tokens"),
        help="what positions count there (default: characters)",
    )
    group.add_argument(
        "--bridge-dtype",
        choices=("float32", "bfloat16", "float16"),
        help="precision of the bridges (default: float32)",
    )


def named(
    entries: list[str] | None, option: str = "--augmenting", what: str = "MODEL"
) -> dict[str, str] | str | None:
    """What an option gives by name, such as augmenting models; a single one may go without.

    Raises:
        ValueError: If several lack names, or share one.
    """
    if not entries:
        return None
    if len(entries) == 1 and "=" not in entries[0]:
        return entries[0]
    values: dict[str, str] = {}
    for entry in entries:
        name, found, value = entry.partition("=")
        if not found or not value:
            raise ValueError(f"{option} {entry!r} has no name; several need NAME={what} each")
        if name in values:
            raise ValueError(f"{option} names two models {name!r}")
        values[name] = value
    return values


def loading(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `add_loading` that were given."""
    quantize = named(args.quantize, "--quantize", "SCHEME")
    return given(args, "dtype", "device_map", "trust_remote_code") | (
        {} if quantize is None else {"quantize": quantize}
    )


def load_composed(args: argparse.Namespace) -> Any:
    """The composed model of a folder, on a device, as the options of models and loading say."""
    from graftlm.evaluation import load  # torch; `--help` does without

    how = loading(args)
    return load(
        args.folder,
        args.device,
        anchor=args.anchor,
        augmenting=named(args.augmenting),
        quantization_config=how.pop("quantize", None),
        **how,
    )


def given(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """The options among these that were given."""
    return {name: value for name in names if (value := getattr(args, name)) is not None}
