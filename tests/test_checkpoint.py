"""Saving and loading: bridges only, atomic, and never on the wrong base models."""

import copy
import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, LlamaForCausalLM

from families import open_bridges, tiny
from graftlm import (
    CheckpointMismatchError,
    ComposedForCausalLM,
    Connection,
    checkpoint,
    compose,
    verify,
)

VOCABULARY = 53


@pytest.fixture
def anchor():
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        intermediate_size=29,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return AutoModelForCausalLM.from_config(config)


@pytest.fixture
def augmenting():
    torch.manual_seed(2)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=14, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return AutoModelForCausalLM.from_config(config)


@pytest.fixture
def folders(anchor, augmenting, tmp_path):
    """The base models on disk, as a user has them."""
    anchor.save_pretrained(tmp_path / "anchor")
    augmenting.save_pretrained(tmp_path / "code")
    return tmp_path


@pytest.fixture
def model(folders):
    model = compose(folders / "anchor", {"code": folders / "code"}, every=1)
    return open_bridges(model)


@pytest.fixture
def saved(model, folders):
    model.save_pretrained(folders / "composed")
    return folders / "composed"


TOKENS = torch.arange(22).reshape(2, 11) % VOCABULARY


def test_reload_gives_the_same_logits(model, saved):
    expected = model(TOKENS).logits
    for loader in (ComposedForCausalLM, AutoModelForCausalLM):
        loaded = loader.from_pretrained(saved)
        assert torch.equal(loaded(TOKENS).logits, expected)
        assert not any(p.requires_grad for p in loaded.anchor.parameters())
        assert all(p.requires_grad for p in loaded.bridges.parameters())
        assert not loaded.training


def test_loaded_models_can_be_handed_over(model, saved, anchor, augmenting):
    expected = model(TOKENS).logits
    loaded = ComposedForCausalLM.from_pretrained(saved, anchor=anchor, augmenting=augmenting)
    assert loaded.anchor is anchor
    assert loaded.augmenting["code"] is augmenting
    assert torch.equal(loaded(TOKENS).logits, expected)


def test_the_file_holds_bridges_only(model, saved):
    tensors = load_file(saved / "model.safetensors")
    assert set(tensors) == {f"model.bridges.{name}" for name, _ in model.bridges.named_parameters()}
    assert sum(t.numel() for t in tensors.values()) == sum(
        p.numel() for p in model.bridges.parameters()
    )
    assert not list(saved.glob("*.bin"))
    assert not list(saved.glob("*.pt"))


def test_scales_and_options_come_back(folders):
    model = compose(
        folders / "anchor",
        {"code": folders / "code"},
        connections=[Connection(augmenting="code", augmenting_layer=1, anchor_layer=0)],
        position="rotary",
        num_heads=3,
        width=18,
        gate=True,
        bias=True,
        reads="prompt",
    )
    model.set_scale("code", 0.25)
    model.save_pretrained(folders / "composed")
    config = ComposedForCausalLM.from_pretrained(folders / "composed").config
    assert config.scales == {"code": 0.25}
    assert config.reads == "prompt"
    assert config.bridge == model.config.bridge
    assert config.connections == model.config.connections


def test_bridges_keep_their_dtype(folders):
    model = compose(
        folders / "anchor",
        folders / "code",
        dtype=torch.bfloat16,
        bridge_dtype=torch.float32,
    )
    model.save_pretrained(folders / "composed")
    loaded = ComposedForCausalLM.from_pretrained(folders / "composed", dtype=torch.bfloat16)
    assert loaded.anchor.dtype == torch.bfloat16
    assert {p.dtype for p in loaded.bridges.parameters()} == {torch.float32}


