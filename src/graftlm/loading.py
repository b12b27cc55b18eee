"""From models, paths or hub ids to a composed model."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from graftlm import decoder
from graftlm.bases import Base, load_base, reference
from graftlm.causal_lm import ComposedForCausalLM
from graftlm.config import (
    BridgeConfig,
    ComposedConfig,
    Connection,
    Position,
    Reads,
    spaced_connections,
)
from graftlm.tokenization import behaviour, find_tokenizer


def compose(
    anchor: Base,
    augmenting: Base | Mapping[str, Base],
    *,
    every: int = 4,
    connections: Sequence[Connection] | None = None,
    variant: str = "graftlm",
    position: Position | None = None,
    num_heads: int | None = None,
    width: int | None = None,
    gate: bool = False,
    bias: bool = False,
    reads: Reads = "sequence",
    bridge_dtype: torch.dtype = torch.float32,
    dtype: torch.dtype | str = "auto",
    device_map: Any = None,
    trust_remote_code: bool = False,
) -> ComposedForCausalLM:
    """Compose a frozen anchor with one or more frozen augmenting models.

    The composed model starts as the anchor, bit for bit; train its bridges to let the anchor
    read the augmenting models. The given models are frozen (`requires_grad` off, evaluation
    mode) and otherwise left as they are.

    Paper: CALM, section 3.

    Args:
        anchor: m_B, whose logits are returned: a loaded causal language model, a path or a hub id.
        augmenting: m_A, or several by name; a single one is named "augmenting".
        every: Connect every n-th augmenting layer, evenly over the anchor (the paper's 4).
        connections: Which layers to connect, instead of `every`.
        variant: "graftlm" normalises both inputs of a bridge and lets it know distances;
            "paper" is the bare equations.
        position: "none", "distance" or "rotary"; by default what the variant says.
        num_heads: Heads of the cross-attention; by default the anchor's.
        width: Total width of the cross-attention; by default the anchor's, a smaller one is a
            bottleneck.
        gate: Multiply each update by tanh of a learned scalar that starts at zero.
        bias: Biases in the linear maps of the bridges.
        reads: "sequence" feeds every token, generated ones too, to the augmenting models;
            "prompt" only the prompt (the paper's "m_A as an encoder" ablation).
        bridge_dtype: Of the bridges; the models keep theirs.
        dtype, device_map, trust_remote_code: For models loaded here, as in transformers.

    Raises:
        UnsupportedModelError: If a model is not a text decoder with one stack of layers.
        ValueError: If an option or a connection does not fit the models.
    """
    if variant not in ("graftlm", "paper"):
        raise ValueError(f"variant is {variant!r}, but must be 'graftlm' or 'paper'")
    changes: dict[str, Any] = {"num_heads": num_heads, "width": width, "gate": gate, "bias": bias}
    if position is not None:
        changes["position"] = position
    bridge = BridgeConfig.paper(**changes) if variant == "paper" else BridgeConfig(**changes)

    named = augmenting if isinstance(augmenting, Mapping) else {"augmenting": augmenting}
    if not named:
        raise ValueError("augmenting is empty, but a composition needs at least one model")
    options = {
        "dtype": dtype,
        "device_map": device_map,
        "trust_remote_code": trust_remote_code,
    }
    anchor_model = load_base(anchor, "the anchor", **options)
    models = {
        name: load_base(base, f"augmenting model {name!r}", **options)
        for name, base in named.items()
    }
    check_tokenizers(anchor_model, models)
    if connections is None:
        connections = [
            connection
            for name, model in models.items()
            for connection in spaced_connections(
                name, decoder.num_layers(model), decoder.num_layers(anchor_model), every
            )
        ]
    config = ComposedConfig(
        anchor_config=anchor_model.config,
        augmenting_configs={name: model.config for name, model in models.items()},
        connections=list(connections),
        bridge=bridge,
        reads=reads,
        bases={
            name: {"name_or_path": reference(model), "revision": None}
            for name, model in {"anchor": anchor_model, **models}.items()
        },
    )
    model = ComposedForCausalLM(config, anchor_model, models)
    model.bridges.to(bridge_dtype)
    return model


def check_tokenizers(anchor: PreTrainedModel, augmenting: Mapping[str, PreTrainedModel]) -> None:
    """Refuse models whose tokenizers are at hand and do different things.

    Raises:
        ValueError: Naming the model.
    """
    ours = find_tokenizer(anchor.config.name_or_path)
    for name, model in augmenting.items():
        theirs = find_tokenizer(model.config.name_or_path)
        if ours and theirs and behaviour(ours) != behaviour(theirs):
            raise ValueError(
                f"augmenting model {name!r} splits text into other tokens than the anchor does, "
                "but this version composes only models that share a tokenizer"
            )
