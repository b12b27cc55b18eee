"""An augmenting model with a tokenizer of its own: every claim of exactness, once more."""

import copy
from typing import Any

import pytest
import torch

from families import (
    FAMILIES,
    REPRESENTATIVE,
    assert_cached_is_uncached,
    generated,
    open_bridges,
    positions_of,
    tiny,
    uncached_logits,
)
from graftlm import Bridge, compose
from graftlm.augmenting_tokens import HOLE
from graftlm.composed import move_to_device
from graftlm.masks import skips_holes
from graftlm.passes import PassInputs
from two_tokenizers import PROMPTS, batch_of, byte_tokenizer, compose_pair, word_tokenizer

SLOW = [
    pytest.param(name, marks=pytest.mark.slow) for name in sorted(set(FAMILIES) - REPRESENTATIVE)
]
EVERY_FAMILY = [*sorted(REPRESENTATIVE), *SLOW]


def open_pair(*args: Any, **options: Any) -> Any:
    return open_bridges(compose_pair(*args, **options).eval())


def test_a_fresh_composition_is_the_anchor() -> None:
    model = compose_pair()
    assert model.config.alignments == {"augmenting": "committed"}
    batch = batch_of(*PROMPTS)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    alone = model.anchor(
        input_ids=ids, attention_mask=mask, position_ids=positions_of(mask), use_cache=False
    ).logits
    assert torch.equal(uncached_logits(model, ids, mask), alone)
    assert not torch.equal(uncached_logits(open_bridges(model), ids, mask), alone)


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_cached_is_uncached_whatever_the_augmenting_model(family: str) -> None:
    model = open_pair("llama", family)
    if family == "recurrent_gemma":
        with pytest.raises(ValueError, match="'augmenting' keeps its state in itself and not in"):
            model.generate(**batch_of(*PROMPTS), max_new_tokens=3)
        uncached = model.generate(**batch_of(*PROMPTS), max_new_tokens=3, use_cache=False)
        assert uncached.shape[0] == len(PROMPTS)
        return
    assert_cached_is_uncached(model, batch_of(*PROMPTS))


@pytest.mark.parametrize("family", ["gpt2", "gemma3_text", "mistral", "mamba", "bloom"])
def test_cached_is_uncached_whatever_the_anchor(family: str) -> None:
    assert_cached_is_uncached(open_pair(family), batch_of(*PROMPTS))


@pytest.mark.parametrize("position", ["none", "distance", "rotary"])
@pytest.mark.parametrize("unit", ["characters", "tokens"])
def test_cached_is_uncached_with_every_position(position: Any, unit: Any) -> None:
    model = open_pair("llama", "gemma3_text", position=position, distance_unit=unit)
    assert_cached_is_uncached(model, batch_of(*PROMPTS))


def test_rows_of_a_batch_are_what_they_are_alone() -> None:
    model = open_pair("llama", "gemma3_text")
    together, _ = generated(model, batch_of(*PROMPTS), 12)
    for row, prompt in enumerate(PROMPTS):
        alone, _ = generated(model, batch_of(prompt), 12)
        assert torch.equal(together[row, -12:], alone[0, -12:])


def test_nothing_of_the_future_is_seen() -> None:
    model = open_pair()
    ids = batch_of("The quick brown fox jumps over the lazy dog")["input_ids"]
    with torch.no_grad():
        before = model(input_ids=ids, use_cache=False).logits
        for place in range(1, ids.shape[1]):
            changed = ids.clone()
            changed[:, place:] = torch.randint(4, 300, changed[:, place:].shape)
            after = model(input_ids=changed, use_cache=False).logits
            # Other text may have more tokens, and longer sums round differently.
            torch.testing.assert_close(before[:, :place], after[:, :place], atol=2e-6, rtol=0)


