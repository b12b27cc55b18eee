"""Models whose parts are elsewhere: accelerate's hooks, weights on disk, several devices.

accelerate replaces `forward` on the modules it moves. Without a GPU its hooks run all the same,
with the CPU as every device and weights that are elsewhere in memory or on disk between passes.
"""

import copy
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model

from families import (
    generated,
    left_padded,
    open_bridges,
    tiny,
    tiny_llama,
    token_ids,
    uncached_logits,
)
from graftlm import ComposedForCausalLM, compose, verify

CPU = torch.device("cpu")
KINDS = ["hooks", "cpu offload", "disk offload", "split"]


def dispatched(model: Any, kind: str, folder: Any) -> Any:
    """A copy of the model, as accelerate places it."""
    model = copy.deepcopy(model)
    if kind == "hooks":
        return dispatch_model(model, {"": "cpu"}, force_hooks=True)
    if kind == "cpu offload":
        return cpu_offload(model, execution_device=CPU)
    if kind == "disk offload":
        return disk_offload(model, str(folder), execution_device=CPU)
    body, *others = (name for name, _ in model.named_children())
    places: dict[str, Any] = {body: "disk", **dict.fromkeys(others, "cpu")}
    return dispatch_model(model, places, main_device=CPU, offload_dir=folder, force_hooks=True)


def pair(kind: str, folder: Any, anchor: str = "llama", augmenting: str = "gpt2") -> Any:
    """A composition of dispatched models with open bridges, and the same of plain ones."""
    anchors, others = tiny(anchor, 3), tiny(augmenting, 1)
    torch.manual_seed(7)
    plain = open_bridges(compose(anchors, {"code": others}, every=2, num_heads=2))
    model = compose(
        dispatched(anchors, kind, folder / "a"),
        {"code": dispatched(others, kind, folder / "b")},
        every=2,
        num_heads=2,
    )
    return model, plain


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("anchor", "augmenting"),
    [
        ("llama", "gpt2"),
        ("gpt2", "llama"),  # tied weights, which a map may split
        pytest.param("gemma3_text", "mamba", marks=pytest.mark.slow),
    ],
)
def test_dispatched_models_compute_what_plain_ones_do(kind, anchor, augmenting, tmp_path):
    """Composing tied the weights of a split anchor anew, and its head was on no device then."""
    model, plain = pair(kind, tmp_path, anchor, augmenting)
    ids, batch = token_ids(2, 9), left_padded([9, 5])
    assert model.device == CPU
    assert torch.equal(model(ids).logits, model.anchor(ids).logits)
    assert torch.equal(model.anchor(ids).logits, plain.anchor(ids).logits)
    model.bridges.load_state_dict(plain.bridges.state_dict())
    logits = uncached_logits(plain, **batch)
    assert torch.equal(uncached_logits(model, **batch), logits)
    assert not torch.equal(logits, uncached_logits(plain.anchor, **batch))
    for found, expected in zip(generated(model, batch, 6), generated(plain, batch, 6), strict=True):
        assert torch.equal(found, expected)
    for one in (model, plain):
        one.train()(input_ids=ids, labels=ids).loss.backward()
    for found, expected in zip(model.bridges.parameters(), plain.bridges.parameters(), strict=True):
        assert torch.equal(found.grad, expected.grad)
    with_gradient = [name for name, p in model.named_parameters() if p.grad is not None]
    assert all(name.startswith("model.bridges.") for name in with_gradient)


@pytest.mark.parametrize("kind", KINDS)
def test_a_dispatched_augmenting_model_is_run_to_its_highest_connected_layer(kind, tmp_path):
    """Its other layers and its head ran too: accelerate's forward is bound to the whole model."""
    model, _ = pair(kind, tmp_path)
    code, ran = model.augmenting["code"], []
    watched = {"0": code.transformer.h[0], "1": code.transformer.h[1], "2": code.transformer.h[2]}
    watched |= {"norm": code.transformer.ln_f, "head": code.lm_head}
    for name, module in watched.items():
        module.register_forward_hook(lambda *call, name=name: ran.append(name))
    assert max(c.augmenting_layer for c in model.config.connections) == 1
    model(token_ids(2, 9))
    assert ran == ["0", "1", "norm"]
    ran.clear()
    code(token_ids(2, 9))  # on its own it is what it was
    assert ran == ["0", "1", "2", "norm", "head"]


def test_a_foreign_forward_is_left_alone(tmp_path):
    """What is bound to the model by other means cannot be run on a part of it."""
    anchor, code = tiny("llama", 3), tiny("gpt2", 1)
    calls, inner = [], code.transformer.forward

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return inner(*args, **kwargs)

    code.transformer.forward = counting
    model = compose(anchor, {"code": code}, every=2, num_heads=2)
    assert model.model.running_view("code") is code.transformer
    model(token_ids(2, 9))
    assert calls == [1]


