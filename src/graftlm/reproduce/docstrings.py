"""The flags of `graftlm reproduce docstrings`, which shares its work with `translate`."""

import argparse

from graftlm.reproduce import translate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `graftlm reproduce docstrings`."""
    translate.add_arguments(parser, output="docstrings")


def main(args: argparse.Namespace) -> int:
    """Run what the flags ask for."""
    from graftlm.reproduce.docstrings_experiment import DOCSTRINGS
    from graftlm.reproduce.translate_experiment import run

    command = translate.command_line("docstrings", args)
    run(DOCSTRINGS, command=command, **translate.options(args))
    return 0
