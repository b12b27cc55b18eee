"""The text of `docs/cli.md`: the help of every verb, as `graftlm VERB --help` prints it.

python -m graftlm.cli.help > docs/cli.md
"""

import argparse
from collections.abc import Iterator

from graftlm.cli import build_parser

HEADER = """\
# The command line

Written by `python -m graftlm.cli.help > docs/cli.md`; a test fails when this page is out of date.
"""


def page() -> str:
    """All of it, as Markdown."""
    parser = build_parser()
    parts = [HEADER, section("graftlm", parser)]
    parts += [section(name, child) for name, child in children("graftlm", parser)]
    return "\n".join(parts)


def section(name: str, parser: argparse.ArgumentParser) -> str:
    """One command's help under its name."""
    return f"## {name}\n\n```\n{parser.format_help().rstrip()}\n```\n"


def children(
    prefix: str, parser: argparse.ArgumentParser
) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """The commands below one, depth first."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, child in action.choices.items():
                yield f"{prefix} {name}", child
                yield from children(f"{prefix} {name}", child)


if __name__ == "__main__":
    print(page(), end="")