@pytest.mark.parametrize("kind", ["cpu offload", "split"])
def test_checkpoints_of_dispatched_models(kind, tmp_path):
    """Offloaded weights are not hashed, which is said."""
    model, plain = pair(kind, tmp_path)
    model.bridges.load_state_dict(plain.bridges.state_dict())
    ids = token_ids(2, 9)
    expected = plain(ids).logits
    model.save_pretrained(tmp_path / "composed")
    loaded = ComposedForCausalLM.from_pretrained(
        tmp_path / "composed", anchor=plain.anchor, augmenting=plain.augmenting["code"]
    )
    assert torch.equal(loaded(ids).logits, expected)
    plain.save_pretrained(tmp_path / "plain")
    with pytest.warns(UserWarning, match="offloaded") as said:
        loaded = ComposedForCausalLM.from_pretrained(
            tmp_path / "plain", anchor=model.anchor, augmenting=model.augmenting["code"]
        )
    assert [str(warning.message) for warning in said] == [
        "the anchor is offloaded, so its weights were not compared",
        "augmenting model 'code' is offloaded, so its weights were not compared",
    ]
    assert torch.equal(loaded(ids).logits, expected)
    assert all(check.passed for check in verify(loaded))


@pytest.mark.parametrize("offloaded", ["anchor", "code"])
def test_loaded_with_weights_on_disk(offloaded, tmp_path):
    """As transformers does it: a device map and a folder for what is offloaded."""
    tiny_llama().save_pretrained(tmp_path / "anchor")
    tiny("gpt2", 1).save_pretrained(tmp_path / "code")
    torch.manual_seed(13)
    plain = compose(tmp_path / "anchor", {"code": tmp_path / "code"}, every=1, num_heads=5)
    bases: dict[str, Any] = {"anchor": tiny_llama(), "code": tiny("gpt2", 1)}
    bases[offloaded] = dispatched(bases[offloaded], "disk offload", tmp_path / "off")
    open_bridges(plain).save_pretrained(tmp_path / "composed")
    with pytest.warns(UserWarning, match="is offloaded, so its weights were not compared"):
        model = ComposedForCausalLM.from_pretrained(
            tmp_path / "composed", anchor=bases["anchor"], augmenting={"code": bases["code"]}
        )
    batch = left_padded([9, 5])
    assert torch.equal(uncached_logits(model, **batch), uncached_logits(plain, **batch))


# ---- with a GPU --------------------------------------------------------------------------


def on_two_devices(anchor: str, augmenting: str) -> Any:
    """One composition with its parts on these devices, and the same on the CPU."""
    torch.manual_seed(7)
    plain = open_bridges(compose(tiny_llama(), {"code": tiny("gpt2", 1)}, every=1, num_heads=5))
    model = compose(
        tiny_llama().to(anchor), {"code": tiny("gpt2", 1).to(augmenting)}, every=1, num_heads=5
    )
    model.bridges.load_state_dict(plain.bridges.state_dict())
    return model, plain


@pytest.mark.gpu
@pytest.mark.parametrize(("anchor", "augmenting"), [("cuda", "cpu"), ("cpu", "cuda")])
def test_anchor_and_augmenting_model_on_different_devices(anchor, augmenting):
    model, plain = on_two_devices(anchor, augmenting)
    assert {p.device.type for p in model.bridges.parameters()} == {anchor}
    batch = left_padded([9, 5])
    here = {name: value.to(anchor) for name, value in batch.items()}
    logits = uncached_logits(model, **here)
    torch.testing.assert_close(logits.cpu(), uncached_logits(plain, **batch), atol=1e-4, rtol=1e-4)
    found, expected = generated(model, here, 6)[0], generated(plain, batch, 6)[0]
    assert torch.equal(found.cpu(), expected)
    ids = here["input_ids"]
    model.train()(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.bridges.parameters())


@pytest.mark.gpu
def test_an_anchor_split_between_gpu_and_cpu(tmp_path):
    """Layers 0 and 1 on the GPU, the others in main memory; bridges are where their layers run."""
    torch.manual_seed(7)
    plain = open_bridges(compose(tiny_llama(), {"code": tiny("gpt2", 1)}, every=1, num_heads=5))
    places: dict[str, Any] = {f"model.layers.{i}": 0 if i < 2 else "cpu" for i in range(4)}
    places |= {"model.embed_tokens": 0, "model.norm": "cpu", "model.rotary_emb": 0, "lm_head": 0}
    first = torch.device("cuda", 0)
    anchor: Any = dispatch_model(tiny_llama(), places, main_device=first, offload_dir=tmp_path)
    model = compose(anchor, {"code": tiny("gpt2", 1).to("cuda")}, every=1, num_heads=5)
    model.bridges.load_state_dict(plain.bridges.state_dict())
    batch = left_padded([9, 5])
    here = {name: value.to("cuda") for name, value in batch.items()}
    logits = uncached_logits(model, **here)
    torch.testing.assert_close(logits.cpu(), uncached_logits(plain, **batch), atol=1e-4, rtol=1e-4)
    assert torch.equal(generated(model, here, 6)[0].cpu(), generated(plain, batch, 6)[0])
