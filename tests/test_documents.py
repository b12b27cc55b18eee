"""The documents are complete: every message of the library is explained."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "graftlm"


def literal_parts(node: ast.expr) -> list[str]:
    """The fixed pieces of a message."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    if isinstance(node, ast.JoinedStr):
        parts, current = [], ""
        for value in node.values:
            if isinstance(value, ast.Constant):
                current += str(value.value)
            else:
                parts, current = [*parts, current], ""
        return [*parts, current]
    return []


def messages() -> list[tuple[str, str]]:
    """Each raise of the library with the longest fixed piece of its message."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                longest = max(literal_parts(node.exc.args[0]), key=len, default="")
                if longest and path.name != "__init__.py":
                    found.append((f"{path.name}:{node.lineno}", longest))
    return found


@pytest.mark.parametrize(("place", "piece"), messages())
def test_every_message_is_explained(place, piece):
    """docs/errors.md quotes the start of the longest fixed piece of each message."""
    page = (ROOT / "docs" / "errors.md").read_text()
    words = piece.strip(" ,:;(")
    start = words[: min(len(words), 25)]
    assert start in page, f"{place}: docs/errors.md does not explain {piece!r}"
