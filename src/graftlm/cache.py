"""One cache object for a composed model: a KV cache per model, plus the bridges' keys and values.

The paper re-runs both models on the whole text at every step (section 3.1). An augmenting state
at position t depends on tokens up to t only, so it never changes again, and neither do the keys
and values a bridge makes of it: caching them is exact.
"""

from typing import Any

from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    StaticCache,
    StaticLayer,
)
from transformers.configuration_utils import PreTrainedConfig


class ComposedCache(Cache):
    """What a composed model remembers between decoding steps.

    `layers` joins the layers of all parts, so that reordering, cropping, repeating and selecting
    rows are transformers' own loops. Lengths and masks are the anchor's.

    Args:
        anchor: The anchor's cache.
        augmenting: Each augmenting model's cache, by name.
        bridges: One layer per connection, holding the keys and values after the projection.
    """

    layer_class_to_replicate = None
    offloading = False

    def __init__(self, anchor: Cache, augmenting: dict[str, Cache], bridges: Cache):
        self.anchor = anchor
        self.augmenting = augmenting
        self.bridges = bridges

    @classmethod
    def around(
        cls,
        anchor: Cache,
        augmenting_configs: dict[str, PreTrainedConfig],
        num_bridges: int,
        max_cache_len: int | None = None,
    ) -> "ComposedCache":
        """Build the other parts around an empty cache of the anchor.

        Args:
            anchor: The anchor's empty cache.
            augmenting_configs: Of the augmenting models as they are run, shortened.
            num_bridges: Number of connections.
            max_cache_len: Tokens a static cache holds; None makes dynamic ones.
        """
        caches: dict[str, Cache]
        layers: list[Any]
        if max_cache_len is None:
            caches = {name: DynamicCache(config=c) for name, c in augmenting_configs.items()}
            layers = [DynamicLayer() for _ in range(num_bridges)]
        else:
            caches = {
                name: StaticCache(config=c, max_cache_len=max_cache_len)
                for name, c in augmenting_configs.items()
            }
            layers = [StaticLayer(max_cache_len=max_cache_len) for _ in range(num_bridges)]
        return cls(anchor, caches, Cache(layers=layers))

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
        after = self.get_seq_length()
        for part in (*self.augmenting.values(), self.bridges):
            layers: list[Any] = part.layers
            lengths = [x.get_seq_length() for x in layers if isinstance(x, CacheLayerMixin)]
            for layer in layers:
                # A recurrent layer does not count, so its neighbours do.
                counts = isinstance(layer, CacheLayerMixin)
                seen = layer.get_seq_length() if counts else max(lengths, default=before)
                layer.crop(-max(seen - after, 0))

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """Tokens the anchor has seen, as a tensor if its cache is static.

        A recurrent anchor does not count, so a bridge does.
        """
        if any(isinstance(layer, CacheLayerMixin) for layer in self.anchor.layers):
            return self.anchor.get_seq_length(layer_idx)
        if not self.anchor.layers:
            return 0
        bridges: list[Any] = self.bridges.layers
        return max((layer.get_seq_length() for layer in bridges), default=0)

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
        return all(
            part.is_compileable for part in (self.anchor, *self.augmenting.values(), self.bridges)
        )


def is_empty(cache: Cache) -> bool:
    """Whether a model's own cache holds nothing yet; recurrent layers do not count tokens."""
    if any(isinstance(layer, CacheLayerMixin) for layer in cache.layers):
        return not bool(cache.get_seq_length() > 0)
    return not cache.layers or not cache.has_previous_state()
