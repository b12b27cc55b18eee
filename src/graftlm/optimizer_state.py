"""The optimizer's state in a file that does not depend on how training is spread.

One safetensors file holds whole tensors, named `exp_avg/model.bridges.0...`; its metadata holds
the settings of each group of parameters. Single processes, DDP, FSDP2 and ZeRO-3 write the same.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from graftlm._version import __version__
from graftlm.errors import CheckpointMismatchError
from graftlm.sharding import is_spread, spread_like, whole, whole_shape

OPTIMIZER = "optimizer.safetensors"
Names = Mapping[Tensor, str]


@dataclass(kw_only=True, slots=True)
class OptimizerState:
    """What an optimizer knows about its parameters.

    Args:
        groups: Names and settings (learning rate, ...) of each group of parameters.
        tensors: By parameter and key, such as `exp_avg`.
        numbers: What is no tensor, in the same way.
    """

    groups: list[dict[str, Any]] = field(default_factory=list)
    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    numbers: dict[str, dict[str, Any]] = field(default_factory=dict)

    def of(self, name: str) -> dict[str, Any]:
        """All that is known about one parameter."""
        return {**self.tensors.get(name, {}), **self.numbers.get(name, {})}


# ---- from an optimizer, and back ---------------------------------------------------------


def gather(optimizer: Any, names: Names, *, keep: bool) -> OptimizerState:
    """The whole state of an optimizer; every process must ask for it.

    Args:
        optimizer: Of PyTorch, or DeepSpeed's of stage 3.
        names: Of the parameters.
        keep: Whether this process needs the tensors; others only help to gather them.

    Raises:
        ValueError: If it keeps something that cannot be written.
    """
    state = OptimizerState()
    for group in groups_of(optimizer):
        settings = {key: plain(value) for key, value in group.items() if key != "params"}
        known = [names[parameter] for parameter in group["params"]]
        state.groups.append({"parameters": known, "settings": settings})
        for parameter in group["params"]:
            for key, value in state_of(optimizer, parameter):
                place = state.tensors if isinstance(value, Tensor) else state.numbers
                check_writable(key, value, parameter)
                if keep:
                    value = value.cpu().clone() if isinstance(value, Tensor) else value
                    place.setdefault(names[parameter], {})[key] = value
    return state


def groups_of(optimizer: Any) -> list[dict[str, Any]]:
    """The groups of an optimizer, with its real parameters."""
    if not is_sharded_by_zero(optimizer):
        return optimizer.param_groups
    # DeepSpeed's groups hold flat pieces, and only while it steps.
    groups = [group | {"params": []} for group in optimizer.optimizer.param_groups]
    for number, parameters in enumerate(optimizer.fp16_groups):
        groups[optimizer.sub_group_to_group_id[number]]["params"] += parameters
    return groups


def is_sharded_by_zero(optimizer: Any) -> bool:
    """Whether this is DeepSpeed's optimizer of stage 3."""
    return hasattr(optimizer, "fp16_groups")


def flat_piece(optimizer: Any, parameter: Tensor) -> Tensor:
    """What DeepSpeed's inner optimizer steps on in the place of a parameter."""
    number = next(
        number
        for number, parameters in enumerate(optimizer.fp16_groups)
        if any(one is parameter for one in parameters)
    )
    return optimizer.fp32_partitioned_groups_flat[number]


def state_of(optimizer: Any, parameter: Tensor) -> Iterator[tuple[str, Any]]:
    """Keys and whole values of one parameter."""
    if not is_sharded_by_zero(optimizer):
        for key, value in optimizer.state.get(parameter, {}).items():
            yield key, whole(value) if isinstance(value, Tensor) else value
        return
    from deepspeed.utils import safe_get_full_optimizer_state

    flat = flat_piece(optimizer, parameter)
    for key, value in optimizer.optimizer.state.get(flat, {}).items():
        is_spread = isinstance(value, Tensor) and value.shape == flat.shape
        yield key, safe_get_full_optimizer_state(parameter, key) if is_spread else value


def check_writable(key: str, value: Any, parameter: Tensor) -> None:
    """Refuse what our file cannot hold, or what could not be spread again.

    Raises:
        ValueError: Naming the key.
    """
    if isinstance(value, Tensor):
        shape = whole_shape(parameter)
        if is_spread(parameter) and value.dim() and tuple(value.shape) != shape:
            raise ValueError(
                f"the optimizer keeps {key} of shape {tuple(value.shape)} for a parameter of "
                f"shape {shape}, which cannot be spread over processes; choose another "
                "training.optim, such as adamw_torch"
            )
    elif not isinstance(value, (bool, int, float, str, type(None))):
        raise ValueError(
            f"the optimizer keeps {key} as a {type(value).__name__}, which graftlm cannot save; "
            "choose another training.optim, such as adamw_torch"
        )