def test_another_precision_is_the_same_model(saved):
    """The fingerprint is also taken over the weights rounded to bfloat16."""
    loaded = ComposedForCausalLM.from_pretrained(saved, dtype=torch.bfloat16)
    assert loaded.anchor.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_made_in_a_narrow_precision_and_loaded_in_a_wide_one(dtype, folders):
    """Rounding float16 once more to bfloat16 is not rounding float32 to bfloat16."""
    model = compose(folders / "anchor", folders / "code", dtype=dtype)
    model.save_pretrained(folders / "composed")
    loaded = ComposedForCausalLM.from_pretrained(folders / "composed")
    assert loaded.anchor.dtype == torch.float32
    assert all(check.passed for check in verify(loaded))


@pytest.mark.parametrize("part", ["anchor", "code"])
def test_other_weights_are_refused(part, saved, anchor, augmenting):
    """One changed weight in 10,000 must be noticed, and the message must say whose."""
    given = {"anchor": anchor, "code": augmenting}
    changed = copy.deepcopy(given[part])
    with torch.no_grad():
        next(changed.parameters()).view(-1)[7] += 1e-3
    given[part] = changed
    role = "the anchor" if part == "anchor" else "augmenting model 'code'"
    with pytest.raises(CheckpointMismatchError, match=f"{role} is not .* its weights differ"):
        ComposedForCausalLM.from_pretrained(
            saved, anchor=given["anchor"], augmenting={"code": given["code"]}
        )


def test_another_anchor_head_is_refused(saved, anchor, augmenting):
    changed = copy.deepcopy(anchor)
    with torch.no_grad():
        changed.lm_head.weight[3, 5] += 1e-3
    with pytest.raises(CheckpointMismatchError, match="the anchor .* weights differ"):
        ComposedForCausalLM.from_pretrained(saved, anchor=changed, augmenting=augmenting)


def test_another_configuration_is_refused(saved, anchor, augmenting):
    anchor.config.rms_norm_eps = 0.5
    with pytest.raises(
        CheckpointMismatchError, match=r"anchor .* rms_norm_eps=0\.5, .* says 1e-06"
    ):
        ComposedForCausalLM.from_pretrained(saved, anchor=anchor, augmenting=augmenting)


def test_check_bases_can_be_waived(saved, anchor, augmenting):
    anchor.config.rms_norm_eps = 0.5
    ComposedForCausalLM.from_pretrained(
        saved, anchor=anchor, augmenting=augmenting, check_bases=False
    )


def test_bases_that_were_not_checked_are_known_when_it_is_saved(saved, anchor, tmp_path):
    other = copy.deepcopy(anchor)
    other.lm_head.weight.data += 1
    other.save_pretrained(tmp_path / "other")
    model = ComposedForCausalLM.from_pretrained(
        saved, anchor=str(tmp_path / "other"), check_bases=False
    )
    model.save_pretrained(tmp_path / "again")
    again = ComposedForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
    other.lm_head.weight.data += 1
    other.save_pretrained(tmp_path / "other")  # where it was
    model = ComposedForCausalLM.from_pretrained(tmp_path / "again", check_bases=False)
    model.save_pretrained(tmp_path / "again")
    again = ComposedForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


def test_how_it_generates_comes_back(model, tmp_path):
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(tmp_path / "seven")
    loaded = ComposedForCausalLM.from_pretrained(tmp_path / "seven")
    assert loaded.generation_config.max_new_tokens == 7
    (tmp_path / "seven" / "generation_config.json").unlink()  # then it is the anchor's
    loaded = ComposedForCausalLM.from_pretrained(tmp_path / "seven")
    assert loaded.generation_config.max_new_tokens is None
    for damaged in ("{", "[]", '{"max_new_tokens": -1}'):
        (tmp_path / "seven" / "generation_config.json").write_text(damaged)
        with pytest.raises(CheckpointMismatchError, match=r"generation_config.json cannot be used"):
            ComposedForCausalLM.from_pretrained(tmp_path / "seven")


CUSTOM = """
from transformers import {config}, {model}

class OwnConfig({config}):
    model_type = "{name}"

    def to_dict(self):
        return {{k: v for k, v in super().to_dict().items() if k != "tie_word_embeddings"}}

class OwnForCausalLM({model}):
    config_class = OwnConfig
"""


