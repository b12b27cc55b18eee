"""A KV cache layer that writes a new token where it belongs, instead of copying all tokens before.

transformers' dynamic layers join the old and the new keys at every token, which moves the whole
cache twice; behind a long prompt that costs more than the models.
"""

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from transformers.cache_utils import Cache, DynamicLayer

SPARE = 0.25  # of the length, kept free whenever the room has become too small


class GrowingLayer(DynamicLayer):
    """A dynamic layer whose `keys` and `values` are the filled part of a larger room.

    What is done to them from outside (rows selected or repeated) makes new tensors, for which the
    next token finds new room.
    """

    keys: Any
    values: Any
    room: Any = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values (batch, heads, new, head_dim); returns all of them."""
        # A backward pass may still need what writing in place would change.
        past = self.get_seq_length()
        unlike = past > 0 and not (
            is_like(key_states, self.keys) and is_like(value_states, self.values)
        )
        is_traced = torch.compiler.is_compiling() or isinstance(key_states, FakeTensor)
        if unlike or is_traced or torch.is_grad_enabled():
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length = past + key_states.shape[-2]
        if not self.has_room(length):
            self.room = (
                roomy(self.keys, key_states, length),
                roomy(self.values, value_states, length),
            )
        keys, values = self.room
        keys[..., past:length, :] = key_states
        values[..., past:length, :] = value_states
        self.keys, self.values = keys[..., :length, :], values[..., :length, :]
        return self.keys, self.values

    def has_room(self, length: int) -> bool:
        """Whether keys and values are still the beginnings of their rooms, and more fit behind."""
        return self.room is not None and all(
            filled.data_ptr() == room.data_ptr()
            and filled.stride() == room.stride()
            and filled.shape[:2] == room.shape[:2]
            and length <= room.shape[-2]
            and (not room.is_inference() or torch.is_inference_mode_enabled())
            for filled, room in zip((self.keys, self.values), self.room, strict=True)
        )

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.room = None


def is_like(new: Tensor, old: Tensor) -> bool:
    """Whether new tokens differ from the old ones in their number only."""
    same_shape = new.shape[:2] == old.shape[:2] and new.shape[-1] == old.shape[-1]
    return same_shape and new.dtype == old.dtype and new.device == old.device


def roomy(filled: Tensor, new: Tensor, length: int) -> Tensor:
    """A tensor for `length` tokens and some more, beginning with those that are there."""
    batch, heads, _, head_dim = new.shape
    room = new.new_empty(batch, heads, length + int(SPARE * length) + 16, head_dim)
    if filled.numel():
        room[..., : filled.shape[-2], :] = filled
    return room


def let_grow(cache: Cache) -> Cache:
    """Give an empty dynamic cache layers of this kind; others (sliding, static) stay.

    A cache that is offloaded stays as it is: what is moved away must be all there is.
    """
    if cache.offloading:
        return cache
    cache.layers = [GrowingLayer() if type(x) is DynamicLayer else x for x in cache.layers]
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = GrowingLayer
    return cache
