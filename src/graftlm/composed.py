"""The composed model: run the augmenting models, then the anchor with the bridges attached."""

import copy
import os
import uuid
import weakref
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, StaticCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from graftlm import decoder
from graftlm.alignment import align, packed_segments, readable_keys
from graftlm.bases import Base, check_base, fingerprint, load_base
from graftlm.bridge import Bridge
from graftlm.cache import ComposedCache
from graftlm.checkpoint import (
    PREFIX,
    bridge_weights,
    check_names,
    read_config,
    read_weights,
    write_checkpoint,
)
from graftlm.config import ComposedConfig
from graftlm.passes import ForwardPass, Hooks, Scoped
from graftlm.tokenization import find_tokenizer


class ComposedPreTrainedModel(PreTrainedModel):
    """What both classes below share with transformers."""

    config_class = ComposedConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["Bridge"]

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: bridges draw their own weights, and the bases come with theirs."""


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
        for base in (anchor, *augmenting.values()):
            base.requires_grad_(False).eval()
            for module in base.modules():
                module._is_hf_initialized = True  # else post_init draws new weights
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
        self.hooks = Hooks(uuid.uuid4().hex)
        self._views: dict[str, tuple[list[nn.Module], PreTrainedModel]] = {}
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
        if view is None or any(a is not b for a, b in zip(known, layers, strict=True)):
            highest = max(
                c.augmenting_layer for c in self.config.connections if c.augmenting == name
            )
            view = decoder.shorten(model, highest + 1)
            self._views[name] = layers, view
        return view

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
        return self.__dict__ | {"_views": {}}

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

    def get_input_embeddings(self) -> nn.Module:
        """The anchor's."""
        return self.anchor.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the anchor's."""
        self.anchor.set_input_embeddings(value)

    # ---- caches --------------------------------------------------------------------------

    def compose_cache(self, anchor_cache: Cache, max_cache_len: int | None = None) -> ComposedCache:
        """The composed cache around an empty cache of the anchor."""
        configs = {name: self.running_view(name).config for name in self.augmenting}
        return ComposedCache.around(anchor_cache, configs, len(self.bridges), max_cache_len)

    def resolve_cache(self, cache: Cache | None, use_cache: bool) -> ComposedCache | None:
        """The cache to use in one forward pass: the caller's, a new one, or none.

        Raises:
            ValueError: If the caller's cache was filled by the anchor alone.
        """
        if cache is None:
            if not use_cache:
                return None
            return self.compose_cache(DynamicCache(config=self.config.get_text_config()))
        if isinstance(cache, ComposedCache):
            return cache
        length = cache.get_seq_length()
        if isinstance(length, int) and length > 0:
            raise ValueError(
                f"past_key_values is a {type(cache).__name__} that holds {length} tokens, but a "
                "composed model continues only from a cache it made itself; pass the "
                "past_key_values it returned, or none"
            )
        return self.compose_cache(cache, static_length(cache))

    # ---- one pass ------------------------------------------------------------------------

    def begin(
        self,
        input_ids: Int[Tensor, "batch seq"] | None,
        attention_mask: Tensor | dict[str, Tensor | None] | None,
        position_ids: Int[Tensor, "#batch seq"] | None,
        cache: ComposedCache | None,
        prompt_mask: Int[Tensor, "batch prompt_seq"] | None,
    ) -> ForwardPass:
        """Run the augmenting models and prepare what the bridges need."""
        if input_ids is None:
            raise ValueError(
                "input_ids is None, but the augmenting models read tokens; pass input_ids, "
                "not inputs_embeds"
            )
        if isinstance(attention_mask, Tensor) and attention_mask.dim() != 2:
            raise ValueError(
                f"attention_mask has {attention_mask.dim()} axes, but must be (batch, sequence) "
                "with 1 for tokens and 0 for padding"
            )
        if not torch.compiler.is_compiling():
            self.attach_hooks()
        forward_pass = ForwardPass(self.hooks.key, self, cache)
        for name in self.augmenting:
            if self.config.scales[name] != 0:
                self.run_augmenting(
                    forward_pass, name, input_ids, attention_mask, position_ids, prompt_mask
                )
        forward_pass.running = "anchor"
        return forward_pass

    def run_augmenting(
        self,
        forward_pass: ForwardPass,
        name: str,
        input_ids: Int[Tensor, "batch seq"],
        attention_mask: Tensor | dict[str, Tensor | None] | None,
        position_ids: Int[Tensor, "#batch seq"] | None,
        prompt_mask: Int[Tensor, "batch prompt_seq"] | None,
    ) -> None:
        """Capture the hidden states of the tokens one augmenting model has not seen yet."""
        cache, (batch, length) = forward_pass.cache, input_ids.shape
        is_static = isinstance(attention_mask, dict)
        past, kept, new = self.count_tokens(name, cache, length, prompt_mask, is_static)
        if new:
            view = self.running_view(name)
            self.check_vocabulary(name, view, input_ids)
            arguments = decoder.call_arguments(
                view,
                attention_mask=first_columns(part_of(attention_mask, name), new - length),
                query_length=new,
                cache=None if cache is None else cache.augmenting[name],
                position_ids=None if position_ids is None else position_ids[:, :new],
            )
            forward_pass.running = name
            with forward_pass, torch.no_grad():
                view(input_ids=input_ids[:, :new].to(view.device), **arguments)
        key_length = self.bridge_layer(cache, name).max_cache_len if is_static else kept + new
        if key_length == 0:
            return
        segments = None
        if cache is None and attention_mask is None and position_ids is not None:
            segments = packed_segments(position_ids.expand(batch, -1))
        forward_pass.plan[name] = align(
            past_length=past,
            query_length=length,
            kept_length=kept,
            new_length=new,
            key_length=key_length,
            readable=readable_keys(part_of(attention_mask, "bridges"), prompt_mask, key_length),
            segments=segments,
            position=self.config.bridge.position,
            num_heads=self.bridge_config.num_heads,
            device=input_ids.device,
        )

    def count_tokens(
        self,
        name: str,
        cache: ComposedCache | None,
        length: int,
        prompt_mask: Tensor | None,
        is_static: bool,
    ) -> tuple[int | Tensor, int | Tensor, int]:
        """Tokens before this pass, keys kept from before, and tokens still to be read."""
        prompt_only = self.config.reads == "prompt"
        prompt_length = None if prompt_mask is None else prompt_mask.shape[1]
        if cache is None:
            if prompt_only and prompt_length is not None:
                return 0, 0, min(prompt_length, length)
            return 0, 0, length
        layer = self.bridge_layer(cache, name)
        if is_static:
            # Lengths are tensors here. A prompt is read in the first, eager pass only.
            read_before = prompt_only and layer.is_initialized
            past = cache.get_seq_length() if prompt_only else layer.get_seq_length()
            return past, layer.get_seq_length(), 0 if read_before else length
        past, kept, new = int(cache.get_seq_length()), int(layer.get_seq_length()), length
        if prompt_only:
            end = prompt_length if prompt_length is not None else (0 if past else length)
            new = max(0, min(end - past, length))
        if new and kept != past:
            raise ValueError(
                f"the cache holds {past} tokens, of which augmenting model {name!r} has read "
                f"{kept}, so it cannot read on; it was switched off or reads only prompts: "
                "start with a fresh cache"
            )
        return past, kept, new

    def bridge_layer(self, cache: ComposedCache, name: str) -> Any:
        """The cache layer of the first bridge of one augmenting model."""
        index = next(i for i, c in enumerate(self.config.connections) if c.augmenting == name)
        return cache.bridges.layers[index]

    def check_vocabulary(self, name: str, view: PreTrainedModel, input_ids: Tensor) -> None:
        """Refuse token ids that an augmenting model of smaller vocabulary does not have.

        Raises:
            ValueError: Naming the id.
        """
        size = view.config.vocab_size
        if size < self.config.vocab_size and not torch.compiler.is_compiling():
            largest = int(input_ids.max())
            if largest >= size:
                raise ValueError(
                    f"input_ids holds token {largest}, but augmenting model {name!r} has tokens 0 "
                    f"to {size - 1} only; both models must share one tokenizer"
                )

    def apply_bridges(
        self,
        forward_pass: ForwardPass,
        layer: int,
        hidden_states: Float[Tensor, "batch seq d_anchor"],
    ) -> Float[Tensor, "batch seq d_anchor"]:
        """Add the updates of all bridges of one anchor layer, all asked with the same states."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            # Reentrant checkpointing needs an input that requires grad; below the first bridge
            # nothing does, so nothing is lost by making it a leaf.
            if not hidden_states.requires_grad:
                hidden_states = hidden_states.detach().requires_grad_(True)
        result = hidden_states
        cache = None if forward_pass.cache is None else forward_pass.cache.bridges
        for index, connection in enumerate(self.config.connections):
            name = connection.augmenting
            if connection.anchor_layer != layer or name not in forward_pass.plan:
                continue
            alignment = forward_pass.plan[name]
            update = self.bridges[index](
                hidden_states,
                forward_pass.states.get((name, connection.augmenting_layer)),
                cross_mask=alignment.cross_mask,
                query_positions=alignment.query_positions,
                key_positions=alignment.new_key_positions,
                past_key_values=cache,
            )
            if alignment.any_visible is not None:
                update = torch.where(alignment.any_visible.to(update.device), update, 0.0)
            scale = self.config.scales[name]
            result = result + (update if scale == 1 else update * scale)
        return result

    def run(
        self,
        part: PreTrainedModel,
        *,
        input_ids: Int[Tensor, "batch seq"] | None,
        attention_mask: Tensor | dict[str, Tensor | None] | None,
        position_ids: Int[Tensor, "#batch seq"] | None,
        past_key_values: Cache | None,
        use_cache: bool | None,
        prompt_mask: Int[Tensor, "batch prompt_seq"] | None,
        options: dict[str, Any],
    ) -> Any:
        """Run the anchor, or its trunk, with the bridges attached.

        Raises:
            RuntimeError: If a bridged layer did not run; its bridge would be skipped silently.
        """
        if use_cache is None:
            use_cache = not self.training and getattr(self.config.get_text_config(), "use_cache", True)
        cache = self.resolve_cache(past_key_values, use_cache)
        forward_pass = self.begin(input_ids, attention_mask, position_ids, cache, prompt_mask)
        assert input_ids is not None
        arguments = decoder.call_arguments(
            part,
            attention_mask=part_of(attention_mask, "anchor"),
            query_length=input_ids.shape[1],
            cache=None if cache is None else cache.anchor,
            position_ids=position_ids,
            **options,
        )
        with forward_pass:
            output = part(input_ids=input_ids, return_dict=True, **arguments)
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
        return_dict: bool | None = None,
        **options: Any,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """The anchor's last hidden states, with the bridges attached.

        Arguments are those of `ComposedForCausalLM.forward`.
        """
        output = self.run(
            decoder.trunk(self.anchor),
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            prompt_mask=prompt_mask,
            options=options,
        )
        return output.to_tuple() if return_dict is False else output


class ComposedForCausalLM(ComposedPreTrainedModel, GenerationMixin):
    """A composed model that predicts tokens; made by `graftlm.compose`.

    The logits, the loss and the head are the anchor's own.

    Args:
        config: What is connected, and how.
        anchor: The anchor, a loaded causal language model. Its parameters are frozen.
        augmenting: The loaded augmenting models by name, frozen too.
    """

    def __init__(
        self,
        config: ComposedConfig,
        anchor: PreTrainedModel,
        augmenting: Mapping[str, PreTrainedModel],
    ):
        super().__init__(config)
        self.model = ComposedModel(config, anchor, augmenting)
        # Checkpoints hold the bridges only; Trainer compares with this when it resumes.
        self._keys_to_ignore_on_save = {
            name for name in self.state_dict() if not name.startswith("model.bridges.")
        }
        self.post_init()
        self.generation_config = copy.deepcopy(anchor.generation_config)
        self.eval()

    # ---- parts ---------------------------------------------------------------------------

    @property
    def anchor(self) -> PreTrainedModel:
        """The frozen model whose logits we return."""
        return self.model.anchor

    @property
    def augmenting(self) -> Mapping[str, PreTrainedModel]:
        """The frozen models we read from, by name."""
        return self.model.augmenting

    @property
    def bridges(self) -> nn.ModuleList:
        """The bridges, in the order of `config.connections`: all that trains."""
        return self.model.bridges

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether Trainer may pass `num_items_in_batch`: if the anchor's forward takes it."""
        return decoder.takes_any_option(self.anchor)

    @property
    def _is_stateful(self) -> bool:
        """Whether a part keeps a state that cannot be rolled back."""
        return any(base._is_stateful for base in (self.anchor, *self.augmenting.values()))

    def get_input_embeddings(self) -> nn.Module:
        """The anchor's."""
        return self.anchor.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the anchor's."""
        self.anchor.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The anchor's head."""
        return self.anchor.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the anchor's head."""
        self.anchor.set_output_embeddings(value)

    # ---- switches ------------------------------------------------------------------------

    def set_scale(self, name: str, scale: float) -> None:
        """Multiply what the anchor reads from one augmenting model; saved with the model.

        Args:
            name: Of the augmenting model.
            scale: 1 as trained; 0 switches the model off, and it is then not run.

        Raises:
            ValueError: If there is no such augmenting model.
        """
        if name not in self.config.scales:
            names = ", ".join(repr(known) for known in self.config.scales)
            raise ValueError(f"there is no augmenting model {name!r}, only {names}")
        self.config.scales[name] = float(scale)

    @contextmanager
    def anchor_only(self) -> Iterator[None]:
        """Within this context the model is the anchor, bit for bit, in this thread."""
        before = anchor_only_keys.get()
        anchor_only_keys.set(before | {self.model.hooks.key})
        try:
            yield
        finally:
            anchor_only_keys.set(before)

    @property
    def is_anchor_only(self) -> bool:
        """Whether we are within `anchor_only`."""
        return self.model.hooks.key in anchor_only_keys.get()

    # ---- saving and loading --------------------------------------------------------------

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        push_to_hub: bool = False,
        safe_serialization: bool = True,
        **kwargs: Any,
    ) -> None:
        """Save the bridges, the configuration and a model card; never a base weight.

        A new folder appears complete or not at all; files in an existing one are replaced one
        by one, each complete.

        Args:
            save_directory: Where to.
            is_main_process: False writes nothing, as in transformers.
            state_dict: A gathered state dict to take the bridges from.
            push_to_hub: Upload afterwards; `repo_id` and others as in transformers.
            safe_serialization: Must be True.
            kwargs: For `push_to_hub`.

        Raises:
            ValueError: If pickles are asked for.
        """
        if not safe_serialization:
            raise ValueError("safe_serialization is False, but graftlm writes safetensors only")
        if push_to_hub:
            kwargs.setdefault("repo_id", os.path.basename(os.path.abspath(save_directory)))
            self.push_to_hub(**kwargs)
        self.take_fingerprints()
        if state_dict is None:
            # Not the full state_dict: gathering packed base weights can change them.
            state_dict = self.bridges.state_dict(prefix=PREFIX)
        if is_main_process:
            write_checkpoint(
                save_directory,
                self.config,
                bridge_weights(state_dict),
                self.generation_config,
                find_tokenizer(self.anchor.config.name_or_path),
                self.num_parameters_by_part(),
            )

    def take_fingerprints(self) -> None:
        """Hash the base models once; they are frozen, so once is enough."""
        bases = {"anchor": self.anchor, **self.augmenting}
        for name, base in bases.items():
            entry = self.config.bases.setdefault(name, {"name_or_path": None, "revision": None})
            if entry.get("fingerprint") is None:
                entry["fingerprint"] = fingerprint(base, with_head=name == "anchor")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        config: ComposedConfig | None = None,
        anchor: Base | None = None,
        augmenting: Base | Mapping[str, Base] | None = None,
        dtype: torch.dtype | str = "auto",
        device_map: Any = None,
        check_bases: bool = True,
        revision: str | None = None,
        subfolder: str = "",
        cache_dir: str | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        trust_remote_code: bool = False,
        attn_implementation: str | None = None,
        quantization_config: Any = None,
        **kwargs: Any,
    ) -> "ComposedForCausalLM":
        """Load the bridges and the base models they were made for.

        Args:
            pretrained_model_name_or_path: A folder written by `save_pretrained`, or a hub id.
            config: The configuration, if it was read before.
            anchor: The anchor, loaded or elsewhere; by default where it was.
            augmenting: The augmenting model, or several by name; by default where they were.
            dtype, device_map, trust_remote_code, attn_implementation, quantization_config: For
                base models loaded here, as in transformers.
            check_bases: Compare configuration, weights and tokenizer of each base model with
                the checkpoint; the weights are read once more for that.
            revision, subfolder, cache_dir, token, local_files_only, force_download: For a
                composed model on the hub.
            kwargs: Refused, but for what transformers' Auto classes add.

        Raises:
            CheckpointMismatchError: If a file is missing or damaged, or a base model differs.
            ValueError: If a base model cannot be found.
        """
        unknown = set(kwargs) - {"_from_auto", "adapter_kwargs", "torch_dtype", "weights_only"}
        if unknown:
            raise TypeError(f"from_pretrained got unknown arguments: {', '.join(sorted(unknown))}")
        folder = os.fspath(pretrained_model_name_or_path)
        shared = {
            "cache_dir": cache_dir,
            "token": token,
            "local_files_only": local_files_only,
            "force_download": force_download,
        }
        hub_options = shared | {"revision": revision, "subfolder": subfolder}
        if config is None:
            config = read_config(folder, **hub_options)
        tensors = read_weights(folder, config, **hub_options)
        options = shared | {
            "dtype": kwargs.get("torch_dtype") or dtype,
            "device_map": device_map,
            "trust_remote_code": trust_remote_code,
            "attn_implementation": attn_implementation,
            "quantization_config": quantization_config,
        }
        given = name_bases(anchor, augmenting, config)
        loaded = {}
        for name in ("anchor", *config.augmenting_configs):
            role = "the anchor" if name == "anchor" else f"augmenting model {name!r}"
            known = config.bases.get(name, {})
            base = given.get(name) or known.get("name_or_path")
            if base is None:
                keyword = "anchor=" if name == "anchor" else "augmenting="
                raise ValueError(
                    f"{folder} does not say where {role} is, because it was composed from a "
                    f"loaded model; pass {keyword}"
                )
            at = {} if given.get(name) else {"revision": known.get("revision")}
            is_anchor = name == "anchor"
            loaded[name] = load_base(base, role, **options, **at)
            if check_bases:
                was = config.anchor_config if is_anchor else config.augmenting_configs[name]
                print_of = known.get("fingerprint")
                check_base(loaded[name], role, was, print_of, with_head=is_anchor)
        anchor = loaded.pop("anchor")
        config.anchor_config = anchor.config
        config.augmenting_configs = {name: base.config for name, base in loaded.items()}
        model = cls(config, anchor, loaded)
        check_names(tensors, model.bridges.state_dict(prefix=PREFIX), folder)
        model.bridges.to(next(iter(tensors.values())).dtype)
        model.load_state_dict(tensors, strict=False)
        model.config.name_or_path = folder
        return model

    def num_parameters_by_part(self) -> dict[str, int]:
        """Parameters of the anchor, of each augmenting model and of the bridges.

        Shared tensors count once; W^O of the bridges counts, which the paper leaves out.
        """
        parts = {"anchor": self.anchor, **self.augmenting, "bridges": self.bridges}
        return {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}

    # ---- training ------------------------------------------------------------------------

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers, for the anchor's layers and the bridges.

        Raises:
            ValueError: If an anchor layer would apply dropout, which checkpointing turns on.
        """
        decoder.check_checkpointing(self.anchor)
        super().gradient_checkpointing_enable(*args, **kwargs)
        self.train(self.training)

    def enable_input_require_grads(self) -> None:
        """Nothing, unless a base has something to train: else all of the anchor joins the graph."""
        if any(p.requires_grad for p in self.anchor.parameters()):
            self.anchor.enable_input_require_grads()

    # ---- forward and generation ----------------------------------------------------------

    def forward(
        self,
        input_ids: Int[Tensor, "batch seq"] | None = None,
        attention_mask: Tensor | dict[str, Tensor | None] | None = None,
        position_ids: Int[Tensor, "#batch seq"] | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Float[Tensor, "batch seq d_anchor"] | None = None,
        labels: Int[Tensor, "batch seq"] | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        prompt_mask: Int[Tensor, "batch prompt_seq"] | None = None,
        return_dict: bool | None = None,
        **options: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Predict the next token at every position.

        Paper: CALM, section 3.1; every token goes to the anchor and to the augmenting models.

        Args:
            input_ids: Token ids, for all models.
            attention_mask: 1 for tokens, 0 for padding, over the cached and the new tokens.
            position_ids: Positions; starting over within a row marks packed documents.
            past_key_values: The cache of earlier calls.
            inputs_embeds: Refused: the augmenting models read tokens.
            labels: Targets, -100 where there is no loss; shifted inside, as in transformers.
            use_cache: Whether to return a cache; the default is yes, but not in training.
            logits_to_keep: As in transformers: how many of the last logits, 0 for all.
            prompt_mask: With `reads="prompt"`: 1 for prompt tokens, over the cached and the new
                tokens; what it does not cover is no prompt. By default all tokens before the
                first label, or all tokens of a call without cache.
            return_dict: False returns a tuple.
            options: Passed on to the anchor.

        Raises:
            ValueError: If `input_ids` are missing, a mask is not 2-D, or a cache does not fit.
        """
        if inputs_embeds is not None:
            raise ValueError(
                "inputs_embeds cannot be used: the augmenting models read tokens; pass input_ids"
            )
        options |= {"labels": labels, "logits_to_keep": logits_to_keep}
        if self.is_anchor_only:
            return self.anchor(
                input_ids=input_ids,
                return_dict=return_dict,
                past_key_values=past_key_values,
                **decoder.declared_options(
                    self.anchor,
                    options
                    | {
                        "attention_mask": attention_mask,
                        "position_ids": position_ids,
                        "use_cache": use_cache,
                    },
                ),
            )
        if self.config.reads != "prompt":
            prompt_mask = None
        elif prompt_mask is None and labels is not None:
            prompt_mask = (labels != -100).cumsum(-1) == 0
        output = self.model.run(
            self.anchor,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            prompt_mask=prompt_mask,
            options=options,
        )
        return output.to_tuple() if return_dict is False else output

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Let transformers make the anchor's cache, and put the other caches beside it."""
        super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )
        if self.is_anchor_only:
            return
        if self.config.reads == "prompt" and "prompt_mask" not in model_kwargs:
            model_kwargs["prompt_mask"] = torch.ones_like(model_kwargs["position_ids"])
        cache = model_kwargs.get("past_key_values")
        if cache is not None and not isinstance(cache, ComposedCache):
            cache = self.model.resolve_cache(cache, use_cache=True)
            if generation_config.is_assistant:
                cache.activate_past_recording()
            model_kwargs["past_key_values"] = cache

    def create_masks_for_generate(
        self,
        config: Any = None,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor | None]:
        """The masks of all parts for one step with a static cache, flat, keyed "part/kind"."""
        del config, kwargs
        shared = {"inputs_embeds": inputs_embeds, "attention_mask": attention_mask}
        shared["position_ids"] = position_ids
        if not isinstance(past_key_values, ComposedCache):
            return decoder.generation_masks(self.anchor, past_key_values=past_key_values, **shared)
        parts = {"anchor": (self.anchor, past_key_values.anchor)}
        for name, cache in past_key_values.augmenting.items():
            parts[name] = self.model.running_view(name), cache
        masks: dict[str, Tensor | None] = {"bridges/": None}
        for name, (model, cache) in parts.items():
            made = decoder.generation_masks(model, past_key_values=cache, **shared)
            masks |= {f"{name}/{kind}": mask for kind, mask in made.items()}
        if attention_mask is not None:
            # Later tokens count as readable here: causality hides them, and the shape is static.
            length = past_key_values.bridges.get_max_length()
            missing = length - attention_mask.shape[1]
            masks["bridges/"] = nn.functional.pad(attention_mask, (0, missing), value=1)
        return masks


