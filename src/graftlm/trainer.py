"""transformers' Trainer for bridges: any layout of processes, checkpoints that fit all of them.

What is frozen may be spread over processes (FSDP2, DeepSpeed ZeRO-3). A checkpoint holds the
bridges as `save_pretrained` writes them and their optimizer's state, both whole, so that a run can
go on with another layout than it was saved with.

Each log of a loss says how fast training went since the last one, and what memory it takes.
"""

import os
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from graftlm import optimizer_state
from graftlm.bases import role_of
from graftlm.causal_lm import ComposedForCausalLM
from graftlm.checkpoint import PREFIX, bridge_weights, check_names, read_config, read_weights
from graftlm.config import ComposedConfig
from graftlm.decoder import num_heads, text_config
from graftlm.errors import CheckpointMismatchError
from graftlm.meter import Meter
from graftlm.sharding import set_weight, whole_weight

SCHEDULER = "scheduler.pt"


class ComposedTrainer(Trainer):
    """A `Trainer` for composed models; takes what `Trainer` takes.

    Raises:
        TypeError: If the model is not a `ComposedForCausalLM`.
        ValueError: If something else than bridges would be trained, or the layout is not one of
            a single process, DDP, FSDP2 and DeepSpeed ZeRO-3, or the loss is to be smoothed.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        check_trainable(self.model)
        check_loss(self.args)
        state: Any = self.accelerator.state
        if self.is_fsdp_enabled:
            check_layout("fsdp_version", state.fsdp_plugin.fsdp_version, 2)
        if self.is_deepspeed_enabled:
            check_layout("zero_stage", state.deepspeed_plugin.zero_stage, 3)
            check_precision(self.args.fp16)
        # While the frozen weights are as they were loaded. Under ZeRO-3 they are spread already,
        # and to see them takes every process; with FSDP2 only the first may have read them.
        if self.is_deepspeed_enabled or self.is_world_process_zero():
            self.composed.take_fingerprints()
        self.composed.config.bases = broadcast_object_list([self.composed.config.bases])[0]
        self.meter = Meter(self.accelerator)

    @property
    def composed(self) -> ComposedForCausalLM:
        """The composed model inside whatever is trained."""
        inner: Any = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        return inner

    @property
    def steps_here(self) -> int:
        """Steps done since training began or was resumed."""
        return self.state.global_step - self._initial_global_step

    def named_weights(self) -> dict[str, Tensor]:
        """The bridges' parameters by the names they have in files."""
        return bridge_weights(dict(self.composed.bridges.named_parameters(PREFIX[:-1])))

    # ---- measuring -----------------------------------------------------------------------

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """As in `Trainer`, and counted."""
        self.meter.count(inputs)
        return super().training_step(model, inputs, num_items_in_batch)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, and beside a training loss how fast training is and what memory it takes."""
        if start_time is not None:  # the logs of the training loop, in every process
            logs = logs | self.meter.read()
        super().log(logs, start_time)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        control = self.control
        is_due = control.should_log or control.should_evaluate or control.should_save
        with self.meter.paused() if is_due else nullcontext():
            super()._maybe_log_save_evaluate(*args, **kwargs)

    # ---- saving --------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the bridges as `save_pretrained` does; every process must call this."""
        weights = {}
        for name, parameter in self.named_weights().items():
            tensor = whole_weight(parameter)
            if self.args.should_save:
                weights[name] = tensor.cpu()
        if self.args.should_save:
            self._save(output_dir, state_dict=weights)
        # Others would write their random numbers into a folder that is only now renamed.
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        state = optimizer_state.gather(
            self.inner_optimizer, self.names(), keep=self.args.should_save
        )
        if self.args.should_save:
            folder = Path(output_dir)
            optimizer_state.write(state, folder)
            assert self.lr_scheduler is not None
            torch.save(self.lr_scheduler.state_dict(), folder / f".{SCHEDULER}")
            (folder / f".{SCHEDULER}").replace(folder / SCHEDULER)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # The file that completes a checkpoint comes next, from the first process.
        self.accelerator.wait_for_everyone()

    # ---- resuming ------------------------------------------------------------------------

    def _prepare_for_training(
        self, max_steps: Any, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> Any:
        # Without the checkpoint, for which Trainer knows one format a layout.
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        self.meter = Meter(self.accelerator)
        if resume_from_checkpoint is not None:
            self._load_from_checkpoint(resume_from_checkpoint)
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
            self._load_scaler(resume_from_checkpoint)
        return prepared

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        folder = os.fspath(resume_from_checkpoint)
        config = read_config(folder)
        check_same(config, self.composed.config, folder)
        weights, parameters = read_weights(folder, config), self.named_weights()
        check_names(weights, parameters, folder)
        for name, parameter in parameters.items():
            set_weight(parameter, weights[name])

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:  # resumed where the run had ended
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        assert checkpoint is not None
        assert self.lr_scheduler is not None
        folder = Path(checkpoint)
        state = optimizer_state.read(folder)
        optimizer_state.restore(self.inner_optimizer, self.names(), state, str(folder))
        schedule = torch.load(folder / SCHEDULER, weights_only=True)
        self.lr_scheduler.load_state_dict(schedule)

    @property
    def inner_optimizer(self) -> Any:
        """The optimizer without accelerate's wrapper."""
        optimizer: Any = self.optimizer
        return getattr(optimizer, "optimizer", optimizer)

    def names(self) -> dict[Tensor, str]:
        """The names of the parameters that are trained."""
        return {parameter: name for name, parameter in self.named_weights().items()}


def check_trainable(model: Any) -> None:
    """Refuse to train what checkpoints would not hold.

    Raises:
        TypeError: If the model is not a composed one.
        ValueError: Naming a trainable parameter that is not a bridge's.
    """
    if not isinstance(model, ComposedForCausalLM):
        raise TypeError(
            f"ComposedTrainer trains a ComposedForCausalLM, not a {type(model).__name__}; use "
            "transformers.Trainer"
        )
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not name.startswith(PREFIX):
            raise ValueError(
                f"{name} requires gradients, but checkpoints of ComposedTrainer hold bridges only; "
                "freeze it, or use transformers.Trainer"
            )


def check_loss(args: TrainingArguments) -> None:
    """Refuse to smooth labels: Trainer shifts them for the classes it knows only.

    Raises:
        ValueError: If it is asked for; bridges would learn to copy the token that they see.
    """
    if args.label_smoothing_factor:
        raise ValueError(
            f"label_smoothing_factor is {args.label_smoothing_factor}, but Trainer would compare "
            "each label with the logits of its own token; leave it at 0"
        )


def check_same(saved: ComposedConfig, config: ComposedConfig, folder: str) -> None:
    """Refuse to go on from a checkpoint of another composition.

    Raises:
        CheckpointMismatchError: If it has other connections or bridges, reads otherwise, or the
            weights of a base model differ.
    """
    if saved.connections != config.connections:
        raise CheckpointMismatchError(
            f"{folder} has the connections {written(saved)}, but this run has {written(config)}; "
            "start anew in another output folder"
        )
    ours = settings_of(config, config.anchor_config)
    for name, there in settings_of(saved, config.anchor_config).items():
        if there != ours[name]:
            raise CheckpointMismatchError(
                f"{folder} has {name} {there!r}, but this run has {ours[name]!r}; start anew in "
                "another output folder"
            )
    for name, base in config.bases.items():
        here = base.get("fingerprint") or {}
        there = saved.bases.get(name, {}).get("fingerprint") or {}
        if here.get("dtype") != there.get("dtype") or not (
            here.get("weights") and there.get("weights")
        ):
            continue  # not to be compared
        if here["weights"] != there["weights"]:
            raise CheckpointMismatchError(
                f"{folder} was trained on another {role_of(name).removeprefix('the ')}: its "
                "weights differ; start anew in another output folder"
            )


def settings_of(config: ComposedConfig, anchor: Any) -> dict[str, Any]:
    """What changes how bridges compute; most of it shows in no weight.

    Args:
        anchor: The configuration of the loaded anchor.
    """
    bridge = config.bridge.resolve(text_config(anchor).hidden_size, num_heads(anchor))
    return {**asdict(bridge), "reads": config.reads, "alignments": config.alignments}


def written(config: ComposedConfig) -> str:
    """Connections as the command line takes them."""
    return ", ".join(
        f"{c.augmenting}:{c.augmenting_layer}-{c.anchor_layer}" for c in config.connections
    )


def check_layout(setting: str, found: int, needed: int) -> None:
    """Refuse the other stages and versions of what spreads a model over processes.

    Raises:
        ValueError: Saying what to set.
    """
    if found != needed:
        raise ValueError(
            f"{setting} is {found}, but graftlm trains with {setting} {needed} only; change it in "
            "the configuration of accelerate"
        )


def check_precision(is_fp16: bool) -> None:
    """Refuse float16 under DeepSpeed, whose changing scale of the loss no checkpoint would hold.

    Raises:
        ValueError: If it is asked for.
    """
    if is_fp16:
        raise ValueError(
            "fp16 is on, but under DeepSpeed a resumed run would start with another scale of the "
            "loss; use bf16"
        )