@pytest.mark.parametrize(
    ("family", "name", "config", "model"),
    [
        ("llama", "own_llama", "LlamaConfig", "LlamaForCausalLM"),
        ("llama", "llama", "LlamaConfig", "LlamaForCausalLM"),  # transformers has one so called
        ("gpt2", "own_gpt2", "GPT2Config", "GPT2LMHeadModel"),  # n_layer, not num_hidden_layers
    ],
)
def test_a_model_with_code_of_its_own_comes_back_if_it_is_trusted(
    family, name, config, model, folders, tmp_path
):
    own = tmp_path / "own"
    tiny(family, vocab_size=VOCABULARY).save_pretrained(own)
    content = json.loads((own / "config.json").read_text())
    classes = {"AutoConfig": "OwnConfig", "AutoModelForCausalLM": "OwnForCausalLM"}
    content |= {"model_type": name, "of_its_own": 1}
    content |= {"auto_map": {key: f"own_code.{kind}" for key, kind in classes.items()}}
    (own / "config.json").write_text(json.dumps(content))
    (own / "own_code.py").write_text(CUSTOM.format(name=name, config=config, model=model))
    composed = compose(str(own), str(folders / "code"), trust_remote_code=True)
    composed.save_pretrained(tmp_path / "composed")
    assert checkpoint.read_config(str(tmp_path / "composed")).to_dict()["anchor_config"]["own_code"]
    message = "is not the model this" if name == family else "trust_remote_code=True"
    with pytest.raises(ValueError, match=message):
        ComposedForCausalLM.from_pretrained(tmp_path / "composed")
    loaded = ComposedForCausalLM.from_pretrained(tmp_path / "composed", trust_remote_code=True)
    assert type(loaded.anchor).__name__ == "OwnForCausalLM"
    assert torch.equal(loaded(TOKENS).logits, composed(TOKENS).logits)


def test_a_headless_augmenting_model_is_the_same_model(saved, augmenting, model):
    """The head of an augmenting model is never run, so it is no part of its identity."""
    loaded = ComposedForCausalLM.from_pretrained(saved, augmenting=augmenting.transformer)
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize("folder", ["nowhere", "./nowhere/at/all", "/nowhere/at/all"])
def test_a_misspelt_folder_is_not_looked_up_on_the_hub(folder):
    with pytest.raises(CheckpointMismatchError, match=f"there is no folder '{folder}'"):
        ComposedForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(name, saved):
    (saved / name).unlink()
    with pytest.raises(CheckpointMismatchError, match=f"composed has no {name}"):
        ComposedForCausalLM.from_pretrained(saved)


def test_a_truncated_file_is_refused(saved):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(
        CheckpointMismatchError, match=r"cut off or changed .* SHA-256 is [0-9a-f]{12}"
    ):
        ComposedForCausalLM.from_pretrained(saved)


def test_a_tampered_file_is_refused(saved):
    path = saved / "model.safetensors"
    tensors = load_file(path)
    tensors[min(tensors)] += 1
    save_file(tensors, path)
    with pytest.raises(CheckpointMismatchError, match="cut off or changed"):
        ComposedForCausalLM.from_pretrained(saved)


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_newer_checkpoint_is_refused(saved):
    edit_config(saved, format_version=99)
    with pytest.raises(CheckpointMismatchError, match="format version 99, but .* up to 2; upgrade"):
        ComposedForCausalLM.from_pretrained(saved)


def test_a_layer_that_does_not_exist_is_named(saved):
    edit_config(
        saved, connections=[{"augmenting": "code", "augmenting_layer": 2, "anchor_layer": 0}]
    )
    with pytest.raises(
        ValueError, match=r"augmenting layer 2, but 'code' \(gpt2\) has layers 0 to 1"
    ):
        ComposedForCausalLM.from_pretrained(saved)


