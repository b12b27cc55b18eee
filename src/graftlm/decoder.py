"""Hugging Face models: where their layers are, what they can do, and how to call them.

No table per family: every decoder has exactly one list of `num_hidden_layers` layers, and the
signature of its `forward` says what it takes.
"""

import copy
import functools
import inspect
import sys
import types
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from graftlm.errors import UnsupportedModelError
from graftlm.sharding import num_elements

# Families whose layers or caches do not have the shape the method needs.
UNSUPPORTED = {
    "gemma3n": "its layers hand on four parallel streams (AltUp) instead of one residual stream",
    "deepseek_v4": "its layers hand on several parallel streams instead of one residual stream",
    "minimax": "it keeps its own kind of cache",
    "xlstm": "it keeps its own kind of cache",
    "rwkv": "its state is not a cache that transformers' generate can hold",
    "openai-gpt": "it has no KV cache",
    "graftlm": "it is composed already; compose all augmenting models with its anchor at once",
}


# Families whose recurrent state is an attribute of their layers, whatever cache they are given.
STATE_IN_MODEL = {"recurrent_gemma"}


def check_decoder(model: nn.Module, role: str) -> None:
    """Refuse, in one sentence, what cannot be composed.

    Args:
        model: The model.
        role: How the message names it, such as "the anchor".

    Raises:
        UnsupportedModelError: If it is not a text decoder with one stack of layers.
    """
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"{role} is a {type(model).__name__}, but must be a transformers PreTrainedModel, a "
            "path or a hub id"
        )
    kind, name = model.config.model_type, type(model).__name__
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"{role} is {name}, an encoder-decoder, but graftlm composes decoder-only models"
        )
    if kind in UNSUPPORTED or kind.removesuffix("_text") in UNSUPPORTED:
        why = UNSUPPORTED.get(kind) or UNSUPPORTED[kind.removesuffix("_text")]
        raise UnsupportedModelError(f"{role} is {name}, which graftlm cannot compose: {why}")
    if model.config.get_text_config() is not model.config:
        raise UnsupportedModelError(
            f"{role} is {name}, a model of several modalities, but graftlm composes text "
            "decoders; load its text model alone"
        )
    if is_encoder(model):
        raise UnsupportedModelError(
            f"{role} is {name}, an encoder whose positions see later tokens, but graftlm composes "
            "decoders"
        )
    layer_list(model, role)


def is_encoder(model: PreTrainedModel) -> bool:
    """Whether positions see later tokens: such a model keeps no cache, or its settings say so."""
    inner, config = trunk(model), text_config(model.config)
    forward = type(inner).forward
    takes_cache = declares(forward, "past_key_values") or declares(forward, "cache_params")
    # GPT-NeoX has BERT's flag too, and does not use it.
    is_bert = getattr(config, "is_decoder", True) is False and hasattr(inner, "encoder")
    sees_all = (
        getattr(config, "use_bidirectional_attention", None) in (True, "all")
        or getattr(config, "is_causal", True) is False
    )
    return not takes_cache or is_bert or sees_all


def trunk(model: PreTrainedModel) -> PreTrainedModel:
    """The headless decoder inside a causal language model; itself if it is headless."""
    decoder = model.get_decoder()
    if isinstance(decoder, PreTrainedModel) and decoder is not model:
        return decoder
    # Llama 4 and ModernBERT's decoder have names by which transformers misses the trunk.
    inner = [child for child in model.children() if isinstance(child, PreTrainedModel)]
    return inner[0] if len(inner) == 1 else model


def layer_list(model: PreTrainedModel, role: str = "the model") -> nn.ModuleList:
    """The decoder layers, in order.

    Raises:
        UnsupportedModelError: If there is not exactly one such list.
    """
    layers: Any = getattr(trunk(model), layer_list_name(model, role))
    return layers


