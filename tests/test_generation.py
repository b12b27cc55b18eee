"""Generation: each way of decoding, each kind of cache, and the hand-written loop they equal."""

from typing import Any

import pytest
import torch
from torch.nn.functional import pad
from torch.testing import assert_close
from transformers import DynamicCache, StaticCache

from families import (
    assert_cached_is_uncached,
    generated,
    left_padded,
    open_bridges,
    positions_of,
    tiny,
    tiny_llama,
    token_ids,
    uncached_logits,
)
from graftlm import ComposedCache, compose

TOLERANCE = {"atol": 5e-6, "rtol": 1e-5}
POSITIONS = ["none", "distance", "rotary"]

# (anchor, augmenting model): full attention, sliding windows, linear positions, experts, recurrence
PAIRS = [
    ("llama", "gpt2"),
    ("gemma3_text", "mistral"),
    ("mistral", "gemma2"),
    ("bloom", "mixtral"),
    ("gpt2", "mamba"),
    ("mixtral", "falcon"),
    ("qwen3_5_text", "llama"),
    ("llama", "bamba"),
    ("mamba", "llama"),
]
# Recurrent states have no static cache of their own kind, and cannot be rolled back.
ATTENDING = [pair for pair in PAIRS if not {"mamba", "bamba", "qwen3_5_text"} & set(pair)]


def composed(anchor: str = "llama", augmenting: str = "gpt2", **options: Any):
    """A small pair with open bridges; `num_heads` divides every width here."""
    own = tiny_llama() if anchor == "llama" else tiny(anchor)
    defaults: dict[str, Any] = {"every": 2, "num_heads": 2}
    return open_bridges(compose(own, tiny(augmenting, 1), **defaults | options))


def greedy_by_hand(model, batch: dict[str, torch.Tensor], steps: int) -> torch.Tensor:
    """The definition: run everything again for each token, and take the likeliest."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    for _ in range(steps):
        following = uncached_logits(model, ids, mask)[:, -1:].argmax(-1)
        ids, mask = torch.cat((ids, following), 1), pad(mask, (0, 1), value=1)
    return ids


# ---- greedy --------------------------------------------------------------------------------


@pytest.mark.parametrize(("anchor", "augmenting"), PAIRS)
def test_generate_is_the_hand_written_loop(anchor, augmenting):
    model, batch = composed(anchor, augmenting), left_padded([9, 5, 2])
    assert torch.equal(generated(model, batch, 8)[0], greedy_by_hand(model, batch, 8))


@pytest.mark.parametrize("position", POSITIONS)
def test_every_cache_gives_the_same_tokens_and_logits(position):
    model, batch = composed(position=position), left_padded([9, 5])
    expected = greedy_by_hand(model, batch, 8)
    logits = uncached_logits(model, expected, pad(batch["attention_mask"], (0, 8), value=1))
    for options in (
        {"use_cache": False},
        {"cache_implementation": "dynamic"},
        {"cache_implementation": "static"},
        {"cache_implementation": "static", "max_cache_len": 41},
        {"prefill_chunk_size": 4},
        {"prefill_chunk_size": 4, "cache_implementation": "static"},
        {"past_key_values": DynamicCache(config=model.anchor.config)},
        {"past_key_values": StaticCache(config=model.anchor.config, max_cache_len=37)},
    ):
        sequences, found = generated(model, batch, 8, **options)
        assert torch.equal(sequences, expected), options
        assert_close(found, logits[:, -9:-1], **TOLERANCE, msg=str(options))


@pytest.mark.parametrize("implementation", ["static", "dynamic"])
@pytest.mark.parametrize(("anchor", "augmenting"), ATTENDING)
def test_static_and_dynamic_caches_of_each_kind_of_attention(anchor, augmenting, implementation):
    """Sliding windows of 5 slots run full in both models while the bridges keep everything."""
    model = composed(anchor, augmenting)
    assert_cached_is_uncached(model, left_padded([9, 5]), cache_implementation=implementation)


def test_a_static_cache_can_be_used_again_and_again():
    """Transformers keeps the anchor's static cache between calls and only resets it."""
    model = composed()
    for lengths in ([9, 5], [4, 7], [12, 3]):
        assert_cached_is_uncached(model, left_padded(lengths), cache_implementation="static")


# ---- sampling, beams, several sequences ----------------------------------------------------