def test_right_padding_changes_nothing() -> None:
    model = open_pair("llama", "mamba")
    ids = batch_of(PROMPTS[0])["input_ids"]
    padded = torch.nn.functional.pad(ids, (0, 5))
    mask = torch.nn.functional.pad(torch.ones_like(ids), (0, 5))
    with torch.no_grad():
        alone = model(input_ids=ids, use_cache=False).logits
        beside = model(input_ids=padded, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(beside[:, : ids.shape[1]], alone, atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("family", "alignment"),
    [(name, "committed") for name in ("gemma2", "falcon", "gpt2", "bloom", "mamba")]
    + [("gemma2", "prefix"), ("falcon", "prefix")],
)
def test_packed_documents_are_separate(family: str, alignment: Any) -> None:
    model = open_pair("llama", family, alignment=alignment)
    rows = [batch_of(prompt)["input_ids"] for prompt in PROMPTS[:3]]
    positions = torch.cat([torch.arange(row.shape[1]) for row in rows])[None]
    with torch.no_grad():
        packed = model(
            input_ids=torch.cat(rows, dim=1), position_ids=positions, use_cache=False
        ).logits
        alone = [model(input_ids=row, use_cache=False).logits for row in rows]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "mamba"])
def test_beams_are_the_same_with_and_without_a_cache(family: str) -> None:
    model = open_pair("llama", family)
    options = {"num_beams": 3, "max_new_tokens": 9, "do_sample": False, "eos_token_id": None}
    batch = batch_of(*PROMPTS[:3])
    cached = model.generate(**batch, **options)
    assert torch.equal(cached, model.generate(**batch, **options, use_cache=False))


def test_sampling_is_the_same_with_and_without_a_cache() -> None:
    model = open_pair("llama", "mistral")
    options = {"do_sample": True, "max_new_tokens": 9, "num_return_sequences": 2}
    batch = batch_of(*PROMPTS[:2])
    torch.manual_seed(3)
    cached = model.generate(**batch, **options)
    torch.manual_seed(3)
    assert torch.equal(cached, model.generate(**batch, **options, use_cache=False))


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
@pytest.mark.parametrize("lookup", [True, False])
def test_assisted_decoding_rolls_back(family: str, lookup: bool) -> None:
    model = open_pair("llama", family)
    batch = batch_of(PROMPTS[0] + " jumps. " + PROMPTS[0])
    greedy, _ = generated(model, batch, 14)
    if lookup:
        helped = model.generate(
            **batch, max_new_tokens=14, do_sample=False, prompt_lookup_num_tokens=4,
            eos_token_id=None,
        )  # fmt: skip
    else:
        helped = model.generate(
            **batch, max_new_tokens=14, do_sample=False, assistant_model=model.anchor,
            eos_token_id=None,
        )  # fmt: skip
    assert torch.equal(helped, greedy)


@pytest.mark.parametrize("family", ["mamba", "lfm2"])
def test_recurrent_models_are_refused_as_parts_of_assisted_decoding(family: str) -> None:
    model = open_pair("llama", family)
    with pytest.raises(ValueError, match="stateful"):
        model.generate(**batch_of(PROMPTS[0]), prompt_lookup_num_tokens=3, max_new_tokens=4)


def test_a_static_cache_of_the_anchor_gives_the_same_tokens() -> None:
    model = open_pair("llama", "gemma3_text")
    batch = batch_of(*PROMPTS)
    dynamic, _ = generated(model, batch, 8)
    static, _ = generated(model, batch, 8, cache_implementation="static")
    assert torch.equal(dynamic, static)


