"""Greedy decoding: the composed model against the models it is made of, run one by one.

The sum of the anchor and of the augmenting models (headless, ended at the highest layer that is
read) is what decoding costs if bridges are free. Times are those of single tokens behind a prompt,
the systems in turns; their caches grow alike.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from benchmarks.models import Case, Setting, build, twin
from benchmarks.timing import Goal, Lap, Step, Times, measure
from benchmarks.training_step import shortened
from graftlm import ComposedForCausalLM
from graftlm.growing_cache import let_grow

GOAL = Goal(system="composed", against=("anchor", "augmenting"), at_most=1.05)
ALONE = Goal(system="composed", against=("anchor",))
PREFILL = Goal(system="composed", against=("anchor", "augmenting"))


class Greedy:
    """A model that continues a prompt, a token at a time.

    Args:
        model: With a head or without; without one it is given the same token again and again.
        prompt: (1, length); every row of the batch continues the same one.
        batch: Rows.
        options: For the model's calls.
    """

    def __init__(self, model: Any, prompt: Tensor, batch: int, **options: Any):
        self.model = model
        self.prompt = prompt
        self.batch = batch
        self.options = options
        self.cache: Any = None
        self.token = prompt[:, -1:].expand(batch, 1)

    @torch.no_grad()
    def prefill(self, lap: Lap) -> None:
        """Read the prompt, once for all rows, and start its cache anew."""
        self.cache = None  # not two at a time
        given = {} if self.is_composed else {"past_key_values": self.own_cache()}
        output = self.model(input_ids=self.prompt, use_cache=True, **given, **self.options)
        self.cache = output.past_key_values

    @property
    def is_composed(self) -> bool:
        """Whether the model makes its cache itself."""
        return isinstance(self.model, ComposedForCausalLM)

    def own_cache(self) -> Any:
        """A cache as the composed model's parts have it, which does not copy itself every token.

        With transformers' own, a part alone would be slower than it is within the composition.
        """
        return let_grow(DynamicCache(config=self.model.config))

    @torch.no_grad()
    def step(self, lap: Lap) -> None:
        """Read the last token and choose the next."""
        output = self.model(
            input_ids=self.token, past_key_values=self.cache, use_cache=True, **self.options
        )
        if "logits" in output:
            self.token = output.logits[:, -1:].argmax(-1)


class Together:
    """Several models that are run one behind the other."""

    def __init__(self, parts: list[Greedy]):
        self.parts = parts

    def prefill(self, lap: Lap) -> None:
        """Of each."""
        for part in self.parts:
            part.prefill(lap)

    def step(self, lap: Lap) -> None:
        """Of each."""
        for part in self.parts:
            part.step(lap)


def decoders(case: Case, batch: int) -> dict[str, Any]:
    """What is compared."""
    prompt = case.input_ids[:1]
    trunks = [shortened(model, case.highest(name) + 1) for name, model in case.augmenting.items()]
    return {
        "composed": Greedy(case.compose(), prompt, batch, logits_to_keep=1),
        "anchor": Greedy(twin(case.anchor), prompt, batch, logits_to_keep=1),
        "augmenting": Together([Greedy(trunk, prompt, batch) for trunk in trunks]),
    }


def compare(setting: Setting, *, tokens: int, prefills: int) -> dict[str, Any]:
    """Time prefills of one row, then tokens of all rows.

    Args:
        setting: `length` is the prompt's.
        tokens: How many are timed.
        prefills: How many prefills are timed.
    """
    systems = decoders(build(setting), setting.batch)
    before = times_of(systems, lambda system: system.prefill, prefills, setting.device)
    for system in systems.values():
        for part in getattr(system, "parts", [system]):
            part.cache.batch_repeat_interleave(setting.batch)
    steps = times_of(systems, lambda system: system.step, tokens, setting.device, warmups=3)
    return {
        "setting": setting.to_dict(),
        "seconds": steps.summary(),
        "prefill_seconds": before.summary(),
        "ratios": steps.ratios([GOAL, ALONE]),
        "prefill_ratios": before.ratios([PREFILL]),
    }


def times_of(
    systems: dict[str, Any],
    run: Callable[[Any], Step],
    rounds: int,
    device: str,
    warmups: int = 1,
) -> Times:
    """Time one method of all systems."""
    steps = {name: run(system) for name, system in systems.items()}
    return measure(steps, rounds=rounds, device=device, warmups=warmups)
