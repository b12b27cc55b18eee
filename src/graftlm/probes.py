"""Prompts that a run continues from time to time, so that one sees what its loss means."""

import json
from pathlib import Path
from textwrap import indent
from typing import Any

import torch
from rich.console import Console
from transformers import (
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations import TensorBoardCallback

from graftlm.greedy import GREEDY
from graftlm.recipe import Recipe
from graftlm.trainer import ComposedTrainer

FILE = "probes.jsonl"


class Probes(TrainerCallback):
    """Continues prompts at each evaluation, or at each checkpoint where nothing is evaluated.

    Greedily, from the first process only, and drawing no random number: training goes on as if
    nothing had been asked. What was written is printed, kept in probes.jsonl, and shown by
    TensorBoard.

    Args:
        trainer: Of the composed model.
        tokenizer: The anchor's.
        recipe: Has the prompts, and the folder.
        console: Where to print.
        logs: TensorBoard's, or None.
    """

    def __init__(
        self,
        trainer: ComposedTrainer,
        tokenizer: PreTrainedTokenizerBase,
        recipe: Recipe,
        console: Console,
        logs: TensorBoardCallback | None = None,
    ):
        self.trainer, self.tokenizer, self.console, self.logs = trainer, tokenizer, console, logs
        self.prompts, self.num_tokens = recipe.probe or (), recipe.probe_tokens
        self.evaluates = recipe.evaluates
        self.path = Path(recipe.output_dir, FILE)
        self.samples: list[dict[str, Any]] = []
        self.last_step: int | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep what a resumed run wrote up to its checkpoint; the rest will come again."""
        if state.global_step > 0 and self.path.is_file():
            lines = self.path.read_text(encoding="utf-8").splitlines()
            samples = [json.loads(line) for line in lines]
            self.samples = [s for s in samples if s["step"] <= state.global_step]

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """After an evaluation."""
        self.take(state)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """After a checkpoint, unless there are evaluations, or the run ends with it."""
        if not self.evaluates and not control.should_training_stop:
            self.take(state)

    def take_last(self, state: TrainerState) -> None:
        """At the end of a run, of the model that is saved."""
        if self.trainer.args.load_best_model_at_end:
            self.last_step = None  # it is another one than the last step's
        self.take(state)

    def take(self, state: TrainerState) -> None:
        """Continue every prompt, unless that was done at this step."""
        step = state.global_step
        if not self.prompts or not state.is_world_process_zero or step == self.last_step:
            return
        self.last_step = step
        for number, prompt in enumerate(self.prompts):
            text = self.continued(prompt)
            self.samples.append({"step": step, "prompt": prompt, "text": text})
            self.console.print(
                f"step {step}/{state.max_steps}  probe {prompt!r}\n{indent(text, '  | ', bool)}",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
            shown = indent(prompt + text, "    ", lambda line: True)  # code in Markdown
            if self.logs is not None and self.logs.tb_writer is not None:
                self.logs.tb_writer.add_text(f"probe/{number}", shown, step)
        self.write()

    def continued(self, prompt: str) -> str:
        """What the composed model writes after a prompt."""
        model = self.trainer.composed
        inputs: Any = self.tokenizer(
            prompt, return_tensors="pt", return_token_type_ids=False, verbose=False
        )
        was_training = model.training
        model.eval()
        with torch.no_grad():
            ids = model.generate(
                **inputs.to(model.device),
                max_new_tokens=self.num_tokens,
                pad_token_id=self.tokenizer.eos_token_id,  # unused, but generate asks for one
                **GREEDY,
            )
        model.train(was_training)
        written = ids[0, inputs["input_ids"].shape[1] :]
        return str(self.tokenizer.decode(written, skip_special_tokens=True))

    def write(self) -> None:
        """All samples so far; the file is replaced whole."""
        lines = [json.dumps(sample, ensure_ascii=False) + "\n" for sample in self.samples]
        temporary = self.path.with_name(f".{FILE}")
        temporary.write_text("".join(lines), encoding="utf-8")
        temporary.replace(self.path)


def check_whole(recipe: Recipe, is_sharded: bool) -> None:
    """Refuse probes of a model that is spread over processes.

    Raises:
        ValueError: If there are any.
    """
    if recipe.probe and is_sharded:
        raise ValueError(
            f"probe is {recipe.probe[0]!r}, but under FSDP and DeepSpeed no process can run the "
            "model alone; leave probe out, and run graftlm generate on a checkpoint"
        )