@pytest.mark.parametrize(("anchor", "augmenting"), PAIRS)
def test_sampling_draws_the_same_with_and_without_a_cache(anchor, augmenting):
    model, batch, drawn = composed(anchor, augmenting), left_padded([9, 5]), []
    for use_cache in (True, False):
        torch.manual_seed(31)
        drawn.append(
            model.generate(
                **batch,
                do_sample=True,
                top_k=0,
                temperature=2.0,
                max_new_tokens=8,
                eos_token_id=None,
                num_return_sequences=3,
                use_cache=use_cache,
            )
        )
    assert torch.equal(*drawn)
    assert len(set(map(tuple, drawn[0].tolist()))) == 6


@pytest.mark.parametrize("implementation", ["dynamic", "static"])
@pytest.mark.parametrize(("anchor", "augmenting"), PAIRS)
def test_beam_search_reorders_every_cache(anchor, augmenting, implementation):
    if implementation == "static" and (anchor, augmenting) not in ATTENDING:
        pytest.skip("recurrent layers have no static cache")
    model, batch = composed(anchor, augmenting), left_padded([9, 5])
    options = {
        "num_beams": 3,
        "num_return_sequences": 2,
        "do_sample": False,
        "max_new_tokens": 7,
        "eos_token_id": None,
        "return_dict_in_generate": True,
        "output_scores": True,
    }
    cached = model.generate(**batch, **options, cache_implementation=implementation)
    uncached = model.generate(**batch, **options, use_cache=False)
    assert torch.equal(cached.sequences, uncached.sequences)
    assert_close(cached.sequences_scores, uncached.sequences_scores, **TOLERANCE)
    beams = cached.beam_indices[:, :7]
    assert (beams[:, 1:] != beams[:, :-1]).any(), "no beam was ever reordered"


# ---- assisted decoding ---------------------------------------------------------------------


@pytest.mark.parametrize("augmenting", ["gpt2", "gemma3_text", "mixtral"])
def test_assisted_decoding_rolls_every_cache_back(augmenting):
    """A poor assistant is refused often: the caches must forget what was refused."""
    model, assistant = composed("llama", augmenting), tiny("gpt2", 8)
    batch = left_padded([9])
    expected = generated(model, batch, 12)[0]
    for helper in (assistant, tiny_llama(), composed("llama", "bloom")):
        assert torch.equal(generated(model, batch, 12, assistant_model=helper)[0], expected)
    assert torch.equal(
        generated(assistant, batch, 12, assistant_model=model)[0],
        generated(assistant, batch, 12)[0],
    )


@pytest.mark.parametrize("position", POSITIONS)
def test_prompt_lookup_rolls_every_cache_back(position):
    model = composed(position=position)
    batch = {"input_ids": token_ids(1, 4).repeat(1, 3), "attention_mask": torch.ones(1, 12).long()}
    expected = generated(model, batch, 12)[0]
    assert torch.equal(generated(model, batch, 12, prompt_lookup_num_tokens=3)[0], expected)


def test_a_recurrent_augmenting_model_cannot_be_rolled_back():
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful"):
        generated(composed("gpt2", "mamba"), left_padded([9]), 5, assistant_model=tiny("gpt2", 8))


# ---- the cache the caller holds ------------------------------------------------------------


@pytest.mark.parametrize(("anchor", "augmenting"), PAIRS)
@torch.no_grad()
def test_a_returned_cache_goes_on_where_it_ended(anchor, augmenting):
    """In chunks of 4, 1 and 3 tokens, left-padded: the logits are those of one pass."""
    model, batch = composed(anchor, augmenting), left_padded([8, 5])
    ids, mask = batch["input_ids"], batch["attention_mask"]
    whole, found, cache, start = uncached_logits(model, ids, mask), [], None, 0
    for size in (4, 1, 3):
        end = start + size
        output = model(
            ids[:, start:end],
            attention_mask=mask[:, :end],
            position_ids=positions_of(mask)[:, start:end],
            past_key_values=cache,
            use_cache=True,
        )
        found.append(output.logits)
        cache, start = output.past_key_values, end
        assert isinstance(cache, ComposedCache)
        assert cache.get_seq_length() == end
    seen = mask.bool()
    if {"mamba", "bamba"} & {anchor, augmenting}:
        # Their later passes of several tokens differ in plain transformers too (by 4e-4).
        seen = seen & (torch.arange(8) < 5)
    assert_close(torch.cat(found, 1)[seen], whole[seen], **TOLERANCE)


