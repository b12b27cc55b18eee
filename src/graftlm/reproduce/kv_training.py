"""Train a model on texts of which it is to predict some pieces; transformers' Trainer does it."""

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from graftlm.reproduce.hardware import has_bf16, on_one_device
from graftlm.reproduce.kv_data import Example

END = "[EOS]"
Lesson = list[tuple[str, bool]]  # pieces of one text, and whether the model is to predict each


@dataclass(frozen=True, kw_only=True, slots=True)
class FitSettings:
    """How to train; the learning rate falls along a cosine to nothing."""

    steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    warmup_steps: int = 50
    bf16: bool = True  # autocast where that is fast: nearly twice as fast, and enough here


def lesson_of(example: Example) -> Lesson:
    """Ask for an example's completion, and for the end of the text."""
    return [(example.prompt, False), (example.completion + END, True)]


def collate(tokenizer: PreTrainedTokenizerBase, lessons: list[Lesson]) -> dict[str, torch.Tensor]:
    """Tokenize lessons into one right-padded batch, with labels on what is to be predicted."""
    pieces = tokenizer([text for lesson in lessons for text, _ in lesson], add_special_tokens=False)
    ids_of_pieces = iter(pieces["input_ids"])
    bos, pad = tokenizer.bos_token_id, tokenizer.pad_token_id
    rows: list[list[int]] = []
    labels: list[list[int]] = []
    for lesson in lessons:
        row, label = [bos], [-100]
        for _, learn in lesson:
            ids = next(ids_of_pieces)
            row += ids
            label += ids if learn else [-100] * len(ids)
        rows.append(row)
        labels.append(label)
    length = max(map(len, rows))
    return {
        "input_ids": torch.tensor([row + [pad] * (length - len(row)) for row in rows]),
        "attention_mask": torch.tensor(
            [[1] * len(row) + [0] * (length - len(row)) for row in rows]
        ),
        "labels": torch.tensor([row + [-100] * (length - len(row)) for row in labels]),
    }


class Watch(TrainerCallback):
    """Shows progress with the time left, and looks at the model now and then."""

    def __init__(self, title: str, console: Console, look: Callable[[int], None], every: int):
        self.look, self.every = look, every
        self.losses: list[tuple[int, float]] = []
        self.bar = Progress(
            TextColumn(title),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[loss]}"),
            console=console,
        )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Start the bar."""
        self.row = self.bar.add_task("", total=state.max_steps, loss="")
        self.bar.start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Advance the bar."""
        self.bar.update(self.row, completed=state.global_step)
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self.look(state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Keep the loss."""
        if logs and "loss" in logs:
            self.losses.append((state.global_step, float(logs["loss"])))
            self.bar.update(self.row, loss=f"loss {float(logs['loss']):.3f}")


def fit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    lessons: Any,
    settings: FitSettings,
    *,
    seed: int,
    title: str,
    console: Console,
    use_cpu: bool,
    look: Callable[[int], None] = lambda step: None,
    look_every: int = 100,
) -> list[tuple[int, float]]:
    """Train what is trainable in a model, reading the lessons in order.

    Args:
        lessons: Anything with a length that gives a `Lesson` for a number.
        look: Called with the step every `look_every` steps, and after the last.

    Returns:
        Step and mean loss since the last entry.
    """
    watch = Watch(title, console, look, look_every)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=on_one_device(
                output_dir=folder,  # nothing is saved there: a run takes minutes
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                logging_steps=math.ceil(settings.steps / 100),
                max_steps=settings.steps,
                per_device_train_batch_size=settings.batch_size,
                train_sampling_strategy="sequential",
                remove_unused_columns=False,
                dataloader_pin_memory=not use_cpu,
                learning_rate=settings.learning_rate,
                lr_scheduler_type="cosine",
                warmup_steps=settings.warmup_steps,
                weight_decay=settings.weight_decay,
                adam_beta2=0.98,
                bf16=settings.bf16 and has_bf16("cpu" if use_cpu else "cuda"),
                use_cpu=use_cpu,
                seed=seed,
            ),
            train_dataset=lessons,
            data_collator=partial(collate, tokenizer),
            callbacks=[watch],
        )
        trainer.remove_callback(PrinterCallback)  # the bar shows what it would print
        try:
            trainer.train()
        finally:
            watch.bar.stop()
            # Undo the autocast that the Trainer put around `forward`.
            trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    return watch.losses
