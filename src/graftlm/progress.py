"""What a training run shows of itself: a bar with the time left, or plain lines in a log file."""

from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class ProgressDisplay(TrainerCallback):
    """Shows the step, the losses and the time left; one line a log where there is no terminal.

    Args:
        console: Where to; only the first process of a run writes.
    """

    def __init__(self, console: Console):
        self.console = console
        self.progress: Progress | None = None
        self.task = TaskID(0)
        self.evaluation: TaskID | None = None
        self.latest: dict[str, str] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar, at the step a resumed run continues from."""
        if not state.is_world_process_zero or not self.console.is_terminal:
            return
        self.progress = Progress(
            TextColumn("{task.description:<10}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[losses]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self.task = self.progress.add_task(
            "training", total=state.max_steps, completed=state.global_step, losses=""
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
            self.evaluation = self.progress.add_task(
                "evaluating", total=len(eval_dataloader), losses=""
            )
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
        """Show the newest losses."""
        if not state.is_world_process_zero:
            return
        known = {"loss": "loss", "eval_loss": "eval loss", "learning_rate": "lr"}
        new = {known[k]: f"{v:.4g}" for k, v in (logs or {}).items() if k in known}
        if not new:
            return
        self.latest |= new
        if self.progress:
            shown = {k: v for k, v in self.latest.items() if k != "lr"}
            self.progress.update(self.task, losses=in_words(shown))
        else:
            self.console.print(f"step {state.global_step}/{state.max_steps}  {in_words(new)}")

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


def in_words(values: dict[str, str]) -> str:
    """Names and values in one line."""
    return "  ".join(f"{name} {value}" for name, value in values.items())