def layer_list_name(model: PreTrainedModel, role: str = "the model") -> str:
    """The name of the list of decoder layers in the trunk (`layers`, `h`, `blocks`, ...)."""
    decoder = trunk(model)
    lists = [
        name
        for name, child in decoder.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == num_layers(model)
    ]
    if len(lists) != 1:
        raise UnsupportedModelError(
            f"{role} is {type(model).__name__}, in which graftlm found {len(lists)} lists of "
            f"{num_layers(model)} decoder layers instead of one"
        )
    return lists[0]


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration that describes the decoder."""
    return config.get_text_config(decoder=True)


def num_layers(model: PreTrainedModel) -> int:
    """How many layers the decoder has."""
    return text_config(model.config).num_hidden_layers


def hidden_size(model: PreTrainedModel) -> int:
    """Width of the residual stream."""
    return text_config(model.config).hidden_size


def num_heads(config: PreTrainedConfig) -> int:
    """Attention heads of a decoder; for one without attention, heads of width 64 or so."""
    config = text_config(config)
    heads = getattr(config, "num_attention_heads", None)
    if isinstance(heads, int) and heads > 0:
        return heads
    return next(
        n for n in range(max(config.hidden_size // 64, 1), 0, -1) if config.hidden_size % n == 0
    )


def shorten(model: PreTrainedModel, length: int) -> PreTrainedModel:
    """A view of the trunk that ends after `length` layers; the model itself is not changed.

    The layers are the model's own modules; only the object that runs through them is new.
    Hybrid models keep at least their first attention layer, which their caches count by.
    """
    decoder, name = trunk(model), layer_list_name(model)
    layers, config = getattr(decoder, name), text_config(decoder.config)
    kinds = getattr(config, "layer_types", None)
    if kinds and any("attention" in kind and "linear" not in kind for kind in kinds):
        first = next(
            index
            for index, kind in enumerate(kinds)
            if "attention" in kind and "linear" not in kind
        )
        length = max(length, first + 1)
    if length >= len(layers) or not can_be_viewed(decoder):
        return decoder
    view = view_of(decoder)
    setattr(view, name, nn.ModuleList(layers[:length]))
    view.config = copy.deepcopy(decoder.config)
    if getattr(config, "hidden_size_per_layer_input", 0):
        return view  # Gemma 4 has embeddings for each of so many layers
    view.config.num_hidden_layers = length
    for per_layer in ("layer_types", "mlp_layer_types", "layers_block_type"):
        values = vars(view.config).get(per_layer)
        if values is not None:
            setattr(view.config, per_layer, values[:length])
    return view


def implementations(model: PreTrainedModel) -> tuple[str | None, str | None]:
    """How the decoder computes attention, and experts."""
    config = text_config(model.config)
    return config._attn_implementation, config._experts_implementation


def view_of(module: Any) -> Any:
    """A copy of one object over the same parts, which can be replaced in the copy alone."""
    view = copy.copy(module)
    if "forward" in vars(module):
        rebind_hooks(view)
    view._modules = dict(module._modules)
    return view


def can_be_viewed(decoder: PreTrainedModel) -> bool:
    """Whether a copy of this object would run itself: its `forward` is its class's own.

    accelerate puts its hook around that one. Whatever else is bound to the object runs the object.
    """
    own = vars(decoder)
    if "forward" not in own:
        return True
    inner = getattr(own.get("_old_forward"), "__func__", None)
    return "_hf_hook" in own and inner is type(decoder).forward


def rebind_hooks(view: PreTrainedModel) -> None:
    """Let accelerate's hook run the copy it is on now, not the object it was made for.

    The hook itself is shared, and so are the modules below with hooks of their own.
    """
    around: Any = vars(view)["forward"]  # functools.partial(accelerate's wrapper, the original)
    inner = types.MethodType(type(view).forward, view)
    vars(view)["_old_forward"] = inner
    vars(view)["forward"] = functools.update_wrapper(functools.partial(around.func, view), inner)


signature_of = functools.cache(inspect.signature)


@torch.compiler.assume_constant_result  # the compiler warns of a cached function it would trace
def declares(forward: Any, name: str) -> bool:
    """Whether a function has an argument of this name."""
    return name in signature_of(forward).parameters


@torch.compiler.assume_constant_result
def has_any_option(forward: Any) -> bool:
    """Whether a `forward` takes options it does not declare."""
    kinds = {p.kind for p in signature_of(forward).parameters.values()}
    return inspect.Parameter.VAR_KEYWORD in kinds


def takes_any_option(model: PreTrainedModel) -> bool:
    """Whether this model's `forward` passes undeclared options on, such as those of the loss."""
    return has_any_option(type(model).forward)


# Undeclared, these would travel on through **kwargs and break a model that has no use for them.
ONLY_IF_DECLARED = {"attention_mask", "position_ids", "logits_to_keep", "labels", "use_cache"}


def declared_options(model: PreTrainedModel, options: dict[str, Any]) -> dict[str, Any]:
    """The options this model's `forward` can take, without those that are None."""
    forward = type(model).forward
    anything = takes_any_option(model)
    return {
        name: value
        for name, value in options.items()
        if value is not None
        and (declares(forward, name) or (anything and name not in ONLY_IF_DECLARED))
    }


