"""The composed cache: what each part holds, and that no operation forgets one of them."""

from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import DynamicCache, StaticCache

from families import left_padded, open_bridges, positions_of, tiny, tiny_llama, token_ids
from graftlm import ComposedCache, compose
from graftlm.cache import is_empty


@pytest.fixture
def model():
    """Four anchor layers, two of three augmenting layers read, two bridges."""
    model = compose(tiny_llama(), {"code": tiny("gpt2"), "sw": tiny("bloom")}, every=3)
    return open_bridges(model)


def filled(model, ids: torch.Tensor) -> Any:
    """The cache after these tokens."""
    with torch.no_grad():
        return model(ids, use_cache=True).past_key_values


def after(model, cache: ComposedCache, ids: torch.Tensor) -> torch.Tensor:
    """Logits of the next tokens."""
    with torch.no_grad():
        return model(ids, past_key_values=cache).logits


def test_one_cache_per_model_and_one_layer_per_bridge(model):
    cache = filled(model, token_ids(2, 7))
    assert list(cache.augmenting) == ["code", "sw"]
    parts = (cache.anchor, cache.augmenting["code"], cache.augmenting["sw"], cache.bridges)
    assert [len(part.layers) for part in parts] == [4, 3, 3, 2]
    assert len(cache.layers) == 12
    assert len(cache) == 4
    shapes = [tuple(layer.keys.shape) for layer in cache.layers]
    # anchor: 1 key head of 4; gpt2: 4 of 6; bloom: 4 of 6; bridges: the anchor's 5 heads of 4
    assert shapes == [(2, 1, 7, 4)] * 4 + [(2, 4, 7, 6)] * 6 + [(2, 5, 7, 4)] * 2


def test_an_augmenting_model_keeps_no_layer_above_its_connections():
    model = compose(tiny_llama(), tiny("gpt2", num_hidden_layers=5), every=2)
    cache = filled(model, token_ids(2, 7))
    assert [c.augmenting_layer for c in model.config.connections] == [1, 3]
    assert len(cache.augmenting["augmenting"].layers) == 4


def test_lengths_and_masks_are_the_anchor_s(model):
    cache = filled(model, token_ids(2, 7))
    assert cache.get_seq_length() == cache.get_seq_length(3) == 7
    assert cache.get_mask_sizes(2, 0) == (9, 0)
    assert cache.get_max_length() == -1
    assert cache.is_sliding == [False] * 4
    assert cache.is_linear == [False] * 4
    assert cache.is_dummy == [False] * 4
    assert not cache.is_compileable
    keys, _ = cache.update(torch.zeros(2, 1, 1, 4), torch.zeros(2, 1, 1, 4), 2)
    assert keys.shape == (2, 1, 8, 4)
    assert cache.anchor.layers[2].get_seq_length() == 8


def test_sliding_anchor_layers_report_themselves():
    model = compose(tiny("gemma3_text"), tiny_llama())
    cache = filled(model, token_ids(1, 9))
    assert cache.is_sliding == [True, False, True]
    assert cache.get_seq_length() == 9


def test_tokens_of_a_recurrent_anchor_are_counted():
    """Mamba's cache does not count tokens, and asking it raises."""
    model = open_bridges(compose(tiny("mamba"), tiny_llama(), reads="prompt"))
    cache = model.model.compose_cache(DynamicCache(config=model.anchor.config))
    assert cache.get_seq_length() == 0
    cache = filled(model, token_ids(2, 7))
    assert cache.get_seq_length() == 7
    after(model, cache, token_ids(2, 3))  # no bridge reads them
    assert cache.get_seq_length() == 10
    cache.reset()
    assert cache.get_seq_length() == 0
    assert ComposedCache.around(DynamicCache(), {}, {}, {}).get_seq_length() == 0


def test_a_recurrent_anchor_that_recorded_its_past_takes_tokens_back():
    model = open_bridges(compose(tiny("mamba"), tiny_llama()))
    ids = token_ids(2, 9)
    cache = model.model.compose_cache(DynamicCache(config=model.anchor.config))
    cache.activate_past_recording()
    with torch.no_grad():
        model(ids[:, :8], past_key_values=cache)
    cache.crop(-3)
    assert cache.get_seq_length() == 5
    assert {layer.get_seq_length() for layer in cache.bridges.layers} == {5}
    expected = model(ids, use_cache=False).logits[:, 5:6]
    # What transformers takes back of Mamba alone is as far off.
    assert_close(after(model, cache, ids[:, 5:6]), expected, atol=1e-3, rtol=0)


