"""Train what is trainable in a system; transformers' Trainer does it.

The loss is on the targets, so the anchor's head, the largest matrix, is applied there only.
"""

import math
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from rich.console import Console
from torch import Tensor
from transformers import PrinterCallback, Trainer

from graftlm import decoder
from graftlm.causal_lm import ComposedForCausalLM
from graftlm.reproduce.encoding import IGNORED, Features
from graftlm.reproduce.experiment import Training
from graftlm.reproduce.hardware import on_one_device
from graftlm.reproduce.kv_training import Watch
from graftlm.reproduce.runner import Runner


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
    return logits.float(), labels[:, 1:][asked], asked.nonzero()[:, 0]


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
    runner: Runner,
    features: Features,
    settings: Training,
    *,
    learning_rate: float,
    seed: int,
    title: str,
    console: Console,
    device: str,
    look: Callable[[int], None] = lambda step: None,
) -> list[tuple[int, float]]:
    """Train on features in the given order, each once.

    Returns:
        Step and mean loss since the last entry.
    """
    steps = max(1, len(features) // settings.batch_size)
    watch = Watch(title, console, look, steps)
    with tempfile.TemporaryDirectory() as folder:
        trainer = TargetTrainer(
            model=runner.model,
            args=on_one_device(
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
            data_collator=runner.collate,
            callbacks=[watch],
        )
        trainer.bf16_autocast = runner.bf16
        trainer.remove_callback(PrinterCallback)  # the bar shows what it would print
        try:
            trainer.train()
        finally:
            watch.bar.stop()
    runner.model.eval()
    return watch.losses
