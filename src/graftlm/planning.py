"""What a composition will cost, counted before a single weight is there.

The composed model is built from configurations alone and run on tensors without storage
(`FakeTensorMode`): every matrix product is counted and every tensor kept for the backward pass is
weighed, whatever the architecture. Attention is counted over all pairs of tokens, as torch counts
it; kernels that skip what a causal mask hides do half of that. Only the time is a formula.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)
from transformers import AutoConfig, PreTrainedModel

from graftlm import decoder, gguf
from graftlm.causal_lm import ComposedForCausalLM
from graftlm.config import ComposedConfig
from graftlm.loading import compose
from graftlm.recipe import Recipe
from graftlm.sizes import part_sizes, unloaded, without_weights

GIGA = 10**9


def attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Of the CPU's fused attention, which torch's counter does not know; arguments are shapes."""
    return sdpa_flop_count(query, key, value)


def attention_backward_flops(
    gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any
) -> int:
    """Of its backward pass, which makes the scores again."""
    return sdpa_backward_flop_count(gradient, query, key, value)


def experts_flops(tokens: Any, weights: Any, *_: Any, **__: Any) -> int:
    """Of the experts' product, each token with the experts it goes to; arguments are shapes."""
    return 2 * math.prod(tokens) * weights[-1]


FUSED = {
    torch.ops.aten._grouped_mm: experts_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
}


def flop_counter() -> FlopCounterMode:
    """A counter that knows fused attention and experts too."""
    return FlopCounterMode(display=False, custom_mapping=FUSED)


@contextmanager
def without_storage() -> Iterator[None]:
    """Tensors made here have shapes, but no storage.

    Raises:
        ValueError: If a model runs operations that need more than shapes.
    """
    try:
        with FakeTensorMode():
            yield
    except (RuntimeError, NotImplementedError) as error:
        raise ValueError(
            f"the models cannot be counted without weights ({error}); mixtures of experts can in "
            "bfloat16: --dtype bfloat16"
        ) from error


@dataclass(frozen=True, kw_only=True, slots=True)
class Devices:
    """The machines to plan for.

    Args:
        count: How many.
        memory: Bytes of each.
        flops: What each sustains in the precision of the models, per second.
        link: Bytes per second that each receives from the others.
    """

    count: int
    memory: int
    flops: float
    link: float


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingCost:
    """One training step of one device.

    Args:
        forward, backward: Floating-point operations, two for each multiply-add.
        kept: Bytes kept from the forward to the backward pass; a little too many, because
            without storage nobody sees that a causal mask is plain and need not be kept.
        passing: Bytes besides that at the worst moment: the logits' gradient in float32 and
            bfloat16, and with checkpointing what one layer keeps while it is computed again.
    """

    forward: int
    backward: int
    kept: int
    passing: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ServingCost:
    """Generation with full contexts.

    Args:
        prefill, token: Floating-point operations for a context, and for one token behind it.
        cache: Bytes of one context's keys and values, the bridges' included.
    """

    prefill: int
    token: int
    cache: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What is asked of the composed model.

    Args:
        batch_size: Training examples of one device at a time.
        length: Tokens of each.
        checkpointing: Whether layers are computed again in the backward pass.
        context: Tokens of a request when serving.
        requests: How many are served at once.
    """

    batch_size: int
    length: int
    checkpointing: bool
    context: int
    requests: int

    def __post_init__(self) -> None:
        for name in ("batch_size", "length", "context", "requests"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What a composition takes.

    Args:
        memory: Bytes on each device, by layout and part.
        seconds: Of a training step, by layout.
    """

    training: TrainingCost
    serving: ServingCost
    memory: dict[str, dict[str, int]]
    seconds: dict[str, float]


def make_plan(model: ComposedForCausalLM, work: Work, devices: Devices) -> Plan:
    """Count everything.

    Args:
        model: A composed model without weights.
        work: What is asked of it.
        devices: Where it will run.
    """
    dtype = next(model.bridges.parameters()).dtype
    training = training_cost(
        model.config,
        batch_size=work.batch_size,
        length=work.length,
        checkpointing=work.checkpointing,
        bridge_dtype=dtype,
    )
    serving = serving_cost(model.config, context=work.context)
    number = devices.count
    memory = {"training, whole copies": training_memory(model, training, 1)}
    seconds = {"whole copies": step_seconds(model, training, devices, is_sharded=False)}
    if number > 1:
        memory[f"training, sharded over {number}"] = training_memory(model, training, number)
        seconds["sharded"] = step_seconds(model, training, devices, is_sharded=True)
    layout = "serving" if number == 1 else f"serving, spread over {number}"
    memory[layout] = serving_memory(model, serving, work.requests, number)
    return Plan(training=training, serving=serving, memory=memory, seconds=seconds)


