"""How large a composed model is: parameters part by part, and a rough guess of its memory."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from graftlm import decoder
from graftlm.causal_lm import ComposedForCausalLM
from graftlm.config import ComposedConfig
from graftlm.packing import num_bytes
from graftlm.sharding import num_elements

# The paper's names for the parameters of a bridge.
PAPER_NAMES = {
    "proj": "f_proj",
    "cross_q": "W^Q",
    "cross_k": "W^K",
    "cross_v": "W^V",
    "cross_o": "W^O",
    "query_norm": "norms",
    "read_norm": "norms",
    "gate": "gate",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """One frozen model or all bridges: how many parameters, how many train, how many bytes."""

    num_parameters: int
    num_trainable: int
    num_bytes: int

    @classmethod
    def of(cls, module: nn.Module) -> "Size":
        """Of a module; tied weights count once."""
        parameters = list(module.parameters())
        return cls(
            num_parameters=decoder.num_parameters(module),
            num_trainable=sum(num_elements(p) for p in parameters if p.requires_grad),
            num_bytes=num_bytes(module),
        )


def part_sizes(model: ComposedForCausalLM) -> dict[str, Size]:
    """The size of the anchor, of each augmenting model and of the bridges."""
    parts = {"anchor": model.anchor, **model.augmenting, "bridges": model.bridges}
    return {name: Size.of(part) for name, part in parts.items()}


def trainable_share(sizes: Mapping[str, Size]) -> float:
    """Trainable parameters of all, between 0 and 1."""
    total = sum(size.num_parameters for size in sizes.values())
    return sum(size.num_trainable for size in sizes.values()) / total


def bridge_parameters(model: ComposedForCausalLM) -> dict[str, int]:
    """Parameters of all bridges together, by the paper's names, W^O included."""
    counts: Counter[str] = Counter()
    for bridge in model.bridges:
        for name, parameter in bridge.named_parameters():
            counts[PAPER_NAMES[name.split(".")[0]]] += parameter.numel()
    return dict(counts)


def training_memory(
    model: ComposedForCausalLM, *, batch_size: int, length: int, checkpointing: bool
) -> dict[str, int]:
    """Bytes that training takes; what depends on the kernels is a rough guess.

    Args:
        model: The composed model.
        batch_size: Examples a device handles at once.
        length: Tokens of the longest example.
        checkpointing: Whether activations are computed again instead of kept.
    """
    sizes = part_sizes(model)
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return {
        "frozen models": sum(s.num_bytes for name, s in sizes.items() if name != "bridges"),
        "bridges": sizes["bridges"].num_bytes,
        "gradients": trained,
        "optimizer (AdamW)": 2 * trained,
        "activations (rough)": batch_size * length * activation_bytes(model, checkpointing),
    }


def activation_bytes(model: ComposedForCausalLM, checkpointing: bool) -> int:
    """Bytes kept for the backward pass per token, from the first bridge up to the loss.

    Below the first bridge nothing is kept. Per anchor layer: about 8 tensors as wide as the
    layer and 4 as wide as its feed-forward part; per bridge 8 of its width; the logits twice
    in float32 besides themselves.
    """
    config = model.config.get_text_config()
    width, item = config.hidden_size, model.dtype.itemsize
    wide = getattr(config, "intermediate_size", None)
    wide = max(wide) if isinstance(wide, list) else wide or 4 * width
    first = min(connection.anchor_layer for connection in model.config.connections)
    num_layers = config.num_hidden_layers - first
    per_layer = width if checkpointing else 8 * width + 4 * wide
    per_bridge = width if checkpointing else 8 * (model.model.bridge_config.width or width)
    return item * (num_layers * per_layer + len(model.bridges) * per_bridge) + config.vocab_size * (
        item + 8
    )


def unloaded(config: ComposedConfig, bridge_dtype: torch.dtype) -> ComposedForCausalLM:
    """The composed model a configuration describes, without storage for any weight.

    Raises:
        UnsupportedModelError: If a base model is none that this version composes.
    """
    with torch.device("meta"):
        anchor = without_weights(config.anchor_config, "the anchor")
        augmenting = {
            name: without_weights(base, f"augmenting model {name!r}")
            for name, base in config.augmenting_configs.items()
        }
        model = ComposedForCausalLM(config, anchor, augmenting)
    model.bridges.to(bridge_dtype)
    return model


def without_weights(config: PreTrainedConfig, role: str) -> PreTrainedModel:
    """A base model on the device of the context, in the precision of its files."""
    base = AutoModelForCausalLM.from_config(config, dtype=config.dtype or torch.float32)
    decoder.check_decoder(base, role)
    return base


def readable_bytes(num_bytes: float) -> str:
    """A number of bytes with three digits and a unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"
