"""The growing cache layer is transformers' dynamic layer, token for token, without its copies."""

import copy
from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from families import open_bridges, tiny, tiny_config, tiny_llama, token_ids
from graftlm import compose
from graftlm.growing_cache import GrowingLayer, let_grow


def tokens(number: int, seed: int = 0, rows: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, rows, 3, number, 5, generator=generator)
    return keys, values


class Pair:
    """Our layer beside the one it stands for; both are told the same."""

    def __init__(self) -> None:
        self.layers: list[Any] = [GrowingLayer(), DynamicLayer()]

    def update(self, number: int, seed: int, rows: int = 2) -> None:
        ours, theirs = (layer.update(*tokens(number, seed, rows)) for layer in self.layers)
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
        self.check()

    def both(self, name: str, *args: Any) -> None:
        for layer in self.layers:
            getattr(layer, name)(*args)
        self.check()

    def check(self) -> None:
        ours, theirs = self.layers
        assert ours.get_seq_length() == theirs.get_seq_length()
        if theirs.is_initialized:
            assert torch.equal(ours.keys, theirs.keys)
            assert torch.equal(ours.values, theirs.values)


@torch.no_grad()
def test_it_is_the_dynamic_layer_whatever_is_done_to_it() -> None:
    pair = Pair()
    pair.update(7, 0)
    for step in range(60):  # through the room and into new ones
        pair.update(1, step)
    pair.both("crop", -9)
    pair.update(3, 71)
    pair.both("reorder_cache", torch.tensor([1, 1]))
    pair.update(1, 72)
    pair.both("batch_repeat_interleave", 2)
    pair.update(2, 73, rows=4)
    pair.both("batch_select_indices", torch.tensor([3, 0]))
    pair.update(1, 74)
    pair.both("reset")
    pair.update(4, 75)


@torch.no_grad()
def test_a_token_is_written_in_its_place() -> None:
    layer: Any = GrowingLayer()
    layer.update(*tokens(40))
    at, room = layer.keys.data_ptr(), layer.room[0].shape[-2]
    assert room > 40
    for _ in range(room - 40):
        layer.update(*tokens(1))
        assert layer.keys.data_ptr() == at
    layer.update(*tokens(1))
    assert layer.keys.data_ptr() != at


@torch.no_grad()
def test_copies_go_their_own_way() -> None:
    layer: Any = GrowingLayer()
    layer.update(*tokens(4))
    twin = copy.deepcopy(layer)
    twin.update(*tokens(1, 5))
    layer.update(*tokens(1, 6))
    assert torch.equal(twin.keys[..., :4, :], layer.keys[..., :4, :])
    assert torch.equal(twin.keys[..., 4:, :], tokens(1, 5)[0])
    assert torch.equal(layer.keys[..., 4:, :], tokens(1, 6)[0])


def test_nothing_a_backward_pass_needs_is_overwritten() -> None:
    layer: Any = GrowingLayer()
    with torch.no_grad():
        layer.update(*tokens(4))
    queries = torch.randn(2, 3, 1, 5, requires_grad=True)
    keys, values = layer.update(*tokens(1, 1))
    read = torch.nn.functional.scaled_dot_product_attention(queries, keys, values)
    with torch.no_grad():
        layer.update(*tokens(1, 2))
    read.sum().backward()
    assert queries.grad is not None
    with torch.inference_mode():
        layer.update(*tokens(1, 3))
    with torch.no_grad():
        layer.update(*tokens(1, 4))  # a tensor of inference mode cannot be written here
    assert layer.get_seq_length() == 8


def test_only_plain_dynamic_layers_are_replaced() -> None:
    sliding = let_grow(DynamicCache(config=tiny_config("gemma3_text")))
    kinds = {type(layer) for layer in sliding.layers}
    assert kinds == {GrowingLayer, DynamicSlidingWindowLayer}
    plain = let_grow(DynamicCache())
    plain.update(*tokens(2), 1)
    assert [type(layer) for layer in plain.layers] == [GrowingLayer, GrowingLayer]


@pytest.mark.parametrize("given", [False, True])
def test_a_callers_cache_keeps_its_layers(given: bool) -> None:
    model = open_bridges(compose(tiny("llama"), tiny_llama(), every=2))
    mine = DynamicCache(config=model.anchor.config)
    options = {"past_key_values": mine} if given else {}
    output = model.generate(
        token_ids(1, 5), max_new_tokens=4, return_dict_in_generate=True, **options
    )
    kind = DynamicLayer if given else GrowingLayer
    assert {type(layer) for layer in output.past_key_values.anchor.layers} == {kind}
    assert mine.get_seq_length() == (8 if given else 0)
