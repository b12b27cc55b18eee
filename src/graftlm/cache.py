"""One cache object for a composed model: a KV cache per model, plus the bridges' keys and values.

The paper re-runs both models on the whole text at every step (section 3.1). An augmenting state
at position t depends on tokens up to t only, so it never changes again, and neither do the keys
and values a bridge makes of it: caching them is exact.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    StaticCache,
    StaticLayer,
)
from transformers.configuration_utils import PreTrainedConfig

from graftlm.augmenting_tokens import ReadingCache
from graftlm.growing_cache import GrowingLayer, let_grow


class ComposedCache(Cache):
    """What a composed model remembers between decoding steps.

    `layers` joins the layers of all parts, so that reordering, cropping, repeating and selecting
    rows are transformers' own loops. Lengths and masks are the anchor's.

    Args:
        anchor: The anchor's cache.
        augmenting: Each augmenting model's cache, by name, if it reads the anchor's tokens.
        readings: Each other augmenting model's, with what it has read of the text.
        bridges: One layer per connection, holding the keys and values after the projection.
        bridges_of: The layers of `bridges` that read each augmenting model.
    """

    layer_class_to_replicate = None
    offloading = False

    def __init__(
        self,
        anchor: Cache,
        augmenting: dict[str, Cache],
        readings: dict[str, ReadingCache],
        bridges: Cache,
        bridges_of: dict[str, list[int]],
    ):
        self.anchor = anchor
        self.augmenting = augmenting
        self.readings = readings
        self.bridges = bridges
        self.bridges_of = bridges_of
        self.num_tokens = 0  # that the anchor has seen, if its layers do not count

    @classmethod
    def around(
        cls,
        anchor: Cache,
        augmenting_configs: dict[str, PreTrainedConfig],
        readings: dict[str, ReadingCache],
        bridges_of: dict[str, list[int]],
        max_cache_len: int | None = None,
    ) -> "ComposedCache":
        """Build the other parts around an empty cache of the anchor.

        Args:
            anchor: The anchor's empty cache.
            augmenting_configs: Of the augmenting models that read the anchor's tokens, as they
                are run, shortened.
            readings: Empty ones of the others.
            bridges_of: The connections that read each augmenting model.
            max_cache_len: Tokens a static cache holds; None makes dynamic ones. How many tokens
                of its own an augmenting model reads is not known beforehand, so these stay dynamic.
        """
        caches: dict[str, Cache]
        layers: list[Any] = [GrowingLayer() for indices in bridges_of.values() for _ in indices]
        if max_cache_len is None:
            caches = {
                name: let_grow(DynamicCache(config=c)) for name, c in augmenting_configs.items()
            }
        else:
            caches = {
                name: StaticCache(config=c, max_cache_len=max_cache_len)
                for name, c in augmenting_configs.items()
            }
            for index in (index for name in caches for index in bridges_of[name]):
                layers[index] = StaticLayer(max_cache_len=max_cache_len)
        return cls(anchor, caches, readings, Cache(layers=layers), bridges_of)

    @property
    def layers(self) -> list[Any]:  # pyrefly: ignore[bad-override]
        """The layers of all parts; a property, because a dynamic cache may still grow."""
        parts = [self.anchor, *self.augmenting.values(), self.bridges]
        return [layer for part in parts for layer in part.layers]

    def __len__(self) -> int:
        return len(self.anchor)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ):
        """Append to a layer of the anchor's cache."""
        return self.anchor.update(key_states, value_states, layer_idx, *args, **kwargs)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens, in each part as far as it has read them.

        Parts that read only the prompt, or are switched off, are behind the anchor.

        Args:
            tokens_to_remove: Minus their number, as in transformers.
        """
        before = self.get_seq_length()
        self.anchor.crop(tokens_to_remove)
        self.advance(tokens_to_remove)
        after = self.get_seq_length()
        shared: list[Any] = [
            self.bridges.layers[i] for name in self.augmenting for i in self.bridges_of[name]
        ]
        parts: list[list[Any]] = [*(part.layers for part in self.augmenting.values()), shared]
        for layers in parts:
            lengths = [x.get_seq_length() for x in layers if isinstance(x, CacheLayerMixin)]
            for layer in layers:
                # A recurrent layer does not count, so its neighbours do.
                counts = isinstance(layer, CacheLayerMixin)
                seen = layer.get_seq_length() if counts else max(lengths, default=before)
                layer.crop(-max(seen - after, 0))
        for name, reading in self.readings.items():
            self.drop_slots(name, reading.crop(max(reading.num_columns - after, 0)))

    def drop_slots(self, name: str, number: int) -> None:
        """Forget the last keys and values of one augmenting model's bridges."""
        for index in self.bridges_of[name] if number else ():
            layer: Any = self.bridges.layers[index]
            layer.crop(-number)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put the rows of each beam where it now is."""
        super().reorder_cache(beam_idx)  # pyrefly: ignore[bad-argument-type]
        for reading in self.readings.values():
            reading.select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        super().batch_repeat_interleave(repeats)
        for reading in self.readings.values():
            reading.select([row for row in range(len(reading.readings)) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        super().batch_select_indices(indices)
        for reading in self.readings.values():
            reading.select(torch.arange(len(reading.readings))[indices.cpu()].tolist())

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.num_tokens = 0
        for reading in self.readings.values():
            reading.reset()

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """Tokens the anchor has seen, as a tensor if its cache is static.

        A recurrent anchor does not count, so we do.
        """
        return self.anchor.get_seq_length(layer_idx) if self.counts else self.num_tokens

    @property
    def counts(self) -> bool:
        """Whether the anchor's layers count its tokens."""
        return any(isinstance(layer, CacheLayerMixin) for layer in self.anchor.layers)

    def advance(self, number: int) -> None:
        """Count the tokens of a pass, where nobody else does."""
        if not self.counts:
            self.num_tokens += number

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Tokens the anchor's cache can hold, -1 if unlimited."""
        return self.anchor.get_max_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Length and offset of the anchor's keys."""
        return self.anchor.get_mask_sizes(query_length, layer_idx)

    @property
    def is_sliding(self) -> list[bool]:
        """Which layers of the anchor keep a sliding window."""
        return self.anchor.is_sliding

    @property
    def is_linear(self) -> list[bool]:
        """Which layers of the anchor are recurrent."""
        return self.anchor.is_linear

    @property
    def is_dummy(self) -> list[bool]:
        """Which layers of the anchor keep nothing."""
        return self.anchor.is_dummy

    @property
    def is_compileable(self) -> bool:
        """Whether every part has a static shape."""
        parts = (self.anchor, *self.augmenting.values(), self.bridges)
        return not self.readings and all(part.is_compileable for part in parts)


def is_empty(cache: Cache) -> bool:
    """Whether a model's own cache holds nothing yet; recurrent layers do not count tokens."""
    if any(isinstance(layer, CacheLayerMixin) for layer in cache.layers):
        return not bool(cache.get_seq_length() > 0)
    return not cache.layers or not cache.has_previous_state()
