"""Python functions and their docstrings, from the standard library and installed packages.

Two tasks: say what a function does, and write the function. Packages are held out whole.
"""

import ast
import random
import sysconfig
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from graftlm.reproduce.near_duplicates import unlike
from graftlm.reproduce.translate_data import Corpus, Pair, few_shots

DESCRIBE, WRITE = "docstring", "function"  # the two groups
LARGEST_FILE = 200_000  # characters; larger ones are tables
SHORTEST, LONGEST = 20, 120  # characters of a docstring's first sentence
SHORTEST_CODE, LONGEST_CODE = 60, 300
MOST_PER_PACKAGE = 60  # so that no package is most of the data
MOST_FILES = 40  # of a package, to look into
MOST_LINES = 40  # of a function; taking a longer one apart only to drop it costs time
TEST_PACKAGES = 4  # every fourth package is held out, every eighth for choosing settings


def load_corpus(
    folders: dict[str, Path] | None = None, *, num_tests: int = 150, num_shots: int = 2
) -> Corpus:
    """Functions with docstrings, split by package.

    Args:
        folders: Where to look, by the name of the origin; by default the standard library and
            the installed packages.
        num_tests: Test pairs of each group.
        num_shots: Examples in a few-shot prompt.

    Raises:
        ValueError: If there are too few packages to hold any out.
    """
    by_package = functions(folders or default_folders())
    names = sorted(by_package)
    random.Random(0).shuffle(names)
    test_names = set(names[::TEST_PACKAGES])
    development_names = set(names[1 :: 2 * TEST_PACKAGES])
    if len(names) < 4:
        raise ValueError(
            f"found documented functions in {len(names)} packages, but a split by package needs "
            "at least 4"
        )
    splits: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for name in names:
        split = "test" if name in test_names else "training"
        splits["development" if name in development_names else split] += by_package[name]
    pairs = {split: both_ways(found) for split, found in splits.items()}
    corpus = Corpus(
        training=[pair for both in pairs["training"].values() for pair in both],
        development=[],
        tests={"other packages": {}},
        shots={},
        dropped={},
    )
    for group in (DESCRIBE, WRITE):
        new = unlike(pairs["test"][group], pairs["training"][group])
        rng = random.Random(0)
        corpus.tests["other packages"][group] = rng.sample(new, min(num_tests, len(new)))
        corpus.dropped[group] = len(pairs["test"][group]) - len(new)
        corpus.shots[group] = few_shots(pairs["training"][group], num_shots)
        development = pairs.get("development", {}).get(group, [])
        corpus.development.extend(rng.sample(development, min(60, len(development))))
    return corpus


def default_folders() -> dict[str, Path]:
    """The standard library, and the packages of this environment."""
    return {
        "standard library": Path(sysconfig.get_path("stdlib")),
        "installed": Path(sysconfig.get_path("purelib")),
    }


def both_ways(found: list[tuple[str, str]]) -> dict[str, list[Pair]]:
    """Pairs of the two tasks."""
    return {
        DESCRIBE: [Pair(DESCRIBE, code, text, "Function", "Docstring") for code, text in found],
        WRITE: [Pair(WRITE, text, code, "Docstring", "Function") for code, text in found],
    }


# ---- functions ---------------------------------------------------------------------------


def functions(folders: dict[str, Path]) -> dict[str, list[tuple[str, str]]]:
    """Code without docstring, and the docstring's first sentence, by package; nothing twice."""
    found: dict[str, list[tuple[str, str]]] = defaultdict(list)
    num_files: dict[str, int] = defaultdict(int)
    seen: set[str] = set()
    for folder in folders.values():
        for path in sorted(folder.rglob("*.py")):
            package = path.relative_to(folder).parts[0].removesuffix(".py")
            if package == "site-packages" or "test" in str(path.relative_to(folder)):
                continue
            if len(found.get(package, ())) >= MOST_PER_PACKAGE or num_files[package] == MOST_FILES:
                continue
            num_files[package] += 1
            for code, text in documented(path):
                if text not in seen and code not in seen:
                    seen |= {text, code}
                    found[package].append((code, text))
    return {name: pairs[:MOST_PER_PACKAGE] for name, pairs in found.items()}


def documented(path: Path) -> Iterator[tuple[str, str]]:
    """The short documented functions of a file, code and first sentence."""
    try:
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text) if len(text) <= LARGEST_FILE else ast.Module([], [])
    except (SyntaxError, ValueError, OSError):  # not for this version of Python, or unreadable
        return
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or num_lines(node) > MOST_LINES:
            continue
        sentence = first_sentence(ast.get_docstring(node) or "")
        if not SHORTEST <= len(sentence) <= LONGEST or len(node.body) < 2:
            continue
        node.body, node.decorator_list = node.body[1:], []
        code = "\n".join(line for line in ast.unparse(node).splitlines() if line.strip())
        if SHORTEST_CODE <= len(code) <= LONGEST_CODE:
            yield code, sentence


def num_lines(node: ast.FunctionDef) -> int:
    """Lines of a function without its docstring, which may be long."""
    last = node.end_lineno or node.lineno
    return last - (node.body[0].end_lineno or node.lineno)


def first_sentence(docstring: str) -> str:
    """The first sentence of the first paragraph, on one line."""
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    return paragraph.split(". ")[0].rstrip(".")
