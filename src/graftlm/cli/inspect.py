"""`graftlm inspect`: what a folder holds, without loading a weight unless something is measured."""

import argparse
import os
from typing import Any

from graftlm.cli import attention, options, usefulness

MEASURING = {  # what loads the models, and the options that belong to it alone
    "attention": (attention, ("generate",)),
    "usefulness": (usefulness, ("limit", "prune")),
}
SHARED = (
    *("output", "device", "anchor", "augmenting"),
    *("dtype", "device_map", "quantize", "trust_remote_code"),
)
BATCH = ("batch_size", "length")  # what --attention, which reads one text, has no use for


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The folder, the batch to estimate memory for, and what to measure."""
    parser.usage = "graftlm inspect FOLDER [options]"
    parser.add_argument("folder", metavar="FOLDER", help="a composed model")
    parser.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help="examples to estimate memory for, or to run at once (default: 8)",
    )
    parser.add_argument(
        "--length",
        type=int,
        metavar="N",
        help="tokens an example (default: 512; with --usefulness as in training)",
    )
    parser.add_argument("--output", metavar="FOLDER", help="for numbers and pictures")
    parser.add_argument("--device", metavar="NAME", help="such as cpu or cuda:1")
    for module, _ in MEASURING.values():
        module.add_arguments(parser)
    options.add_models(parser, required=False)
    options.add_loading(parser)


def run(args: argparse.Namespace) -> int:
    """Show the model that the configuration describes, or measure."""
    wanted = [verb for verb in MEASURING if getattr(args, verb) is not None]
    check_options(args, wanted)
    args.batch_size = 8 if args.batch_size is None else args.batch_size
    if wanted:
        return MEASURING[wanted[0]][0].run(args)
    from graftlm.checkpoint import read_config
    from graftlm.cli.show import output, show_composition, show_memory
    from graftlm.sizes import training_memory, unloaded

    console = output()
    config = read_config(args.folder)
    show_bases(console, config)
    model = unloaded(config, bridge_dtype(args.folder))
    show_composition(console, model)
    memory = training_memory(
        model, batch_size=args.batch_size, length=args.length or 512, checkpointing=False
    )
    show_memory(console, memory)
    console.print("All of this is from config.json: no weight was read.", markup=False)
    return 0


def check_options(args: argparse.Namespace, wanted: list[str]) -> None:
    """Refuse options that would have no effect.

    Raises:
        ValueError: Naming the first.
    """
    if len(wanted) > 1:
        raise ValueError("--attention and --usefulness are two commands; give one of them")
    for verb, (_, names) in MEASURING.items():
        for name in names:
            if verb not in wanted and getattr(args, name) is not None:
                raise ValueError(f"--{name} needs --{verb}")
    for name in () if wanted else SHARED:
        if getattr(args, name) is not None:
            option = name.replace("_", "-")
            raise ValueError(f"--{option} needs --attention TEXT or --usefulness DATA")
    for name in BATCH if "attention" in wanted else ():
        if getattr(args, name) is not None:
            option = name.replace("_", "-")
            raise ValueError(f"--{option} has no effect with --attention; leave it out")


def show_bases(console: Any, config: Any) -> None:
    """The frozen models: what they are, and whether they are where they were."""
    from graftlm.cli.show import show, table

    shown = table(
        *("part", "kind", "layers", "width", "from", "found"),
        numbers=("layers", "width"),
    )
    for name, base in {"anchor": config.anchor_config, **config.augmenting_configs}.items():
        text = base.get_text_config(decoder=True)
        place = config.bases.get(name, {}).get("name_or_path")
        shown.add_row(
            name,
            base.model_type,
            str(text.num_hidden_layers),
            str(text.hidden_size),
            place or "a loaded model",
            is_found(place),
        )
    show(console, "Models", shown)


def is_found(place: str | None) -> str:
    """Whether a base model is on this machine."""
    if place is None:
        return "must be given"
    if os.path.isabs(place):
        return "yes" if os.path.exists(place) else "no"
    from transformers.utils.hub import cached_file

    options = {"_raise_exceptions_for_missing_entries": False, "local_files_only": True}
    try:
        return "yes" if cached_file(place, "config.json", **options) else "not downloaded"
    except OSError:
        return "not downloaded"


def bridge_dtype(folder: str) -> Any:
    """The precision of the saved bridges; float32 if their file is absent."""
    import torch
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(os.path.join(folder, "model.safetensors"), framework="pt") as file:
            return file.get_tensor(next(iter(file.keys()))).dtype
    except (OSError, SafetensorError):
        return torch.float32
