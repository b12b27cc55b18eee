"""results.json: what was measured, section by section, and on what."""

import json
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

import graftlm
from graftlm.reproduce.hardware import hardware


def described(device: str, threads: int) -> dict[str, Any]:
    """The machine, and the versions of what is measured."""
    return hardware(device, jobs=1) | {
        "threads": threads,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "graftlm": graftlm.__version__,
    }


class Results:
    """The file, written anew whenever a row is there, so that a stopped run keeps what it has.

    Args:
        folder: Where it is; sections of earlier runs stay until they are measured again.
        device, threads: Of this run.
    """

    def __init__(self, folder: Path, device: str, threads: int):
        self.path = folder / "results.json"
        folder.mkdir(parents=True, exist_ok=True)
        self.sections: dict[str, Any] = {}
        if self.path.exists():
            self.sections = json.loads(self.path.read_text(encoding="utf-8"))["sections"]
        self.run = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": f"python -m benchmarks {shlex.join(sys.argv[1:])}".rstrip(),
            "hardware": described(device, threads),
        }

    def begin(self, section: str) -> None:
        """Start a section over."""
        self.sections[section] = {"run": self.run, "complete": False, "rows": []}

    def add(self, section: str, row: dict[str, Any]) -> None:
        """Keep a row."""
        self.sections[section]["rows"].append(row)
        self.write()

    def finish(self, section: str) -> None:
        """Note that a section has all its rows."""
        self.sections[section]["complete"] = True
        self.write()

    def write(self) -> None:
        """Under another name first: a half-written file would lose the sections before."""
        draft = self.path.with_suffix(".json.new")
        text = json.dumps({"run": self.run, "sections": self.sections}, indent=1)
        draft.write_text(text + "\n", encoding="utf-8")
        draft.replace(self.path)
