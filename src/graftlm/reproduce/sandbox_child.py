"""Runs one generated program in a process of its own, which gives up its rights first.

`sandbox` starts this file as a script. It imports nothing of graftlm, which the process cannot
see. What it has to say goes to its standard output, which the program cannot use.
"""

import contextlib
import ctypes
import json
import os
import platform
import resource
import signal
import sys
import sysconfig
import types
from typing import Any

READ, READ_FOLDER = 1 << 2, 1 << 3  # landlock's names: READ_FILE, READ_DIR
# WRITE_FILE, READ_FILE, READ_DIR, REMOVE_FILE, MAKE_REG, TRUNCATE: files, but no folders
IN_FOLDER = 1 << 1 | READ | READ_FOLDER | 1 << 5 | 1 << 8 | 1 << 14
RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}  # how many rights each version of landlock knows
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
NO_NEW_PRIVILEGES, SECCOMP, FILTER, SIGNAL_WITH_PARENT = 38, 22, 2, 1  # of prctl
CAPABILITY_VERSION = 0x20080522
# By machine: the mark of its calls, and their numbers. No new processes or threads, no network,
# no signals to others, no change of limits, of owners or of permissions, nothing that stays.
CALLS: dict[str, tuple[int, tuple[int, ...]]] = {
    "x86_64": (
        0xC000003E,
        (
            *(56, 57, 58, 59, 322, 435),  # clone fork vfork execve execveat clone3
            *(41, 42, 49, 53, 425),  # socket connect bind socketpair io_uring_setup
            *(62, 129, 200, 234, 297, 424, 434),  # kill, tkill and kin, pidfd_open
            *(101, 272, 298, 308, 310, 311, 321),  # ptrace unshare perf setns process_vm bpf
            *(160, 302, 141, 142, 144, 203, 314, 251),  # limits, priorities, affinity
            *(90, 91, 268, 452, 92, 93, 94, 260),  # chmod and chown
            *(132, 235, 261, 280, 76),  # utime and truncate
            *(188, 189, 190, 197, 198, 199),  # extended attributes
            *(29, 64, 68, 240, 248, 249, 250),  # shared memory, queues, keys
        ),
    ),
    "aarch64": (
        0xC00000B7,
        (
            *(220, 221, 281, 435),
            *(198, 203, 200, 199, 425),
            *(129, 138, 130, 131, 240, 424, 434),
            *(117, 97, 241, 268, 270, 271, 280),
            *(164, 261, 140, 118, 119, 122, 274, 30),
            *(52, 53, 452, 54, 55),
            *(88, 45),
            *(5, 6, 7, 14, 15, 16),
            *(194, 190, 186, 180, 217, 218, 219),
        ),
    ),
}
# fcntl by machine, and its commands that have the kernel signal others: F_SETOWN, F_SETSIG, ..._EX
FCNTL, OWNING = {"x86_64": 72, "aarch64": 25}, (8, 10, 15)
FORBIDDEN = (
    "socket.",
    "subprocess.",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "os.spawn",
    "os.kill",
)
FORBIDDEN += (
    "os.system",
    "os.mkdir",
    "os.chmod",
    "os.chown",
    "os.symlink",
    "os.link",
    "os.truncate",
    "pty.",
)
FORBIDDEN += ("ctypes.", "fcntl.", "signal.pthread_kill", "resource.setrlimit", "resource.prlimit")
CHANGING = {"os.remove": 1, "os.rename": 2, "os.rmdir": 1}  # and how many paths they are given
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def main() -> None:
    """Do as standard input says, in JSON, and leave without the program's own endings."""
    task = json.load(sys.stdin)
    verdict, token = quiet(), task["token"]
    try:
        held = give_up_rights(task["limits"])
    except Exception as exc:
        answer = f"{token}{type(exc).__name__}: {exc}"
    else:
        said = json.dumps(held) if task["source"] is None else run(task["source"])
        answer = token if said is None else said[:300]
    os.write(verdict, answer.encode(errors="replace"))
    os._exit(0)


def quiet() -> int:
    """Leave a program nothing to read, and nowhere to print; the verdict gets another place."""
    verdict = os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for place in (0, 1, 2):
        os.dup2(nowhere, place)
    os.close(nowhere)
    os.environ.clear()
    sys.stdin = open(0, encoding="utf-8")  # noqa: SIM115
    return verdict


def run(source: str) -> str | None:
    """Run a program to its last line; what stopped it before, if anything."""
    module = types.ModuleType("program")
    sys.modules["program"] = module
    try:
        exec(compile(source, "program.py", "exec"), module.__dict__)
    except BaseException as exc:  # whatever it is: SystemExit is no way to pass
        return f"{type(exc).__name__}: {exc}"
    return None


# ---- rights ------------------------------------------------------------------------------