def test_broken_json_is_named(saved):
    (saved / "config.json").write_text("{")
    with pytest.raises(CheckpointMismatchError, match=r"config.json is not valid JSON"):
        ComposedForCausalLM.from_pretrained(saved)


def test_a_plain_model_is_refused(folders, saved):
    with pytest.raises(CheckpointMismatchError, match="holds a model of type 'llama', not"):
        ComposedForCausalLM.from_pretrained(folders / "anchor")


def test_an_unknown_base_family_is_named(saved):
    content = json.loads((saved / "config.json").read_text())
    content["anchor_config"]["model_type"] = "llama9"
    edit_config(saved, anchor_config=content["anchor_config"])
    with pytest.raises(CheckpointMismatchError, match="no model type 'llama9'"):
        ComposedForCausalLM.from_pretrained(saved)


def resave(saved, tensors):
    """A file that is whole, but holds other weights."""
    save_file(tensors, saved / "model.safetensors")
    edit_config(saved, weights_sha256=checkpoint.file_hash(saved / "model.safetensors"))


def test_weights_that_do_not_fit_are_named(saved):
    tensors = load_file(saved / "model.safetensors")
    name = "model.bridges.0.proj.weight"
    resave(saved, {key: value for key, value in tensors.items() if key != name})
    with pytest.raises(CheckpointMismatchError, match=f"lacks {name}"):
        ComposedForCausalLM.from_pretrained(saved)
    resave(saved, tensors | {"model.bridges.9.proj.weight": torch.ones(1)})
    with pytest.raises(CheckpointMismatchError, match=r"holds model.bridges.9.proj.weight, which"):
        ComposedForCausalLM.from_pretrained(saved)
    resave(saved, tensors | {name: torch.ones(5, 7)})
    with pytest.raises(CheckpointMismatchError, match=r"shape \(5, 7\), .* needs \(24, 14\)"):
        ComposedForCausalLM.from_pretrained(saved)


def test_a_damaged_base_is_named(folders):
    file = folders / "anchor" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"the anchor at '.*' has a damaged \.safetensors file"):
        compose(str(folders / "anchor"), str(folders / "code"))


def test_a_file_that_is_no_safetensors_is_named(saved):
    (saved / "model.safetensors").write_bytes(b"PK not tensors")
    edit_config(saved, weights_sha256=checkpoint.file_hash(saved / "model.safetensors"))
    with pytest.raises(CheckpointMismatchError, match="is not a safetensors file"):
        ComposedForCausalLM.from_pretrained(saved)


def test_a_base_that_is_gone_is_named(folders, saved):
    os.rename(folders / "code", folders / "moved")
    with pytest.raises(ValueError, match=r"augmenting model 'code' is '.*code', but there is no"):
        ComposedForCausalLM.from_pretrained(saved)
    loaded = ComposedForCausalLM.from_pretrained(saved, augmenting={"code": folders / "moved"})
    assert loaded.config.bases["code"]["name_or_path"] == str(folders / "moved")


def test_bases_without_a_place_must_be_handed_over(anchor, augmenting, tmp_path):
    compose(anchor, augmenting).save_pretrained(tmp_path / "composed")
    with pytest.raises(ValueError, match="does not say where the anchor is, .* pass anchor="):
        ComposedForCausalLM.from_pretrained(tmp_path / "composed")
    with pytest.raises(
        ValueError, match="where augmenting model 'augmenting' is.*pass augmenting="
    ):
        ComposedForCausalLM.from_pretrained(tmp_path / "composed", anchor=anchor)
    ComposedForCausalLM.from_pretrained(tmp_path / "composed", anchor=anchor, augmenting=augmenting)


def test_handing_over_unknown_names_is_refused(saved, augmenting):
    with pytest.raises(ValueError, match="names 'sw', but there is only code"):
        ComposedForCausalLM.from_pretrained(saved, augmenting={"sw": augmenting})


