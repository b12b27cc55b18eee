"""Train the bridges of a composition, as a recipe says; the loop is transformers' `Trainer`.

prepare(recipe) -> Training      all that can fail fails here, models last
Training.run()  -> Outcome       trains, evaluates, saves; Ctrl-C leaves a checkpoint
"""

import json
import math
import signal
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)

from graftlm import gguf
from graftlm._version import __version__
from graftlm.caching import cache_states, is_whole
from graftlm.causal_lm import ComposedForCausalLM
from graftlm.checkpoint import check_replaceable
from graftlm.config import ComposedConfig, spaced_connections
from graftlm.data import Examples, contexts, fitting_length, load_examples
from graftlm.loading import compose
from graftlm.processor import ComposedDataCollator, ComposedProcessor
from graftlm.recipe import Recipe
from graftlm.resuming import RECORD, Interruption, starting_point
from graftlm.trainer import ComposedTrainer, check_loss
from graftlm.watching import reports_to, watched

# What suits freshly opened bridges; a recipe's `training` goes over it. Fractions are of all steps.
DEFAULTS: dict[str, Any] = {
    "learning_rate": 3e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,
    "logging_steps": 0.01,
    "logging_first_step": True,
    "save_steps": 0.1,
    "save_total_limit": 2,
    "remove_unused_columns": False,
    "prediction_loss_only": True,
    "ddp_find_unused_parameters": False,
}
EVALUATION_DEFAULTS = {"eval_strategy": "steps", "eval_steps": 0.1}


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How a run ended.

    Args:
        folder: The composed model, or the checkpoint an interrupted run left.
        step: Training steps done in all.
        metrics: Losses and speed.
        stopped_by: The signal that ended the run early, or None.
    """

    folder: str
    step: int
    metrics: Mapping[str, float]
    stopped_by: signal.Signals | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """A composed model and its data, ready to train."""

    recipe: Recipe
    arguments: TrainingArguments
    tokenizer: PreTrainedTokenizerBase
    examples: Examples
    evaluation: Examples | None
    model: ComposedForCausalLM
    max_length: int
    checkpoint: str | None

    @property
    def processor(self) -> ComposedProcessor:
        """The tokenizers of the composed model."""
        assert self.model.processor is not None
        return self.model.processor

    def run(self, console: Console | None = None) -> Outcome:
        """Train, evaluate and save.

        Args:
            console: Where to show progress; by default nowhere.
        """
        interruption = Interruption()
        trained_on, evaluated_on = self.with_states(console)
        trainer = ComposedTrainer(
            model=self.model,
            args=self.arguments,
            train_dataset=trained_on,
            eval_dataset=evaluated_on,
            data_collator=ComposedDataCollator(self.processor),
            processing_class=self.tokenizer,
            callbacks=[interruption],
        )
        with watched(
            trainer, self.tokenizer, self.recipe, console or Console(quiet=True)
        ) as probes:
            if trainer.is_world_process_zero():
                self.record({"state": "started"})
            with interruption.caught():
                trainer.train(resume_from_checkpoint=self.checkpoint)
            step = trainer.state.global_step
            if interruption.has_stopped:
                folder = str(Path(self.recipe.output_dir, f"checkpoint-{step}"))
                return Outcome(folder=folder, step=step, metrics={}, stopped_by=interruption.signal)
            trainer.save_model()  # before an evaluation, which may round the weights
            metrics = self.final_metrics(trainer)
            trainer.save_state()
            # Trainer leaves its arguments as a pickle; what we hand over holds none.
            Path(self.recipe.output_dir, "training_args.bin").unlink(missing_ok=True)
            probes.take_last(trainer.state)  # behind all that must not be lost if it fails
        if trainer.is_world_process_zero():
            self.record({"state": "finished", "step": step, "metrics": metrics})
        return Outcome(folder=self.recipe.output_dir, step=step, metrics=metrics)

    def with_states(self, console: Console | None = None) -> tuple[Any, Any]:
        """The data to train and to evaluate on, with hidden states if the recipe keeps them.

        States that are not in the cache yet are computed first.

        Args:
            console: Where to show progress; by default nowhere.
        """
        parts = {"training": self.examples, "evaluation": self.evaluation}
        data: dict[str, Any] = {
            name: part.dataset if part else None for name, part in parts.items()
        }
        if self.recipe.states_cache is None:
            return data["training"], data["evaluation"]
        if self.recipe.device_map is None and is_whole(self.model):
            model: Any = self.model
            model.to(self.arguments.device)
        with self.autocast():
            for name, dataset in data.items():
                if dataset is not None:
                    states = cache_states(
                        self.model,
                        dataset,
                        Path(self.recipe.states_cache, name),
                        dtype=self.recipe.states_dtype,
                        batch_size=self.arguments.per_device_train_batch_size,
                        console=console,
                    )
                    data[name] = states.with_states(dataset)
        return data["training"], data["evaluation"]

    def autocast(self) -> torch.autocast:
        """The mixed precision that training computes in."""
        dtype = torch.bfloat16 if self.arguments.bf16 else torch.float16
        is_mixed = self.arguments.bf16 or self.arguments.fp16
        return torch.autocast(self.arguments.device.type, dtype, enabled=is_mixed)

    def final_metrics(self, trainer: ComposedTrainer) -> dict[str, float]:
        """The losses of the steps done and of what is saved; evaluates that if it was not."""
        state = trainer.state
        metrics: dict[str, float] = {}
        if trainer.steps_here > 0:
            for entry in state.log_history:
                wanted = ("train_loss", "train_runtime")
                metrics |= {name: entry[name] for name in wanted if name in entry}
        if self.evaluation is not None:
            best = state.best_global_step if self.arguments.load_best_model_at_end else None
            saved = state.global_step if best is None else best
            known = [e for e in state.log_history if "eval_loss" in e and e["step"] == saved]
            metrics["eval_loss"] = (known[-1] if known else trainer.evaluate())["eval_loss"]
            metrics["eval_perplexity"] = math.exp(min(metrics["eval_loss"], 700.0))
        return metrics

    def record(self, facts: Mapping[str, Any]) -> None:
        """Note in the output folder what was trained, on what, and how it went."""
        folder = Path(self.recipe.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        counts = {
            "examples": len(self.examples.dataset),
            "evaluation_examples": len(self.evaluation.dataset) if self.evaluation else 0,
            "tokens": self.examples.num_tokens,
            "truncated": self.examples.num_truncated,
            "dropped": self.examples.num_dropped,
        }
        content = {
            "graftlm": __version__,
            "recipe": self.recipe.to_json(),
            "max_length": self.max_length,
            "data": counts,
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            **facts,
        }
        temporary = folder / f".{RECORD}"
        temporary.write_text(json.dumps(content, indent=2, default=str), encoding="utf-8")
        temporary.replace(folder / RECORD)


# ---- before training ---------------------------------------------------------------------


def prepare(recipe: Recipe, *, resume: bool = False) -> Training:
    """Read the data and compose the model; what is quick to check is checked first.

    Args:
        recipe: What to do.
        resume: Continue from the last complete checkpoint of the output folder.

    Raises:
        ValueError: If the recipe contradicts the models, the data or the output folder.
    """
    arguments = training_arguments(recipe)
    check_replaceable(Path(recipe.output_dir))
    checkpoint = starting_point(recipe, resume=resume)
    return load(recipe, arguments, checkpoint)


def load(recipe: Recipe, arguments: TrainingArguments, checkpoint: str | None = None) -> Training:
    """Read the data and compose the model, wherever the run starts.

    Raises:
        ValueError: If the recipe contradicts the models or the data.
    """
    check_layers(recipe)
    tokenizer: Any = AutoTokenizer.from_pretrained(
        gguf.resolve(recipe.tokenizer or recipe.anchor),
        trust_remote_code=recipe.trust_remote_code,
    )
    max_length = fitting_length(base_configs(recipe), recipe.max_length)
    check_probes(recipe, tokenizer)
    options = {"max_length": max_length, "completions_only": recipe.completions_only}
    with arguments.main_process_first(desc="reading data"):
        examples = load_examples(recipe.data, tokenizer, **options)
        evaluation = None
        if recipe.eval_data is not None:
            evaluation = load_examples(recipe.eval_data, tokenizer, **options)
        elif recipe.eval_fraction is not None:
            examples, evaluation = examples.split(recipe.eval_fraction, recipe.seed)
    set_seed(recipe.seed)
    return Training(
        recipe=recipe,
        arguments=arguments,
        tokenizer=tokenizer,
        examples=examples,
        evaluation=evaluation,
        model=compose(
            recipe.anchor, recipe.augmenting, tokenizer=tokenizer, **recipe.compose_options()
        ),
        max_length=max_length,
        checkpoint=checkpoint,
    )


def training_arguments(recipe: Recipe) -> TrainingArguments:
    """The recipe's, over our defaults, over those of transformers.

    Raises:
        ValueError: If transformers finds a contradiction.
    """
    values: dict[str, Any] = DEFAULTS | (EVALUATION_DEFAULTS if recipe.evaluates else {})
    if not {"bf16", "fp16", "use_cpu"} & set(recipe.training):
        values["bf16"] = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    values["dataloader_pin_memory"] = torch.cuda.is_available()
    values |= recipe.training
    values["report_to"] = reports_to(recipe)
    for name in ("do_train", "do_eval", "do_predict"):
        if name in recipe.training:
            warnings.warn(f"training.{name} has no effect: train always trains", stacklevel=2)
    # Our own display replaces the bar of transformers.
    values |= {"output_dir": recipe.output_dir, "seed": recipe.seed, "disable_tqdm": True}
    arguments = TrainingArguments(**values)
    check_loss(arguments)
    return arguments


def base_configs(recipe: Recipe) -> dict[str, Any]:
    """The configurations of the anchor and the augmenting models, without their weights."""
    return {
        name: AutoConfig.from_pretrained(
            gguf.resolve(ref), trust_remote_code=recipe.trust_remote_code
        )
        for name, ref in {"anchor": recipe.anchor, **recipe.models}.items()
    }


def check_layers(recipe: Recipe) -> None:
    """Refuse connections to layers that do not exist, before any weights are read."""
    configs = base_configs(recipe)
    anchor = configs.pop("anchor")
    anchor_layers = anchor.get_text_config(decoder=True).num_hidden_layers
    connections = list(recipe.connections or ()) or [
        connection
        for name, config in configs.items()
        for connection in spaced_connections(
            name, config.get_text_config(decoder=True).num_hidden_layers, anchor_layers, 4
        )
    ]
    ComposedConfig(anchor_config=anchor, augmenting_configs=configs, connections=connections)


def check_probes(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse prompts that would stop the run when they are first continued.

    Raises:
        ValueError: If one is too long with what is written after it, or has no tokens.
    """
    for prompt in recipe.probe or ():
        num_tokens = len(tokenizer(prompt, verbose=False)["input_ids"])
        if num_tokens == 0:
            raise ValueError(f"probe {prompt!r} has no tokens, so there is nothing to continue")
        for model, size in contexts(base_configs(recipe)).items():
            if num_tokens + recipe.probe_tokens > size:
                raise ValueError(
                    f"probe {prompt!r} has {num_tokens} tokens and probe_tokens is "
                    f"{recipe.probe_tokens}, but the context of {model} is {size} tokens"
                )
