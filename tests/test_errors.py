"""Everything the core refuses, and what exactly the user reads."""

from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

from families import left_padded, open_bridges, tiny, tiny_config, tiny_llama, token_ids
from graftlm import (
    BridgeConfig,
    CheckpointMismatchError,
    ComposedConfig,
    ComposedDataCollator,
    Connection,
    GraftlmError,
    UnsupportedModelError,
    compose,
)
from graftlm.config import spaced_connections
from graftlm.reading import TextReader
from two_tokenizers import byte_tokenizer, compose_pair, word_tokenizer


def one(**changes: Any) -> list[Connection]:
    """One connection of layer 1 to layer 2, changed."""
    defaults: dict[str, Any] = {"augmenting_layer": 1, "anchor_layer": 2}
    return [Connection(**defaults | changes)]


@pytest.fixture
def model():
    return open_bridges(compose(tiny_llama(), tiny("gpt2")))


def test_errors_can_be_caught_by_intent():
    assert issubclass(UnsupportedModelError, GraftlmError)
    assert issubclass(UnsupportedModelError, TypeError)
    assert issubclass(CheckpointMismatchError, GraftlmError)
    assert issubclass(CheckpointMismatchError, ValueError)


# ---- the shape of a bridge -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ({"position": "alibi"}, "position is 'alibi', but must be one of 'none', 'distance', 'rot"),
        ({"num_heads": 0}, "num_heads is 0, but must be a positive whole number"),
        ({"num_heads": 2.0}, r"num_heads is 2\.0, but must be a positive whole number"),
        ({"num_heads": True}, "num_heads is True, but must be a positive whole number"),
        ({"width": -7}, "width is -7, but must be a positive whole number"),
        ({"width": "7"}, "width is '7', but must be a positive whole number"),
    ],
)
def test_bridge_settings(shape, words):
    with pytest.raises(ValueError, match=words):
        BridgeConfig(**shape)


def test_bridge_sizes_that_do_not_divide():
    with pytest.raises(ValueError, match="width 20 is not a multiple of num_heads 3; pass num_h"):
        compose(tiny_llama(), tiny("gpt2"), num_heads=3)
    words = "position='rotary' needs an even head width, but width 15 over 5 heads gives 3"
    with pytest.raises(ValueError, match=words):
        compose(tiny_llama(), tiny("gpt2"), width=15, position="rotary")


# ---- connections ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["augmenting_layer", "anchor_layer"])
@pytest.mark.parametrize("value", [-1, 1.5, True, "2", None])
def test_a_layer_is_a_whole_number(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value!r}, but layers are whole numbers"):
        one(**{name: value})


@pytest.mark.parametrize("every", [0, -4, 2.0, "4", True])
def test_every_is_a_positive_whole_number(every):
    with pytest.raises(ValueError, match=f"every is {every!r}, but must be a positive whole num"):
        spaced_connections("a", 12, 12, every)


def test_connections_to_what_does_not_exist():
    anchor, code = tiny_llama(), tiny("gpt2")

    def refused(words, connections, **named):
        with pytest.raises(ValueError, match=words):
            compose(anchor, named or code, connections=connections)

    refused(
        "connection 0 reads augmenting model 'sw', but there is only 'aug", one(augmenting="sw")
    )
    refused(
        r"connection 0 reads augmenting layer 3, but 'augmenting' \(gpt2\) has layers 0 to 2",
        one(augmenting_layer=3),
    )
    refused(
        r"connection 1 writes to anchor layer 4, but the anchor \(llama\) has layers 0 to 3",
        one() + one(anchor_layer=4),
    )
    refused("connection 1 appears twice: .*augmenting_layer=1, anchor_layer=2", one() * 2)
    refused("model 'sw' has no connection", one(augmenting="code"), code=code, sw=tiny("opt"))
    refused("augmenting model 'augmenting' has no connection", [])