def test_a_conversation_can_go_on_and_fork() -> None:
    model = open_pair("llama", "gemma2")
    ids = batch_of("The quick brown fox jumps over the lazy dog")["input_ids"]
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
        first = model(input_ids=ids[:, :5], use_cache=True)
        fork = copy.deepcopy(first.past_key_values)
        model(input_ids=ids[:, :4], past_key_values=first.past_key_values)
        pieces = [first.logits]
        for start, end in ((5, 6), (6, 11), (11, ids.shape[1])):
            output = model(input_ids=ids[:, start:end], past_key_values=fork)
            fork = output.past_key_values
            pieces.append(output.logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_rows_roll_back_by_different_numbers_of_augmenting_tokens(family: str) -> None:
    model = open_pair("llama", family)
    texts = (
        "There was once a town where 345",
        "def add(first, second):\n    return",
        "敏捷的棕色狐狸",
    )
    ids = torch.cat([batch_of(text)["input_ids"][:, :12] for text in texts])
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
        cache = model(input_ids=ids[:, :10], use_cache=True).past_key_values
        for removed in (3, 1, 4):
            cache.crop(-removed)
            start = cache.get_seq_length()
            output = model(input_ids=ids[:, start : start + 3], past_key_values=cache)
            torch.testing.assert_close(
                output.logits, whole[:, start : start + 3], atol=5e-6, rtol=1e-5
            )


def test_rows_can_be_reordered_repeated_and_selected() -> None:
    for family in ("gemma3_text", "mamba"):
        model = open_pair("llama", family)
        texts = ("There was once a town where 345", "def add(first, second):\n    return")
        ids = torch.cat([batch_of(text)["input_ids"][:, :9] for text in texts])
        rows = torch.tensor([1, 1, 0])
        with torch.no_grad():
            whole = model(input_ids=ids[rows], use_cache=False).logits
            cache = model(input_ids=ids[:, :6], use_cache=True).past_key_values
            cache.batch_repeat_interleave(2)  # 0 0 1 1
            cache.batch_select_indices(torch.tensor([0, 2, 3]))  # 0 1 1
            cache.reorder_cache(torch.tensor([2, 1, 0]))
            output = model(input_ids=ids[rows][:, 6:], past_key_values=cache)
        torch.testing.assert_close(output.logits, whole[:, 6:], atol=5e-6, rtol=1e-5)


def test_one_augmenting_model_may_share_the_tokens_and_another_not() -> None:
    ours, theirs = byte_tokenizer(), word_tokenizer()
    model = compose(
        tiny("llama", seed=1, vocab_size=len(ours)),
        {
            "shares": tiny("gpt2", seed=2, vocab_size=len(ours)),
            "own": tiny("gemma2", seed=3, vocab_size=len(theirs)),
        },
        every=1,
        tokenizer=ours,
        augmenting_tokenizers={"shares": ours, "own": theirs},
    )
    assert model.config.alignments == {"shares": "identity", "own": "committed"}
    assert_cached_is_uncached(open_bridges(model), batch_of(*PROMPTS))
    static, _ = generated(model, batch_of(*PROMPTS), 6, cache_implementation="static")
    assert torch.equal(static, generated(model, batch_of(*PROMPTS), 6)[0])


def test_reading_the_prompt_only_is_exact_too() -> None:
    model = open_pair("llama", "gemma2", reads="prompt")
    batch = batch_of(*PROMPTS)
    sequences, cached = generated(model, batch, 6)
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, 6), value=1)
    with torch.no_grad():
        whole = model(
            input_ids=sequences, attention_mask=mask, position_ids=positions_of(mask),
            use_cache=False, prompt_mask=torch.ones_like(batch["input_ids"]),
        ).logits  # fmt: skip
    torch.testing.assert_close(cached, whole[:, -7:-1], atol=5e-6, rtol=1e-5)


def test_a_prompt_is_all_that_is_read_without_a_cache_too() -> None:
    """Without padding `generate` gives positions and no mask, as packed documents have."""
    model, batch = open_pair("llama", "gemma2", reads="prompt"), batch_of(PROMPTS[0])
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    cached = model.generate(**batch, **options)
    uncached = model.generate(**batch, **options, use_cache=False)
    assert torch.equal(cached.sequences, uncached.sequences)
    torch.testing.assert_close(cached.logits, uncached.logits, atol=5e-6, rtol=1e-5)


def test_each_packed_document_has_a_prompt() -> None:
    """Only the first one's was read."""
    model = open_pair(reads="prompt")
    rows = [batch_of(text)["input_ids"] for text in ("The quick brown fox", "There was once")]
    labels = [row.clone() for row in rows]
    for row in labels:
        row[:, :4] = -100
    positions = torch.cat([torch.arange(row.shape[1])[None] for row in rows], 1)
    with torch.no_grad():
        packed = model(
            input_ids=torch.cat(rows, 1),
            position_ids=positions,
            labels=torch.cat(labels, 1),
            use_cache=False,
        ).logits
        alone = [
            model(input_ids=ids, labels=own).logits for ids, own in zip(rows, labels, strict=True)
        ]
    torch.testing.assert_close(packed, torch.cat(alone, 1), atol=5e-6, rtol=1e-5)


def test_packed_documents_read_what_a_prompt_mask_allows() -> None:
    model = open_pair(reads="prompt")
    ids = batch_of("The quick brown fox jumps")["input_ids"]
    positions = torch.arange(ids.shape[1])[None] % 5
    prompt = (positions < 3).long()
    calls = []
    view = model.model.running_view("augmenting")
    view.register_forward_pre_hook(
        lambda _, args, options: calls.append(options["input_ids"]), with_kwargs=True
    )
    with torch.no_grad():
        model(input_ids=ids, position_ids=positions, prompt_mask=prompt, use_cache=False)
        read = torch.cat(calls, 1).shape[1]
        calls.clear()
        model(input_ids=ids, position_ids=positions, use_cache=False)
    assert read < torch.cat(calls, 1).shape[1]


