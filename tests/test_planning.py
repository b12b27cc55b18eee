"""`graftlm plan`: what is counted without weights is what a real model takes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from families import tiny_config
from graftlm import ComposedForCausalLM, compose, planning
from graftlm.config import ComposedConfig, Connection
from graftlm.recipe import Recipe
from tiny import save_pair

BATCH, LENGTH = 2, 24


@pytest.fixture
def pair(tmp_path: Path) -> tuple[str, str]:
    return save_pair(tmp_path)


@pytest.fixture
def model(pair: tuple[str, str]) -> ComposedForCausalLM:
    return compose(*pair, every=1)


def real_step(model: ComposedForCausalLM) -> tuple[int, int, int]:
    """Operations forward and backward, and bytes kept, of a step on real tensors."""
    input_ids = torch.zeros(BATCH, LENGTH, dtype=torch.long)
    weights = {w.untyped_storage().data_ptr() for w in model.parameters()}
    kept: dict[int, Tensor] = {}

    def weigh(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(weigh, lambda tensor: tensor):
        model(input_ids=input_ids, labels=input_ids)
    # Unfused attention is plain matrix products, which torch's counter knows by itself.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss = model(input_ids=input_ids, labels=input_ids).loss
        forward = counter.get_total_flops()
        loss.backward()
    size = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    return forward, counter.get_total_flops() - forward, size


def attention_products(model: ComposedForCausalLM) -> int:
    """Operations of one product of queries and keys in all anchor layers that learn."""
    config = model.config.get_text_config()
    first = model.config.connections[0].anchor_layer
    width = config.num_attention_heads * config.head_dim
    bridges = len(model.bridges) * (model.model.bridge_config.width or 0)
    layers = config.num_hidden_layers - first - 1
    return 2 * BATCH * LENGTH**2 * (layers * width + bridges)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_is_counted_as_it_runs(model: ComposedForCausalLM, checkpointing: bool) -> None:
    cost = planning.training_cost(
        model.config, batch_size=BATCH, length=LENGTH, checkpointing=checkpointing
    )
    model.train()
    if checkpointing:
        model.activation_checkpointing_enable()
    forward, backward, kept = real_step(model)
    assert cost.forward == forward
    # Fused attention makes the scores again, one product more than the plain one.
    assert cost.backward == backward + attention_products(model)
    # Without storage transformers cannot see that a mask is plain, so each layer keeps one.
    first = model.config.connections[0].anchor_layer
    masks = (model.config.num_hidden_layers - first) * BATCH * LENGTH**2 * 8
    assert kept <= cost.kept <= kept + masks
    logits = BATCH * LENGTH * model.config.vocab_size * 8
    assert cost.passing > logits if checkpointing else cost.passing == logits


def test_checkpointing_keeps_less_and_computes_more(model: ComposedForCausalLM) -> None:
    plain, again = (
        planning.training_cost(
            model.config, batch_size=BATCH, length=LENGTH, checkpointing=checkpointing
        )
        for checkpointing in (False, True)
    )
    assert again.kept < plain.kept
    assert again.backward > plain.backward
    assert again.forward == plain.forward


def test_serving_is_counted_as_it_runs(model: ComposedForCausalLM) -> None:
    cost = planning.serving_cost(model.config, context=LENGTH)
    prompt = torch.zeros(1, LENGTH, dtype=torch.long)
    model.eval()
    with torch.no_grad():
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as prefill:
            cache = model(input_ids=prompt, use_cache=True, logits_to_keep=1).past_key_values
        layers: list[Any] = cache.layers
        size = sum(x.nbytes for layer in layers for x in (layer.keys, layer.values))
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as token:
            model(input_ids=prompt[:, :1], past_key_values=cache)
    assert cost.prefill == prefill.get_total_flops()
    assert cost.token == token.get_total_flops()
    assert cost.cache == size


def test_memory_is_divided_and_nothing_is_lost(model: ComposedForCausalLM) -> None:
    work = planning.Work(
        batch_size=BATCH, length=LENGTH, checkpointing=False, context=LENGTH, requests=3
    )
    devices = planning.parse_devices("4x1GB", flops=1e9, link=1e6)
    plan = planning.make_plan(model, work, devices)
    whole, sharded, serving = plan.memory.values()
    weights = sum(w.numel() * 4 for w in model.parameters())
    trained = sum(w.numel() * 4 for w in model.parameters() if w.requires_grad)
    assert whole["frozen models"] + whole["bridges, gradients, AdamW"] == weights + 3 * trained
    assert sharded["frozen models"] == whole["frozen models"] // 4
    assert sharded["kept for the backward pass"] == whole["kept for the backward pass"]
    assert serving["weights"] == weights // 4
    assert serving["caches of 3 contexts"] == 3 * plan.serving.cache // 4
    computing = (plan.training.forward + plan.training.backward) / 1e9
    assert plan.seconds["whole copies"] == pytest.approx(max(computing, 2 * trained * 0.75 / 1e6))
    assert plan.seconds["sharded"] == pytest.approx(max(computing, 2 * weights * 0.75 / 1e6))
    assert plan.seconds["sharded"] > plan.seconds["whole copies"]


def experts(dtype: torch.dtype, chosen: int) -> ComposedConfig:
    """A composition whose anchor has four experts, of which a token goes to some."""
    size = {"hidden_size": 32, "intermediate_size": 48, "num_local_experts": 4}
    anchor = tiny_config("mixtral", **size, num_experts_per_tok=chosen)
    augmenting = tiny_config("llama")
    anchor.dtype = augmenting.dtype = dtype
    return ComposedConfig(
        anchor_config=anchor,
        augmenting_configs={"augmenting": augmenting},
        connections=[Connection(augmenting_layer=0, anchor_layer=0)],
    )


def test_a_token_costs_the_experts_it_goes_to() -> None:
    one, two = (
        planning.training_cost(
            experts(torch.bfloat16, chosen), batch_size=BATCH, length=LENGTH, checkpointing=False
        )
        for chosen in (1, 2)
    )
    layers = experts(torch.bfloat16, 1).num_hidden_layers
    of_one = 2 * BATCH * LENGTH * 3 * 32 * 48
    assert two.forward - one.forward == layers * of_one
    assert two.backward - one.backward == (layers - 1) * of_one  # nothing below the bridge


def test_what_cannot_be_counted_is_refused() -> None:
    with pytest.raises(ValueError, match=r"cannot be counted without weights \(.*bfloat16"):
        planning.serving_cost(experts(torch.float32, 1), context=LENGTH)


def recipe(pair: tuple[str, str], **changes: Any) -> Recipe:
    given = {"anchor": pair[0], "augmenting": pair[1], "data": "none", "output_dir": "none"}
    return Recipe.from_mapping(given | changes)


@pytest.mark.parametrize("change", [{"alignment": "prefix"}, {"reads": "prompt"}])
def test_what_is_not_counted_is_refused(pair: tuple[str, str], change: dict[str, str]) -> None:
    name = next(iter(change))
    with pytest.raises(ValueError, match=f"as if every model read .* leave {name} out"):
        planning.compose_without_weights(recipe(pair, **change))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_serving_counts_two_bytes_a_weight(pair: tuple[str, str], dtype: str) -> None:
    model = planning.compose_without_weights(recipe(pair, dtype=dtype))
    cost = planning.serving_cost(model.config, context=LENGTH)
    weights = sum(weight.numel() for weight in model.parameters())
    assert planning.serving_memory(model, cost, 1, 1)["weights"] == 2 * weights
    full = planning.compose_without_weights(recipe(pair, dtype="float32"))
    assert planning.serving_cost(full.config, context=LENGTH).cache == 2 * cost.cache


def test_several_models_and_their_precision(pair: tuple[str, str]) -> None:
    both = {"a": pair[1], "b": pair[1]}
    changes = {"augmenting": both, "dtype": "bfloat16", "width": 12}
    model = planning.compose_without_weights(recipe(pair, **changes))
    assert list(model.augmenting) == ["a", "b"]
    assert all(weight.is_meta for weight in model.parameters())
    assert model.anchor.dtype == torch.bfloat16
    assert model.model.bridge_config.width == 12
    cost = planning.training_cost(model.config, batch_size=1, length=8, checkpointing=False)
    assert cost.forward > 0


@pytest.mark.parametrize("text", ["", "80", "8x", "0x80GB", "8x0GB", "8 x 80GB", "eightx80GB"])
def test_devices_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="such as 8x80GB"):
        planning.parse_devices(text, flops=1, link=1)


def test_devices_are_read() -> None:
    devices = planning.parse_devices("8x80GB", flops=2, link=3)
    assert (devices.count, devices.memory) == (8, 80 * 10**9)
    assert planning.parse_devices("0.5GB", flops=1, link=1).memory == 5 * 10**8
    for name, change in {"tflops": {"flops": 0.0}, "link": {"link": -1.0}}.items():
        with pytest.raises(ValueError, match=f"{name} must be more than 0"):
            planning.parse_devices("8x80GB", **{"flops": 1.0, "link": 1.0} | change)


@pytest.mark.parametrize("name", ["batch_size", "length", "context", "requests"])
def test_work_is_refused(name: str) -> None:
    work: dict[str, Any] = {
        "batch_size": 1,
        "length": 1,
        "context": 1,
        "requests": 1,
        "checkpointing": False,
    }
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        planning.Work(**work | {name: 0})


def test_shapes_are_those_of_the_llamas() -> None:
    """Parameters as their model cards have them, in billions."""
    sizes = {"llama-1b": 1.24, "llama-8b": 8.03, "llama-70b": 70.6, "llama-405b": 405.9}
    folder = Path(__file__).parents[1] / "benchmarks" / "shapes"
    assert {path.name for path in folder.iterdir()} == set(sizes)
    for name, billions in sizes.items():
        config = json.loads((folder / name / "config.json").read_text())
        heads, width = config["num_attention_heads"], config["hidden_size"]
        head_dim = config.get("head_dim", width // heads)
        keys = config["num_key_value_heads"] * head_dim
        layer = 2 * width * (heads * head_dim + keys) + 3 * width * config["intermediate_size"]
        vocabularies = 1 if config["tie_word_embeddings"] else 2
        total = config["num_hidden_layers"] * layer + vocabularies * width * config["vocab_size"]
        assert total / 1e9 == pytest.approx(billions, rel=0.004)