@pytest.mark.parametrize("name", ["anchor", "composed", "my.code", "", "kod eins"])
def test_names_of_augmenting_models(name):
    with pytest.raises(ValueError, match=f"name {name!r} must consist of letters, digits"):
        compose(tiny_llama(), {name: tiny("gpt2")})


# ---- compose and the configuration ---------------------------------------------------------


def test_compose_settings():
    anchor, code = tiny_llama(), tiny("gpt2")
    with pytest.raises(ValueError, match="variant is 'flamingo', but must be 'graftlm' or 'paper'"):
        compose(anchor, code, variant="flamingo")
    with pytest.raises(ValueError, match="reads is 'answers', but must be 'sequence' or 'prompt'"):
        compose(anchor, code, reads="answers")  # pyrefly: ignore[bad-argument-type]
    with pytest.raises(ValueError, match="augmenting is empty, but a composition needs at least"):
        compose(anchor, {})


def test_configurations_of_another_time():
    with pytest.raises(CheckpointMismatchError, match="format version 9, .* versions up to 2"):
        ComposedConfig(format_version=9)
    with pytest.raises(CheckpointMismatchError, match="knows no model type 'llama9'"):
        ComposedConfig(anchor_config={"model_type": "llama9"})
    with pytest.raises(ValueError, match=r"scales names unknown augmenting models: \['sw'\]"):
        ComposedConfig(
            anchor_config=tiny_config("llama"),
            augmenting_configs={"code": tiny_config("gpt2")},
            connections=one(augmenting="code"),
            scales={"sw": 0.5},
        )


# ---- forward -------------------------------------------------------------------------------


def test_inputs_that_the_augmenting_models_cannot_read(model):
    with pytest.raises(ValueError, match="inputs_embeds cannot be used: .*; pass input_ids"):
        model(inputs_embeds=torch.zeros(1, 3, 20))
    with pytest.raises(ValueError, match="input_ids is None, but the augmenting models read tok"):
        model()


def test_a_mask_of_the_wrong_kind(model):
    with pytest.raises(ValueError, match="attention_mask has 4 axes, but must be .batch, sequence"):
        model(token_ids(2, 5), attention_mask=torch.ones(2, 1, 5, 5))


def test_a_token_that_an_augmenting_model_does_not_have():
    """Both have rows for more tokens than the tokenizer has; no text has such a token."""
    anchor, code = tiny_llama(vocab_size=340), tiny("gpt2", vocab_size=330)
    ours = byte_tokenizer()
    model = compose(anchor, {"code": code}, tokenizer=ours, augmenting_tokenizers=ours)
    ids = token_ids(2, 5)
    assert model(ids).logits.isfinite().all()
    ids[1, 3] = 330
    with pytest.raises(
        ValueError, match="token 330, but augmenting model 'code' has tokens 0 to 329 only, and so"
    ):
        model(ids)


def test_a_cache_that_the_anchor_filled_alone(model):
    ids = token_ids(2, 5)
    for family in ("llama", "mamba"):
        composed = compose(tiny(family), tiny_llama())
        cache = DynamicCache(config=composed.anchor.config)
        name = "cache_params" if family == "mamba" else "past_key_values"
        composed.anchor(ids, **{name: cache}, use_cache=True)
        with pytest.raises(ValueError, match="is a DynamicCache that holds tokens already, but a"):
            composed(ids[:, :1], past_key_values=cache)


@pytest.mark.parametrize("static", [False, True])
@torch.no_grad()
def test_a_model_that_is_switched_on_in_the_middle_of_a_text(model, static):
    """It has not read the beginning; going on would be silently wrong."""
    ids = token_ids(2, 7)
    model.set_scale("augmenting", 0)
    anchor = model.anchor.config
    made = StaticCache(config=anchor, max_cache_len=11) if static else DynamicCache(config=anchor)
    cache = model(ids[:, :5], past_key_values=made).past_key_values
    model.set_scale("augmenting", 1)
    words = "the cache holds 5 tokens, of which augmenting model 'augmenting' has read 0, so"
    with pytest.raises(ValueError, match=words):
        model(ids[:, 5:], past_key_values=cache)


