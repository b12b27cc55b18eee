"""Generated programs can compute, and little else; only reaching the last line is passing."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from graftlm.reproduce import sandbox
from graftlm.reproduce.sandbox import Outcome, guards, run_program, run_programs

pytestmark = pytest.mark.skipif(os.name != "posix", reason="children are held in on POSIX only")
LINUX = sys.platform == "linux"


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch):
    """Let the child skip some of its guards, so that a test sees what the others do."""

    original = sandbox.COMMAND

    def skip(*names: str) -> None:
        folder = str(sandbox.CHILD.parent)
        skipped = "".join(f"c.{name} = lambda *_: False; " for name in names)
        code = f"import sys; sys.path.insert(0, {folder!r}); import sandbox_child as c; "
        command = (*original[:-1], "-c", f"{code}{skipped}sys.path.pop(0); c.main()")
        monkeypatch.setattr(sandbox, "COMMAND", command)

    return skip


def reason(source: str, **limits: float) -> str:
    """Why a program did not pass."""
    outcome = run_program(source, **limits)  # pyrefly: ignore
    assert not outcome.passed
    return outcome.reason


def test_a_program_that_computes_passes():
    imports = "import math, re, collections, typing, hashlib, random, datetime, decimal, heapq"
    assert run_program(f"{imports}\nassert math.factorial(20) % 19 == 0") == Outcome(True)


def test_dataclasses_find_their_module_and_main_blocks_do_not_run():
    source = "from dataclasses import dataclass\n@dataclass\nclass A:\n    b: 'int' = 3\n"
    assert run_program(source + "assert A().b == 3\nif __name__ == '__main__':\n    1 / 0").passed


def test_programs_run_side_by_side_and_answer_in_order():
    found = run_programs([f"assert {k} % 3" for k in range(7)], workers=3)
    assert [outcome.passed for outcome in found] == [k % 3 != 0 for k in range(7)]


def wait_for(found: Callable[[], object]) -> None:
    """Until something is so, or a test has failed."""
    for _ in range(300):
        if found():
            return
        time.sleep(0.1)
    pytest.fail("it did not come to be within 30 seconds")


@pytest.mark.skipif("seccomp" not in guards(), reason="a child that is held in is known by seccomp")
def test_a_program_ends_with_the_process_that_runs_it():
    """Nobody would count its seconds any more."""
    program = "import time\nwhile True: time.sleep(1)"
    code = (
        f"from graftlm.reproduce.sandbox import run_program; run_program({program!r}, seconds=99)"
    )
    with subprocess.Popen([sys.executable, "-c", code]) as running:
        children = Path(f"/proc/{running.pid}/task/{running.pid}/children")
        wait_for(lambda: children.read_text())
        status = Path(f"/proc/{children.read_text().split()[0]}/status")
        wait_for(lambda: "Seccomp:\t2" in status.read_text())
        running.kill()
    wait_for(lambda: not status.exists() or "State:\tZ" in status.read_text())


def test_a_failed_test_says_why():
    assert reason("assert 1 == 2, 'not so'") == "AssertionError: not so"
    assert reason("def f(:").startswith("SyntaxError: ")
    assert reason("import torch") == "ModuleNotFoundError: No module named 'torch'"
    assert reason("raise ValueError('\\ud800')") == "ValueError: ?"


# ---- no way to pass ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import sys; sys.exit(0)", "SystemExit: 0"),
        ("raise SystemExit", "SystemExit: "),
        ("import os; os._exit(0)", "ended before its last line"),
        ("import atexit, os; atexit.register(os._exit, 0); exit()", "NameError: "),
        ("raise KeyboardInterrupt", "KeyboardInterrupt: "),
        ("print('passed'); print('OK'); import sys; sys.exit(0)", "SystemExit: 0"),
        ("import signal; signal.raise_signal(9)", ""),
    ],
)
def test_ending_before_the_tests_is_no_way_to_pass(source, said):
    assert reason(f"{source}\nassert False, 'a test'").startswith(said)


def test_writing_success_everywhere_is_no_way_to_pass():
    everywhere = "import os\nfor k in range(64):\n    try: os.write(k, b'passed')\n"
    assert reason(everywhere + "    except OSError: pass\nos._exit(0)") == "passed"
    assert not run_program(everywhere + "    except OSError: pass\n").passed


# ---- limits ------------------------------------------------------------------------------


def test_an_endless_loop_ends():
    ends = ("was ended by SIGKILL", "ran longer than 4 s")  # the clock's on a busy machine
    assert reason("while True: pass", seconds=1) in ends


def test_a_program_that_waits_ends():
    assert reason("import time; time.sleep(60)", seconds=0.2) == "ran longer than 0.8 s"


def test_memory_is_limited():
    assert reason("x = bytearray(600 * 2**20)") == "MemoryError: "
    assert run_program("x = bytearray(100 * 2**20)").passed
    assert reason("x = bytearray(100 * 2**20)", memory_bytes=90 * 2**20) == "MemoryError: "


def test_file_sizes_and_open_files_are_limited():
    fill = "with open('a', 'wb') as file:\n    for _ in range({}): file.write(b'x' * 1000)"
    assert run_program(fill.format(1000)).passed
    assert reason(fill.format(1100)).startswith("OSError: [Errno 27]")
    assert reason("files = [open('a', 'w') for _ in range(40)]").startswith("OSError: [Errno 24]")


def test_what_a_program_writes_is_gone(tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(tmp_path))
    assert run_program("open('a', 'w').write('b')\nassert open('a').read() == 'b'").passed
    assert list(tmp_path.iterdir()) == []


def test_deep_recursion_does_not_pass():
    source = "import sys; sys.setrecursionlimit(10**8)\ndef f(): return f()\nf()"
    assert reason(source, seconds=1).startswith(("was ended by SIG", "Recurs", "ran"))


# ---- what it cannot reach ----------------------------------------------------------------


def test_the_environment_is_empty(monkeypatch):
    monkeypatch.setenv("SECRET_OF_THE_PARENT", "x")
    assert run_program("import os; assert not os.environ\nassert os.listdir() == []").passed


def test_nothing_can_be_read_from_standard_input():
    assert reason("input()").startswith("EOFError")


FORK = "import os\nwhile True: os.fork()"
LIBC_FORK = "import ctypes\nassert ctypes.CDLL(None).fork() != -1"
SPAWN = (
    "import _posixsubprocess as p, os\np.fork_exec([b'/bin/true'], [b'/bin/true'], True, (), None, "
    "None, -1, -1, -1, -1, -1, -1, *os.pipe(), False, False, 0, None, None, None, -1, None, False)"
)
SOCKET = "import socket; socket.socket()"
CONNECT = "import socket; socket.create_connection(('127.0.0.1', 9))"
KILL = "import os; os.kill(os.getppid(), 9)"
GROUP = "import os; os.killpg(os.getpgid(os.getppid()), 9)"
OWNER = """import fcntl, os
refused = []
for command in (fcntl.F_SETOWN, 10, 15):
    try:
        fcntl.fcntl(os.pipe()[0], command, bytes(8))
    except PermissionError as exc:
        refused.append(exc)
