"""The invariants over every decoder family, each as the anchor and as the augmenting model.

The other model is a small Llama, so each pair mixes widths, depths, heads and position schemes.
"""

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
)

from families import (
    FAMILIES,
    REPRESENTATIVE,
    assert_cached_is_uncached,
    left_padded,
    open_bridges,
    tiny,
    tiny_config,
    tiny_llama,
    token_ids,
)
from graftlm import UnsupportedModelError, compose

# A token may change which kernel path an expert's batch takes, and so the last bit of others.
MIXTURES = {
    "dbrx",
    "deepseek_v3",
    "gpt_oss",
    "granitemoehybrid",
    "jamba",
    "kimi_linear",
    "llama4_text",
    "mixtral",
    "phimoe",
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_next",
}

every_family = pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, marks=() if family in REPRESENTATIVE else pytest.mark.slow)
        for family in FAMILIES
    ],
)
every_role = pytest.mark.parametrize("role", ["anchor", "augmenting"])


def composed_with(family: str, role: str):
    """A family composed with the small Llama, in the given role."""
    if role == "anchor":
        return compose(tiny(family), tiny_llama(), every=2)
    return compose(tiny_llama(), tiny(family), every=1)


@every_role
@every_family
def test_a_fresh_composition_is_the_anchor_and_an_opened_one_is_not(family, role):
    model, ids = composed_with(family, role), token_ids(2, 11)
    with torch.no_grad():
        alone = model.anchor(ids).logits
        assert torch.equal(model(ids).logits, alone)
        open_bridges(model)
        assert (model(ids).logits - alone).abs().max() > 1e-3
        assert torch.equal(model.anchor(ids).logits, alone)


@every_role
@every_family
def test_no_position_sees_a_later_token(family, role):
    model, ids = open_bridges(composed_with(family, role)), token_ids(2, 11)
    changed = ids.clone()
    changed[:, 6] = 3 + (ids[:, 6] - 2) % 64
    with torch.no_grad():
        before, after = model(ids).logits, model(changed).logits
    assert (changed != ids).sum() == 2
    if family in MIXTURES:
        torch.testing.assert_close(after[:, :6], before[:, :6], atol=1e-6, rtol=0)
    else:
        assert torch.equal(after[:, :6], before[:, :6])
    assert not torch.equal(after[:, 6:], before[:, 6:])


@every_role
@every_family
def test_cached_decoding_of_a_padded_batch_equals_uncached(family, role):
    model = open_bridges(composed_with(family, role))
    assert_cached_is_uncached(model, left_padded([9, 5]))


@every_role
@every_family
def test_gradients_reach_exactly_the_bridges(family, role):
    model, ids = open_bridges(composed_with(family, role)).train(), token_ids(2, 11)
    model(input_ids=ids, labels=ids).loss.backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    bridges = {name for name, _ in model.named_parameters() if name.startswith("model.bridges.")}
    assert reached == bridges
    assert len(bridges) == 7 * len(model.bridges)


REFUSED = {
    "gemma3n_text": ({"num_kv_shared_layers": 0}, "four parallel streams"),
    "deepseek_v4": ({}, "several parallel streams"),
    "minimax": ({}, "its own kind of cache"),
    "xlstm": ({}, "its own kind of cache"),
    "rwkv": ({}, "its state is not a cache"),
    "openai-gpt": ({}, "it has no KV cache"),
}


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_with_a_quirk_is_refused_with_the_reason(family):
    changes, reason = REFUSED[family]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config(family, **changes))
    name = type(model).__name__
    with pytest.raises(UnsupportedModelError, match=f"the anchor is {name}, which .*{reason}"):
        compose(model, tiny_llama())
    with pytest.raises(UnsupportedModelError, match=f"model 'code' is {name}, which .*{reason}"):
        compose(tiny_llama(), {"code": model})


def test_an_encoder_decoder_is_refused():
    with torch.device("meta"):
        model = AutoModelForSeq2SeqLM.from_config(tiny_config("t5", d_model=24, d_ff=37, d_kv=6))
    words = "is T5ForConditionalGeneration, an encoder-decoder, but graftlm composes decoder-only"
    with pytest.raises(UnsupportedModelError, match=f"the anchor {words}"):
        compose(model, tiny_llama())
    with pytest.raises(UnsupportedModelError, match=f"augmenting model 'augmenting' {words}"):
        compose(tiny_llama(), model)


def test_a_vision_model_is_refused_and_told_what_to_load_instead():
    config = Gemma3Config(
        text_config=tiny_config("gemma3_text").to_dict(),
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 23,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
    )
    with torch.device("meta"):
        model = Gemma3ForConditionalGeneration(config)
    words = "Gemma3ForConditionalGeneration, a model of several modalities.*its text model alone"
    with pytest.raises(UnsupportedModelError, match=words):
        compose(model, tiny_llama())
    with pytest.raises(UnsupportedModelError, match=words):
        compose(tiny_llama(), model)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("bert", {}),
        ("roberta", {}),
        ("modernbert", {}),
        ("eurobert", {}),
        ("gemma3_text", {"use_bidirectional_attention": True}),
        ("gemma4_text", {"use_bidirectional_attention": "all"}),
        ("llama", {"is_causal": False}),
    ],
)
def test_an_encoder_is_refused(family, changes):
    """Its states see later tokens: composed, it would leak what is to be predicted.

    ModernBERT's layers look like a decoder's; it was accepted, and it leaked.
    """
    with torch.device("meta"):
        model = AutoModel.from_config(tiny_config(family, **changes))
    words = f"is {type(model).__name__}, an encoder whose positions see later tokens"
    with pytest.raises(UnsupportedModelError, match=f"augmenting model 'augmenting' {words}"):
        compose(tiny_llama(), model)


def test_what_is_no_model_is_refused():
    with pytest.raises(UnsupportedModelError, match="the anchor is a Linear, but must be a trans"):
        compose(torch.nn.Linear(3, 5), tiny_llama())  # pyrefly: ignore[bad-argument-type]


def test_a_composed_model_is_refused_and_told_what_to_do_instead():
    words = "it is composed already; compose all augmenting models with its anchor at once"
    with pytest.raises(
        UnsupportedModelError, match=f"the anchor is ComposedForCausalLM, .*{words}"
    ):
        compose(compose(tiny_llama(), tiny("gpt2")), {"more": tiny("opt")})


def test_streams_of_another_shape_are_refused_when_they_are_met():
    """A family we do not know may hand on something else than one residual stream."""
    augmenting = tiny_llama()
    model = compose(tiny("gpt2"), augmenting)
    augmenting.model.layers[3].register_forward_hook(
        lambda *_: torch.zeros(2, 3, 5, 7), prepend=True
    )
    with pytest.raises(
        UnsupportedModelError, match=r"LlamaDecoderLayer returned .* \(2, 3, 5, 7\)"
    ):
        model(token_ids(1, 3))


def test_a_model_without_a_list_of_layers_is_refused():
    model = tiny_llama()
    model.config.num_hidden_layers = 3
    words = "the anchor is LlamaForCausalLM, in which graftlm found 0 lists of 3 decoder layers"
    with pytest.raises(UnsupportedModelError, match=words):
        compose(model, tiny("gpt2"))