def test_a_scale_of_a_model_that_does_not_exist(model):
    with pytest.raises(ValueError, match="there is no augmenting model 'code', only 'augmenting'"):
        model.set_scale("code", 0.5)
    with pytest.raises(ValueError, match="there is no augmenting model 'sw', only 'augmenting'"):
        model.scaled({"augmenting": 1, "sw": 0.5}).__enter__()


def test_a_bridged_layer_that_did_not_run(model, monkeypatch):
    """Silently missing bridges would look like a model that has learned nothing."""
    model.model.hooks.remove()
    monkeypatch.setattr(model.model, "attach_hooks", lambda: None)
    words = "0 of 1 bridged anchor layers ran, so the output would miss bridges"
    with pytest.raises(RuntimeError, match=words):
        model(token_ids(2, 5))


def test_dropout_that_checkpointing_would_turn_on():
    """A layer must be in training mode to be checkpointed, and BioGPT's drops by a number."""
    quiet: dict[str, Any] = {"hidden_dropout_prob": 0.0, "activation_dropout": 0.0}
    compose(tiny("biogpt", **quiet), tiny_llama()).activation_checkpointing_enable()
    model = compose(tiny("biogpt", **quiet | {"hidden_dropout_prob": 0.3}), tiny_llama())
    words = "would turn on dropout=0.3 in the frozen layers of BioGptForCausalLM; load it with"
    with pytest.raises(ValueError, match=words):
        model.activation_checkpointing_enable()


def test_caches_for_one_model_only(model):
    with pytest.raises(ValueError, match="continuous batching .* keeps a cache for one model only"):
        model.generate(**left_padded([5, 3]), max_new_tokens=3, cache_implementation="paged")


def test_the_part_without_a_head_cannot_be_saved(model, tmp_path):
    with pytest.raises(TypeError, match="a ComposedModel cannot be saved; save the ComposedForC"):
        model.model.save_pretrained(tmp_path)


# ---- tokenizers --------------------------------------------------------------------------


def pair_of_models():
    sizes = (len(byte_tokenizer()), len(word_tokenizer()))
    return [tiny("llama", seed, vocab_size=size) for seed, size in enumerate(sizes)]


def test_alignments_that_do_not_exist():
    with pytest.raises(ValueError, match="alignment is 'greedy', but must be 'auto', 'identity'"):
        compose(*pair_of_models(), alignment="greedy")
    model = compose(*pair_of_models())
    with pytest.raises(ValueError, match="alignment of 'augmenting' is 'auto', but must be 'ident"):
        ComposedConfig(**model.config.to_dict() | {"alignments": {"augmenting": "auto"}})


def test_alignments_that_the_tokenizers_do_not_allow():
    models, tokenizers = pair_of_models(), {"tokenizer": byte_tokenizer()}
    with pytest.raises(ValueError, match="but augmenting model 'augmenting' has no tokenizer besi"):
        compose(*models, alignment="committed", **tokenizers)
    with pytest.raises(ValueError, match="but the anchor has no tokenizer beside it"):
        compose(*models, alignment="committed")
    tokenizers["augmenting_tokenizers"] = word_tokenizer()
    with pytest.raises(ValueError, match="is 'identity', but augmenting model 'augmenting' splits"):
        compose(*models, alignment="identity", **tokenizers)


def test_tokenizers_that_fit_no_model():
    anchor, other = pair_of_models()
    with pytest.raises(ValueError, match="names 'cod', but there is only code"):
        compose(anchor, {"code": other}, augmenting_tokenizers={"cod": word_tokenizer()})
    with pytest.raises(ValueError, match="is a single one, but there are 2 augmenting models: a"):
        compose(anchor, {"a": other, "b": other}, augmenting_tokenizers=word_tokenizer())


