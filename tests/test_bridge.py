"""The bridge alone: numbers worked out by hand, and what a fresh one may and may not do."""

import math
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from graftlm import Bridge, BridgeConfig
from graftlm.bridge import InputNorm, distance_bias, distance_slopes, rotate

D_B, D_A, BATCH, SEQ, AUG_SEQ = 15, 11, 2, 7, 5


def bridge_of(**shape: Any) -> Bridge:
    """A bridge whose output map is not zero, so that its updates can be seen."""
    shape.setdefault("num_heads", 3)
    bridge = Bridge(D_B, D_A, BridgeConfig(**shape), index=0)
    torch.nn.init.normal_(bridge.cross_o.weight, std=0.3)
    if bridge.gate is not None:
        torch.nn.init.constant_(bridge.gate, 0.6)
    return bridge


def test_slopes_fall_from_8_to_a_half_and_a_quarter_of_the_heads_is_free():
    assert distance_slopes(6) == [0, 8, 4, 2, 1, 1 / 2]
    assert distance_slopes(2) == [8, 1 / 2]
    assert distance_slopes(1) == [8]


def test_distance_bias_is_minus_slope_times_tokens_back():
    visible = torch.tensor([[[True, True, False], [True, True, True]]])
    bias = distance_bias(2, torch.tensor([[3, 4]]), torch.tensor([[0, 2, 4]]), visible)
    assert bias.shape == (1, 2, 2, 3)
    least = torch.finfo(torch.float32).min
    assert bias[0, 0].tolist() == [[-24, -8, least], [-32, -16, 0]]
    assert bias[0, 1].tolist() == [[-3 / 2, -1 / 2, least], [-4 / 2, -2 / 2, 0]]


def test_rotate_turns_the_two_halves_by_position():
    """Channel c turns with channel c + half; the rates are 1 and 10000^(-1/2) = 0.01."""
    x = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])[None, None]
    turned = rotate(x, torch.tensor([[3, 3, 2, 2]]))[0, 0]
    expected = [
        [math.cos(3), 0, math.sin(3), 0],
        [0, math.cos(0.03), 0, math.sin(0.03)],
        [-math.sin(2), 0, math.cos(2), 0],
        [0, -math.sin(0.02), 0, math.cos(0.02)],
    ]
    assert_close(turned, torch.tensor(expected), atol=1e-6, rtol=0)


def test_rotated_scores_depend_on_the_distance_only():
    query, key = torch.randn(1, 3, 1, 6), torch.randn(1, 3, 1, 6)

    def score(at, other):
        turned = rotate(query, torch.tensor([[at]])) * rotate(key, torch.tensor([[other]]))
        return turned.sum(-1)

    assert_close(score(5, 2), score(41, 38), atol=1e-4, rtol=0)
    assert (score(5, 2) - score(5, 3)).abs().max() > 0.01


def test_norm_is_root_mean_square_then_weight():
    norm = InputNorm(2)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 10.0]))
    rms = math.sqrt((9 + 16) / 2)
    assert_close(norm(torch.tensor([[[3.0, 4.0]]])), torch.tensor([[[3 / rms, 40 / rms]]]))


def test_states_beyond_the_range_of_float16_do_not_overflow():
    """Gemma's hidden states reach 104,000; cast before they are normalised they were inf."""
    bridge = bridge_of().half()
    states = torch.full((1, 3, D_A), 104_000.0)
    states[..., ::2] = -1.0
    assert bridge(torch.randn(1, 3, D_B).half() * 50, states).isfinite().all()


@pytest.mark.parametrize("gate", [False, True])
def test_a_fresh_bridge_adds_exactly_nothing(gate):
    bridge = Bridge(D_B, D_A, BridgeConfig(num_heads=3, gate=gate, bias=True), index=0)
    h_b = torch.randn(BATCH, SEQ, D_B)
    update = bridge(h_b, torch.randn(BATCH, SEQ, D_A))
    assert torch.equal(h_b + update, h_b)
    update.sum().backward()
    started: Any = bridge.gate if gate else bridge.cross_o.weight
    assert started.grad.abs().max() > 0, "it would never start to train"


def test_fresh_maps_keep_unit_variance():
    bridge = Bridge(101, 79, BridgeConfig(num_heads=1), index=0)
    for linear in (bridge.proj, bridge.cross_q, bridge.cross_k, bridge.cross_v):
        assert abs(linear.weight.std() * linear.in_features**0.5 - 1) < 0.05


