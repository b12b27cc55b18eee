"""`graftlm evaluate`: lm-eval on the composed model and on each of its parts, side by side."""

import argparse
import math
import sys
from typing import Any

from graftlm.cli import options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to run, on how much, and where results go."""
    parser.usage = "graftlm evaluate FOLDER --tasks TASKS [options]"
    parser.epilog = (
        "Tasks are those of lm-eval (pip install 'graftlm[evaluate]'); their data may be "
        "downloaded. lm-eval's own command with composed models: python -m graftlm.lm_eval."
    )
    parser.add_argument("folder", metavar="FOLDER", help="a composed model")
    parser.add_argument(
        "--tasks",
        metavar="A,B",
        required=True,
        help="tasks, groups or tags of lm-eval; patterns such as 'mgsm_direct_*' too",
    )
    parser.add_argument(
        "--parts",
        metavar="A,B",
        help="of composed, anchor and the names of augmenting models (default: all)",
    )
    group = parser.add_argument_group("evaluation, as in lm-eval")
    group.add_argument(
        "--batch-size", metavar="N", default="1", help="rows at a time, or auto (default: 1)"
    )
    group.add_argument(
        "--limit", type=float, metavar="N", help="examples of each task; a share if below 1"
    )
    group.add_argument(
        "--num-fewshot", type=int, metavar="N", help="solved examples in each prompt"
    )
    group.add_argument(
        "--apply-chat-template",
        action="store_true",
        help="write prompts as chats, each part in its own template",
    )
    group.add_argument("--seed", type=int, metavar="N", help="of all that is drawn")
    group.add_argument("--include-path", metavar="FOLDER", help="tasks of your own")
    group.add_argument(
        "--use-cache", metavar="PATH", help="keep answers here; a file for each part and model"
    )
    parser.add_argument(
        "--output",
        metavar="FOLDER",
        help="for results.json and samples; parts finished there are not run again",
    )
    parser.add_argument("--device", metavar="NAME", help="such as cpu or cuda:1")
    options.add_models(parser, required=False)
    options.add_loading(parser)


def run(args: argparse.Namespace) -> int:
    """Evaluate, and print a table of all parts."""
    settings = options.given(
        args, "limit", "num_fewshot", "seed", "include_path", "use_cache", "output", "device"
    )
    batch_size = parse_batch_size(args.batch_size)
    from graftlm.evaluation import evaluate, require_lm_eval

    require_lm_eval()
    if not args.verbose:
        quiet_lm_eval()
    how = options.loading(args)
    report = evaluate(
        args.folder,
        split(args.tasks),
        parts=split(args.parts) if args.parts else None,
        batch_size=batch_size,
        apply_chat_template=args.apply_chat_template,
        on_part=announce,
        anchor=args.anchor,
        augmenting=options.named(args.augmenting),
        quantization_config=how.pop("quantize", None),
        **settings,
        **how,
    )
    print_table(report["parts"])
    if args.output:
        print(f"Results and samples: {args.output}")
    return 0


def split(entries: str) -> list[str]:
    """The names between commas."""
    return [entry for entry in entries.split(",") if entry]


def parse_batch_size(entry: str) -> int | str:
    """A number, or "auto" as lm-eval has it.

    Raises:
        ValueError: If it is neither.
    """
    if entry.isdecimal() and int(entry) > 0:
        return int(entry)
    if entry == "auto" or entry.startswith("auto:"):
        return entry
    raise ValueError(f"--batch-size is {entry!r}, but must be a positive whole number or auto")


def quiet_lm_eval() -> None:
    """Leave lm-eval's messages out, but for errors."""
    import logging

    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def announce(part: str, is_done: bool) -> None:
    """Say which part is next."""
    print(f"{part}: {'finished before' if is_done else 'running'}", file=sys.stderr)


def print_table(parts: dict[str, Any]) -> None:
    """Each metric of each task, a column for each part; the best of a row has a star."""
    from graftlm.cli.show import output, show, table

    first = next(iter(parts.values()))
    shown = table("task", "metric", "filter", "n-shot", *parts, numbers=("n-shot", *parts))
    for task, metrics in first["results"].items():
        for key in metrics:
            metric, _, filtered = key.partition(",")
            if not filtered or metric.endswith("_stderr"):
                continue
            cells = [part["results"].get(task, {}) for part in parts.values()]
            values = [cell.get(key) for cell in cells]
            errors = [cell.get(f"{metric}_stderr,{filtered}") for cell in cells]
            is_better = first.get("higher_is_better", {}).get(task, {}).get(metric)
            best = best_of(values, is_better)
            shots = first.get("n-shot", {}).get(task, "")
            texts = [
                number(value, error) + ("*" if value == best else " ")
                for value, error in zip(values, errors, strict=True)
            ]
            shown.add_row(task, metric, filtered.replace("none", ""), str(shots), *texts)
    console = output()
    show(console, "Evaluation", shown)
    console.print("value ± standard error; * best of the row", style="dim")


def best_of(values: list[Any], is_higher_better: bool | None) -> float | None:
    """The best value, or None where none is better than another."""
    known = [value for value in values if is_number(value)]
    if is_higher_better is None or len(set(known)) < 2:
        return None
    return max(known) if is_higher_better else min(known)


def number(value: Any, error: Any) -> str:
    """A value with its standard error, if it has one."""
    if not is_number(value):
        return "" if value is None else str(value)
    return f"{value:.4f} ± {error:.4f}" if is_number(error) else f"{value:.4f}"


def is_number(value: Any) -> bool:
    """Whether it can be compared."""
    return isinstance(value, (int, float)) and not math.isnan(value)