def test_tokenizers_that_are_not_there():
    model = compose_pair()
    model.set_tokenizers(None, {})
    with pytest.raises(ValueError, match="'augmenting' has a tokenizer of its own, but the tokeni"):
        model(token_ids(1, 4))


def test_inputs_prepared_for_another_composition():
    with pytest.raises(ValueError, match="augmenting_inputs lacks augmenting model 'augmenting'"):
        compose_pair()(token_ids(1, 4), augmenting_inputs={})


def test_a_model_of_other_tokens_that_was_switched_off():
    model = compose_pair()
    model.set_scale("augmenting", 0)
    cache = model(token_ids(1, 4), use_cache=True).past_key_values
    model.set_scale("augmenting", 1)
    with pytest.raises(ValueError, match="holds 4 tokens, of which .* has read 0, so it cannot re"):
        model(token_ids(1, 2), past_key_values=cache)


def test_a_recurrent_model_cannot_take_tokens_back():
    model = compose_pair("llama", "mamba", alignment="char_end")
    assert model(token_ids(1, 4), use_cache=False).logits.isfinite().all()
    with pytest.raises(ValueError, match="'augmenting' is recurrent and cannot take tokens back"):
        model(token_ids(1, 4), use_cache=True)


def test_hidden_states_beyond_float16():
    anchor, augmenting = tiny("llama", 1), tiny("llama", 2).half()
    with torch.no_grad():  # each layer adds about this much to the residual stream
        for layer in augmenting.model.layers:
            layer.mlp.down_proj.weight.fill_(60_000.0)
            layer.mlp.up_proj.weight.fill_(60.0)
    model = compose(anchor, augmenting, every=1)
    with pytest.raises(ValueError, match="beyond the range of float16; load it in bfloat16 or flo"):
        model(token_ids(1, 4))


@pytest.mark.parametrize("family", ["gpt2", "mamba"])
def test_models_that_cannot_run_several_endings(family):
    model = compose_pair("llama", family, alignment="prefix")
    with pytest.raises(ValueError, match="which cannot run several endings of a text at once, as"):
        model(token_ids(1, 4))


def test_other_tokens_to_read_of_another_shape():
    with pytest.raises(ValueError, match=r"read_ids has shape \(1, 3\), but must have that of inp"):
        compose_pair()(token_ids(1, 4), read_ids=token_ids(1, 3))


def test_examples_with_other_tokens_to_read_of_another_length():
    collator = ComposedDataCollator(compose_pair().processor)
    good, bad = {"input_ids": [5, 6], "read_ids": [7, 8]}, {"input_ids": [5, 6]}
    with pytest.raises(ValueError, match="example 1 of the batch has 2 input_ids, but none read_i"):
        collator([good, bad])
    with pytest.raises(ValueError, match="example 0 of the batch has 2 input_ids, but 3 read_ids"):
        collator([{"input_ids": [5, 6], "read_ids": [7, 8, 9]}, good])


def test_a_text_beyond_the_learned_positions_of_an_augmenting_model():
    model = compose_pair("llama", "gpt2")
    ids = byte_tokenizer()("狐狸跳过" * 40, return_tensors="pt")["input_ids"][:, :119]
    with pytest.raises(
        ValueError, match="tokens of augmenting model 'augmenting', but its context"
    ):
        model(ids)


def test_a_slow_tokenizer_of_the_anchor():
    from transformers import ByT5Tokenizer

    with pytest.raises(ValueError, match="the anchor's tokenizer is a ByT5Tokenizer, but reading"):
        TextReader(ByT5Tokenizer(), word_tokenizer())


def test_one_tokenizer_alone_is_not_enough_to_tell():
    with pytest.warns(UserWarning, match="only one tokenizer is at hand, the anchor's; the anchor"):
        model = compose(*pair_of_models(), tokenizer=byte_tokenizer())
    assert model.config.alignments == {"augmenting": "identity"}
