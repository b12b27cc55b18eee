"""`verify` measures the claims, and says so when one fails."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

from families import open_bridges
from graftlm import ComposedForCausalLM, compose, verification, verify


@pytest.fixture
def model():
    torch.manual_seed(5)
    shape = {"vocab_size": 47, "num_attention_heads": 2, "num_key_value_heads": 1}
    anchor = LlamaConfig(hidden_size=16, intermediate_size=19, num_hidden_layers=3, **shape)
    augmenting = LlamaConfig(hidden_size=12, intermediate_size=23, num_hidden_layers=2, **shape)
    model = compose(*(AutoModelForCausalLM.from_config(c) for c in (anchor, augmenting)), every=1)
    return open_bridges(model)


def results(model) -> dict[str, Any]:
    return {check.claim: check for check in verify(model)}


@pytest.mark.parametrize("reads", ["sequence", "prompt"])
def test_a_sound_model_passes(model, reads):
    model.config.reads = reads
    checks = results(model)
    assert [claim for claim, check in checks.items() if not check.passed] == []
    assert checks["no look into the future"].measured == 0
    assert checks["no look into the future"].allowed == 0
    assert checks["anchor_only is the anchor"].measured == 0
    assert 0 < checks["cached equals uncached"].measured <= 1e-5


def test_a_leak_is_found(model, monkeypatch):
    """A bridge that reads all positions, as the authors' code does, must fail."""
    from graftlm import shared_tokens

    def leaking(**kwargs):
        alignment: Any = aligned(**kwargs)
        object.__setattr__(alignment, "cross_mask", torch.zeros_like(alignment.cross_mask))
        return alignment

    aligned = shared_tokens.align
    monkeypatch.setattr(shared_tokens, "align", leaking)
    checks = results(model)
    assert not checks["no look into the future"].passed
    assert checks["no look into the future"].measured > 1e-3
    assert not checks["cached equals uncached"].passed


def test_a_cache_that_forgets_is_found(model, monkeypatch):
    from graftlm.bridge import Bridge

    read = Bridge.read

    def forgetful(self, states, positions=None):
        keys, values = read(self, states, positions)
        return (keys, values) if states.shape[1] > 1 else (keys, values * 0)

    monkeypatch.setattr(Bridge, "read", forgetful)
    assert not results(model)["cached equals uncached"].passed


def test_a_trainable_base_is_found(model):
    model.anchor.requires_grad_(True)
    check = results(model)["only bridges train"]
    assert not check.passed
    assert "others" in check.detail


def test_changed_base_weights_are_found(model, tmp_path):
    model.save_pretrained(tmp_path / "composed")
    loaded = ComposedForCausalLM.from_pretrained(
        tmp_path / "composed", anchor=model.anchor, augmenting=model.augmenting
    )
    checks = results(loaded)
    assert checks["anchor: same weights"].passed
    with torch.no_grad():
        loaded.anchor.lm_head.weight[0, 0] += 1
    loaded.augmenting["augmenting"].config.rms_norm_eps = 0.1
    checks = results(loaded)
    assert not checks["anchor: same weights"].passed
    assert checks["augmenting: same weights"].passed
    assert not checks["augmenting: same configuration"].passed
    assert checks["augmenting: same configuration"].detail == "rms_norm_eps differs"


def test_a_model_that_is_switched_off_passes_too(model):
    for name in model.augmenting:
        model.set_scale(name, 0)
    assert all(check.passed for check in verify(model))


def test_state_is_left_as_it_was(model):
    model.train()
    model.set_scale("augmenting", 0.5)
    verify(model)
    assert model.training
    assert model.config.scales == {"augmenting": 0.5}
    assert all(p.grad is None for p in model.parameters())


def test_own_tokens_can_be_given(model):
    assert all(check.passed for check in verify(model, torch.arange(9)[None]))
    with pytest.raises(ValueError, match="has 5 tokens a row, but needs at least 8"):
        verify(model, torch.arange(5)[None])


def test_only_mixtures_of_experts_may_round(model):
    assert not verification.has_experts(model.anchor.config)
    assert verification.has_experts(MixtralConfig())
