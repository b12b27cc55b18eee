"""What a composition is: the spacing rule in numbers, and configurations that survive a file."""

import json
from typing import Any

import pytest

from families import SHAPE, tiny_config
from graftlm import BridgeConfig, ComposedConfig, Connection
from graftlm.config import spaced_connections


def pairs(augmenting_layers: int, anchor_layers: int, every: int) -> list[tuple[int, int]]:
    """(augmenting layer, anchor layer) of each connection."""
    spaced = spaced_connections("a", augmenting_layers, anchor_layers, every)
    assert {connection.augmenting for connection in spaced} <= {"a"}
    return [(c.augmenting_layer, c.anchor_layer) for c in spaced]


def composed_config(**changes) -> ComposedConfig:
    """A GPT-2 of three layers that reads a BLOOM and a Mamba of three."""
    arguments: dict[str, Any] = {
        "anchor_config": tiny_config("gpt2", num_hidden_layers=4),
        "augmenting_configs": {"sw": tiny_config("bloom"), "code": tiny_config("mamba")},
        "connections": [
            Connection(augmenting="sw", augmenting_layer=2, anchor_layer=3),
            Connection(augmenting="code", augmenting_layer=0, anchor_layer=1),
        ],
    }
    return ComposedConfig(**arguments | changes)


def test_every_fourth_augmenting_layer_evenly_over_the_anchor():
    assert pairs(28, 30, 4) == [(3, 3), (7, 7), (11, 11), (15, 16), (19, 20), (23, 24), (27, 29)]
    assert pairs(12, 12, 4) == [(3, 3), (7, 7), (11, 11)]
    assert pairs(5, 7, 2) == [(1, 2), (3, 6)]


def test_an_augmenting_model_that_is_much_deeper_is_still_read_up_to_its_end():
    """More layers to read than the anchor has: each anchor layer gets one."""
    assert pairs(28, 3, 4) == [(8, 0), (17, 1), (27, 2)]
    assert pairs(9, 2, 1) == [(3, 0), (8, 1)]


def test_a_model_shallower_than_the_gap_is_read_at_its_last_layer():
    assert pairs(3, 11, 4) == [(2, 10)]
    assert pairs(1, 1, 4) == [(0, 0)]


@pytest.mark.parametrize("every", range(1, 6))
def test_layers_exist_and_no_pair_comes_twice(every):
    for augmenting_layers in range(1, 14):
        for anchor_layers in range(1, 14):
            found = pairs(augmenting_layers, anchor_layers, every)
            assert found == sorted(set(found))
            assert found[-1][1] == anchor_layers - 1
            assert all(0 <= i < augmenting_layers for i, _ in found)


def test_the_shape_of_a_bridge_follows_the_anchor_unless_told():
    resolved = BridgeConfig().resolve(anchor_size=35, anchor_heads=5)
    assert (resolved.num_heads, resolved.width) == (5, 35)
    assert (resolved.norm, resolved.position) == (True, "distance")
    narrow = BridgeConfig.paper(num_heads=3, width=21).resolve(35, 5)
    assert (narrow.num_heads, narrow.width, narrow.norm, narrow.position) == (3, 21, False, "none")
    assert not narrow.gate
    assert not narrow.bias


def test_the_configuration_looks_like_the_anchor_s():
    config = composed_config()
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (67, 24, 4)
    assert (config.num_attention_heads, config.max_position_embeddings) == (4, 59)
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 1, 2)
    assert config.get_text_config(decoder=True) is config.anchor_config


def test_connections_are_kept_in_one_order():
    """A sum over connections must not depend on how a dictionary was written down."""
    config = composed_config()
    other = composed_config(connections=config.connections[::-1])
    assert [c.anchor_layer for c in config.connections] == [1, 3]
    assert other.connections == config.connections


def test_a_file_brings_the_same_configuration_back(tmp_path):
    config = composed_config(
        bridge=BridgeConfig(num_heads=2, width=14, position="rotary", gate=True),
        reads="prompt",
        scales={"sw": 0.5},
        bases={"anchor": {"name_or_path": "here", "revision": None}},
    )
    config.save_pretrained(tmp_path)
    again = ComposedConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert again.bridge == config.bridge
    assert again.connections == config.connections
    assert again.scales == {"sw": 0.5, "code": 1.0}
    assert again.reads == "prompt"
    assert again.augmenting_configs["code"].model_type == "mamba"
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "graftlm"
    assert written["anchor_config"]["n_embd"] == SHAPE["hidden_size"]
    assert written["connections"][0] == {
        "augmenting": "code",
        "augmenting_layer": 0,
        "anchor_layer": 1,
    }