def parse_devices(text: str, *, flops: float, link: float) -> Devices:
    """Devices from words like "8x80GB".

    Raises:
        ValueError: If they are written in another way.
    """
    found = re.fullmatch(r"(?:(\d+)x)?(\d+(?:\.\d+)?)GB", text.strip(), re.IGNORECASE)
    count = int(found[1] or 1) if found else 0
    if found is None or count == 0 or float(found[2]) == 0:
        raise ValueError(
            f"devices is {text!r}, but must be a number of devices and the memory of each, such "
            "as 8x80GB"
        )
    for name, number in {"tflops": flops, "link": link}.items():
        if number <= 0:
            raise ValueError(f"{name} must be more than 0, got {number:g}")
    return Devices(count=count, memory=round(float(found[2]) * GIGA), flops=flops, link=link)


# ---- the model without weights -----------------------------------------------------------


def compose_without_weights(recipe: Recipe) -> ComposedForCausalLM:
    """What `compose` makes of a recipe's models, on the meta device.

    Raises:
        ValueError: If the recipe asks for what is not counted.
    """
    for name, counted in {"alignment": "auto", "reads": "sequence"}.items():
        if getattr(recipe, name) != counted:
            raise ValueError(
                f"{name} is {getattr(recipe, name)!r}, but plan counts as if every model read "
                f"every token of the anchor; leave {name} out"
            )
    named = recipe.augmenting
    named = named if isinstance(named, Mapping) else {"augmenting": named}

    def bare(name: str, role: str) -> PreTrainedModel:
        config = AutoConfig.from_pretrained(gguf.resolve(name))
        if recipe.dtype != "auto":
            config.dtype = getattr(torch, recipe.dtype)
        if config.dtype == torch.float16:  # as many bytes, and its range is not looked at
            config.dtype = torch.bfloat16
        config.name_or_path = ""  # whose tokenizer is not asked for
        with torch.device("meta"):
            return without_weights(config, role)

    return compose(
        bare(recipe.anchor, "the anchor"),
        {name: bare(base, f"augmenting model {name!r}") for name, base in named.items()},
        **recipe.compose_options() | {"dtype": "auto"},
    )


def give_fakes(model: ComposedForCausalLM) -> ComposedForCausalLM:
    """Put a tensor without storage in the place of each; call inside `without_storage`."""
    fakes: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in fakes:  # tied weights stay tied
            made = torch.empty(tensor.shape, dtype=tensor.dtype)
            is_weight = isinstance(tensor, nn.Parameter)
            fakes[id(tensor)] = (
                nn.Parameter(made, requires_grad=tensor.requires_grad) if is_weight else made
            )
        return fakes[id(tensor)]

    with torch.no_grad():
        originals = [*model.parameters(), *model.buffers()]  # alive, so that no id is used twice
        for module in model.modules():
            tables: Any = (module._parameters, module._buffers)
            for tensors in tables:
                for name, tensor in tensors.items():
                    if tensor is not None:
                        tensors[name] = fake(tensor)
        del originals
    return model


def training_cost(
    config: ComposedConfig,
    *,
    batch_size: int,
    length: int,
    checkpointing: bool,
    bridge_dtype: torch.dtype = torch.float32,
) -> TrainingCost:
    """Count one training step.

    Args:
        config: What is composed.
        batch_size: Examples of one device.
        length: Tokens of each.
        checkpointing: Whether layers are computed again in the backward pass.
        bridge_dtype: Of the bridges, and so of their optimizer.
    """
    model = unloaded(config, bridge_dtype)
    with without_storage():
        give_fakes(model).train()
        plain = run_step(model, batch_size, length)
        cost = plain
        if checkpointing:
            model.activation_checkpointing_enable()
            cost = run_step(model, batch_size, length)
    first = min(connection.anchor_layer for connection in config.connections)
    layers = config.num_hidden_layers - first
    again = (plain.kept - cost.kept) // layers if checkpointing else 0
    return TrainingCost(
        forward=cost.forward,
        backward=cost.backward,
        kept=cost.kept,
        passing=cost.passing + again,
    )


