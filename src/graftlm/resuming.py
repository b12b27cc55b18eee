"""Stopping a training run and going on with it: checkpoints, Ctrl-C, kill."""

import json
import os
import re
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from graftlm.recipe import Recipe

RECORD = "training.json"
WITHOUT_EFFECT = {"probe", "probe_tokens"}  # on what is trained


def starting_point(recipe: Recipe, *, resume: bool) -> str | None:
    """The checkpoint to start from, or None for the beginning.

    Raises:
        ValueError: If the output folder holds a run that was not asked to be continued, or cannot
            be, or what that run did after the checkpoint to start from.
    """
    named = recipe.training.get("resume_from_checkpoint")
    found = last_checkpoint(Path(recipe.output_dir))
    if found is None and read_record(recipe).get("state") == "finished":
        raise ValueError(
            f"{recipe.output_dir} holds a finished run and no checkpoint to go on from; choose "
            "another output folder, or delete it first"
        )
    is_own = (
        named is not None and Path(named).absolute().parent == Path(recipe.output_dir).absolute()
    )
    if not resume and found is not None and not is_own:
        raise ValueError(
            f"{recipe.output_dir} already holds {found.name}; pass --resume to continue that "
            "run, or choose another output folder"
        )
    if named is not None and not (resume and found):  # a stopped run goes on from its own
        if not is_complete(Path(named)):
            raise ValueError(
                f"training.resume_from_checkpoint is {named!r}, which is no checkpoint"
            )
        if is_own and found is not None and found.name != Path(named).name:
            raise ValueError(
                f"{recipe.output_dir} also holds {found.name}, which --resume would take for what "
                f"follows on {Path(named).name}; delete it, or choose another output folder"
            )
        return str(named)
    if not resume:
        return None
    if found is None:
        warnings.warn(
            f"{recipe.output_dir} holds no checkpoint to resume from; starting at the beginning",
            stacklevel=2,
        )
        return None
    warn_if_changed(recipe)
    return str(found)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint; one that was cut off while it was written is passed over."""
    numbered = {
        int(match[1]): path
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and path.is_dir()
    }
    for _, path in sorted(numbered.items(), reverse=True):
        if is_complete(path):
            return path
        warnings.warn(
            f"{path} is incomplete: training ended while it was written; passing it over",
            stacklevel=3,
        )
    return None


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint has its last file, whole: `Trainer` writes trainer_state.json last."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def read_record(recipe: Recipe) -> dict[str, Any]:
    """What the output folder says of its last run; nothing if there was none."""
    try:
        return json.loads(Path(recipe.output_dir, RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def warn_if_changed(recipe: Recipe) -> None:
    """Say in what the recipe differs from the one the checkpoint was made with."""
    now = json.loads(json.dumps(recipe.to_json(), default=str))
    before = read_record(recipe).get("recipe", now)
    names = sorted((now.keys() | before) - WITHOUT_EFFECT)
    changed = [name for name in names if now.get(name) != before.get(name)]
    if changed:
        warnings.warn(
            f"the recipe differs in {', '.join(changed)} from the one this run was started with, "
            "so it will not end as it would have",
            stacklevel=3,
        )


class Interruption(TrainerCallback):
    """On Ctrl-C (or SIGTERM): finish the step, save a checkpoint, stop. A second one stops at once.

    With several processes all stop at the same step, whichever was interrupted first.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.has_stopped = False  # a signal after the last step is too late
        self.process = os.getpid()

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Listen for signals; only the main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for number in before:
            signal.signal(number, self.receive)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Note the signal; data loading processes, which inherit this, ignore it."""
        if self.signal is not None and os.getpid() == self.process:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save and stop, if asked to."""
        if args.world_size > 1:
            number = torch.tensor(int(self.signal or 0), device=args.device)
            torch.distributed.all_reduce(number, op=torch.distributed.ReduceOp.MAX)
            self.signal = signal.Signals(int(number)) if int(number) else None
        if self.signal is not None:
            self.has_stopped = control.should_save = control.should_training_stop = True
            if args.save_total_limit == 1:
                args.save_total_limit = 2  # at its end Trainer would keep the best one only
            control.should_evaluate = False

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The checkpoint is written already; do not spend time on evaluation."""
        if self.has_stopped:
            control.should_save = control.should_evaluate = False