def test_what_the_processor_prepares_generates_with_the_anchor_only_too() -> None:
    model = open_pair()
    inputs = model.processor(PROMPTS[:1])
    options = {"max_new_tokens": 4, "do_sample": False}
    with model.anchor_only():
        alone = model.generate(**inputs, read_ids=inputs["input_ids"], **options)
    assert torch.equal(alone, model.anchor.generate(inputs["input_ids"], **options))


def test_what_the_processor_prepares_is_what_the_model_reads() -> None:
    model = open_pair("llama", "gemma2")
    inputs = model.processor(PROMPTS, padding=True)
    with torch.no_grad():
        prepared = model(**inputs)
        inputs.pop("augmenting_inputs")
        read = model(**inputs, use_cache=False)
    assert prepared.past_key_values is None
    assert torch.equal(prepared.logits, read.logits)


def test_reading_other_tokens_is_a_control() -> None:
    model = open_pair()
    batch = batch_of("The quick brown fox jumps", "There was once a town whe")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with torch.no_grad():
        own = model(input_ids=ids, attention_mask=mask, read_ids=ids, use_cache=False).logits
        plain = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        other = model(
            input_ids=ids, attention_mask=mask, read_ids=ids.flip(0), use_cache=False
        ).logits
    assert torch.equal(own, plain)
    assert not torch.equal(other, plain)
    read = model.generate(**batch, read_ids=ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(read, model.generate(**batch, max_new_tokens=5, do_sample=False))


def test_only_the_bridges_get_gradients() -> None:
    model = compose_pair().train()
    batch = model.processor(PROMPTS, padding=True)
    model(**batch, labels=batch["input_ids"]).loss.backward()
    learning = {name for name, p in model.named_parameters() if p.grad is not None}
    assert learning == {f"model.bridges.{name}" for name, _ in model.bridges.named_parameters()}


def test_tokens_beyond_a_smaller_vocabulary_are_holes() -> None:
    ours = byte_tokenizer()
    anchor = tiny("llama", seed=1, vocab_size=len(ours))
    model = open_bridges(compose(anchor, tiny("gemma2", seed=2, vocab_size=300), every=1))
    assert model.config.alignments == {"augmenting": "identity"}
    batch = batch_of(*PROMPTS)
    assert int(batch["input_ids"].max()) >= 300
    assert_cached_is_uncached(model, batch)


def test_rows_of_an_embedding_that_no_token_uses_are_no_reason_to_look_at_tokens() -> None:
    ours = byte_tokenizer()
    anchor = tiny("llama", seed=1, vocab_size=len(ours) + 8)
    other = tiny("gpt2", seed=2, vocab_size=len(ours))
    model = compose(anchor, other, every=1, tokenizer=ours, augmenting_tokenizers=ours)
    assert model.model.readers == {}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_char_end_reads_all_of_the_text_so_far(family: str) -> None:
    """What the model holds after each step is the tokens of the text so far, and no others."""
    model = open_pair("llama", family, alignment="char_end")
    ids = batch_of("The quick brown foxes jump")["input_ids"]
    states: list[torch.Tensor] = []
    read = Bridge.read

    def spy(bridge: Any, augmenting_states: torch.Tensor, *args: Any) -> Any:
        states.append(augmenting_states)
        return read(bridge, augmenting_states, *args)

    theirs, cache = word_tokenizer(), None
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Bridge, "read", spy)
        for step in range(ids.shape[1]):
            cache = model(input_ids=ids[:, step : step + 1], past_key_values=cache).past_key_values
            text = byte_tokenizer().decode(ids[0, : step + 1])
            expected = theirs(text, return_tensors="pt")["input_ids"]
            held = cache.readings["augmenting"]
            assert int((held.ranks != HOLE).sum()) == expected.shape[1]
            alone = model.augmenting["augmenting"](expected, output_hidden_states=True)
            layer = model.config.connections[0].augmenting_layer
            torch.testing.assert_close(
                states[-len(model.bridges)][:, -1],
                alone.hidden_states[layer + 1][:, -1],
                atol=5e-6,
                rtol=1e-5,
            )


