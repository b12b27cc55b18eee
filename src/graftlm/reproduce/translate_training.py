"""Train what is trainable in a model on pairs; transformers' Trainer does it.

The loss is on the targets, so the anchor's head, the largest matrix, is applied there only.
"""

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainingArguments

from graftlm import decoder
from graftlm.causal_lm import ComposedForCausalLM
from graftlm.reproduce.kv_training import Watch
from graftlm.reproduce.translate_data import IGNORED

Features = list[dict[str, list[int]]]
Collate = Callable[[Features], dict[str, Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingSettings:
    """How to train; the learning rate falls along a cosine to nothing."""

    batch_size: int = 8
    weight_decay: float = 0.01
    warmup: float = 0.1  # of all updates
    bf16: bool = True  # autocast


def target_logits(
    model: Any, batch: dict[str, Any]
) -> tuple[Float[Tensor, "targets vocab"], Int[Tensor, " targets"], Int[Tensor, " targets"]]:
    """What a model says where a label follows.

    Returns:
        Logits, labels, and the row each is of.
    """
    labels = batch["labels"]
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    if isinstance(model, ComposedForCausalLM):
        if model.config.reads == "prompt":
            inputs["prompt_mask"] = ((labels != IGNORED).cumsum(-1) == 0).long()
        trunk: Any = model.model
    else:
        trunk = decoder.trunk(model)
    hidden_states = trunk(**inputs, use_cache=False).last_hidden_state[:, :-1]
    asked = labels[:, 1:] != IGNORED
    logits = model.get_output_embeddings()(hidden_states[asked])
    rows = asked.nonzero()[:, 0]
    return logits.float(), labels[:, 1:][asked], rows


def target_loss(model: Any, batch: dict[str, Any], *, bf16: bool) -> Float[Tensor, ""]:
    """Mean cross-entropy of the batch's targets."""
    with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
        logits, labels, _ = target_logits(model, batch)
    return F.cross_entropy(logits, labels)


class TargetTrainer(Trainer):
    """Trainer with the head applied to targets only."""

    bf16_autocast = False

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Mean cross-entropy of the batch's targets."""
        del return_outputs, num_items_in_batch
        return target_loss(model, inputs, bf16=self.bf16_autocast)


def fit(
    model: PreTrainedModel,
    features: Features,
    collate: Collate,
    settings: TrainingSettings,
    *,
    learning_rate: float,
    seed: int,
    title: str,
    console: Console,
    device: str,
) -> list[tuple[int, float]]:
    """Train on features in the given order, each once.

    Returns:
        Step and mean loss since the last entry.
    """
    steps = len(features) // settings.batch_size
    watch = Watch(title, console, lambda step: None, steps)
    with tempfile.TemporaryDirectory() as folder:
        trainer = TargetTrainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder,  # nothing is saved there
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                logging_steps=math.ceil(steps / 20),
                max_steps=steps,
                per_device_train_batch_size=settings.batch_size,
                train_sampling_strategy="sequential",
                remove_unused_columns=False,
                dataloader_pin_memory=device != "cpu",
                learning_rate=learning_rate,
                lr_scheduler_type="cosine",
                warmup_steps=math.ceil(steps * settings.warmup),
                weight_decay=settings.weight_decay,
                adam_beta2=0.98,  # a run has a few hundred updates
                use_cpu=device == "cpu",
                seed=seed,
            ),
            train_dataset=features,  # pyrefly: ignore[bad-argument-type]
            data_collator=collate,
            callbacks=[watch],
        )
        trainer.bf16_autocast = settings.bf16
        trainer.remove_callback(PrinterCallback)  # the bar shows what it would print
        try:
            trainer.train()
        finally:
            watch.bar.stop()
    model.eval()
    return watch.losses


def pad(features: Sequence[dict[str, list[int]]], *, left: bool = False) -> dict[str, Tensor]:
    """A batch for a model that stands alone."""
    longest = max(len(feature["input_ids"]) for feature in features)
    blanks = {"input_ids": 0, "labels": IGNORED}
    columns: dict[str, list[list[int]]] = {name: [] for name in features[0]}
    columns["attention_mask"] = []
    for feature in features:
        for name, values in {**feature, "attention_mask": [1] * len(feature["input_ids"])}.items():
            blank = [blanks.get(name, 0)] * (longest - len(values))
            columns[name].append(blank + values if left else values + blank)
    return {name: torch.tensor(rows) for name, rows in columns.items()}
