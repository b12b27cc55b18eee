"""`graftlm compose`: two or more models into one folder, with untrained bridges."""

import argparse

from graftlm.cli import options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Models, bridges, and where to."""
    parser.usage = (
        "graftlm compose --anchor MODEL --augmenting [NAME=]MODEL --output FOLDER [options]"
    )
    options.add_models(parser, required=True)
    parser.add_argument("--output", metavar="FOLDER", required=True, help="where to save")
    parser.add_argument("--seed", type=int, default=0, help="of the fresh bridges (default: 0)")
    options.add_bridges(parser)
    options.add_loading(parser)


def check_output(folder: str) -> None:
    """Refuse to replace bridges that have learned something, or a model of another kind.

    Raises:
        ValueError: If there are some.
    """
    from pathlib import Path

    from graftlm.checkpoint import CONFIG, check_replaceable, read_config, read_weights

    if not Path(folder, CONFIG).is_file():
        return
    check_replaceable(Path(folder))
    tensors = read_weights(folder, read_config(folder))
    gates = [tensor for name, tensor in tensors.items() if name.endswith(".gate")]
    opened = gates or [t for name, t in tensors.items() if name.endswith(".cross_o.weight")]
    if any(bool(tensor.any()) for tensor in opened):
        raise ValueError(
            f"{folder} holds trained bridges, which fresh ones would replace; choose another "
            "--output, or delete it first"
        )


def run(args: argparse.Namespace) -> int:
    """Compose, save and show."""
    from transformers import set_seed

    from graftlm.cli.show import output, show_composition
    from graftlm.loading import compose
    from graftlm.recipe import Recipe

    recipe = Recipe.from_mapping(
        {
            "anchor": args.anchor,
            "augmenting": options.named(args.augmenting),
            "data": "none",
            "output_dir": args.output,
            **options.given(args, *options.BRIDGE_OPTIONS),
            **options.loading(args),
        },
        "the command",
    )
    check_output(args.output)
    set_seed(args.seed)
    model = compose(recipe.anchor, recipe.augmenting, **recipe.compose_options())
    model.save_pretrained(args.output)
    console = output()
    show_composition(console, model)
    console.print(f"saved in {args.output}", markup=False)
    return 0