def test_char_end_sees_in_training_what_decoding_does_not() -> None:
    """The documented mismatch; "committed" has none."""
    ids = batch_of("The quick brown foxes jump")["input_ids"]
    differences = {}
    for rule in ("committed", "char_end"):
        model = open_pair(alignment=rule)
        with torch.no_grad():
            whole, cache, steps = model(input_ids=ids, use_cache=False).logits, None, []
            for step in range(ids.shape[1]):
                output = model(input_ids=ids[:, step : step + 1], past_key_values=cache)
                cache = output.past_key_values
                steps.append(output.logits)
        differences[rule] = float((torch.cat(steps, dim=1) - whole).abs().max())
    assert differences["committed"] < 5e-6
    assert differences["char_end"] > 1e-3


ROTARY = ["llama", "gemma3_text", "mistral", "qwen3", "falcon"]


@pytest.mark.parametrize("family", ROTARY)
def test_prefix_sees_in_training_what_the_text_so_far_gives(family: str) -> None:
    """Each position of a whole row, against the row cut off there; and against decoding."""
    model = open_pair("llama", family, alignment="prefix")
    ids = batch_of("The quick brown foxes jump 123 狐狸跳")["input_ids"]
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
        for length in range(1, ids.shape[1] + 1):
            alone = model(input_ids=ids[:, :length], use_cache=False).logits[:, -1]
            torch.testing.assert_close(whole[:, length - 1], alone, atol=5e-6, rtol=1e-5)
    assert_cached_is_uncached(model, batch_of(*PROMPTS))


