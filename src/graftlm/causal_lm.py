"""The composed model with the anchor's head: what users train, generate with and save."""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.cache_utils import Cache
from transformers.modeling_outputs import ModelOutput

from graftlm import decoder
from graftlm.alignment import packed_segments
from graftlm.augmenting_tokens import AugmentingTokens, keeps_keys_only
from graftlm.cache import ComposedCache
from graftlm.composed import ComposedModel
from graftlm.config import ComposedConfig, Connection
from graftlm.explain import Explanation, explain
from graftlm.growing_cache import let_grow
from graftlm.masks import generation_masks
from graftlm.own_tokens import has_reader
from graftlm.passes import (
    PassInputs,
    anchor_only_keys,
    connections_off,
    prompt_of,
    scales_here,
    show_scopes,
)
from graftlm.saving import SavesBridges


class ComposedForCausalLM(SavesBridges, GenerationMixin):
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
        self.set_tokenizers(None, {})
        # Checkpoints hold the bridges only; Trainer compares with this when it resumes.
        self._keys_to_ignore_on_save = {
            name for name in self.state_dict() if not name.startswith("model.bridges.")
        }
        self.post_init()
        device_map = decoder.device_map_of(
            {"model.anchor": anchor}
            | {f"model.augmenting_{name}": base for name, base in augmenting.items()}
        )
        if device_map is not None:
            self.hf_device_map = device_map  # Trainer and generate ask for it
        self.generation_config = copy.deepcopy(anchor.generation_config)
        self.show_attn_implementation()
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
    def _is_stateful(self) -> bool:  # pyrefly: ignore[bad-override]
        """Whether a part keeps a state that cannot be rolled back."""
        return any(base._is_stateful for base in (self.anchor, *self.augmenting.values())) or any(
            has_reader(self.model, name)
            and not keeps_keys_only(self.model.running_view(name).config)
            for name in self.augmenting
        )

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers, in all parts; the bridges' attention stays what it is."""
        super().set_attn_implementation(*args, **kwargs)
        self.show_attn_implementation()

    def show_attn_implementation(self) -> None:
        """Let `generate` see how the anchor attends: it makes masks for flash attention only."""
        anchor = decoder.text_config(self.anchor.config)
        self.config._attn_implementation_internal = anchor._attn_implementation

    def get_output_embeddings(self) -> nn.Module | None:
        """The anchor's head."""
        return self.anchor.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the anchor's head."""
        self.anchor.set_output_embeddings(new_embeddings)

    # ---- switches ------------------------------------------------------------------------

    def set_scale(self, name: str, scale: float | int) -> None:
        """Multiply what the anchor reads from one augmenting model; saved with the model.

        Args:
            name: Of the augmenting model.
            scale: 1 as trained; 0 switches the model off, and it is then not run.

        Raises:
            ValueError: If there is no such augmenting model.
        """
        self.check_name(name)
        self.config.scales[name] = float(scale)

    @contextmanager
    def scaled(self, scales: Mapping[str, float | int]) -> Iterator[None]:
        """Within this context these scales hold, in this thread; the model keeps its own.

        Args:
            scales: By name of the augmenting model, as in `set_scale`.

        Raises:
            ValueError: If there is no such augmenting model.
        """
        for name in scales:
            self.check_name(name)
        before = scales_here.get()
        ours = {(self.model.scope_key, name): float(scale) for name, scale in scales.items()}
        scales_here.set({**before, **ours})
        try:
            yield
        finally:
            scales_here.set(before)

    def check_name(self, name: str) -> None:
        """Refuse what is no augmenting model of ours.

        Raises:
            ValueError: Naming those there are.
        """
        if name not in self.config.scales:
            names = ", ".join(repr(known) for known in self.config.scales)
            raise ValueError(f"there is no augmenting model {name!r}, only {names}")

    @contextmanager
    def anchor_only(self) -> Iterator[None]:
        """Within this context the model is the anchor, bit for bit, in this thread."""
        before = anchor_only_keys.get()
        anchor_only_keys.set(before | {self.model.scope_key})
        try:
            yield
        finally:
            anchor_only_keys.set(before)

    @property
    def is_anchor_only(self) -> bool:
        """Whether we are within `anchor_only`."""
        return self.model.scope_key in anchor_only_keys.get()

    @contextmanager
    def without(self, connections: Iterable[Connection]) -> Iterator[None]:
        """Within this context these connections add nothing, in this thread.

        An augmenting model whose connections are all off is not run, as with `set_scale(name, 0)`;
        without any connection the logits are the anchor's, bit for bit. Contexts add up.

        Args:
            connections: Some of `config.connections`.

        Raises:
            ValueError: If there is no such connection.
        """
        key, before = self.model.scope_key, connections_off.get()
        connections_off.set(before | {(key, index) for index in self.model.indices_of(connections)})
        try:
            yield
        finally:
            connections_off.set(before)

    # ---- training ------------------------------------------------------------------------

    def _set_gradient_checkpointing(  # pyrefly: ignore[bad-override]
        self, enable: bool = True, **options: Any
    ) -> None:
        """As in transformers, for the anchor's layers and the bridges.

        Raises:
            ValueError: If an anchor layer would apply dropout, which checkpointing turns on.
        """
        if enable:
            decoder.check_checkpointing(self.anchor)
        super()._set_gradient_checkpointing(enable=enable, **options)
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
        read_ids: Int[Tensor, "batch seq"] | None = None,
        augmenting_inputs: Mapping[str, AugmentingTokens] | None = None,
        frozen_states: Mapping[str, Tensor] | None = None,
        return_dict: bool | None = None,
        **options: Any,
    ) -> ModelOutput | tuple[Any, ...]:
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
            read_ids: Tokens for the augmenting models to read instead of `input_ids`, place by
                place, in the anchor's vocabulary. A control: what does the anchor gain from
                reading this very text?
            augmenting_inputs: What augmenting models with tokenizers of their own read of these
                rows, prepared by `ComposedProcessor`; by default read here. For whole rows, so
                not with a cache.
            frozen_states: Hidden states of these rows that training never changes, padded on the
                right like the tokens, as `StatesCache` keeps them: the augmenting models are not
                run then, nor the anchor up to its first connected layer. Not with a cache.
            return_dict: False returns a tuple.
            options: Passed on to the anchor.

        Returns:
            `logits` (batch, seq, vocabulary of the anchor), of the last `logits_to_keep` if given;
            `loss` with `labels`, a mean in nats a token; `past_key_values`, a `ComposedCache`,
            with `use_cache`; what else the anchor returns. A tuple if `return_dict` is False.

        Raises:
            ValueError: If `input_ids` are missing, a mask is not 2-D, or a cache does not fit.
        """
        if inputs_embeds is not None:
            raise ValueError(
                "inputs_embeds cannot be used: the augmenting models read tokens; pass input_ids"
            )
        options |= {"labels": labels, "logits_to_keep": logits_to_keep}
        if self.is_anchor_only:
            cache_name = decoder.cache_name(self.anchor)
            return self.anchor(
                input_ids=input_ids,
                return_dict=return_dict,
                **{cache_name: past_key_values},
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
            # Without a mask, positions that start over are packed documents.
            is_packed = attention_mask is None and position_ids is not None
            segments = packed_segments(position_ids.expand_as(labels)) if is_packed else None
            prompt_mask = prompt_of(labels, segments)
        output = self.model.run(
            self.anchor,
            PassInputs(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                prompt_mask=prompt_mask,
                read_ids=read_ids,
                augmenting_inputs=augmenting_inputs,
                frozen_states=frozen_states,
            ),
            past_key_values=past_key_values,
            use_cache=use_cache,
            options=options,
        )
        return output.to_tuple() if return_dict is False else output

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; within `anchor_only` the anchor's own, with its own settings."""
        if self.is_anchor_only:
            for name in ("prompt_mask", "read_ids", "augmenting_inputs", "frozen_states"):
                kwargs.pop(name, None)  # for the augmenting models
            return self.anchor.generate(*args, **kwargs)  # pyrefly: ignore[not-callable]
        return super().generate(*args, **kwargs)  # pyrefly: ignore[bad-argument-type]

    def explain(
        self,
        text: str | None = None,
        *,
        input_ids: Tensor | Sequence[int] | None = None,
        max_new_tokens: int = 0,
        top: int = 10,
        num_prompt: int | None = None,
    ) -> Explanation:
        """What the bridges do in one text: who reads what, how much, and what it changes.

        Memory grows with the square of the text: attention weights of all heads and connections.

        Args:
            text: The prompt.
            input_ids: The prompt's tokens instead, (seq,) or (1, seq).
            max_new_tokens: How many tokens to write behind it at most, greedily.
            top: How many of the likeliest next tokens to name.
            num_prompt: How many of the tokens are the prompt, where the model has written the
                others before; by default all.

        Raises:
            ValueError: If there is not exactly one prompt, there is no tokenizer to split it
                with, `num_prompt` does not fit, or the model is within `anchor_only`.
        """
        return explain(self, text, input_ids, max_new_tokens, top, num_prompt)

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As in transformers. The augmenting models read on from the cache, step by step."""
        show_scopes()
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(  # pyrefly: ignore
            *args, **kwargs
        )
        inputs.pop("augmenting_inputs", None)
        read_ids = inputs.get("read_ids")
        if read_ids is not None:
            # They stand for the prompt; what is generated is read as it is.
            ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
            read = torch.cat([read_ids, ids[:, read_ids.shape[1] :]], dim=1)
            num_new, start = inputs["input_ids"].shape[1], ids.shape[1]
            if read_ids.shape[1] > start:  # a piece of a long prompt (prefill_chunk_size)
                start = num_new + int(inputs["past_key_values"].get_seq_length())
            inputs["read_ids"] = read[:, start - num_new : start]
        return inputs

    def _prepare_cache_for_generation(  # pyrefly: ignore[bad-override]
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Let transformers make the anchor's cache, and put the other caches beside it."""
        is_ours = model_kwargs.get("past_key_values") is None
        super()._prepare_cache_for_generation(  # pyrefly: ignore[bad-argument-type]
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )
        if self.config.reads == "prompt" and "prompt_mask" not in model_kwargs:
            model_kwargs["prompt_mask"] = torch.ones_like(model_kwargs["position_ids"])
        cache = model_kwargs.get("past_key_values")
        if cache is not None and not isinstance(cache, ComposedCache):
            if is_ours:
                let_grow(cache)
            composed_cache = self.model.resolve_cache(cache, True, max_cache_length)
            assert composed_cache is not None
            if generation_config.is_assistant:
                composed_cache.activate_past_recording()
            model_kwargs["past_key_values"] = composed_cache

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: it makes its own cache for one model.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "continuous batching (and cache_implementation='paged') keeps a cache for one model "
            "only; use generate with a dynamic or static cache"
        )

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
            return generation_masks(self.anchor, past_key_values=past_key_values, **shared)
        parts = {"anchor": (self.anchor, past_key_values.anchor)}
        for name, cache in past_key_values.augmenting.items():
            parts[name] = self.model.running_view(name), cache
        masks: dict[str, Tensor | None] = {"bridges/": None, "tokens/": attention_mask}
        for name, (model, cache) in parts.items():
            made = generation_masks(model, past_key_values=cache, **shared)
            masks |= {f"{name}/{kind}": mask for kind, mask in made.items()}
        length = past_key_values.bridges.get_max_length()  # -1 if none of them is static
        if attention_mask is not None and length > 0:
            # Later tokens count as readable here: causality hides them, and the shape is static.
            missing = length - attention_mask.shape[1]
            masks["bridges/"] = nn.functional.pad(attention_mask, (0, missing), value=1)
        return masks


AutoModelForCausalLM.register(ComposedConfig, ComposedForCausalLM, exist_ok=True)
