"""Attention masks of Hugging Face models, and which of them go by position alone."""

import functools
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.masking_utils import create_masks_for_generate

from graftlm.decoder import declares, is_recurrent_call, text_config


def generation_masks(model: PreTrainedModel, **arguments: Any) -> dict[str, Tensor | None]:
    """The 4-D masks of a compiled decoding step, flat; "" holds a model's only mask.

    Bloom and others bring their own maker on the causal language model's class, so that class
    is looked up for headless models too.
    """
    owner = model
    if not hasattr(owner, "create_masks_for_generate"):
        owner = AutoModelForCausalLM._model_mapping.get(type(model.config), None)
    make = getattr(owner, "create_masks_for_generate", create_masks_for_generate)
    if declares(make, "self"):  # of a class: Bloom's is a method, others are static
        make = functools.partial(make, model)
    masks = make(config=text_config(model.config), **arguments)
    if is_recurrent_call(model):
        return {"": None}
    return masks if isinstance(masks, dict) else {"": masks}


# Kinds of attention whose masks depend on the positions of query and key only.
MASKED_BY_POSITION = {"full_attention", "sliding_attention", "chunked_attention"}


def skips_holes(model: PreTrainedModel) -> bool:
    """Whether slots of its cache can stay empty: positions and masks are what we say they are.

    Rotary models with plain attention. Others count slots: by a recurrence, for learned biases,
    or in a window of their own.
    """
    config = text_config(model.config)
    return (
        hasattr(config, "rope_parameters")
        and not getattr(config, "alibi", False)
        and not is_recurrent_call(model)
        and declares(type(model).forward, "position_ids")
        and set(getattr(config, "layer_types", None) or ()) <= MASKED_BY_POSITION
        and config._attn_implementation in ("eager", "sdpa")
    )


def masks_by_position(
    model: PreTrainedModel, seen: Tensor, query_positions: Tensor, key_positions: Tensor
) -> dict[str, Tensor] | Tensor:
    """What a model that skips holes takes as `attention_mask`.

    Args:
        model: The model.
        seen: (batch, seq, slots), True where a new token may see a slot, as far as its layers
            look back.
        query_positions: (batch, seq), the number of each new token in its row, negative for
            padding, which sees all.
        key_positions: (batch, slots), of all slots.
    """
    config = text_config(model.config)
    query, key = query_positions[:, None, :, None], key_positions[:, None, None, :]
    window: Any = getattr(config, "sliding_window", None)
    chunk: Any = getattr(config, "attention_chunk_size", None)

    def mask(kind: str) -> Tensor:
        allowed = seen[:, None]
        if kind == "sliding_attention":
            allowed = allowed & ((query - key < window) | (query < 0))
        if kind == "chunked_attention":
            allowed = allowed & ((query // chunk == key // chunk) | (query < 0))
        return torch.zeros(allowed.shape, dtype=model.dtype, device=allowed.device).masked_fill(
            ~allowed, torch.finfo(model.dtype).min
        )

    kinds = getattr(config, "layer_types", None)
    if kinds:
        return {kind: mask(kind) for kind in set(kinds)}
    if window is not None:
        return mask("sliding_attention")
    return mask("full_attention" if chunk is None else "chunked_attention")
