"""Documented Python functions, and the source text they are in, by package.

They are read from the standard library and from installed packages, and nothing of them is run.
Tests, and copies of other packages, are left out.
"""

import ast
import hashlib
import re
import sysconfig
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

LARGEST_FILE = 200_000  # characters; larger ones are tables
MOST_FILES = 40  # of a package, to look into
MOST_PER_PACKAGE = 60  # functions, so that no package is most of the data
MOST_LINES = 40  # of a function; taking a longer one apart only to drop it costs time
SHORTEST_CODE, LONGEST_CODE = 60, 400  # characters without the docstring
SHORTEST, LONGEST = 20, 120  # characters of a docstring's first sentence
LONGEST_HEAD = 600  # characters of a signature with its docstring
# Of a folder or file: tests, and other packages' code.
SKIPPED = re.compile(
    r"tests?|testing|test_.*|.*_test\.py|conftest\.py|_?vendor(ed)?|third_party|"
    r"externals?|site-packages|dist-packages"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Function:
    """A documented function.

    Args:
        sentence: The first one of its docstring.
        code: The function without its docstring, decorators, comments and empty lines.
        head: Signature and whole docstring.
        body: What follows these.
        stands_alone: Whether it is at the top of its file, and no method.
    """

    sentence: str
    code: str
    head: str
    body: str
    stands_alone: bool

    @property
    def text(self) -> str:
        """All of it."""
        return f"{self.head}{self.body}"


@dataclass(slots=True)
class Sources:
    """What is known of one package: its documented functions, and its files' text."""

    functions: list[Function] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)


def default_folders() -> dict[str, Path]:
    """The standard library, and the packages of this environment."""
    return {
        "standard library": Path(sysconfig.get_path("stdlib")),
        "installed": Path(sysconfig.get_path("purelib")),
    }


def read_packages(folders: Mapping[str, Path]) -> dict[str, Sources]:
    """The packages in some folders, by name; no function or sentence comes twice.

    Args:
        folders: Where packages are, by a name of the folder.

    Returns:
        In the order of the packages' names, which is the same on each machine.
    """
    packages: dict[str, Sources] = {}
    seen: set[str] = set()
    for name, paths in sorted(package_files(folders).items()):
        sources = packages[name] = Sources()
        for path in paths:
            text, tree = read_file(path)
            if not text:
                continue
            sources.texts.append(text)
            for function in documented(tree):
                if len(sources.functions) == MOST_PER_PACKAGE:
                    break
                keys = {squeezed(function.code), squeezed(function.sentence)}
                if not keys & seen:
                    seen |= keys
                    sources.functions.append(function)
    return packages


def package_files(folders: Mapping[str, Path]) -> dict[str, list[Path]]:
    """Some files of each package, spread over it; those of the same name make one package."""
    found: dict[str, list[tuple[str, Path]]] = defaultdict(list)
    for folder in folders.values():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).parts
            if not any(SKIPPED.fullmatch(part) for part in parts):
                key = hashlib.sha256("/".join(parts).encode()).hexdigest()
                found[parts[0].removesuffix(".py")].append((key, path))
    return {name: [path for _, path in sorted(files)[:MOST_FILES]] for name, files in found.items()}


def read_file(path: Path) -> tuple[str, ast.Module]:
    """A file's text and what it says; nothing of one that is too large or cannot be read."""
    nothing = "", ast.Module([], [])
    try:
        text = path.read_text(encoding="utf-8")
        if len(text) > LARGEST_FILE:
            return nothing
        with warnings.catch_warnings(action="ignore"):
            return text, ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, OSError):  # such as for another Python
        return nothing


def squeezed(text: str) -> str:
    """Text without case, marks and numbers: the same for what says the same."""
    return re.sub(r"[\W\d_]+", "", text.lower())


# ---- functions ---------------------------------------------------------------------------


def documented(tree: ast.Module) -> Iterator[Function]:
    """The short documented functions of a file, and methods of its classes."""
    for node in tree.body:
        for one in node.body if isinstance(node, ast.ClassDef) else [node]:
            if isinstance(one, ast.FunctionDef) and num_lines(one) <= MOST_LINES:
                function = take_apart(one, at_top=one is node)
                if function is not None:
                    yield function


def take_apart(node: ast.FunctionDef, *, at_top: bool) -> Function | None:
    """The parts of a function, or None if it is not documented, or too short or long."""
    sentence = first_sentence(ast.get_docstring(node) or "")
    if not SHORTEST <= len(sentence) <= LONGEST or not sentence.isascii() or is_stub(node.body[1:]):
        return None
    node.decorator_list = []
    [docstring, *rest] = node.body
    node.body = [docstring]
    head = f"{ast.unparse(node)}\n"
    node.body = rest
    code = without_empty_lines(ast.unparse(node))
    signature = without_empty_lines(head).split("\n", 1)[0]
    if not SHORTEST_CODE <= len(code) <= LONGEST_CODE or not code.startswith(signature):
        return None
    body = code.removeprefix(signature).removeprefix("\n")
    return Function(sentence=sentence, code=code, head=head, body=body, stands_alone=at_top)


def is_stub(body: list[ast.stmt]) -> bool:
    """Whether a function does nothing, or nothing but raise an error."""
    match body:
        case [] | [ast.Pass() | ast.Raise() | ast.Expr(ast.Constant())]:
            return True
    return False


def num_lines(node: ast.FunctionDef) -> int:
    """Lines of a function without its docstring, which may be long."""
    last = node.end_lineno or node.lineno
    return last - (node.body[0].end_lineno or node.lineno)


def first_sentence(docstring: str) -> str:
    """The first sentence of the first paragraph, on one line."""
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    return paragraph.split(". ")[0].rstrip(" .")


def without_empty_lines(code: str) -> str:
    """The lines that hold something."""
    return "\n".join(line for line in code.splitlines() if line.strip())