if len(refused) == 3:
    raise refused[0]"""
REFUSED = [
    FORK,
    LIBC_FORK,
    SOCKET,
    CONNECT,
    KILL,
    GROUP,
    OWNER,
    "import os; assert os.system('true') == 0",
]
REFUSED += ["import os; os.chmod('.', 0o777)", "import os; os.mkdir('a')"]


@pytest.mark.parametrize("source", [*REFUSED, SPAWN])
def test_processes_network_and_signals_are_refused(source):
    if source is SPAWN and "seccomp" not in guards():
        pytest.skip("no seccomp here")
    assert reason(source).startswith(("PermissionError", "OSError", "AssertionError"))


@pytest.mark.parametrize("source", REFUSED)
def test_python_itself_refuses_them_where_the_kernel_does_not(without, source):
    without("restrict_calls", "restrict_files")
    assert guards() == ("limits", "audit")
    if source is GROUP:
        source = KILL  # not our own, should this fail
    assert " is not for generated programs" in reason(source)


@pytest.mark.skipif(not LINUX, reason="seccomp is of Linux")
@pytest.mark.parametrize(
    "source", [*REFUSED[:-1], SPAWN, "import threading as t; t.Thread().start()"]
)
def test_the_kernel_refuses_them_where_python_does_not(without, source):
    if "seccomp" not in guards():
        pytest.skip("no seccomp here")
    without("watch")
    said = reason(source)
    assert said.startswith(("PermissionError", "AssertionError", "RuntimeError")), said


@pytest.mark.skipif(not LINUX, reason="seccomp is of Linux")
def test_limits_cannot_be_raised_and_the_guard_not_removed(without):
    if "seccomp" not in guards():
        pytest.skip("no seccomp here")
    without("watch")
    source = "import resource as r; r.setrlimit(r.RLIMIT_AS, (-1, -1))"
    assert reason(source).startswith(("PermissionError", "ValueError"))


@pytest.mark.parametrize("skipped", [("watch",), ("restrict_files",)])
def test_files_outside_cannot_be_written(without, tmp_path, skipped):
    if "watch" in skipped and "landlock" not in guards():
        pytest.skip("no landlock here")
    without(*skipped)
    kept = tmp_path / "kept"
    kept.write_text("mine")
    for source in (
        f"open({str(tmp_path / 'new')!r}, 'w')",
        f"open({str(kept)!r}, 'a').write('not mine')",
        f"import os; os.remove({str(kept)!r})",
        f"import os; os.rename({str(kept)!r}, 'here')",
        f"import os; open('a', 'w'); os.rename('a', {str(kept)!r})",
        f"import os; os.truncate({str(kept)!r}, 0)",
        f"import os; os.symlink({str(kept)!r}, 'a'); open('a', 'w')",
        f"import shutil; shutil.rmtree({str(tmp_path)!r})",
    ):
        assert "Error: " in reason(source), source
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert kept.read_text() == "mine"


def test_the_users_files_cannot_be_read(tmp_path):
    if "landlock" not in guards():
        pytest.skip("no landlock here")
    (tmp_path / "secret").write_text("mine")
    for source in (
        f"open({str(tmp_path / 'secret')!r})",
        f"import os; os.listdir({str(tmp_path)!r})",
        "import os; open(f'/proc/{os.getppid()}/environ')",
        "open('/proc/self/environ')",
        f"open({str(Path(__file__))!r})",
    ):
        assert reason(source).startswith("PermissionError"), source


@pytest.mark.skipif(not LINUX, reason="landlock is of Linux")
def test_what_is_not_known_to_the_kernel_is_not_claimed(without):
    without("restrict_files")
    assert "landlock" not in guards()
    without("restrict_calls")
    assert "seccomp" not in guards()


# ---- where it cannot be ------------------------------------------------------------------


def test_other_machines_are_refused(monkeypatch):
    monkeypatch.setattr(sandbox.os, "name", "nt")
    monkeypatch.setattr(sandbox.sys, "platform", "win32")
    with pytest.raises(RuntimeError, match="cannot be held in on win32: .* use Linux"):
        sandbox.in_child({}, 1)


def test_a_limit_that_cannot_be_set_is_not_a_failed_test(without):
    without("lower = None; c.not_used")
    with pytest.raises(RuntimeError, match="could not be held in: TypeError: 'NoneType'"):
        run_program("pass")
