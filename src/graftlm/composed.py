"""The composed model: run the augmenting models, then the anchor with the bridges attached."""

import uuid
import weakref
from collections import defaultdict
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, StaticCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from graftlm import decoder
from graftlm.augmenting_tokens import AugmentingTokens, ReadingCache
from graftlm.bases import role_of
from graftlm.bridge import Bridge
from graftlm.cache import ComposedCache, is_empty
from graftlm.config import ComposedConfig, Connection
from graftlm.frozen_states import entering_view, take_states
from graftlm.growing_cache import let_grow
from graftlm.masks import skips_holes
from graftlm.own_tokens import has_reader, run_reader
from graftlm.packing import keep_unpacked
from graftlm.passes import (
    ForwardPass,
    Hooks,
    PassInputs,
    connections_off,
    part_of,
    scales_here,
    show_scopes,
)
from graftlm.reading import Reader
from graftlm.shared_tokens import run_shared


class ComposedPreTrainedModel(PreTrainedModel):
    """What the composed models share with transformers."""

    config: ComposedConfig  # pyrefly: ignore[bad-override-mutable-attribute]
    config_class = ComposedConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    # There is no attention here but the bridges'; the bases know what they support.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True
    _no_split_modules = ["Bridge"]  # noqa: RUF012 (transformers assigns it per instance)

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: bridges draw their own weights, and the bases come with theirs."""

    def init_weights(self) -> None:
        """Nothing, for the same reason; tying a base's weights anew would undo a device map."""

    @property
    def device(self) -> torch.device:  # pyrefly: ignore[bad-override]
        """Where `input_ids` go; offloaded weights are nowhere between two passes."""
        return decoder.device_of(self.get_input_embeddings())

    def get_input_embeddings(self) -> nn.Module:
        """The anchor's."""
        anchor: Any = self.anchor
        return anchor.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the anchor's."""
        anchor: Any = self.anchor
        anchor.set_input_embeddings(value)