def test_prefix_is_char_end_without_its_leak() -> None:
    """Decoding sees the same with both; only what training shows differs."""
    ids = batch_of("The quick brown foxes jump")["input_ids"]
    last = {}
    for rule in ("prefix", "char_end"):
        model = open_pair(alignment=rule)
        with torch.no_grad():
            cache, steps = None, []
            for step in range(ids.shape[1]):
                output = model(input_ids=ids[:, step : step + 1], past_key_values=cache)
                cache = output.past_key_values
                steps.append(output.logits)
        last[rule] = torch.cat(steps, dim=1)
    torch.testing.assert_close(last["prefix"], last["char_end"], atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("position", ["none", "distance", "rotary"])
@pytest.mark.parametrize("unit", ["characters", "tokens"])
def test_prefix_knows_positions(position: Any, unit: Any) -> None:
    model = open_pair(
        "llama", "gemma3_text", position=position, distance_unit=unit, alignment="prefix"
    )
    assert_cached_is_uncached(model, batch_of(*PROMPTS))


def test_prefix_keeps_every_other_claim() -> None:
    model = open_pair("llama", "gemma2", alignment="prefix")
    batch = batch_of(*PROMPTS[:3])
    beams = {"num_beams": 3, "max_new_tokens": 9, "do_sample": False, "eos_token_id": None}
    cached = model.generate(**batch, **beams)
    assert torch.equal(cached, model.generate(**batch, **beams, use_cache=False))
    greedy, _ = generated(model, batch, 8)
    assert torch.equal(greedy, generated(model, batch, 8, cache_implementation="static")[0])
    one = batch_of(PROMPTS[0] + " jumps. " + PROMPTS[0])
    helped = model.generate(
        **one, max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=4, eos_token_id=None
    )
    assert torch.equal(helped, generated(model, one, 12)[0])


def test_models_that_skip_holes_run_as_one_batch() -> None:
    assert skips_holes(tiny("gemma3_text"))
    for family in ("mamba", "gpt2", "bloom", "mpt", "gpt_neo"):
        assert not skips_holes(tiny(family))


@pytest.mark.parametrize("alignment", ["committed", "prefix"])
def test_a_text_that_settles_nothing_still_trains(alignment: Any) -> None:
    """The augmenting tokenizer puts nothing before a text, and the only word may go on."""
    theirs = byte_tokenizer(300)
    model = compose(
        tiny("llama", seed=1, vocab_size=320),
        tiny("llama", seed=2, vocab_size=300),
        every=1,
        tokenizer=byte_tokenizer(),
        augmenting_tokenizers=theirs,
        alignment=alignment,
    ).train()
    ids = byte_tokenizer()("Th", return_tensors="pt")["input_ids"]
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    gradients = [p.grad for p in model.bridges.parameters() if p.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("prompt", ["T", "The quick brown fox jumps"])
def test_other_tokens_are_read_for_the_prompt_only(use_cache: bool, prompt: str) -> None:
    """What is generated is read as it is, with a cache and without, step by step."""
    model = open_pair()
    ids = batch_of(prompt)["input_ids"]
    other = ids.flip(1) + 1
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    written = model.generate(ids, read_ids=other, use_cache=use_cache, **options)
    length = ids.shape[1]
    for step in range(6):
        now = written[:, : length + step]
        read = torch.cat([other, now[:, length:]], dim=1)
        with torch.no_grad():
            logits = model(input_ids=now, read_ids=read, use_cache=False).logits[:, -1]
        assert int(logits.argmax()) == int(written[0, length + step])


def test_other_tokens_can_be_read_in_pieces() -> None:
    model = open_pair()
    ids = batch_of("The quick brown fox jumps")["input_ids"]
    options = {"read_ids": ids.flip(1) + 1, "max_new_tokens": 6, "do_sample": False}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    whole = model.generate(ids, **options)
    pieces = model.generate(ids, **options, prefill_chunk_size=4)
    assert torch.equal(pieces.sequences, whole.sequences)
    torch.testing.assert_close(pieces.logits, whole.logits, atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("only_new", [True, False])
def test_other_tokens_can_be_read_behind_a_cache(only_new: bool) -> None:
    model = open_pair()
    ids = batch_of("The quick brown fox jumps")["input_ids"]
    other = ids.flip(1) + 1
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    whole = model.generate(ids, read_ids=other, **options)
    with torch.no_grad():
        cache = model(ids[:, :6], read_ids=other[:, :6], use_cache=True).past_key_values
    given = slice(6, None) if only_new else slice(None)
    options |= {"past_key_values": cache, "attention_mask": torch.ones_like(ids)}
    written = model.generate(ids[:, given], read_ids=other[:, given], **options)
    assert torch.equal(written[:, -6:], whole[:, -6:])


def test_a_prompt_has_ended_when_reading_goes_on_without_a_mask() -> None:
    model = open_pair(reads="prompt")
    ids = batch_of("The quick brown fox jumps")["input_ids"]
    with torch.no_grad():
        mask = torch.ones_like(ids[:, :5])
        expected = model(input_ids=ids, prompt_mask=mask, use_cache=False).logits
        cache = model(input_ids=ids[:, :5], use_cache=True).past_key_values
        rest = model(input_ids=ids[:, 5:], past_key_values=cache).logits
    torch.testing.assert_close(rest, expected[:, 5:], atol=5e-6, rtol=1e-5)


def test_labels_tell_the_prompt_also_beside_prepared_inputs() -> None:
    model = open_pair(reads="prompt")
    inputs = model.processor(PROMPTS[:1])
    labels = inputs["input_ids"].clone()
    labels[:, :3] = -100
    with torch.no_grad():
        prepared = model(**inputs, labels=labels).logits
        plain = model(input_ids=inputs["input_ids"], labels=labels, use_cache=False).logits
    assert torch.equal(prepared, plain)


def test_a_mask_of_the_new_tokens_only_reads_them() -> None:
    """What a mask does not cover are tokens, as for models that share them."""
    ids = batch_of("The quick brown fox jumps")["input_ids"]
    short = PassInputs(input_ids=ids[:, 5:], attention_mask=torch.ones_like(ids[:, 5:]))
    columns = short.columns_to_read(past=5)
    assert columns is not None
    assert columns.tolist() == [[1] * (ids.shape[1] - 5)]


def test_masks_by_kind_go_to_the_models_device() -> None:
    moved = move_to_device(
        {"attention_mask": {"full_attention": torch.ones(1)}, "use_cache": True},
        torch.device("meta"),
    )
    assert moved["attention_mask"]["full_attention"].device.type == "meta"
    assert moved["use_cache"] is True


@pytest.mark.parametrize("alignment", ["committed", "prefix", "char_end"])
def test_a_prompt_aligned_in_blocks_is_one_aligned_whole(
    alignment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = open_pair(alignment=alignment), batch_of(*PROMPTS)
    whole = generated(model, batch, 6)
    monkeypatch.setattr("graftlm.alignment.WHOLE", 1)
    monkeypatch.setattr("graftlm.alignment.BLOCK", 700)
    blocks = generated(model, batch, 6)
    assert torch.equal(blocks[0], whole[0])
    torch.testing.assert_close(blocks[1], whole[1], atol=5e-6, rtol=1e-5)