def test_the_gate_multiplies_by_its_tanh():
    bridge, plain = bridge_of(gate=True), bridge_of()
    plain.load_state_dict(bridge.state_dict(), strict=False)
    h_b, h_a = torch.randn(BATCH, SEQ, D_B), torch.randn(BATCH, SEQ, D_A)
    assert_close(bridge(h_b, h_a), plain(h_b, h_a) * math.tanh(0.6))


def test_a_normalised_bridge_knows_no_scale():
    """Inputs may come in any scale; the update is in units of the anchor's hidden states."""
    h_b, h_a = torch.randn(BATCH, SEQ, D_B), torch.randn(BATCH, SEQ, D_A)
    bridge, bare = bridge_of(), bridge_of(norm=False)
    assert_close(bridge(h_b * 1000, h_a * 30), 1000 * bridge(h_b, h_a), atol=1e-2, rtol=1e-4)
    assert (bare(h_b * 1000, h_a * 30) - bare(h_b, h_a)).abs().max() > 0.1


def test_the_mask_says_which_keys_are_read():
    """Changing an augmenting state changes exactly the positions that may read it."""
    bridge = bridge_of(position="none")
    h_b, h_a = torch.randn(BATCH, SEQ, D_B), torch.randn(BATCH, AUG_SEQ, D_A)
    mask = torch.zeros(BATCH, 1, SEQ, AUG_SEQ, dtype=torch.bool)
    mask[..., 0] = True
    mask[0, 0, [2, 5], 3] = True
    before = bridge(h_b, h_a, cross_mask=mask)
    h_a[:, 3] += 1
    changed = (bridge(h_b, h_a, cross_mask=mask) != before).any(-1)
    assert changed.nonzero().tolist() == [[0, 2], [0, 5]]


def test_without_a_mask_a_first_pass_is_causal():
    bridge = bridge_of(position="none")
    h_b, h_a = torch.randn(BATCH, SEQ, D_B), torch.randn(BATCH, SEQ, D_A)
    before = bridge(h_b, h_a)
    h_a[:, 4] += 1
    changed = (bridge(h_b, h_a) != before).any(-1)
    assert changed.tolist() == [[False] * 4 + [True] * 3] * BATCH


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_update_comes_in_the_dtype_of_the_hidden_states(dtype):
    bridge = bridge_of()
    h_b, h_a = torch.randn(BATCH, SEQ, D_B).to(dtype), torch.randn(BATCH, SEQ, D_A).to(dtype)
    update = bridge(h_b, h_a)
    assert update.dtype == dtype
    exact = bridge(h_b.float(), h_a.float())
    assert_close(update.float(), exact, atol=0.02, rtol=0.02)


@pytest.mark.parametrize(
    ("shape", "count"),
    [
        # f_proj, W^Q, W^K, W^V, W^O: D_A D_B + 4 D_B^2
        ({"norm": False}, 11 * 15 + 4 * 15 * 15),
        # and the two norms: D_B + D_A
        ({}, 11 * 15 + 4 * 15 * 15 + 15 + 11),
        # a bottleneck narrows W^Q, W^K, W^V, W^O, not f_proj
        ({"norm": False, "width": 6}, 11 * 15 + 4 * 15 * 6),
        ({"norm": False, "gate": True}, 11 * 15 + 4 * 15 * 15 + 1),
        ({"norm": False, "bias": True, "width": 6}, 11 * 15 + 15 + 4 * 15 * 6 + 3 * 6 + 15),
    ],
)
def test_parameters_are_counted_with_the_output_map(shape, count):
    bridge = Bridge(D_B, D_A, BridgeConfig(num_heads=3, **shape), index=0)
    assert sum(p.numel() for p in bridge.parameters()) == count


def test_no_map_has_a_name_that_adapters_usually_target():
    names = {name.rsplit(".")[-1] for name, _ in bridge_of().named_modules()}
    assert not names & {"q_proj", "k_proj", "v_proj", "o_proj", "c_attn", "query", "key", "value"}


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="width 15 is not a multiple of num_heads 4"):
        Bridge(D_B, D_A, BridgeConfig(num_heads=4), index=0)
    with pytest.raises(ValueError, match="even head width, but width 15 over 3 heads gives 5"):
        Bridge(D_B, D_A, BridgeConfig(num_heads=3, position="rotary"), index=0)
