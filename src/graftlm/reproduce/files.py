"""Write a file or a folder whole or not at all, one process at a time."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from rich.console import Console


def write_text(path: Path, text: str) -> None:
    """Write under a temporary name, then rename."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


@contextmanager
def unfinished(folder: Path) -> Iterator[Path]:
    """A folder to fill, which is then renamed; what was begun goes away if filling it fails."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        filled = Path(temporary, "filled")
        filled.mkdir()
        yield filled
        filled.replace(folder)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Let one process at a time make a folder; another one waits, and finds it made."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        Console(stderr=True).print(f"waiting for the process that makes {folder}", markup=False)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
