"""How the weights of a model are kept: plain, packed into fewer bits, or elsewhere."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from graftlm.sharding import is_spread, whole_shape


def quantization_of(model: PreTrainedModel) -> str | None:
    """How the weights are packed, in words; None for plain ones."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None:
        return None
    config = quantizer.quantization_config
    method = str(getattr(config.quant_method, "value", config.quant_method))
    if method == "bitsandbytes":
        return (
            f"{method} 8-bit" if config.load_in_8bit else f"{method} {config.bnb_4bit_quant_type}"
        )
    kind = getattr(config, "quant_type", None)  # torchao's is an object
    return method if kind is None else f"{method} {type(kind).__name__}"


def computing_dtype(model: PreTrainedModel) -> torch.dtype:
    """The precision of its products, which for packed weights is not that of the model."""
    quantizer = getattr(model, "hf_quantizer", None)
    config: Any = getattr(quantizer, "quantization_config", None)
    if getattr(config, "load_in_8bit", False):
        return torch.float16  # all that bitsandbytes has
    if getattr(config, "load_in_4bit", False):
        return config.bnb_4bit_compute_dtype
    return model.dtype


def holds_plain_weights(model: PreTrainedModel) -> bool:
    """Whether the weights are in memory as they were saved, neither packed nor offloaded."""
    return quantization_of(model) is None and not any(p.is_meta for p in model.parameters())


def num_bytes(module: nn.Module) -> int:
    """What the parameters take; torchao's are tensors around others, whose type is not theirs."""
    return sum(
        math.prod(whole_shape(inner)) * inner.element_size()
        for parameter in module.parameters()
        for inner in inner_tensors(parameter)
    )


def inner_tensors(parameter: Tensor) -> list[Tensor]:
    """What a parameter is stored in: itself, or the tensors that torchao's is put around."""
    if hasattr(parameter, "__tensor_flatten__") and not is_spread(parameter):
        return [getattr(parameter, name) for name in parameter.__tensor_flatten__()[0]]
    return [parameter]


def keep_unpacked(model: PreTrainedModel, role: str) -> None:
    """Stop bitsandbytes from packing 4-bit weights anew when they first run on some CPUs.

    Through weights in that layout no gradient passes, without an error, and gathering a state
    dict changes them (bitsandbytes 0.50, `Linear4bit.forward`). Nothing else depends on it.

    Args:
        model: The model.
        role: How the message names it.

    Raises:
        ValueError: If it was run before, and its weights are in that layout already.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", None) is None:
            continue
        weight: Any = module.weight
        if getattr(weight.quant_state, "packing_format_for_cpu", False):
            raise ValueError(
                f"{role} ran on the CPU before it was composed, where bitsandbytes packed its "
                "4-bit weights for inference only; load it again and compose it before it runs"
            )
        vars(module)["support_avx512bf16_for_cpu"] = False
