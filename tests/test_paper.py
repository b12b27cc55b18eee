"""The equations of CALM, section 3.1, written a second time in einsum, in float64.

Nothing here is shared with `src`: hidden states are taken and changed by hooks of this file, and
the cross-attention is spelled out head by head. Only the weights are the bridges' own.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from families import left_padded, open_bridges, tiny, tiny_llama, token_ids
from graftlm import Bridge, BridgeConfig, Connection, compose


def f_cross(
    h_a: Tensor, h_b: Tensor, weights: dict[str, Tensor], num_heads: int, may_read: Tensor
) -> Tensor:
    """f_cross(f_proj(H_Ai), H_Bj): the update, before it is added to H_Bj.

    K = f_proj(H_Ai) W^K, V = f_proj(H_Ai) W^V, Q = H_Bj W^Q
    head_k = softmax(Q_k K_k^T / sqrt(D_B / N_H)) V_k, f_cross = Concat(head_1 ... head_N_H) W^O
    """
    projected = torch.einsum("bsa,da->bsd", h_a, weights["proj.weight"])
    queries = torch.einsum("btd,ed->bte", h_b, weights["cross_q.weight"])
    keys = torch.einsum("bsd,ed->bse", projected, weights["cross_k.weight"])
    values = torch.einsum("bsd,ed->bse", projected, weights["cross_v.weight"])
    width = keys.shape[-1] // num_heads
    heads = []
    for k in range(num_heads):
        own = slice(k * width, (k + 1) * width)
        scores = torch.einsum("btw,bsw->bts", queries[..., own], keys[..., own]) / math.sqrt(width)
        scores = scores.masked_fill(~may_read, -math.inf)
        weight = scores.exp() / scores.exp().sum(-1, keepdim=True)
        heads.append(torch.einsum("bts,bsw->btw", weight, values[..., own]))
    return torch.einsum("bte,de->btd", torch.cat(heads, -1), weights["cross_o.weight"])


def reads_by_position(length: int, attention_mask: Tensor | None = None) -> Tensor:
    """Position t has seen x_1 .. x_t when it is decoded, and no padding: (batch, t, s)."""
    earlier = torch.tensor([[s <= t for s in range(length)] for t in range(length)])[None]
    return earlier if attention_mask is None else earlier & attention_mask[:, None, :].bool()


def test_one_bridge_is_the_paper_equation():
    """Every size is another prime (but head count times width), so no swapped axis can pass."""
    bridge = Bridge(35, 11, BridgeConfig.paper(num_heads=5), index=0).double()
    torch.nn.init.normal_(bridge.cross_o.weight)
    h_a, h_b = torch.randn(3, 13, 11).double(), torch.randn(3, 13, 35).double()
    expected = f_cross(h_a, h_b, bridge.state_dict(), 5, reads_by_position(13))
    assert expected.abs().mean() > 0.1
    torch.testing.assert_close(bridge(h_b, h_a), expected, atol=1e-10, rtol=0)


def test_a_bottleneck_is_the_same_equation_with_narrower_heads():
    bridge = Bridge(23, 11, BridgeConfig.paper(num_heads=3, width=21), index=0).double()
    torch.nn.init.normal_(bridge.cross_o.weight)
    h_a, h_b = torch.randn(2, 13, 11).double(), torch.randn(2, 13, 23).double()
    expected = f_cross(h_a, h_b, bridge.state_dict(), 3, reads_by_position(13))
    torch.testing.assert_close(bridge(h_b, h_a), expected, atol=1e-10, rtol=0)


def composed_by_hand(model, augmenting, anchor, batch: dict[str, Tensor]) -> Tensor:
    """The composed logits, from plain copies of the models and hooks of our own."""
    mask = batch.get("attention_mask")
    may_read = reads_by_position(batch["input_ids"].shape[1], mask)
    if mask is not None:
        may_read = may_read | ~may_read.any(-1, keepdim=True)  # no softmax over nothing
    real = 1 if mask is None else may_read.new_tensor(mask.tolist()).double()[..., None]
    states: dict[tuple[str, int], Tensor] = {}
    handles = []
    for name, layers in augmenting.items():
        for i, layer in enumerate(layers[1]):
            keep = lambda *call, key=(name, i): states.__setitem__(key, first(call[2]))  # noqa: E731
            handles.append(layer.register_forward_hook(keep))
        layers[0](**batch)
    bridges = [bridge.state_dict() for bridge in model.bridges]

    def add(j: int):
        def hook(module, args, output):
            h_b = first(output)
            total = h_b
            for connection, weights in zip(model.config.connections, bridges, strict=True):
                if connection.anchor_layer == j:
                    h_a = states[connection.augmenting, connection.augmenting_layer]
                    heads = model.model.bridge_config.num_heads
                    total = total + real * f_cross(h_a, h_b, weights, heads, may_read)
            return total if isinstance(output, Tensor) else (total, *output[1:])

        return hook

    for j, layer in enumerate(anchor[1]):
        handles.append(layer.register_forward_hook(add(j)))
    logits = anchor[0](**batch).logits
    for handle in handles:
        handle.remove()
    return logits


def first(output) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_a_whole_composition_is_the_paper_equations(padded):
    """Two augmenting models, three connections onto one anchor layer, and one onto the last."""
    connections = [
        Connection(augmenting="sw", augmenting_layer=1, anchor_layer=2),
        Connection(augmenting="code", augmenting_layer=0, anchor_layer=2),
        Connection(augmenting="code", augmenting_layer=2, anchor_layer=2),
        Connection(augmenting="code", augmenting_layer=2, anchor_layer=3),
    ]

    def bases():
        return tiny_llama().double(), tiny("gpt2").double(), tiny("gpt_neox").double()

    anchor, code, swahili = bases()
    model = compose(
        anchor,
        {"sw": swahili, "code": code},
        connections=connections,
        variant="paper",
        bridge_dtype=torch.float64,
    )
    open_bridges(model)
    batch = left_padded([13, 7]) if padded else {"input_ids": token_ids(2, 13)}
    anchor, code, swahili = bases()
    alone = anchor(**batch).logits
    expected = composed_by_hand(
        model,
        {"code": (code, code.transformer.h), "sw": (swahili, swahili.gpt_neox.layers)},
        (anchor, anchor.model.layers),
        batch,
    )
    seen = batch.get("attention_mask", torch.ones(2, 13)).bool()
    difference = (model(**batch).logits - expected)[seen].abs().max()
    assert difference < 1e-10, difference
    assert (alone - expected)[seen].abs().max() > 0.01


@torch.no_grad()
def test_scales_multiply_the_updates_of_their_model():
    model = compose(
        tiny_llama().double(),
        tiny("gpt2").double(),
        connections=[Connection(augmenting_layer=1, anchor_layer=3)],
        variant="paper",
        bridge_dtype=torch.float64,
    )
    open_bridges(model)
    ids = token_ids(2, 11)
    states: dict[str, Tensor] = {}
    augmenting: Any = model.augmenting["augmenting"]
    augmenting.transformer.h[1].register_forward_hook(lambda m, a, out: states.update(a=first(out)))
    last = model.anchor.model.layers[3]
    handle = last.register_forward_hook(lambda m, a, out: states.update(b=first(out)))
    with model.anchor_only():
        model(ids)
    handle.remove()
    model.set_scale("augmenting", 0.3)
    hidden = model.model(ids).last_hidden_state
    update = f_cross(
        states["a"], states["b"], model.bridges[0].state_dict(), 5, reads_by_position(11)
    )
    expected = model.anchor.model.norm(states["b"] + 0.3 * update)
    assert (expected - hidden).abs().max() < 1e-10
