"""Tensors that are spread over processes: FSDP2's, which are DTensors, and ZeRO-3's."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def is_zero3(tensor: Tensor) -> bool:
    """Whether DeepSpeed keeps it, and what is here is a placeholder."""
    return hasattr(tensor, "ds_id")


def is_spread(tensor: Tensor) -> bool:
    """Whether this process holds a part of it only."""
    return isinstance(tensor, DTensor) or is_zero3(tensor)


def whole_shape(tensor: Any) -> tuple[int, ...]:
    """The shape of the whole tensor."""
    return tuple(tensor.ds_shape if is_zero3(tensor) else tensor.shape)


def num_elements(tensor: Any) -> int:
    """Elements of the whole tensor; of a packed one, as many as it stands for."""
    packed = getattr(tensor, "quant_state", None)
    if packed is not None:
        return math.prod(packed.shape)
    return tensor.ds_numel if is_zero3(tensor) else tensor.numel()


def whole(tensor: Any) -> Tensor:
    """All of a tensor, without its gradient history; every process must ask for it."""
    if isinstance(tensor, DTensor):
        return tensor.full_tensor().detach()
    if is_zero3(tensor):
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([tensor]):
            return tensor.detach().clone()
    return tensor.detach()


def whole_weight(parameter: Any) -> Tensor:
    """All of a parameter, in the precision it is trained in; every process must ask for it."""
    if is_zero3(parameter) and parameter.requires_grad:
        from deepspeed.utils import safe_get_full_fp32_param

        weight = safe_get_full_fp32_param(parameter)
        assert weight is not None, parameter
        return weight
    return whole(parameter)


@torch.no_grad()
def set_weight(parameter: Any, value: Tensor) -> None:
    """Give a parameter the values of a whole tensor; every process must do so."""
    if not is_zero3(parameter):
        parameter.copy_(spread_like(value, parameter))
        return
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_set_full_fp32_param

    with GatheredParameters([parameter], modifier_rank=0):
        parameter.copy_(value)
    # What the optimizer steps on is a copy, in 32 bits whatever the model is in.
    safe_set_full_fp32_param(parameter, value.to(parameter.device, torch.float32))


def spread_like(value: Tensor, parameter: nn.Parameter) -> Tensor:
    """A whole tensor, spread over processes as a parameter of its shape is."""
    if not isinstance(parameter, DTensor):
        return value
    return distribute_tensor(
        value.to(parameter.device), parameter.device_mesh, parameter.placements
    )
