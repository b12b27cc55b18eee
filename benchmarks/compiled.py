"""Compiled decoding with static caches, on a GPU: `generate` compiles its steps there by itself."""

from typing import Any

import torch

from benchmarks.models import Setting, build, twin
from benchmarks.timing import Goal, Lap, Step, Times, measure

GOAL = Goal(system="composed", against=("anchor",), at_most=1.15)


def compare(setting: Setting, *, tokens: int, rounds: int) -> dict[str, Any]:
    """Seconds a token: those of `generate`, less those of the prompt and the first token."""
    row: dict[str, Any] = {"setting": setting.to_dict(), "compiled": True}
    if not setting.device.startswith("cuda"):
        return row | {"not_measured": "needs a GPU, where generate compiles static caches"}
    case = build(setting)
    models = {"composed": case.compose(), "anchor": twin(case.anchor)}
    steps = {name: generating(model, case.input_ids, tokens) for name, model in models.items()}
    times = measure(steps, rounds=rounds, device=setting.device, warmups=3, count=False)
    a_token = {
        name: [
            {"total": (seconds["all"] - seconds["prompt"]) / tokens}
            for seconds in times.rounds[name]
        ]
        for name in models
    }
    measured = Times(a_token, {})
    return row | {"seconds": measured.summary(), "ratios": measured.ratios([GOAL])}


def generating(model: Any, prompt: torch.Tensor, tokens: int) -> Step:
    """Generate one token, and then, anew, that many more; the difference is what they take."""

    def generate(number: int) -> None:
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=number,
            do_sample=False,
            eos_token_id=None,
            cache_implementation="static",
        )

    def step(lap: Lap) -> None:
        generate(1)
        lap("prompt")
        generate(1 + tokens)
        lap("all")

    return step
