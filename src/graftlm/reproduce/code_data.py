"""What the code experiment learns from and is tested on: Python functions, packages held out whole.

Three tasks: say what a function does, write the function, and go on after its docstring, as
HumanEval asks. What D_C learns is from training packages; tests are other packages, HumanEval,
and programs of CodeI/O. Nothing D_C or the domain holds shares a long run with HumanEval.
"""

import hashlib
import platform
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from graftlm.reproduce.code_functions import (
    LONGEST_HEAD,
    Function,
    Sources,
    default_folders,
    read_packages,
)
from graftlm.reproduce.code_sources import (
    COMPLETE,
    DESCRIBE,
    WRITE,
    code_io,
    complete,
    describe,
    human_eval,
    news,
    write,
)
from graftlm.reproduce.domain import with_replay
from graftlm.reproduce.example import Data, Example, plain
from graftlm.reproduce.near_duplicates import unlike

GROUPS = (DESCRIBE, WRITE, COMPLETE)
NUM_DEVELOPMENT = 60  # of each group
NUM_RETENTION = 100
LONG_RUN = 10  # words that no two write alike by chance
DOMAIN_CHARS = 20_000_000
SIDES = ("test", "test", "development", *["training"] * 5)  # by the hash of a package's name
Run = tuple[str, ...]


def load_data(
    *,
    num_tests: int = 100,
    num_shots: int = 2,
    domain_chars: int = DOMAIN_CHARS,
    folders: Mapping[str, Path] | None = None,
    cache: Path | None = None,
) -> Data:
    """Functions of installed packages, HumanEval, CodeI/O, source text and English news.

    Args:
        num_tests: Test examples of each group, and English texts; of HumanEval all 164 always.
        num_shots: Examples in a few-shot prompt.
        domain_chars: Characters of source text at most, the same share of each package.
        folders: Where packages are; by default the standard library's folder and the
            environment's, so that the data depend on what is installed (see `notes`).
        cache: Where the packages of HumanEval, CodeI/O and the news are, or are put.

    Returns:
        D_C, tests and the rest; `notes` has counts and a fingerprint of D_C and of the tests.

    Raises:
        ValueError: If no documented function is in a package to hold out, or in one to train on,
            or if a package cannot be fetched.
    """
    problems = human_eval(cache)
    known = long_runs(f"{problem.source}\n{problem.target}" for problem in problems)
    splits = split(read_packages(folders or default_folders()))
    functions = {name: new_functions(found, known) for name, found in splits.items()}
    pools = {name: tasks(found) for name, found in functions.items()}
    composition = [one for group in GROUPS for one in pools["training"][group]]
    english = news(cache)
    texts = domain(splits["training"].values(), domain_chars)
    kept = [text for text in texts if known.isdisjoint(runs_of(text))]
    new = {name: new_tests(pools[name], composition, kept) for name in ("test", "development")}
    data = Data(
        composition=with_replay(composition, [one.target for one in english[NUM_RETENTION:]]),
        tests={
            "other packages": {group: draw(new["test"][group], num_tests) for group in GROUPS},
            "HumanEval": {COMPLETE: problems},
            "CodeI/O": {WRITE: draw(code_io(cache), num_tests)},
        },
        development=[
            one for group in GROUPS for one in draw(new["development"][group], NUM_DEVELOPMENT)
        ],
        shots={group: few_shots(pools["training"][group], num_shots) for group in GROUPS},
        domain=[plain(text) for text in kept],
        retention={"text": english[:NUM_RETENTION][:num_tests]},
    )
    dropped = {name: num_functions(splits[name]) - len(functions[name]) for name in splits}
    notes = {
        "python": platform.python_version(),
        "packages": {name: len(found) for name, found in splits.items()},
        "functions": {name: len(found) for name, found in functions.items()},
        "functions dropped, like HumanEval": dropped,
        "domain files dropped, like HumanEval": len(texts) - len(kept),
        "tests dropped, like training": {
            g: len(pools["test"][g]) - len(new["test"][g]) for g in GROUPS
        },
    }
    return replace(data, notes=notes | counts(data))


# ---- splits ------------------------------------------------------------------------------


