"""`graftlm train`: train the bridges, from a YAML recipe, flags, or both."""

import argparse
import shlex
from typing import Any

from graftlm.cli import options

RECIPE_FLAGS = (
    "anchor",
    "data",
    "output_dir",
    "eval_data",
    "eval_fraction",
    "max_length",
    "completions_only",
    "seed",
    "tokenizer",
    *options.BRIDGE_OPTIONS,
    "states_cache",
    "states_dtype",
    "probe",
    "probe_tokens",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The recipe and what may be said instead of it."""
    parser.usage = "graftlm train [RECIPE] [options] [--ANY_TRAINING_ARGUMENT VALUE ...]"
    parser.description = "Train the bridges. RECIPE is a YAML file; options go over it."
    parser.epilog = (
        "Every field of transformers.TrainingArguments is an option too, such as "
        "--learning_rate 1e-4 or --num-train-epochs 1."
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue from the output folder's last checkpoint",
    )
    add_recipe(parser)


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """What may be said instead of the recipe, or over it."""
    options.add_models(parser, required=False)
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data", metavar="DATA", help="JSONL or text file, folder, or NAME[:CONFIG[:SPLIT]]"
    )
    group.add_argument("--eval-data", metavar="DATA", help="data to evaluate on")
    group.add_argument(
        "--eval-fraction", type=float, metavar="X", help="part of the data to evaluate on instead"
    )
    group.add_argument("--max-length", type=int, metavar="N", help="tokens to cut examples to")
    group.add_argument(
        "--completions-only",
        action=argparse.BooleanOptionalAction,
        help="no loss on prompts (default: yes)",
    )
    group.add_argument("--tokenizer", metavar="PATH", help="by default the anchor's")
    group.add_argument(
        "--states-cache",
        metavar="FOLDER",
        help="compute the frozen models' hidden states once, keep them here and train on them",
    )
    group.add_argument(
        "--states-dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="their precision there; by default that of the models",
    )
    group = parser.add_argument_group("run")
    group.add_argument(
        "--output",
        "--output_dir",
        "--output-dir",
        dest="output_dir",
        metavar="FOLDER",
        help="for all that is saved",
    )
    group.add_argument("--seed", type=int, metavar="N", help="of bridges and data (default: 42)")
    group.add_argument(
        "--probe",
        action="append",
        metavar="PROMPT",
        help="let the composed model continue this at each evaluation; may be repeated",
    )
    group.add_argument(
        "--probe-tokens", type=int, metavar="N", help="tokens it writes at most (default: 64)"
    )
    options.add_bridges(parser)
    options.add_loading(parser)


def take_rest(rest: list[str]) -> tuple[str | None, dict[str, Any]]:
    """The recipe's path and the fields of `TrainingArguments`, among words we do not know.

    (With RECIPE declared to argparse, it would take the value of an unknown option for it.)

    Raises:
        ValueError: If an option is none of the fields, or its value does not fit.
    """
    if len(rest) <= 1 and not any(word.startswith("-") for word in rest):
        return (rest[0] if rest else None), {}
    from transformers import HfArgumentParser, TrainingArguments

    from graftlm.recipe import nearest

    parser = HfArgumentParser(TrainingArguments, add_help=False, allow_abbrev=False)
    parser.exit_on_error = False
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    try:
        found, unknown = parser.parse_known_args(rest)
    except argparse.ArgumentError as exc:
        raise ValueError(f"option {exc.argument_name}: {exc.message}") from exc
    for word in unknown:
        if word.startswith("-"):
            hint = nearest(word.partition("=")[0], set(parser._option_string_actions))
            raise ValueError(f"unknown option {word!r}{hint}")
    if len(unknown) > 1:
        raise ValueError(f"there is one RECIPE at most, not {' and '.join(map(repr, unknown))}")
    return (unknown[0] if unknown else None), vars(found)


def build_recipe(args: argparse.Namespace) -> Any:
    """The recipe of the file with the flags over it.

    Raises:
        ValueError: If the two together contradict themselves.
    """
    from graftlm.recipe import Recipe, read_yaml

    path, training = take_rest(args.rest)
    values = read_yaml(path) if path else {}
    flags = options.given(args, *RECIPE_FLAGS) | options.loading(args)
    augmenting = options.named(args.augmenting)
    if augmenting is not None:
        flags["augmenting"] = augmenting
    if training:
        flags["training"] = {**(values.get("training") or {}), **training}
    # A flag replaces what the file says on the same matter.
    for one, other in (("every", "connections"), ("eval_data", "eval_fraction")):
        for name, rival in ((one, other), (other, one)):
            if name in flags and rival not in flags:
                values.pop(rival, None)
    return Recipe.from_mapping(values | flags, path or "the command")


def run(args: argparse.Namespace) -> int:
    """Check the recipe, report, train."""
    recipe = build_recipe(args)
    from graftlm.cli.show import output, show_composition, show_memory
    from graftlm.sizes import training_memory
    from graftlm.training import prepare

    training = prepare(recipe, resume=args.resume)
    console = output()
    console.quiet = training.arguments.process_index != 0
    show_composition(console, training.model)
    longest = max(len(ids) for ids in training.examples.dataset["input_ids"])
    memory = training_memory(
        training.model,
        batch_size=training.arguments.per_device_train_batch_size,
        length=longest,
        checkpointing=bool(training.arguments.gradient_checkpointing),
    )
    show_memory(console, memory)
    show_data(console, training)
    show_states(console, training)
    outcome = training.run(console)
    if outcome.stopped_by is not None:
        again = [word for word in args.argv if word != "--resume"]
        console.print(
            f"stopped at step {outcome.step}; checkpoint in {outcome.folder}\n"
            f"continue with: {shlex.join(['graftlm', *again, '--resume'])}",
            markup=False,
            soft_wrap=True,
        )
        return 128 + outcome.stopped_by
    losses = {name: f"{value:.4g}" for name, value in outcome.metrics.items() if "loss" in name}
    words = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in losses.items())
    console.print(f"{outcome.step} steps done" + (words and f": {words}"), markup=False)
    console.print(f"saved in {outcome.folder}", markup=False, soft_wrap=True)
    return 0


def show_data(console: Any, training: Any) -> None:
    """How much data there is, and what became of it."""
    examples = training.examples
    console.print(
        f"Data: {len(examples.dataset):,} examples, {examples.num_tokens:,} tokens, "
        f"{examples.num_labels:,} of them with a loss; at most {training.max_length} an example"
        + (f"; {len(training.evaluation.dataset):,} to evaluate" if training.evaluation else ""),
        markup=False,
    )
    if training.checkpoint:
        console.print(f"Resuming from {training.checkpoint}", markup=False, soft_wrap=True)


def show_states(console: Any, training: Any) -> None:
    """What the hidden states of the frozen models take on disk, if they are kept."""
    folder = training.recipe.states_cache
    if folder is None:
        return
    from graftlm.caching import states_size
    from graftlm.sizes import readable_bytes

    parts = [part.dataset for part in (training.examples, training.evaluation) if part]
    sizes = [states_size(training.model, part, training.recipe.states_dtype) for part in parts]
    about = "" if all(size.is_exact for size in sizes) else "about "
    num_bytes = sum(size.num_bytes for size in sizes)
    console.print(
        f"Hidden states: {about}{readable_bytes(num_bytes)} in {folder}",
        markup=False,
        soft_wrap=True,
    )
