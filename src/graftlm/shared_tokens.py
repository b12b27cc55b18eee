"""Run an augmenting model that reads the anchor's own tokens."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import StaticLayer

from graftlm import decoder
from graftlm.alignment import Alignment, Blocks, align, packed_segments, readable_keys
from graftlm.frozen_states import take_states
from graftlm.passes import part_of

if TYPE_CHECKING:
    from graftlm.cache import ComposedCache
    from graftlm.composed import ComposedModel
    from graftlm.passes import ForwardPass, PassInputs


def run_shared(
    model: "ComposedModel", forward_pass: "ForwardPass", name: str, inputs: "PassInputs"
) -> None:
    """Capture the hidden states of the tokens one augmenting model has not seen yet."""
    cache, input_ids = forward_pass.cache, inputs.tokens_to_read
    attention_mask, prompt_mask = inputs.attention_mask, inputs.prompt_mask
    position_ids, (batch, length) = inputs.position_ids, input_ids.shape
    layer = None if cache is None else bridge_layer(model, cache, name)
    past, kept, new = count_tokens(model, name, cache, layer, length, prompt_mask)
    if inputs.frozen_states is not None:
        take_states(model, forward_pass, name, inputs.frozen_states, input_ids.shape, new)
    elif new:
        view = model.running_view(name)
        check_vocabulary(model, name, view, input_ids)
        arguments = decoder.call_arguments(
            view,
            input_ids=input_ids[:, :new],
            attention_mask=first_columns(part_of(attention_mask, name), new - length),
            query_length=new,
            cache=None if cache is None else cache.augmenting[name],
            position_ids=None if position_ids is None else position_ids[:, :new],
        )
        model.capture(forward_pass, name, arguments)
    # A static cache shows its empty slots to the attention too.
    key_length: Any = layer.max_cache_len if isinstance(layer, StaticLayer) else kept + new
    if key_length == 0:
        return
    segments = None
    if cache is None and attention_mask is None and position_ids is not None:
        segments = packed_segments(position_ids.expand(batch, -1))
    width = batch * model.num_bridge_heads * key_length
    readable = readable_keys(part_of(attention_mask, "bridges"), prompt_mask, key_length)

    def make(start: int, end: int) -> Alignment:
        # No token of a block reads what lies behind its last one.
        seen = key_length if end == length else min(key_length, int(past) + end)
        return align(
            past_length=past + start,
            query_length=end - start,
            kept_length=kept,
            new_length=new,
            key_length=seen,
            readable=readable,
            segments=segments,
            position=model.config.bridge.position,
            num_heads=model.num_bridge_heads,
            device=input_ids.device,
        )

    forward_pass.plan[name] = Blocks(make, length, width, cache is not None)


def count_tokens(
    model: "ComposedModel",
    name: str,
    cache: "ComposedCache | None",
    layer: Any,
    length: int,
    prompt_mask: Tensor | None,
) -> tuple[int | Tensor, int | Tensor, int]:
    """Tokens before this pass, keys kept from before, and tokens still to be read.

    Raises:
        ValueError: If the cache holds tokens that the augmenting model has not read.
    """
    prompt_only = model.config.reads == "prompt"
    prompt_length = None if prompt_mask is None else prompt_mask.shape[1]
    if cache is None:
        if prompt_only and prompt_length is not None:
            return 0, 0, min(prompt_length, length)
        return 0, 0, length
    if torch.compiler.is_compiling() and isinstance(layer, StaticLayer):
        # Lengths are tensors here. A prompt is read in the first, eager pass only.
        read_before = prompt_only and layer.is_initialized
        past = cache.get_seq_length() if prompt_only else layer.get_seq_length()
        return past, layer.get_seq_length(), 0 if read_before else length
    past, kept, new = int(cache.get_seq_length()), int(layer.get_seq_length()), length
    if prompt_only:
        end = prompt_length if prompt_length is not None else (0 if past else length)
        new = max(0, min(end - past, length))
    if new and kept != past:
        raise ValueError(
            f"the cache holds {past} tokens, of which augmenting model {name!r} has read "
            f"{kept}, so it cannot read on; it was switched off or reads only prompts: "
            "start with a fresh cache"
        )
    return past, kept, new


def bridge_layer(model: "ComposedModel", cache: "ComposedCache", name: str) -> Any:
    """The cache layer of the first bridge of one augmenting model."""
    index = next(i for i, c in enumerate(model.config.connections) if c.augmenting == name)
    return cache.bridges.layers[index]


def check_vocabulary(
    model: "ComposedModel", name: str, view: PreTrainedModel, input_ids: Tensor
) -> None:
    """Refuse token ids that an augmenting model of smaller vocabulary does not have.

    Raises:
        ValueError: Naming the id.
    """
    size = view.config.vocab_size
    if size < model.config.vocab_size and not torch.compiler.is_compiling():
        largest = int(input_ids.max())
        if largest >= size:
            raise ValueError(
                f"input_ids holds token {largest}, but augmenting model {name!r} has tokens 0 "
                f"to {size - 1} only, and so has the tokenizer of the two"
            )


def first_columns(mask: Any, surplus: int) -> Any:
    """A (batch, past + seq) mask without its last columns; `surplus` is minus their number."""
    return mask[:, :surplus] if surplus and isinstance(mask, Tensor) else mask