def test_one_model_for_two_names_is_refused(anchor, augmenting, tmp_path):
    compose(anchor, {"a": augmenting, "b": augmenting}).save_pretrained(tmp_path / "composed")
    with pytest.raises(
        ValueError, match="is a single one, but there are 2 augmenting models: a, b"
    ):
        ComposedForCausalLM.from_pretrained(
            tmp_path / "composed", anchor=anchor, augmenting=augmenting
        )


def test_unknown_arguments_are_refused(saved):
    with pytest.raises(TypeError, match="unknown arguments: anchr"):
        ComposedForCausalLM.from_pretrained(saved, anchr="x")


def test_pickles_are_refused(model, tmp_path):
    with pytest.raises(ValueError, match="safe_serialization is False"):
        model.save_pretrained(tmp_path / "composed", safe_serialization=False)


def test_a_failed_save_leaves_the_old_checkpoint(model, saved, monkeypatch):
    """A full disk half-way through must not destroy what was there."""
    before = {path.name: path.read_bytes() for path in saved.iterdir()}

    def full_disk(*args, **kwargs):
        raise OSError("no space left on device")

    with torch.no_grad():
        model.bridges[0].proj.weight += 1
    monkeypatch.setattr(checkpoint, "model_card", full_disk)
    with pytest.raises(OSError, match="no space left"):
        model.save_pretrained(saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert sorted(path.name for path in saved.parent.iterdir()) == ["anchor", "code", "composed"]


def test_saving_again_replaces_the_weights(model, saved):
    with torch.no_grad():
        model.bridges[0].cross_o.weight += 1
    model.save_pretrained(saved)
    loaded = ComposedForCausalLM.from_pretrained(saved)
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)


def test_a_gathered_state_dict_is_filtered(model, folders):
    """FSDP and activation checkpointing hand over full state dicts with wrapped names."""
    gathered = {
        name.replace("bridges.0.", "bridges.0._checkpoint_wrapped_module."): value + 1
        for name, value in model.state_dict().items()
    }
    model.save_pretrained(folders / "composed", state_dict=gathered)
    tensors = load_file(folders / "composed" / "model.safetensors")
    for name, value in model.bridges.named_parameters():
        assert torch.equal(tensors[f"model.bridges.{name}"], value + 1)


def test_other_processes_write_nothing(model, tmp_path):
    model.save_pretrained(tmp_path / "composed", is_main_process=False)
    assert not (tmp_path / "composed").exists()


def test_the_card_says_what_was_composed(model, saved):
    card = (saved / "README.md").read_text()
    assert "| anchor | anchor | llama | 3 x 24 |" in card
    assert "| code | code | gpt2 | 2 x 14 |" in card
    parameters = sum(p.numel() for p in model.bridges.parameters())
    assert f"holds the {parameters:,} weights of the bridges" in card
    assert "| code | 1 | 2 |" in card


def test_a_tokenizer_that_changed_is_refused(folders, model):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    def save_tokenizer(words):
        inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "?"))
        inner.pre_tokenizer = pre_tokenizers.Whitespace()
        PreTrainedTokenizerFast(tokenizer_object=inner).save_pretrained(folders / "anchor")

    save_tokenizer(["?", "The", "fox"])
    model.save_pretrained(folders / "composed")
    ComposedForCausalLM.from_pretrained(folders / "composed")
    assert (folders / "composed" / "tokenizer.json").is_file()
    save_tokenizer(["?", "fox", "The"])
    with pytest.raises(
        CheckpointMismatchError, match="the anchor .* its tokenizer at '.*' differs"
    ):
        ComposedForCausalLM.from_pretrained(folders / "composed")


def test_a_llama_is_no_llama_with_other_shapes(saved, augmenting):
    other = LlamaForCausalLM(
        LlamaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1)
    )
    with pytest.raises(CheckpointMismatchError, match="the anchor .* configuration has"):
        ComposedForCausalLM.from_pretrained(saved, anchor=other, augmenting=augmenting)