def give_up_rights(limits: dict[str, int]) -> list[str]:
    """Give up what a program needs not; the names of what holds it in."""
    for name, value in limits.items():
        lower(getattr(resource, name), value)
    held = ["limits"]
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0)
        header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0)
        libc.capset(header, (ctypes.c_uint32 * 6)())  # none, also for root
        libc.prctl(SIGNAL_WITH_PARENT, signal.SIGKILL, 0, 0, 0)  # who counts the seconds
        held += ["landlock"] if restrict_files(libc) else []
        held += ["seccomp"] if restrict_calls(libc) else []
    watch(os.getcwd())
    return [*held, "audit"]


def lower(kind: int, value: int) -> None:
    """Set a limit for good, never above what is in force."""
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))


def restrict_files(libc: ctypes.CDLL) -> bool:
    """Let the process read Python's own files, and write in its folder: landlock, Linux 5.13."""
    version = libc.syscall(CREATE_RULESET, None, 0, 1)
    if version < 1:
        return False
    known = (1 << RIGHTS.get(version, 16)) - 1
    # Rights to files, and from version 4 and 6 on to TCP and to what is outside the process.
    fields = [known, 3 if version >= 4 else 0, 3 if version >= 6 else 0]
    ruleset = libc.syscall(
        CREATE_RULESET, (ctypes.c_uint64 * 3)(*fields), size_of_rules(version), 0
    )
    if ruleset < 0:
        return False
    for path in readable():
        allow(libc, ruleset, path, READ | READ_FOLDER if os.path.isdir(path) else READ)
    allow(libc, ruleset, os.devnull, READ | 1 << 1)
    allow(libc, ruleset, os.getcwd(), IN_FOLDER & known)
    restricted = libc.syscall(RESTRICT_SELF, ruleset, 0) == 0
    os.close(ruleset)
    return restricted


def size_of_rules(version: int) -> int:
    """Bytes of a set of rules, which grew by a field at versions 4 and 6."""
    return 8 if version < 4 else 16 if version < 6 else 24


def readable() -> list[str]:
    """What Python itself reads: its library, shared libraries, time zones, random numbers."""
    library = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib")]
    shared = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", os.path.join(sys.base_prefix, "lib")]
    return [*library, *shared, "/etc/ld.so.cache", "/usr/share/zoneinfo", "/dev/urandom"]


def allow(libc: ctypes.CDLL, ruleset: int, path: str, rights: int) -> None:
    """Add a rule for a file, or for a folder and what is in it; not for what is not there."""
    with contextlib.suppress(FileNotFoundError):
        place = os.open(path, os.O_PATH)
        rule = rights.to_bytes(8, sys.byteorder) + place.to_bytes(4, sys.byteorder)
        libc.syscall(ADD_RULE, ruleset, 1, rule, 0)
        os.close(place)


def restrict_calls(libc: ctypes.CDLL) -> bool:
    """Let the kernel refuse the `CALLS` and `OWNING`: seccomp, which cannot be taken back."""
    if platform.machine() not in CALLS or sys.maxsize < 2**32:
        return False
    mark, numbers = CALLS[platform.machine()]
    refuse = (0x06, 0, 0, 0x00050001)  # return EPERM
    steps = [(0x20, 0, 0, 4), (0x15, 1, 0, mark), (0x06, 0, 0, 0x80000000)]  # other calls: the end
    steps += [(0x20, 0, 0, 0), (0x35, 0, 1, 0x40000000), refuse]  # the number; not the 32-bit ones
    for number in numbers:
        steps += [(0x15, 0, 1, number), refuse]
    after = 1 + 2 * len(OWNING)
    steps += [(0x15, 0, after, FCNTL[platform.machine()]), (0x20, 0, 0, 24)]  # its second argument
    for command in OWNING:
        steps += [(0x15, 0, 1, command), refuse]
    steps.append((0x06, 0, 0, 0x7FFF0000))  # allow the others
    order = sys.byteorder
    code = b"".join(
        operation.to_bytes(2, order) + bytes([yes, no]) + value.to_bytes(4, order)
        for operation, yes, no, value in steps
    )
    kept = ctypes.create_string_buffer(code, len(code))
    address = ctypes.addressof(kept)
    program = len(steps).to_bytes(8, order) + address.to_bytes(8, order)
    return libc.prctl(SECCOMP, FILTER, program, 0, 0) == 0


def watch(folder: str) -> None:
    """Refuse within Python what the kernel may not: all there is where it is not Linux."""
    inside = os.path.realpath(folder) + os.sep

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event.startswith(FORBIDDEN):
            raise PermissionError(f"{event} is not for generated programs")
        writes = event == "open" and isinstance(args[2], int) and args[2] & WRITING
        if not writes and event not in CHANGING:
            return
        for path in args[: CHANGING.get(event, 1)]:
            if isinstance(path, int) or path == os.devnull:  # a file that is open already
                continue
            if not os.path.realpath(os.fsdecode(path)).startswith(inside):
                raise PermissionError(f"{event} of {path!r} is not for generated programs")
        if event in CHANGING and any(isinstance(place, int) and place > 2 for place in args[1:]):
            raise PermissionError(f"{event} in a folder is not for generated programs")

    sys.addaudithook(hook)


if __name__ == "__main__":
    main()