def restore(optimizer: Any, names: Names, state: OptimizerState, source: str) -> None:
    """Give an optimizer a state that was gathered from one, spread in whatever way.

    Args:
        optimizer: Of PyTorch, or DeepSpeed's of stage 3.
        names: Of the parameters.
        state: The same in every process.
        source: Where it is from, for messages.

    Raises:
        CheckpointMismatchError: If it is of other parameters.
    """
    groups = groups_of(optimizer)
    check_groups([[names[p] for p in group["params"]] for group in groups], state, source)
    settings = [group["settings"] for group in state.groups]
    if not is_sharded_by_zero(optimizer):
        known: dict[int, dict[str, Any]] = {}
        for number, parameter in enumerate(p for group in groups for p in group["params"]):
            values = state.of(names[parameter])
            known[number] = {key: spread_value(v, parameter) for key, v in values.items()}
        # Its own method puts everything in the place and precision the optimizer needs.
        content = optimizer.state_dict()
        content["state"] = {number: values for number, values in known.items() if values}
        for group, saved in zip(content["param_groups"], settings, strict=True):
            group.update(saved)
        optimizer.load_state_dict(content)
        return
    for group, saved in zip(optimizer.optimizer.param_groups, settings, strict=True):
        group.update(saved)
    for parameter in (p for group in groups for p in group["params"]):
        fill_flat_piece(optimizer, parameter, state.of(names[parameter]))


def fill_flat_piece(optimizer: Any, parameter: Tensor, values: Mapping[str, Any]) -> None:
    """Restore one parameter's part of what DeepSpeed keeps for several together."""
    from deepspeed.utils import safe_set_full_optimizer_state

    flat = flat_piece(optimizer, parameter)
    pieces = optimizer.optimizer.state[flat]  # made at the first step, which has not been yet
    for key, value in values.items():
        if isinstance(value, Tensor) and value.dim():
            if key not in pieces:
                pieces[key] = torch.zeros_like(flat)
            safe_set_full_optimizer_state(parameter, value.to(flat.device), key)
        else:
            pieces[key] = value.clone() if isinstance(value, Tensor) else value


def spread_value(value: Any, parameter: Any) -> Any:
    """One value of the state, where the parameter is; single numbers are everywhere."""
    if isinstance(value, Tensor) and value.dim():
        return spread_like(value, parameter)
    return value


def check_groups(here: list[list[str]], state: OptimizerState, source: str) -> None:
    """Refuse the state of other parameters.

    Raises:
        CheckpointMismatchError: Naming the first parameter that is in one of the two only.
    """
    there = [group["parameters"] for group in state.groups]
    if [set(names) for names in here] == [set(names) for names in there]:
        return
    differing = {(n, name) for n, names in enumerate(here) for name in names} ^ {
        (n, name) for n, names in enumerate(there) for name in names
    }
    number, name = min(differing)
    raise CheckpointMismatchError(
        f"{source} does not fit the optimizer: {name} is in group {number} of only one of them; "
        "resume with the recipe the run was started with"
    )


# ---- the file ----------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """A setting as JSON can hold it."""
    return value.item() if isinstance(value, Tensor) else value


def write(state: OptimizerState, folder: Path) -> None:
    """Write the file, or leave what is there."""
    tensors = {
        f"{key}/{name}": tensor.contiguous()
        for name, values in state.tensors.items()
        for key, tensor in values.items()
    }
    content = json.dumps({"groups": state.groups, "numbers": state.numbers})
    temporary = folder / f".{OPTIMIZER}"
    save_file(tensors, temporary, metadata={"graftlm": __version__, "optimizer": content})
    temporary.replace(folder / OPTIMIZER)


def read(folder: Path) -> OptimizerState:
    """Read the file.

    Raises:
        CheckpointMismatchError: If it is missing or damaged.
    """
    path = folder / OPTIMIZER
    if not path.is_file():
        raise CheckpointMismatchError(
            f"{folder} holds no {OPTIMIZER}: it was saved with save_only_model, or by graftlm "
            "0.1; it cannot be resumed exactly, but its bridges can be loaded"
        )
    try:
        with safe_open(path, "pt") as file:
            content = json.loads(file.metadata()["optimizer"])
            named = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointMismatchError(f"{path} is cut off or damaged: {error}") from error
    state = OptimizerState(numbers=content["numbers"])
    for group in content["groups"]:
        # JSON knows lists only; optimizers keep pairs such as betas as tuples.
        settings = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in group["settings"].items()
        }
        state.groups.append({"parameters": group["parameters"], "settings": settings})
    for full_name, tensor in named.items():
        key, name = full_name.split("/", 1)
        state.tensors.setdefault(name, {})[key] = tensor
    return state
