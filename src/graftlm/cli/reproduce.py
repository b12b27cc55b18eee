"""`graftlm reproduce`: repeat an experiment."""

import argparse
import importlib
from typing import Any

EXPERIMENTS = {
    "kv-arithmetic": ("kv_arithmetic", "section 4.1: key-value arithmetic (Table 1)"),
    "translate": ("translate", "real models: Indonesian, Turkish and Swedish to English"),
    "docstrings": ("docstrings", "real models: Python functions and their docstrings"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Each experiment's own flags."""
    parser.usage = "graftlm reproduce EXPERIMENT [options]"
    experiments = parser.add_subparsers(
        dest="experiment", metavar="EXPERIMENT", required=True, prog="graftlm reproduce"
    )
    for name, (module, summary) in EXPERIMENTS.items():
        child = experiments.add_parser(
            name,
            help=summary,
            usage=f"graftlm reproduce {name} [options]",
            formatter_class=parser.formatter_class,
            allow_abbrev=False,
        )
        load(module).add_arguments(child)


def run(args: argparse.Namespace) -> int:
    """Run the experiment."""
    return load(EXPERIMENTS[args.experiment][0]).main(args)


def load(module: str) -> Any:
    """One experiment's flags."""
    return importlib.import_module(f"graftlm.reproduce.{module}")