def call_arguments(
    model: PreTrainedModel,
    *,
    attention_mask: Tensor | dict[str, Tensor] | None,
    query_length: int,
    cache: Any,
    **options: Any,
) -> dict[str, Any]:
    """The arguments of one call, spelled as this model's `forward` declares them.

    Args:
        attention_mask: (batch, past + seq), or masks made by `generation_masks`.
        query_length: Tokens of this call.
        cache: This model's own cache, or None.
        options: Passed on if this model takes them.
    """
    arguments = declared_options(model, options)
    is_recurrent = is_recurrent_call(model)
    if is_recurrent and isinstance(attention_mask, Tensor):
        # State-space models mask the new tokens only; a full mask would broadcast silently.
        attention_mask = attention_mask[:, -query_length:] if query_length > 1 else None
    arguments["attention_mask"] = attention_mask
    arguments[cache_name(model)] = cache
    # Always explicit: some families do not declare it, and cache by default.
    arguments["use_cache"] = cache is not None
    return arguments


def cache_name(model: PreTrainedModel) -> str:
    """What this model's `forward` calls its cache."""
    return "cache_params" if is_recurrent_call(model) else "past_key_values"


def is_recurrent_call(model: PreTrainedModel) -> bool:
    """Whether this is a state-space model, which calls its cache `cache_params`."""
    return declares(type(model).forward, "cache_params")


def check_checkpointing(model: PreTrainedModel) -> None:
    """Refuse gradient checkpointing where it would change what the frozen layers compute.

    Raises:
        ValueError: If a layer's dropout would be turned on, naming the setting.
    """
    for layer in layer_list(model):
        for name, value in vars(layer).items():
            if "dropout" in name and isinstance(value, float) and value > 0:
                raise ValueError(
                    f"gradient checkpointing would turn on {name}={value} in the frozen layers of "
                    f"{type(model).__name__}; load it with {name}=0.0"
                )


def learned_positions(model: PreTrainedModel) -> int | None:
    """How many positions a model has vectors for; None if it computes them."""
    config = text_config(model.config)
    if not declares(type(model).forward, "position_ids") or hasattr(config, "rope_parameters"):
        return None
    return getattr(config, "max_position_embeddings", None)


def hidden_states_of(output: Any, layer_owner: str) -> Tensor:
    """The residual stream in what a decoder layer returned.

    Raises:
        UnsupportedModelError: If it is not one stream of shape (batch, seq, width).
    """
    hidden_states = output[0] if isinstance(output, (tuple, list)) else output
    if not isinstance(hidden_states, Tensor) or hidden_states.dim() != 3:
        shape = tuple(getattr(hidden_states, "shape", ()))
        raise UnsupportedModelError(
            f"a layer of {layer_owner} returned hidden states of shape {shape}, but graftlm "
            "needs one residual stream of shape (batch, sequence, width)"
        )
    return hidden_states


def with_hidden_states(output: Any, hidden_states: Tensor) -> Any:
    """What the layer returned, with its residual stream replaced."""
    if isinstance(output, (tuple, list)):
        return type(output)((hidden_states, *output[1:]))
    return hidden_states


def num_parameters(model: nn.Module) -> int:
    """How many there are, packed ones as many as they stand for; tied ones count once."""
    return sum(map(num_elements, model.parameters()))


def trainable_adapters(model: PreTrainedModel) -> list[nn.Module]:
    """PEFT's adapter layers inside a model; their dropout follows the training mode."""
    peft = sys.modules.get("peft.tuners.tuners_utils")
    if peft is None:
        return []
    return [module for module in model.modules() if isinstance(module, peft.BaseTunerLayer)]


def device_of(part: nn.Module) -> torch.device:
    """Where a part computes: where accelerate runs it, or else where its first parameter is."""
    for module in part.modules():  # the part itself first; its hook may be that of its parts only
        hook = getattr(module, "_hf_hook", None)
        for single in getattr(hook, "hooks", [hook]):
            device = getattr(single, "execution_device", None)
            if device is not None:
                return torch.device(device)
    return next(part.parameters()).device


def device_map_of(parts: dict[str, PreTrainedModel]) -> dict[str, Any] | None:
    """One device map for several models, named by their place; None if none has one."""
    merged = {
        f"{place}.{name}".rstrip("."): device
        for place, model in parts.items()
        for name, device in getattr(model, "hf_device_map", {}).items()
    }
    return merged or None
