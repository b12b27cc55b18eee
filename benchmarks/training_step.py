"""One training step: the composed model against the least that could be asked, and against LoRA.

The floor runs what no composition of these models can do without: the augmenting models up to the
highest layer that is read, the anchor, and the anchor's backward pass down to the first connection,
for activations only. Bridges and their optimizer come on top of it.
"""

import atexit
import shutil
import tempfile
from collections.abc import Callable, Iterable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.models import Case, num_parameters, twin
from benchmarks.timing import Goal, Lap, Step
from graftlm import cache_states
from graftlm.states_cache import pad_states

RATE = 1e-4


def composed(case: Case) -> Step:
    """Forward, backward and AdamW on the bridges."""
    return step_of(case.compose(), case)


def cached(case: Case) -> Step:
    """The same on hidden states that were computed before, and are read from files in the step."""
    model, rows = case.compose(), case.input_ids.tolist()
    examples = [{"input_ids": row, "labels": row} for row in rows]
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder)
    states = cache_states(model, examples, folder)

    def read() -> dict[str, Any]:
        return {"frozen_states": pad_states([states[index] for index in range(len(rows))], {})}

    return step_of(model, case, read)


def lora(case: Case) -> Step:
    """LoRA on all linear layers of the anchor, with as many parameters as the bridges have."""
    return step_of(with_lora(case), case)


def floor(case: Case) -> Step:
    """What every composition must run."""
    trunks = [shortened(model, case.highest(name) + 1) for name, model in case.augmenting.items()]
    return floor_step(trunks, anchor_from_first_connection(case), case.input_ids)


def floor_step(trunks: list[PreTrainedModel], anchor: PreTrainedModel, ids: Tensor) -> Step:
    """The floor's three parts."""

    def step(lap: Lap) -> None:
        with torch.no_grad():
            for trunk in trunks:
                trunk(input_ids=ids, use_cache=False)
        lap("augmenting forward")
        loss = anchor(input_ids=ids, labels=ids, use_cache=False).loss
        lap("anchor forward")
        loss.backward()
        lap("anchor backward")

    return step


# The systems that are compared: a name, and what makes a step of a case.
SYSTEMS: dict[str, Callable[[Case], Step]] = {
    "composed": composed,
    "cached": cached,
    "floor": floor,
    "lora": lora,
}
GOALS: dict[str, list[Goal]] = {
    "paper": [Goal(system="composed", against=("floor",), at_most=1.03)],
    "middle": [Goal(system="composed", against=("floor",), at_most=1.03)],
}
for goals in GOALS.values():
    goals.append(Goal(system="composed", against=("lora",)))
# Hidden states computed before: 0.8 of LoRA from the middle of the anchor on, never slower.
GOALS["paper"].append(Goal(system="cached", against=("lora",), at_most=1.0))
GOALS["middle"].append(Goal(system="cached", against=("lora",), at_most=0.8))


def step_of(model: Any, case: Case, read: Callable[[], dict[str, Any]] = dict) -> Step:
    """A training step of a model that knows which of its parameters train.

    Args:
        model: The model.
        case: Whose tokens it trains on.
        read: Further inputs, fetched in every step.
    """
    if case.setting.checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, fused=True)  # as Trainer does
    ids = case.input_ids

    def step(lap: Lap) -> None:
        loss = model(input_ids=ids, labels=ids, use_cache=False, **read()).loss
        lap("forward")
        loss.backward()
        lap("backward")
        optimizer.step()
        optimizer.zero_grad()
        lap("optimizer")

    return step


def shortened(model: PreTrainedModel, length: int) -> PreTrainedModel:
    """The headless model, ended after some layers; made here, to check the library's own."""
    trunk = twin(model).model.requires_grad_(False)
    trunk.layers = trunk.layers[:length]
    trunk.config.num_hidden_layers = length
    return trunk


def anchor_from_first_connection(case: Case) -> PreTrainedModel:
    """The anchor, whose only leaf that requires grad is the output of the first connected layer."""

    def leaf(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output.detach().requires_grad_()

    anchor = twin(case.anchor).requires_grad_(False)
    anchor.model.layers[case.first].register_forward_hook(leaf)
    return anchor


def with_lora(case: Case) -> Any:
    """The anchor with LoRA that trains as many parameters as the case's bridges.

    One more rank everywhere is a step of up to 6 %, so the lowest layers get it first.
    """
    anchor = twin(case.anchor).requires_grad_(False)
    wanted = num_bridge_parameters(case)
    per_layer = [
        sum(m.in_features + m.out_features for m in linears(layer)) for layer in anchor.model.layers
    ]
    rank, rest = divmod(wanted, sum(per_layer))
    higher = round(rest / per_layer[0])
    lowest = "|".join(map(str, range(higher)))
    config = LoraConfig(
        r=max(rank, 1),
        lora_alpha=2 * max(rank, 1),
        # With too few parameters even for rank 1, the lowest layers alone get it.
        target_modules="all-linear" if rank else rf".*\.layers\.({lowest})\..*_proj",
        rank_pattern={rf".*\.layers\.({lowest})\..*": rank + 1} if higher else {},
        task_type="CAUSAL_LM",
    )
    return get_peft_model(anchor, config)


def num_bridge_parameters(case: Case) -> int:
    """What trains in the composed model."""
    return num_parameters(case.compose(), trainable=True)


def linears(layer: nn.Module) -> Iterable[nn.Linear]:
    """The linear maps in a layer."""
    return (module for module in layer.modules() if isinstance(module, nn.Linear))
