"""Training one can watch: bars or lines, curves.png, TensorBoard's logs, and probes."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import (
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations import TensorBoardCallback, is_tensorboard_available

from graftlm.curves import Curves
from graftlm.probes import Probes, check_whole
from graftlm.progress import ProgressDisplay
from graftlm.recipe import Recipe
from graftlm.trainer import ComposedTrainer

LOGS = "logs"


@contextmanager
def watched(
    trainer: ComposedTrainer, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, console: Console
) -> Iterator[Probes]:
    """Within this context the run is shown on the console, and its output folder shows it too.

    Raises:
        ValueError: If the recipe has probes, but the model is spread over processes.
    """
    check_whole(recipe, trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    display = ProgressDisplay(console)
    logs = None
    if trainer.pop_callback(TensorBoardCallback) is not None:
        logs = TensorBoardLogs(Path(recipe.output_dir, LOGS))
        trainer.add_callback(logs)
    probes = Probes(trainer, tokenizer, recipe, console, logs)
    for callback in (display, Curves(recipe.output_dir), probes):
        trainer.add_callback(callback)
    try:
        with display:
            yield probes
    finally:
        if logs is not None:
            logs.close()


class TensorBoardLogs(TensorBoardCallback):
    """transformers' callback, which writes into the output folder until it is closed.

    Args:
        folder: Where to, unless the environment says it in TENSORBOARD_LOGGING_DIR.
    """

    def __init__(self, folder: Path):
        super().__init__()
        self.logging_dir = self.logging_dir or str(folder)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Hide what a killed run wrote behind the checkpoint: these steps come again."""
        if state.is_world_process_zero and self.tb_writer is None:
            self.tb_writer = self._SummaryWriter(
                log_dir=self.logging_dir, purge_step=state.global_step + 1
            )
        super().on_train_begin(args, state, control, **kwargs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stay open: the last evaluation and the last probes come later."""

    def close(self) -> None:
        """Write what is left."""
        if self.tb_writer is not None:
            self.tb_writer.close()


def reports_to(recipe: Recipe) -> Any:
    """Whom the run reports to: whom the recipe names, else TensorBoard, if it is installed.

    Raises:
        ValueError: If the recipe names TensorBoard, and it is not.
    """
    is_installed = is_tensorboard_available()
    chosen = recipe.training.get("report_to")
    if chosen is None:
        return "tensorboard" if is_installed else "none"
    if "tensorboard" in ([chosen] if isinstance(chosen, str) else chosen) and not is_installed:
        raise ValueError(
            f"training.report_to is {chosen!r}, but the tensorboard package is missing; "
            "pip install 'graftlm[watch]'"
        )
    return chosen
