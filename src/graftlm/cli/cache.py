"""`graftlm cache`: compute once what training never changes, for `graftlm train` to read."""

import argparse
import time

from graftlm.cli import train

take_rest = train.take_rest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The recipe of the training to come, and what may be said instead of it."""
    parser.usage = "graftlm cache [RECIPE] [options] [--ANY_TRAINING_ARGUMENT VALUE ...]"
    parser.description = (
        "Compute the hidden states of the frozen models once, for graftlm train with the same "
        "recipe. What is there is not computed again; work that was stopped goes on."
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="say what the disk must hold, and compute nothing"
    )
    train.add_recipe(parser)


def run(args: argparse.Namespace) -> int:
    """Say what it takes, compute, say what it took.

    Raises:
        ValueError: If the recipe names no folder for the hidden states.
    """
    recipe = train.build_recipe(args)
    if recipe.states_cache is None:
        raise ValueError(
            "states_cache is not set; name a folder for the hidden states with --states-cache"
        )
    from graftlm.cli.show import output
    from graftlm.training import load, training_arguments

    arguments = training_arguments(recipe)
    training = load(recipe, arguments)
    console = output()
    console.quiet = arguments.process_index != 0
    train.show_data(console, training)
    train.show_states(console, training)
    if args.dry_run:
        return 0
    start = time.perf_counter()
    training.with_states(console)
    seconds = time.perf_counter() - start
    console.print(
        f"saved in {recipe.states_cache} in {seconds:.1f} s; graftlm train reads them with the "
        "same recipe",
        markup=False,
        soft_wrap=True,
    )
    return 0
