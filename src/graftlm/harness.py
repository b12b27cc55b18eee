"""lm-eval's model class for composed models: all of one, or one of its parts alone.

`import graftlm` tells lm-eval of it under the name "graftlm" (see `_register.py`).
"""

import copy
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import resolve_max_length
from lm_eval.models.utils_hf import get_dtype
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from graftlm.causal_lm import ComposedForCausalLM
from graftlm.checkpoint import read_config
from graftlm.config import ComposedConfig
from graftlm.processor import ComposedProcessor
from graftlm.tokenization import find_tokenizer

COMPOSED = "composed"
# What HFLM offers and a composed model cannot take.
REFUSED = ("peft", "delta", "autogptq", "gptqmodel", "gguf_file", "tp_plan")

Request = tuple[Any, list[int], list[int]]  # what to cache it under, context, continuation
Span = tuple[int, int]  # how many tokens a row has, and how many of them are the prompt


class GraftLM(HFLM):
    """A composed model, or a part of one, as lm-eval runs models.

    Requests are tokenized with the part's own tokenizer. A composed model gets what lm-eval does
    not give to others: which tokens of a batch are padding, and which are the prompt.

    Args:
        pretrained: A composed folder, a hub id or a loaded composed model.
        part: "composed", "anchor", or the name of an augmenting model, which is then run alone.
        scale: Multiply what is read from all augmenting models, or from each by name; 0 switches
            them off. By default what the folder says.
        device: Where to run a model that is loaded here; by default a GPU if there is one.
        options: As for lm-eval's `hf`: `dtype`, `batch_size`, `max_length`, `tokenizer`, ...

    Raises:
        ValueError: If there is no such part, or a setting of `hf` does not apply.
    """

    tokenizer: Any  # HFLM says None, and sets it

    def __init__(
        self,
        pretrained: str | ComposedForCausalLM,
        part: str = COMPOSED,
        scale: float | Mapping[str, float] | None = None,
        device: str | None = None,
        **options: Any,
    ):
        refused = next((name for name in REFUSED if options.get(name)), None)
        if refused:
            raise ValueError(
                f"{refused} is {options[refused]!r}, but a composed model takes none of "
                f"{', '.join(REFUSED)}"
            )
        self.part = part
        self.scale = scale
        self.spans: dict[tuple[int, ...], Span] = {}
        chosen: Any = pretrained
        if isinstance(pretrained, ComposedForCausalLM):
            check_part(pretrained.config, part)
            set_scales(pretrained, scale)
            processor = pretrained.processor
            if options.get("tokenizer") is None:
                options["tokenizer"] = tokenizer_of(processor, pretrained.config, part)
            chosen = part_of(pretrained, part)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        super().__init__(pretrained=chosen, device=device, **options)

    # ---- loading: the steps of HFLM ------------------------------------------------------

    def _get_config(self, pretrained: str, **options: Any) -> None:  # pyrefly: ignore
        where = {name: options[name] for name in ("revision", "subfolder") if options.get(name)}
        self.composed_config = read_config(pretrained, **where)
        check_part(self.composed_config, self.part)
        self._config = config_of(self.composed_config, self.part)

    def _create_tokenizer(  # pyrefly: ignore[bad-override]
        self, pretrained: Any, tokenizer: Any, **options: Any
    ) -> None:
        if not tokenizer and isinstance(pretrained, str):
            where = {name: options[name] for name in ("revision", "subfolder") if options.get(name)}
            processor = None
            try:
                processor = ComposedProcessor.from_pretrained(
                    pretrained, self.composed_config, **where
                )
            except (OSError, ValueError, KeyError):  # saved without a tokenizer
                if set(self.composed_config.alignments.values()) != {"identity"}:
                    raise
            tokenizer = tokenizer_of(processor, self.composed_config, self.part)
        # A finished tokenizer is told here what others are told when they are loaded.
        adds_bos = options.get("add_bos_token")
        if adds_bos is not None and tokenizer and not isinstance(tokenizer, str):
            tokenizer = copy.deepcopy(tokenizer)
            tokenizer.add_bos_token = adds_bos
        super()._create_tokenizer(pretrained, tokenizer, **options)

    def _create_model(  # pyrefly: ignore[bad-override]
        self,
        pretrained: str,
        revision: str | None = "main",
        dtype: Any = "auto",
        trust_remote_code: bool | None = False,
        subfolder: str = "",
        quantization_config: Any = None,
        **options: Any,
    ) -> None:
        memory = ("max_memory_per_gpu", "max_cpu_memory", "offload_folder", "gpus")
        placed = self._get_accelerate_args(
            parallelize=options.pop("parallelize", False),
            device_map=options.pop("device_map", None),
            **{name: options.pop(name, None) for name in memory},
        )
        composed = ComposedForCausalLM.from_pretrained(
            pretrained,
            revision=revision,
            dtype=get_dtype(dtype),
            device_map=placed["device_map"],
            trust_remote_code=bool(trust_remote_code),
            subfolder=subfolder or "",
            quantization_config=quantization_config,
            **{name: value for name, value in options.items() if name not in REFUSED},
        )
        set_scales(composed, self.scale)
        self._model = part_of(composed, self.part)

    # ---- running -------------------------------------------------------------------------

    @property
    def max_length(self) -> int:
        """Tokens of context: for a composed model those that all its parts have."""
        if self._max_length or self.part != COMPOSED:
            return super().max_length
        config = self.model.config
        parts = (config.anchor_config, *config.augmenting_configs.values())
        default = self._DEFAULT_MAX_LENGTH
        return min(resolve_max_length(c, self.tokenizer, default=default) for c in parts)

    def _loglikelihood_tokens(  # pyrefly: ignore[bad-override]
        self,
        requests: Sequence[Request],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """As in HFLM, while `_model_call` knows where the rows of a batch end."""
        if self.part != COMPOSED:
            return super()._loglikelihood_tokens(list(requests), disable_tqdm, override_bs)
        answers: dict[int, tuple[float, bool]] = {}
        for numbers, spans in self.passes(requests):
            self.spans = spans
            try:
                found = super()._loglikelihood_tokens(
                    [requests[number] for number in numbers], disable_tqdm, override_bs
                )
            finally:
                self.spans = {}
            answers |= zip(numbers, found, strict=True)
        return [answers[number] for number in range(len(requests))]

    def passes(
        self, requests: Sequence[Request]
    ) -> Iterator[tuple[list[int], dict[tuple[int, ...], Span]]]:
        """Requests by number, so that in each pass the tokens of a row tell its `Span`.

        One pass, but for two requests that look the same in a padded batch: they split the same
        tokens at different places (which matters where the prompt does), or one of them ends in
        the token that pads.
        """
        made: list[tuple[list[int], dict[tuple[int, ...], Span]]] = []
        for number, (_, context, continuation) in enumerate(requests):
            row = (context + continuation)[-(self.max_length + 1) :][:-1]
            prompt = len(row) - len(continuation) + 1 if self.reads_prompt else len(row)
            key, span = without_padding(row), (len(row), prompt)
            for numbers, spans in made:
                if spans.setdefault(key, span) == span:
                    numbers.append(number)
                    break
            else:
                made.append(([number], {key: span}))
        yield from made

    @property
    def reads_prompt(self) -> bool:
        """Whether the augmenting models read the prompt only."""
        return self.model.config.reads == "prompt"

    def _model_call(
        self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        spans = [self.spans.get(without_padding(row)) for row in inps.tolist()]
        known = [span for span in spans if span is not None]
        if len(known) < len(spans):  # another part, or HFLM looking for a batch that fits
            return super()._model_call(inps, attn_mask, labels)
        places = torch.arange(inps.shape[1], device=inps.device)
        lengths, prompts = torch.tensor(known, device=inps.device).T[..., None]
        masks = {"attention_mask": (places < lengths).long()}
        if self.reads_prompt:
            masks["prompt_mask"] = (places < prompts).long()
        precision: Any = self.mixed_precision_dtype
        with (
            torch.no_grad(),
            torch.autocast(inps.device.type, dtype=precision, enabled=precision is not None),
        ):
            return self.model(inps, **masks).logits

    def get_model_info(self) -> dict[str, Any]:
        """As in HFLM, but the hub is not asked about a folder or a loaded model."""
        if isinstance(self.pretrained, str) and not os.path.isdir(self.pretrained):
            return super().get_model_info()
        return {
            "model_num_parameters": self.model.num_parameters(),
            "model_dtype": self.model.dtype,
            "model_revision": "",
            "model_sha": "",
        }


def without_padding(row: Sequence[int]) -> tuple[int, ...]:
    """A row's tokens without the zeros at its end, with which lm-eval pads."""
    length = len(row)
    while length and row[length - 1] == 0:
        length -= 1
    return tuple(row[:length])


def check_part(config: ComposedConfig, part: str) -> None:
    """Refuse a part that does not exist.

    Raises:
        ValueError: Naming those that do.
    """
    names = part_names(config)
    if part not in names:
        raise ValueError(f"part is {part!r}, but must be one of {', '.join(names)}")


def part_names(config: ComposedConfig) -> list[str]:
    """What can be run: the composed model, the anchor, each augmenting model."""
    return [COMPOSED, "anchor", *config.augmenting_configs]


def part_of(model: ComposedForCausalLM, part: str) -> PreTrainedModel:
    """The model that is run."""
    if part == COMPOSED:
        return model
    return model.anchor if part == "anchor" else model.augmenting[part]


def config_of(config: ComposedConfig, part: str) -> PreTrainedConfig:
    """The configuration of what is run."""
    if part == COMPOSED:
        return config
    return config.anchor_config if part == "anchor" else config.augmenting_configs[part]


def tokenizer_of(
    processor: ComposedProcessor | None, config: ComposedConfig, part: str
) -> PreTrainedTokenizerBase | None:
    """A copy of the tokenizer one part is run with; lm-eval may give it a padding token.

    An augmenting model that shares the anchor's tokens has its own beside it all the same, with
    its own special tokens and chat template.
    """
    base = "anchor" if part == COMPOSED else part
    ours = {} if processor is None else processor.all_tokenizers
    found = ours.get(base)
    if found is None:
        found = find_tokenizer(config.bases.get(base, {}).get("name_or_path"))
    return copy.deepcopy(found if found is not None else ours.get("anchor"))


def chat_templates(folder: str | os.PathLike[str], config: ComposedConfig) -> dict[str, str]:
    """A hash of what each part's chats are written by."""
    processor = None
    if set(config.alignments.values()) != {"identity"}:
        processor = ComposedProcessor.from_pretrained(os.fspath(folder), config)
    elif tokenizer := find_tokenizer(os.fspath(folder)):
        processor = ComposedProcessor(tokenizer, {}, config)
    found = {part: tokenizer_of(processor, config, part) for part in part_names(config)}
    return {
        part: hashlib.sha256(repr(getattr(tokenizer, "chat_template", None)).encode()).hexdigest()
        for part, tokenizer in found.items()
    }


def set_scales(model: ComposedForCausalLM, scale: float | Mapping[str, float] | None) -> None:
    """Set one scale for all augmenting models, or one each."""
    if scale is None:
        return
    given = scale if isinstance(scale, Mapping) else dict.fromkeys(model.augmenting, scale)
    for name, factor in given.items():
        model.set_scale(name, factor)