def test_a_cache_is_empty_until_it_holds_something():
    ids = token_ids(2, 3)
    for family, name in (("llama", "past_key_values"), ("mamba", "cache_params")):
        anchor = tiny(family)
        cache = DynamicCache(config=anchor.config)
        assert is_empty(cache)
        anchor(ids, **{name: cache}, use_cache=True)
        assert not is_empty(cache)
    assert is_empty(DynamicCache())
    assert is_empty(StaticCache(config=tiny("llama").config, max_cache_len=7))


def test_static_parts_have_one_length(model):
    static = StaticCache(config=model.anchor.config, max_cache_len=13)
    cache = model.model.compose_cache(static, 13)
    assert {layer.get_max_length() for layer in cache.layers} == {13}
    assert cache.is_compileable
    ids = token_ids(2, 7)
    output = model(ids, past_key_values=cache)
    assert output.past_key_values is cache
    assert_close(output.logits, model(ids).logits, atol=5e-6, rtol=1e-5)


def test_cropping_is_never_having_read(model):
    ids = token_ids(2, 9)
    cache = filled(model, ids[:, :8])
    cache.crop(-3)
    assert {layer.get_seq_length() for layer in cache.layers} == {5}
    expected = after(model, filled(model, ids[:, :5]), ids[:, 5:])
    # Products of 8 and of 5 rows may be rounded differently: they are on CPUs without AVX512.
    assert_close(after(model, cache, ids[:, 5:]), expected, atol=5e-6, rtol=1e-5)


def test_cropping_leaves_a_prompt_alone():
    """Keys of the prompt were cropped with the tokens an assistant had guessed wrongly."""
    model = open_bridges(compose(tiny_llama(), tiny("gpt2"), reads="prompt"))
    ids = token_ids(2, 9)
    cache = filled(model, ids[:, :5])
    after(model, cache, ids[:, 5:8])
    cache.crop(-2)
    assert cache.get_seq_length() == 6
    assert cache.bridges.get_seq_length() == 5
    expected = filled(model, ids[:, :5])
    after(model, expected, ids[:, 5:6])
    assert_close(after(model, cache, ids[:, 6:]), after(model, expected, ids[:, 6:]))
    cache.crop(-6)
    assert cache.get_seq_length() == cache.bridges.get_seq_length() == 3


@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda cache: cache.batch_select_indices(torch.tensor([2, 1])), [2, 1]),
    ],
)
def test_rows_move_in_every_part(model, change, rows):
    ids = token_ids(3, 9)
    cache = filled(model, ids[:, :5])
    change(cache)
    found = after(model, cache, ids[rows, 5:])
    expected = after(model, filled(model, ids[rows, :5]), ids[rows, 5:])
    assert_close(found, expected, atol=2e-6, rtol=1e-5)


def test_a_reset_cache_starts_again(model):
    static = StaticCache(config=model.anchor.config, max_cache_len=13)
    cache = model.model.compose_cache(static, 13)
    ids, other = token_ids(2, 7), token_ids(2, 7, seed=8)
    after(model, cache, other)
    cache.reset()
    assert int(cache.get_seq_length()) == 0
    assert_close(after(model, cache, ids), model(ids).logits, atol=5e-6, rtol=1e-5)


@torch.no_grad()
def test_keys_are_made_once_and_then_only_read(model):
    """Bridge keys of earlier tokens never change, so a step projects one token per bridge."""
    batch = left_padded([7, 4])
    mask = batch["attention_mask"]
    lengths = []
    model.bridges[0].cross_k.register_forward_hook(
        lambda module, args, output: lengths.append(output.shape[1])
    )
    cache = model(**batch, position_ids=positions_of(mask)).past_key_values
    before = cache.bridges.layers[0].keys.clone()
    mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    step = {"attention_mask": mask, "position_ids": positions_of(mask)[:, -1:]}
    model(token_ids(2, 1), past_key_values=cache, **step)
    assert lengths == [7, 1]
    assert torch.equal(cache.bridges.layers[0].keys[:, :, :7], before)
