"""What a training run shows of itself: a bar with the time left, or plain lines in a log file."""

import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from graftlm.sizes import readable_bytes

# What is shown of a log, in this order.
SHOWN: dict[str, Callable[[float], str]] = {
    "loss": lambda value: f"loss {value:.4g}",
    "eval_loss": lambda value: f"eval loss {value:.4g}",
    "learning_rate": lambda value: f"lr {value:.3g}",
    "examples_per_second": lambda value: f"{value:,.1f} examples/s",
    "tokens_per_second": lambda value: f"{value:,.0f} tokens/s",
    "memory_bytes": lambda value: f"memory {readable_bytes(value)}",
}


class Bars(Progress):
    """Bars, and a line of facts below them."""

    facts = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        """All that is drawn."""
        yield from super().get_renderables()
        yield Text(self.facts)


class ProgressDisplay(TrainerCallback):
    """Shows step, losses, speed, memory and time left; one line a log where there is no terminal.

    Args:
        console: Where to; only the first process of a run writes.
    """

    def __init__(self, console: Console):
        self.console = console
        self.progress: Bars | None = None
        self.task = TaskID(0)
        self.evaluation: TaskID | None = None
        self.latest: dict[str, str] = {}
        self.started_s, self.first_step = 0.0, 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar, at the step a resumed run continues from."""
        self.started_s, self.first_step = time.monotonic(), state.global_step
        if not state.is_world_process_zero or not self.console.is_terminal:
            return
        self.progress = Bars(
            TextColumn("{task.description:<10}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self.task = self.progress.add_task(
            "training", total=state.max_steps, completed=state.global_step
        )
        self.progress.start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move the bar."""
        if self.progress:
            self.progress.update(self.task, completed=state.global_step)

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Move a second bar while evaluating."""
        if not self.progress or eval_dataloader is None:
            return
        if self.evaluation is None:
            self.evaluation = self.progress.add_task("evaluating", total=len(eval_dataloader))
        self.progress.advance(self.evaluation)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the second bar away."""
        if self.progress and self.evaluation is not None:
            self.progress.remove_task(self.evaluation)
            self.evaluation = None

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the newest losses, the speed and the memory."""
        if not state.is_world_process_zero:
            return
        logs = logs or {}
        new = {name: words(logs[name]) for name, words in SHOWN.items() if name in logs}
        if not new:
            return
        self.latest |= new
        if self.progress:
            shown = [self.latest[name] for name in SHOWN if name in self.latest]
            self.progress.facts = "  ".join(shown)
        else:
            left = "" if "eval_loss" in new else f"  left {self.time_left(state)}"
            facts = "  ".join(new.values())
            self.console.print(f"step {state.global_step}/{state.max_steps}  {facts}{left}")

    def time_left(self, state: TrainerState) -> timedelta:
        """If all goes on as it went since this process began, evaluations included."""
        done = state.global_step - self.first_step
        seconds = (time.monotonic() - self.started_s) / done * (state.max_steps - state.global_step)
        return timedelta(seconds=round(seconds))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the finished bar on the screen."""
        if self.progress:
            self.progress.stop()
            self.progress = None

    def __exit__(self, *error: object) -> None:
        """Give the terminal back also when training raised."""
        if self.progress:
            self.progress.stop()

    def __enter__(self) -> "ProgressDisplay":
        return self
