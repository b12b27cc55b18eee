"""Runs generated Python programs, which may do anything, where they can do little.

Each program runs in a child process that has given up its rights, in an empty folder that is
removed afterwards; its whole process group is killed at the end. What holds it in:

- `limits` (POSIX): seconds, memory, sizes of files, open files, core dumps; setrlimit
- `seccomp` (Linux on x86-64 and 64-bit ARM): no new processes or threads, no sockets, no signals
  to others, no change of limits, owners and permissions
- `landlock` (Linux 5.13 and later): no reading but of the folder and of installed libraries, no
  writing but of files in the folder
- `audit` (everywhere): the same within Python; a program that means to can get round it

`guards()` says which of them hold here. With the first three, no program is known to us that
reads your files, writes outside its folder, reaches the network or stays. Not held back: how many
files of the allowed size a program writes within its seconds, and errors of the kernel itself.
Where there is no `seccomp` or `landlock`, run untrusted programs in a container or not at all.

A program passes if its last line is reached: `sys.exit(0)`, `os._exit(0)` or printing is no way
to pass. But tests share the process with what they test, as in every harness of this kind: an
answer that is equal to everything passes, and a program written to search this process's memory
for its token could forge a verdict. A model's honest attempts do neither.
"""

import contextlib
import json
import math
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

CHILD = Path(__file__).with_name("sandbox_child.py")
# No environment, no site-packages, no bytecode, nothing of the current folder; strings hash alike
# in each run, so that a program that depends on the order of a set does the same each time.
COMMAND = (sys.executable, "-s", "-P", "-S", "-B", str(CHILD))
ENVIRONMENT = {"PYTHONHASHSEED": "0", "PYTHONUTF8": "1"}
MIB = 2**20


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a program ended.

    Args:
        passed: Whether its last line was reached.
        reason: What stopped it before; empty if it passed.
    """

    passed: bool
    reason: str = ""


def run_program(
    source: str,
    *,
    seconds: float = 5,
    memory_bytes: int = 512 * MIB,
    file_bytes: int = MIB,
    open_files: int = 32,
) -> Outcome:
    """Run a Python program in a child process that can do little else than compute.

    Args:
        source: The program, with the tests that decide at its end.
        seconds: Of the processor, rounded up; of the clock four times as many, since a machine may
            be busy.
        memory_bytes: Address space, Python's own 20 MiB and more among it.
        file_bytes: Size of the largest file.
        open_files: At a time.

    Returns:
        Passed if the last line was reached, and otherwise why not.

    Raises:
        RuntimeError: If the machine is not a POSIX one, or does not set a limit.
    """
    limits = {
        "RLIMIT_CPU": math.ceil(seconds),
        "RLIMIT_AS": memory_bytes,
        "RLIMIT_FSIZE": file_bytes,
        "RLIMIT_NOFILE": open_files,
        "RLIMIT_NPROC": 0,
        "RLIMIT_CORE": 0,
    }
    token = secrets.token_hex(16)
    task = {"source": source, "limits": limits, "token": token}
    patience = 4 * seconds
    code, said = in_child(task, patience)
    if said.startswith(token) and said != token:
        raise RuntimeError(f"a generated program could not be held in: {said.removeprefix(token)}")
    if code is None:
        return Outcome(False, f"ran longer than {patience:g} s")
    if code < 0:  # the kernel kills what has had its seconds
        return Outcome(False, f"was ended by {signal.Signals(-code).name}")
    passed = code == 0 and said == token
    return Outcome(passed, "" if passed else said or "ended before its last line")


def run_programs(sources: Sequence[str], workers: int = 1) -> list[Outcome]:
    """Run several programs, as many at a time as there are workers.

    Args:
        sources: The programs.
        workers: How many run at a time.

    Returns:
        Their outcomes, in the programs' order.

    Raises:
        RuntimeError: If the machine is not a POSIX one.
    """
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(run_program, sources))


def guards() -> tuple[str, ...]:
    """What holds a program in on this machine: of limits, landlock, audit and seccomp.

    Raises:
        RuntimeError: If the machine is not a POSIX one.
    """
    said = in_child({"source": None, "limits": {}, "token": ""}, 60)[1]
    return tuple(json.loads(said))


def in_child(task: Mapping[str, object], seconds: float) -> tuple[int | None, str]:
    """The exit code of a child that does a task, None if it was too slow, and what it said."""
    if os.name != "posix":
        raise RuntimeError(
            f"generated programs cannot be held in on {sys.platform}: there are no limits for "
            "processes; use Linux"
        )
    with (
        tempfile.TemporaryDirectory(prefix="graftlm-", ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile() as orders,
        tempfile.TemporaryFile() as verdict,
    ):
        orders.write(json.dumps(task).encode())
        orders.seek(0)
        child = subprocess.Popen(
            COMMAND,
            stdin=orders,
            stdout=verdict,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env=ENVIRONMENT,
            start_new_session=True,
        )
        code = wait(child, seconds)
        verdict.seek(0)
        return code, verdict.read(1000).decode(errors="replace")


def wait(child: subprocess.Popen[bytes], seconds: float) -> int | None:
    """The exit code of a child, None if it took too long; its whole process group is ended."""
    try:
        return child.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
