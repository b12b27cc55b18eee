"""`graftlm reproduce`: repeat an experiment of the CALM paper."""

import argparse
import importlib

EXPERIMENTS = {"kv-arithmetic": "graftlm.reproduce.kv_arithmetic"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Each experiment's own flags."""
    parser.usage = "graftlm reproduce EXPERIMENT [options]"
    experiments = parser.add_subparsers(
        dest="experiment", metavar="EXPERIMENT", required=True, prog="graftlm reproduce"
    )
    for name, module in EXPERIMENTS.items():
        child = experiments.add_parser(
            name,
            help="section 4.1: key-value arithmetic (Table 1)",
            usage=f"graftlm reproduce {name} [options]",
            formatter_class=parser.formatter_class,
            allow_abbrev=False,
        )
        importlib.import_module(module).add_arguments(child)


def run(args: argparse.Namespace) -> int:
    """Run the experiment."""
    return importlib.import_module(EXPERIMENTS[args.experiment]).main(args)