def split(packages: Mapping[str, Sources]) -> dict[str, dict[str, Sources]]:
    """Packages for training, choosing settings and testing: by their names alone.

    So a package stays on its side whatever else is installed.

    Raises:
        ValueError: If a side has no documented function.
    """
    sides: dict[str, dict[str, Sources]] = {"training": {}, "development": {}, "test": {}}
    for name, sources in packages.items():
        sides[SIDES[int(digest(name)[:8], 16) % len(SIDES)]][name] = sources
    for side in ("training", "test"):
        if not num_functions(sides[side]):
            raise ValueError(
                f"found documented functions in no {side} package, of {len(packages)} packages; "
                "install more, for every fourth or so is for tests"
            )
    return sides


def num_functions(packages: Mapping[str, Sources]) -> int:
    """How many functions packages have."""
    return sum(len(sources.functions) for sources in packages.values())


def new_functions(packages: Mapping[str, Sources], known: set[Run]) -> list[Function]:
    """The functions of packages without those that share a long run with what is known."""
    return [
        function
        for sources in packages.values()
        for function in sources.functions
        if known.isdisjoint(runs_of(function.text))
    ]


def tasks(functions: Iterable[Function]) -> dict[str, list[Example]]:
    """The examples of each group that functions make."""
    found: dict[str, list[Example]] = {group: [] for group in GROUPS}
    for function in functions:
        found[DESCRIBE].append(describe(function.code, function.sentence))
        found[WRITE].append(write(function.sentence, function.code))
        if function.stands_alone and len(function.head) <= LONGEST_HEAD:
            found[COMPLETE].append(complete(function.head, function.body))
    return found


def domain(packages: Iterable[Sources], most: int) -> list[str]:
    """Source text of packages, a file of each in turn, up to a number of characters."""
    waiting = [sources.texts for sources in packages]
    found: list[str] = []
    size = 0
    for number in range(max(map(len, waiting), default=0)):
        for texts in waiting:
            if number < len(texts) and size + len(texts[number]) <= most:
                found.append(texts[number])
                size += len(texts[number])
    return found


def draw(examples: Sequence[Example], number: int) -> list[Example]:
    """Some examples, always the same."""
    return random.Random(0).sample(examples, min(number, len(examples)))


def few_shots(examples: Sequence[Example], number: int) -> list[Example]:
    """Short examples, spread over the packages."""
    short = [one for one in examples if len(one.prompt) + len(one.target) <= 300] or list(examples)
    return [short[len(short) * (2 * k + 1) // (2 * number)] for k in range(number)]


# ---- what is known -----------------------------------------------------------------------


def words_of(text: str) -> list[str]:
    """The words of a text or program; case and marks do not count."""
    return re.findall(r"[^\W_]+", text.lower())


def runs_of(text: str) -> Iterator[Run]:
    """All long runs of words; none of a shorter text."""
    words = words_of(text)
    return zip(*(words[k:] for k in range(LONG_RUN)), strict=False)


def long_runs(texts: Iterable[str]) -> set[Run]:
    """The long runs of several texts."""
    return {run for text in texts for run in runs_of(text)}


def new_tests(
    pool: Mapping[str, Sequence[Example]], composition: Sequence[Example], texts: Iterable[str]
) -> dict[str, list[Example]]:
    """The examples like none of D_C, and no long run of which is in the domain's texts."""
    runs = {
        id(one): long_runs([one.source, one.target]) for group in pool.values() for one in group
    }
    wanted = set().union(*runs.values())
    known = {run for text in texts for run in wanted.intersection(runs_of(text))}
    return {
        group: [one for one in unlike(examples, composition) if known.isdisjoint(runs[id(one)])]
        for group, examples in pool.items()
    }


# ---- notes -------------------------------------------------------------------------------


def counts(data: Data) -> dict[str, Any]:
    """How much there is of all, and a mark of what exactly."""
    tests = [one for groups in data.tests.values() for some in groups.values() for one in some]
    return {
        "composition": dict(Counter(one.group for one in data.composition)),
        "tests": {n: {g: len(some) for g, some in t.items()} for n, t in data.tests.items()},
        "domain files": len(data.domain),
        "domain characters": sum(len(text.target) for text in data.domain),
        "fingerprints": {"composition": mark(data.composition), "tests": mark(tests)},
    }


def mark(examples: Iterable[Example]) -> str:
    """The same for the same examples in the same order."""
    return digest("\0".join(f"{one.prompt}\0{one.target}" for one in examples))[:16]


def digest(text: str) -> str:
    """Sixty-four characters that tell a text from others."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