def test_generation_goes_on_from_a_returned_cache():
    model, batch = composed(), left_padded([9, 5])
    expected = generated(model, batch, 10)[0]
    first = model.generate(
        **batch,
        max_new_tokens=4,
        do_sample=False,
        eos_token_id=None,
        return_dict_in_generate=True,
    )
    cache = first.past_key_values
    assert isinstance(cache, ComposedCache)
    mask = pad(batch["attention_mask"], (0, 4), value=1)
    go_on = {"input_ids": first.sequences, "attention_mask": mask}
    assert torch.equal(generated(model, go_on, 6, past_key_values=cache)[0], expected)


# ---- reads="prompt" ------------------------------------------------------------------------


def tokens_read(model) -> list[list[int]]:
    """The tokens the augmenting model gets from now on, a list for each call."""
    calls: list[list[int]] = []
    embedding = model.augmenting["augmenting"].get_input_embeddings()
    embedding.register_forward_hook(lambda m, args, out: calls.append(args[0].flatten().tolist()))
    return calls


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize(
    "options",
    [
        {"cache_implementation": "dynamic"},
        {"cache_implementation": "static"},
        {"num_beams": 2, "num_return_sequences": 2},
        {"prompt_lookup_num_tokens": 3},
    ],
)
def test_a_prompt_is_read_once_and_what_is_generated_never(position, options):
    model = composed(position=position, reads="prompt")
    lengths = [9] if "prompt_lookup_num_tokens" in options else [9, 5]
    batch = left_padded(lengths)
    calls = tokens_read(model)
    sequences, cached = generated(model, batch, 8, **options)
    assert len(calls) == 1
    beams = options.get("num_beams", 1)
    assert calls[0] == batch["input_ids"].repeat_interleave(beams, 0).flatten().tolist()
    if beams > 1:
        return
    with torch.no_grad():
        mask = pad(batch["attention_mask"], (0, 8), value=1)
        uncached = model(
            sequences,
            attention_mask=mask,
            position_ids=positions_of(mask),
            prompt_mask=torch.ones_like(batch["input_ids"]),
            use_cache=False,
        ).logits
    assert calls[1] == batch["input_ids"].flatten().tolist()
    assert_close(cached, uncached[:, -9:-1], **TOLERANCE)


def test_a_recurrent_anchor_is_counted_on_behind_the_prompt():
    """Bridges stop at the prompt, and no layer of Mamba's counts: its tokens stood still."""
    model = composed("mamba", "llama", reads="prompt", position="rotary")
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    cached = model.generate(token_ids(1, 6), **options)
    uncached = model.generate(token_ids(1, 6), **options, use_cache=False)
    assert_close(cached.logits, uncached.logits, **TOLERANCE)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Dynamo detected a call")
@torch.no_grad()
def test_a_recurrent_anchor_is_counted_in_compiled_code():
    model, ids = composed("mamba", "llama", reads="prompt", position="rotary"), token_ids(1, 9)
    compiled: Any = torch.compile(model, backend="eager", dynamic=False)
    both = []
    for run in (model, compiled):
        output = run(input_ids=ids[:, :6], use_cache=True)
        for place in range(6, 9):
            piece, cache = ids[:, place : place + 1], output.past_key_values
            output = run(input_ids=piece, past_key_values=cache, use_cache=True)
        both.append(output.logits)
    assert_close(*both, **TOLERANCE)


def test_beams_over_a_prompt_equal_those_without_a_cache():
    model, batch = composed(reads="prompt"), left_padded([9, 5])
    options = {"num_beams": 3, "max_new_tokens": 7, "do_sample": False, "eos_token_id": None}
    cached = model.generate(**batch, **options)
    assert torch.equal(cached, model.generate(**batch, **options, use_cache=False))


@torch.no_grad()
def test_what_comes_after_the_prompt_is_hidden_from_the_augmenting_model():
    """In training the prompt ends at the first label; a later token reaches no bridge."""
    model, ids = composed(reads="prompt"), token_ids(2, 9)
    labels = ids.clone()
    labels[0, :4], labels[1, :6] = -100, -100
    calls = tokens_read(model)
    by_labels = model(ids, labels=labels, use_cache=False).logits
    assert len(calls) == 1
    prompt_mask = torch.tensor([[1] * 4 + [0] * 5, [1] * 6 + [0] * 3])
    by_mask = model(ids, prompt_mask=prompt_mask, use_cache=False).logits
    assert torch.equal(by_labels, by_mask)
    for row, end in enumerate((4, 6)):
        prompt = torch.ones(1, end).long()
        alone = model(ids[row : row + 1], prompt_mask=prompt, use_cache=False).logits
        assert_close(by_labels[row], alone[0], **TOLERANCE)
    assert (by_labels - composed()(ids).logits).abs().max() > 0.01