anchor_only_keys: Scoped[frozenset[str]] = Scoped(frozenset())


def name_bases(
    anchor: Base | None, augmenting: Base | Mapping[str, Base] | None, config: ComposedConfig
) -> dict[str, Base | None]:
    """The base models handed over, by name.

    Raises:
        ValueError: If a name is unknown, or missing where there are several.
    """
    names = list(config.augmenting_configs)
    if augmenting is None:
        augmenting = {}
    elif not isinstance(augmenting, Mapping):
        if len(names) != 1:
            raise ValueError(
                f"augmenting is one model, but the checkpoint has {len(names)}: "
                f"{', '.join(names)}; pass a dictionary"
            )
        augmenting = {names[0]: augmenting}
    unknown = sorted(set(augmenting) - set(names))
    if unknown:
        raise ValueError(
            f"augmenting names {unknown[0]!r}, but the checkpoint has only {', '.join(names)}"
        )
    return {"anchor": anchor, **augmenting}


def part_of(masks: Any, name: str) -> Any:
    """One part's mask: the tensor that all parts share, or its own of `create_masks_for_generate`."""
    if not isinstance(masks, dict):
        return masks
    own = {
        kind.removeprefix(f"{name}/"): mask
        for kind, mask in masks.items()
        if kind.startswith(f"{name}/")
    }
    return own[""] if set(own) == {""} else own


def first_columns(mask: Any, surplus: int) -> Any:
    """A (batch, past + seq) mask without its last columns; `surplus` is minus their number."""
    return mask[:, :surplus] if surplus and isinstance(mask, Tensor) else mask


def static_length(cache: Cache) -> int | None:
    """Tokens a static cache holds, or None for a dynamic one."""
    return cache.get_max_length() if isinstance(cache, StaticCache) else None


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
AutoModelForCausalLM.register(ComposedConfig, ComposedForCausalLM, exist_ok=True)