def run_step(model: ComposedForCausalLM, batch_size: int, length: int) -> TrainingCost:
    """Run forward and backward on tensors without storage, and count."""
    input_ids = torch.zeros(batch_size, length, dtype=torch.long)
    weights = {id_of(weight) for weight in model.parameters()}
    kept: dict[int, Tensor] = {}

    def weigh(tensor: Tensor) -> Tensor:
        if id_of(tensor) not in weights:
            kept[id_of(tensor)] = tensor
        return tensor

    with flop_counter() as counter:
        with saved_tensors_hooks(weigh, lambda tensor: tensor):
            loss = model(input_ids=input_ids, labels=input_ids).loss
        forward, kept_bytes = counter.get_total_flops(), storage_bytes(kept)
        loss.backward()
    model.zero_grad(set_to_none=True)
    logits = batch_size * length * model.config.vocab_size
    return TrainingCost(
        forward=forward,
        backward=counter.get_total_flops() - forward,
        kept=kept_bytes,
        passing=logits * (4 + model.dtype.itemsize),
    )


def serving_cost(config: ComposedConfig, *, context: int) -> ServingCost:
    """Count a prefill of one row and one token behind it, and weigh the cache."""
    model = unloaded(config, torch.float32)
    model.bridges.to(model.anchor.dtype)  # trained ones need no more
    with without_storage(), torch.no_grad():
        give_fakes(model).eval()
        prompt = torch.zeros(1, context, dtype=torch.long)
        with flop_counter() as prefill:
            cache = model(input_ids=prompt, use_cache=True, logits_to_keep=1).past_key_values
        size = storage_bytes({id_of(tensor): tensor for tensor in tensors_of(cache.layers)})
        with flop_counter() as token:
            model(input_ids=prompt[:, :1], past_key_values=cache)
    return ServingCost(prefill=prefill.get_total_flops(), token=token.get_total_flops(), cache=size)


def id_of(tensor: Tensor) -> int:
    """Names the storage of a tensor; views share it."""
    return tensor.untyped_storage()._cdata


def storage_bytes(tensors: dict[int, Tensor]) -> int:
    """Bytes of storages that are all different."""
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors.values())


def tensors_of(layers: Iterable[object]) -> list[Tensor]:
    """What the layers of a cache hold."""
    found: list[Tensor] = []
    for layer in layers:
        for value in vars(layer).values():
            values = value.values() if isinstance(value, dict) else [value]
            found += [tensor for tensor in values if isinstance(tensor, Tensor)]
    return found


# ---- what fits ---------------------------------------------------------------------------


def training_memory(
    model: ComposedForCausalLM, cost: TrainingCost, num_devices: int
) -> dict[str, int]:
    """Bytes on each device that trains, with weights and optimizer sharded over the devices.

    Args:
        model: The composed model, without weights.
        cost: Of a step of one device.
        num_devices: 1 for whole copies (DDP).
    """
    bridges = part_sizes(model)["bridges"].num_bytes
    memory = {
        "frozen models": frozen_bytes(model) // num_devices,
        "bridges, gradients, AdamW": 4 * bridges // num_devices,
        "kept for the backward pass": cost.kept,
        "passing": cost.passing,
    }
    if num_devices > 1:
        memory["largest layer, gathered twice"] = 2 * largest_unit(model)
    return memory


def serving_memory(
    model: ComposedForCausalLM, cost: ServingCost, requests: int, num_devices: int
) -> dict[str, int]:
    """Bytes on each device that serves, layers spread over the devices (`device_map`)."""
    trained = sum(weight.numel() for weight in model.bridges.parameters())
    weights = frozen_bytes(model) + trained * model.dtype.itemsize
    return {
        "weights": weights // num_devices,
        f"caches of {requests} contexts": requests * cost.cache // num_devices,
    }


def frozen_bytes(model: ComposedForCausalLM) -> int:
    """Bytes of the models that are composed."""
    return sum(size.num_bytes for name, size in part_sizes(model).items() if name != "bridges")


def largest_unit(model: ComposedForCausalLM) -> int:
    """Bytes of the largest part that is gathered whole: a layer, a bridge or the embedding."""
    units: list[nn.Module] = [*model.bridges]
    for base in (model.anchor, *model.augmenting.values()):
        units += [*decoder.layer_list(base), base.get_input_embeddings()]
    return max(sum(w.numel() * w.element_size() for w in unit.parameters()) for unit in units)


def step_seconds(
    model: ComposedForCausalLM, cost: TrainingCost, devices: Devices, *, is_sharded: bool
) -> float:
    """Seconds of a step: the longer of computing it and of what the devices exchange.

    Whole copies exchange gradients of the bridges; sharded weights are gathered for the forward
    pass and, at most all of them, again for the backward pass.
    """
    bridges = part_sizes(model)["bridges"].num_bytes
    exchanged = 2 * (frozen_bytes(model) + bridges if is_sharded else bridges)
    elsewhere = (devices.count - 1) / devices.count
    computing = (cost.forward + cost.backward) / devices.flops
    return max(computing, exchanged * elsewhere / devices.link)