class ComposedModel(ComposedPreTrainedModel):
    """A frozen anchor, frozen augmenting models and the bridges between them, without a head.

    Args:
        config: What is connected, and how.
        anchor: The anchor, a causal language model. Its parameters are frozen.
        augmenting: The augmenting models by name, frozen too.
    """

    gradient_checkpointing = False

    def __init__(
        self,
        config: ComposedConfig,
        anchor: PreTrainedModel,
        augmenting: Mapping[str, PreTrainedModel],
    ):
        super().__init__(config)
        self.bridge_config = config.bridge.resolve(
            decoder.hidden_size(anchor), decoder.num_heads(anchor.config)
        )
        assert self.bridge_config.num_heads is not None
        self.num_bridge_heads = self.bridge_config.num_heads
        for name, base in {"anchor": anchor, **augmenting}.items():
            keep_unpacked(base, role_of(name))
            base.requires_grad_(False).eval()
            for module in base.modules():
                vars(module)["_is_hf_initialized"] = True  # else post_init draws new weights
        self.anchor = anchor
        # Direct children: transformers looks for tied weights and split rules only there.
        for name, model in augmenting.items():
            self.add_module(f"augmenting_{name}", model)
        self.bridges = nn.ModuleList(
            Bridge(
                anchor_size=decoder.hidden_size(anchor),
                augmenting_size=decoder.hidden_size(augmenting[connection.augmenting]),
                config=self.bridge_config,
                index=index,
            ).to(decoder.device_of(decoder.layer_list(anchor)[connection.anchor_layer]))
            for index, connection in enumerate(config.connections)
        )
        self.readers: dict[str, Reader] = {}
        self.hooks = Hooks(uuid.uuid4().hex)
        self.scope_key = uuid.uuid4().hex  # what `anchor_only`, `without` and `scaled` are about
        self.layer_output: tuple[type, int] | None = None  # see `frozen_states.layer_output`
        self._views: dict[str, tuple[list[nn.Module], PreTrainedModel]] = {}
        self.entering_views: dict[str, tuple[list[nn.Module], PreTrainedModel]] = {}
        self.attach_hooks()
        # The user's anchor outlives us; our hooks must not.
        weakref.finalize(self, self.hooks.remove)
        self.post_init()

    # ---- parts ---------------------------------------------------------------------------

    @property
    def augmenting(self) -> Mapping[str, PreTrainedModel]:
        """The augmenting models by name."""
        return MappingProxyType(
            {name: getattr(self, f"augmenting_{name}") for name in self.config.augmenting_configs}
        )

    def running_view(self, name: str) -> PreTrainedModel:
        """The augmenting model as it is run: headless, and ended at its highest connected layer."""
        model = self.augmenting[name]
        layers = list(decoder.layer_list(model))
        known, view = self._views.get(name, ([], None))
        if (
            view is None
            or any(a is not b for a, b in zip(known, layers, strict=True))
            # The layers are told by the model's configuration, masks are made by the view's.
            or decoder.implementations(view) != decoder.implementations(model)
        ):
            highest = max(
                c.augmenting_layer for c in self.config.connections if c.augmenting == name
            )
            view = decoder.shorten(model, highest + 1)
            self._views[name] = layers, view
        return view

    def indices_of(self, connections: Iterable[Connection]) -> set[int]:
        """Where these connections, and their bridges, are among all.

        Raises:
            ValueError: If there is no such connection.
        """
        known, indices = self.config.connections, set()
        for connection in connections:
            if connection not in known:
                raise ValueError(
                    f"there is no {connection}; config.connections lists the {len(known)} there are"
                )
            indices.add(known.index(connection))
        return indices

    def scale_of(self, name: str) -> float:
        """What multiplies an augmenting model's updates: `scaled`'s factor, else the saved one."""
        return scales_here.get().get((self.scope_key, name), self.config.scales[name])

    def is_off(self, index: int) -> bool:
        """Whether a connection is switched off by `ComposedForCausalLM.without`."""
        return (self.scope_key, index) in connections_off.get()

    def is_read(self, name: str) -> bool:
        """Whether anything is read of an augmenting model; else it is not run."""
        return self.scale_of(name) != 0 and not all(
            self.is_off(i) for i, c in enumerate(self.config.connections) if c.augmenting == name
        )

    def attach_hooks(self) -> None:
        """Put our hooks on the layers that are connected, unless they are there."""
        places: dict[str, set[int]] = defaultdict(set)
        for connection in self.config.connections:
            places["anchor"].add(connection.anchor_layer)
            places[connection.augmenting].add(connection.augmenting_layer)
        for name, indices in places.items():
            model = self.anchor if name == "anchor" else self.augmenting[name]
            self.hooks.attach(name, decoder.layer_list(model), sorted(indices))

    def __getstate__(self) -> dict[str, Any]:
        """Views are rebuilt where they are needed; a copy must not run the original's layers."""
        return self.__dict__ | {"_views": {}, "entering_views": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy shares the hooks' key, which is in the layers, but is switched on its own."""
        super().__setstate__(state | {"scope_key": uuid.uuid4().hex})

    def train(self, mode: bool = True) -> "ComposedModel":
        """Train the bridges; the frozen models stay in evaluation mode.

        With gradient checkpointing the anchor's layers alone (not what is inside them) are
        marked as training, because transformers checkpoints no others.
        """
        self.training = mode
        self.bridges.train(mode)
        for base in (self.anchor, *self.augmenting.values()):
            base.eval()
        if mode and self.gradient_checkpointing:
            for layer in decoder.layer_list(self.anchor):
                layer.training = isinstance(layer, GradientCheckpointingLayer)
        for adapter in decoder.trainable_adapters(self.anchor):
            adapter.train(mode)
        return self

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> "ComposedModel":
        """The composed model inside a checkpoint, as `ComposedForCausalLM` loads it."""
        from graftlm.causal_lm import ComposedForCausalLM  # which is built around this class

        return ComposedForCausalLM.from_pretrained(*args, **kwargs).model

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Refused: checkpoints are made by the model with the head.

        Raises:
            TypeError: Always.
        """
        raise TypeError("a ComposedModel cannot be saved; save the ComposedForCausalLM around it")

    # ---- caches --------------------------------------------------------------------------

    def compose_cache(self, anchor_cache: Cache, max_cache_len: int | None = None) -> ComposedCache:
        """The composed cache around an empty cache of the anchor."""
        views = {name: self.running_view(name) for name in self.augmenting}
        return ComposedCache.around(
            anchor_cache,
            {name: view.config for name, view in views.items() if not has_reader(self, name)},
            {
                name: ReadingCache(view.config, by_row=not skips_holes(view))
                for name, view in views.items()
                if has_reader(self, name)
            },
            {
                name: [i for i, c in enumerate(self.config.connections) if c.augmenting == name]
                for name in views
            },
            max_cache_len,
        )

    def resolve_cache(
        self, cache: Cache | None, use_cache: bool, static_length: int = 0
    ) -> ComposedCache | None:
        """The cache to use in one forward pass: the caller's, a new one, or none.

        Args:
            cache: The caller's.
            use_cache: Whether to make one if there is none.
            static_length: Tokens a static cache must hold, where known; an anchor with nothing
                but sliding windows reports the window.

        Raises:
            ValueError: If the caller's cache was filled by the anchor alone.
        """
        if cache is None:
            if not use_cache:
                return None
            made = DynamicCache(config=self.config.get_text_config())
            return self.compose_cache(let_grow(made))
        if isinstance(cache, ComposedCache):
            return cache
        if not is_empty(cache):
            raise ValueError(
                f"past_key_values is a {type(cache).__name__} that holds tokens already, but a "
                "composed model continues only from a cache it made itself; pass the "
                "past_key_values it returned, or none"
            )
        if not isinstance(cache, StaticCache):
            return self.compose_cache(cache)
        return self.compose_cache(cache, max(cache.get_max_length(), static_length))

    # ---- one pass ------------------------------------------------------------------------

    def begin(self, inputs: PassInputs, cache: ComposedCache | None) -> ForwardPass:
        """Run the augmenting models and prepare what the bridges need."""
        if inputs.input_ids is None:
            raise ValueError(
                "input_ids is None, but the augmenting models read tokens; pass input_ids, "
                "not inputs_embeds"
            )
        mask = inputs.attention_mask
        if isinstance(mask, Tensor) and mask.dim() != 2:
            raise ValueError(
                f"attention_mask has {mask.dim()} axes, but must be (batch, sequence) "
                "with 1 for tokens and 0 for padding"
            )
        if not torch.compiler.is_compiling():
            self.attach_hooks()
            show_scopes()
        forward_pass = ForwardPass(self.hooks.key, self, cache, observed=inputs.observed)
        if inputs.frozen_states is not None:
            shape = inputs.input_ids.shape
            take_states(self, forward_pass, "anchor", inputs.frozen_states, shape)
        for name in self.augmenting:
            if not self.is_read(name):
                continue
            if has_reader(self, name):
                run_reader(self, forward_pass, name, inputs)
            else:
                run_shared(self, forward_pass, name, inputs)
        forward_pass.running = "anchor"
        return forward_pass

    def capture(self, forward_pass: ForwardPass, name: str, arguments: dict[str, Any]) -> None:
        """Run one augmenting model; its hooks keep the hidden states we read."""
        view = self.running_view(name)
        forward_pass.running = name
        with forward_pass, torch.no_grad():
            view(**move_to_device(arguments, decoder.device_of(view.get_input_embeddings())))
        if view.dtype == torch.float16 and not torch.compiler.is_compiling():
            check_finite(forward_pass, name)

    def apply_bridges(
        self,
        forward_pass: ForwardPass,
        layer: int,
        hidden_states: Float[Tensor, "batch seq d_anchor"],
    ) -> Float[Tensor, "batch seq d_anchor"]:
        """Add the updates of all bridges of one anchor layer, all asked with the same states."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            # Reentrant checkpointing needs an input that requires grad. Below the first bridge
            # nothing does, so that nothing is lost by making it a leaf.
            needs_leaf = not hidden_states.requires_grad
            hidden_states = hidden_states.detach().requires_grad_() if needs_leaf else hidden_states
        result = hidden_states
        cache = None if forward_pass.cache is None else forward_pass.cache.bridges
        observed = forward_pass.observed
        for index, connection in enumerate(self.config.connections):
            name = connection.augmenting
            if connection.anchor_layer != layer or name not in forward_pass.plan:
                continue
            is_off = self.is_off(index)
            if is_off and cache is None:
                continue
            states = forward_pass.states.get((name, connection.augmenting_layer))
            updates = []
            for rows, alignment in forward_pass.plan[name]:
                update = self.bridges[index](
                    hidden_states[:, rows],
                    states,
                    cross_mask=alignment.cross_mask,
                    query_positions=alignment.query_positions,
                    key_positions=alignment.new_key_positions,
                    past_key_values=cache,
                    record=observed and observed.recorder(index, alignment.any_visible),
                )
                if alignment.any_visible is not None:
                    update = torch.where(alignment.any_visible.to(update.device), update, 0.0)
                updates.append(update)
                states = None  # the first block has put them into the cache
            if is_off:  # it ran for its keys and values, so that all caches have read as much
                continue
            update = updates[0] if len(updates) == 1 else torch.cat(updates, dim=1)
            scale = self.scale_of(name)
            update = update if scale == 1 else update * scale
            if observed is not None:
                observed.add_update(index, hidden_states, update)
            result = result + update
        return result

    def run(
        self,
        part: PreTrainedModel,
        inputs: PassInputs,
        *,
        past_key_values: Cache | None,
        use_cache: bool | None,
        options: dict[str, Any],
    ) -> Any:
        """Run the anchor, or its trunk, with the bridges attached.

        Raises:
            RuntimeError: If a bridged layer did not run; its bridge would be skipped silently.
        """
        if use_cache is None:
            # What was prepared for whole rows is not for reading on.
            prepared = inputs.augmenting_inputs is not None or inputs.frozen_states is not None
            use_cache = not self.training and not prepared
            use_cache = use_cache and getattr(self.config.get_text_config(), "use_cache", True)
        cache = self.resolve_cache(past_key_values, use_cache)
        if inputs.frozen_states is not None:
            check_frozen(cache, options, self.config.get_text_config())
        forward_pass = self.begin(inputs, cache)
        assert inputs.input_ids is not None
        if inputs.frozen_states is not None:
            part = entering_view(self, part)
        arguments = decoder.call_arguments(
            part,
            attention_mask=part_of(inputs.attention_mask, "anchor"),
            query_length=inputs.input_ids.shape[1],
            cache=None if cache is None else cache.anchor,
            position_ids=inputs.position_ids,
            **options,
        )
        with forward_pass:
            output = part(input_ids=inputs.input_ids, return_dict=True, **arguments)
        if cache is not None:
            cache.advance(inputs.input_ids.shape[1])
        expected = len({connection.anchor_layer for connection in self.config.connections})
        if forward_pass.bridged != expected:
            raise RuntimeError(
                f"{forward_pass.bridged} of {expected} bridged anchor layers ran, so the output "
                "would miss bridges; was a layer replaced or skipped during the forward pass?"
            )
        return with_cache(output, cache)

    def forward(
        self,
        input_ids: Int[Tensor, "batch seq"] | None = None,
        attention_mask: Tensor | dict[str, Tensor | None] | None = None,
        position_ids: Int[Tensor, "#batch seq"] | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        prompt_mask: Int[Tensor, "batch prompt_seq"] | None = None,
        read_ids: Int[Tensor, "batch seq"] | None = None,
        augmenting_inputs: Mapping[str, AugmentingTokens] | None = None,
        frozen_states: Mapping[str, Tensor] | None = None,
        return_dict: bool | None = None,
        **options: Any,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """The anchor's last hidden states, with the bridges attached.

        Arguments are those of `ComposedForCausalLM.forward`.
        """
        output = self.run(
            decoder.trunk(self.anchor),
            PassInputs(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                prompt_mask=prompt_mask if self.config.reads == "prompt" else None,
                read_ids=read_ids,
                augmenting_inputs=augmenting_inputs,
                frozen_states=frozen_states,
            ),
            past_key_values=past_key_values,
            use_cache=use_cache,
            options=options,
        )
        return output.to_tuple() if return_dict is False else output


def check_frozen(
    cache: ComposedCache | None, options: Mapping[str, Any], config: PreTrainedConfig
) -> None:
    """Refuse what given hidden states cannot serve.

    Raises:
        ValueError: If a cache would miss the layers that are not run, or their output is asked for.
    """
    of_all_layers = ("output_hidden_states", "output_attentions", "output_router_logits")
    unseen = [name for name in of_all_layers if options.get(name, getattr(config, name, False))]
    if cache is not None:
        unseen.append("use_cache")
    if unseen:
        raise ValueError(
            f"{unseen[0]} is on, but with frozen_states the lower layers of the anchor are not "
            "run; leave out one of the two"
        )


def check_finite(forward_pass: ForwardPass, name: str) -> None:
    """Refuse hidden states beyond what float16 holds; they would make every logit NaN.

    Raises:
        ValueError: Naming the model and the layer.
    """
    for (read_from, layer), states in forward_pass.states.items():
        if read_from == name and not bool(states.isfinite().all()):
            raise ValueError(
                f"hidden states of augmenting model {name!r} at layer {layer} are beyond the range "
                "of float16; load it in bfloat16 or float32 (dtype=)"
            )


def move_to_device(arguments: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The arguments of a call to a model that may live on another device."""

    def moved(value: Any) -> Any:
        if isinstance(value, dict):  # masks, by kind of attention
            return move_to_device(value, device)
        return value.to(device) if isinstance(value, Tensor) else value

    return {name: moved(value) for name, value in arguments.items()}


def with_cache(output: Any, cache: ComposedCache | None) -> Any:
    """The anchor's output, holding the composed cache instead of the anchor's."""
    if "past_key_values" in type(output).__dataclass_fields__:
        output.past_key_values = cache
        return output
    # Recurrent anchors return their own kind of output, which has no place for our cache.
    fields = {name: output.get(name) for name in ("hidden_states", "attentions")}
    if "logits" in output:
        return CausalLMOutputWithPast(
            loss=output.get("loss"), logits=output.logits, past_key_values=cache, **fields
        )
    return BaseModelOutputWithPast(
        last_hidden_state=output.last_hidden_state, past_key_values=cache, **fields
    )


AutoModel.register(ComposedConfig, ComposedModel, exist_ok=True)