@torch.no_grad()
def test_each_packed_document_has_a_prompt():
    """Only the first one's was read."""
    model, ids = composed(reads="prompt"), token_ids(2, 12)
    labels, positions = ids.clone(), torch.arange(12)[None] % 7
    labels[:, :3] = labels[:, 7:9] = -100
    packed = model(ids, position_ids=positions, labels=labels, use_cache=False).logits
    for start, end in ((0, 7), (7, 12)):
        document, own = ids[:, start:end], labels[:, start:end]
        alone = model(document, labels=own, use_cache=False).logits
        assert_close(packed[:, start:end], alone, **TOLERANCE)


@pytest.mark.parametrize("position", POSITIONS)
@torch.no_grad()
def test_a_row_without_a_prompt_reads_nothing(position):
    """No key may be read there, and softmax over nothing is not zero."""
    model, ids = composed(reads="prompt", position=position), token_ids(2, 9)
    labels = ids.clone()
    labels[1, :5] = -100
    logits, alone = model(ids, labels=labels, use_cache=False).logits, model.anchor(ids).logits
    assert torch.equal(logits[0], alone[0])
    assert (logits[1] - alone[1]).abs().max() > 0.01


@torch.no_grad()
def test_the_first_pass_without_labels_is_all_prompt():
    model, ids = composed(reads="prompt"), token_ids(2, 9)
    assert torch.equal(model(ids).logits, composed()(ids).logits)
    cache = model(ids[:, :6]).past_key_values
    calls = tokens_read(model)
    by_steps = model(ids[:, 6:], past_key_values=cache).logits
    assert calls == []
    whole = model(ids, prompt_mask=torch.ones(2, 6).long(), use_cache=False).logits
    assert_close(by_steps, whole[:, 6:], **TOLERANCE)


# ---- switches ------------------------------------------------------------------------------


def test_two_augmenting_models_with_one_switched_off():
    models = {"code": tiny("gpt2", 1), "sw": tiny("bloom")}
    model = open_bridges(compose(tiny_llama(), models, every=2, num_heads=2))
    alone = composed()
    own = [
        b
        for b, c in zip(model.bridges, model.config.connections, strict=True)
        if c.augmenting == "code"
    ]
    for mine, other in zip(own, alone.bridges, strict=True):
        other.load_state_dict(mine.state_dict())
    model.set_scale("sw", 0)
    for options in ({}, {"cache_implementation": "static"}, {"use_cache": False}):
        batch = left_padded([9, 5])
        sequences, logits = generated(model, batch, 6, **options)
        wanted, expected = generated(alone, batch, 6, **options)
        assert torch.equal(sequences, wanted)
        assert_close(logits, expected, **TOLERANCE)


def test_a_scaled_model_is_cached_exactly():
    model = composed()
    model.set_scale("augmenting", 0.37)
    assert_cached_is_uncached(model, left_padded([9, 5]))
    assert_cached_is_uncached(model, left_padded([9, 5]), cache_implementation="static")


# ---- long prompts ------------------------------------------------------------------------


@pytest.mark.parametrize("position", ["none", "distance", "rotary"])
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}])
def test_a_prompt_aligned_in_blocks_is_one_aligned_whole(
    position: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = {"small": tiny_llama(vocab_size=50), "whole": tiny_llama(seed=9)}
    model = open_bridges(compose(tiny("llama"), pair, every=2, position=position))
    batch = left_padded([11, 7, 2])
    if options:  # tokens of their own have no static cache
        model = open_bridges(compose(tiny("llama"), tiny_llama(), every=2, position=position))
    whole = model.generate(**batch, max_new_tokens=6, do_sample=False, **options)
    monkeypatch.setattr("graftlm.alignment.WHOLE", 1)
    monkeypatch.setattr("graftlm.alignment.BLOCK", 700)
    assert torch.equal(model.generate(**batch, max_new_tokens=6, do_sample=False, **options), whole)
    assert_cached_is_uncached(model, batch, **options)
    with torch.no_grad():
        blocks = model(**batch, use_cache=True).logits
        monkeypatch.setattr("graftlm.alignment.WHOLE", 10**9)
        torch.testing.assert_close(blocks, model(**batch, use_cache=True).logits)
