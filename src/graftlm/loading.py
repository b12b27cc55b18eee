"""From models, paths or hub ids to a composed model."""

import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from graftlm import decoder
from graftlm.bases import Base, for_augmenting, load_base, reference, role_of
from graftlm.causal_lm import ComposedForCausalLM
from graftlm.config import (
    AlignmentRule,
    BridgeConfig,
    ComposedConfig,
    Connection,
    DistanceUnit,
    Position,
    Reads,
    spaced_connections,
)
from graftlm.gguf import resolve as resolve_gguf
from graftlm.quantized import quantization_for
from graftlm.tokenization import find_tokenizer, load_tokenizer, tokenizes_alike


def compose(
    anchor: Base,
    augmenting: Base | Mapping[str, Base],
    *,
    every: int = 4,
    connections: Sequence[Connection] | None = None,
    variant: str = "graftlm",
    position: Position | None = None,
    num_heads: int | None = None,
    width: int | None = None,
    gate: bool = False,
    bias: bool = False,
    reads: Reads = "sequence",
    tokenizer: PreTrainedTokenizerBase | str | None = None,
    augmenting_tokenizers: Mapping[str, PreTrainedTokenizerBase | str]
    | PreTrainedTokenizerBase
    | str
    | None = None,
    alignment: str = "auto",
    distance_unit: DistanceUnit = "characters",
    bridge_dtype: torch.dtype = torch.float32,
    dtype: torch.dtype | str = "auto",
    device_map: Any = None,
    quantization_config: Any = None,
    trust_remote_code: bool = False,
) -> ComposedForCausalLM:
    """Compose a frozen anchor with one or more frozen augmenting models.

    The composed model starts as the anchor, bit for bit; train its bridges to let the anchor
    read the augmenting models. The given models are frozen (`requires_grad` off, evaluation
    mode) and otherwise left as they are.

    Paper: CALM, section 3.

    Args:
        anchor: m_B, whose logits are returned: a loaded causal language model, a path or a hub id.
        augmenting: m_A, or several by name; a single one is named "augmenting".
        every: Connect every n-th augmenting layer, evenly over the anchor (the paper's 4).
        connections: Which layers to connect, instead of `every`.
        variant: "graftlm" normalises both inputs of a bridge and lets it know distances;
            "paper" is the bare equations.
        position: "none", "distance" or "rotary"; by default what the variant says.
        num_heads: Heads of the cross-attention; by default the anchor's.
        width: Total width of the cross-attention; by default the anchor's, a smaller one is a
            bottleneck.
        gate: Multiply each update by tanh of a learned scalar that starts at zero.
        bias: Biases in the linear maps of the bridges.
        reads: "sequence" feeds every token, generated ones too, to the augmenting models;
            "prompt" only the prompt (the paper's "m_A as an encoder" ablation).
        tokenizer: The anchor's; by default the one beside it.
        augmenting_tokenizers: The augmenting models', by name, or the only one's; by default
            those beside them.
        alignment: Which augmenting tokens an anchor token sees. "auto": the same tokens if both
            tokenizers do the same ("identity"), or are not at hand; else "committed", the tokens
            that no continuation of the text can change. "prefix": all tokens of the text so far,
            made anew for every anchor token; no lag, but the augmenting model runs over about a
            quarter more tokens, and in decoding over the last word twice. "char_end": the same
            in decoding, but in training the tokens of the whole text, which give away a little
            of the future (docs/tokenizers.md).
        distance_unit: What positions count where tokenizers differ: "characters" (4 to a token)
            or "tokens" of the augmenting model.
        bridge_dtype: Of the bridges; the models keep theirs.
        dtype, device_map, trust_remote_code: For models loaded here, as in transformers.
        quantization_config: For models loaded here: "8bit", "4bit" (bitsandbytes), "int8wo"
            (torchao), or a configuration of transformers; or these by the names of the models
            ("anchor" and those of `augmenting`), others keep plain weights (docs/quantized.md).

    Raises:
        UnsupportedModelError: If a model is not a text decoder with one stack of layers.
        ValueError: If an option or a connection does not fit the models.
    """
    if variant not in ("graftlm", "paper"):
        raise ValueError(f"variant is {variant!r}, but must be 'graftlm' or 'paper'")
    changes: dict[str, Any] = {
        "num_heads": num_heads,
        "width": width,
        "gate": gate,
        "bias": bias,
        "distance_unit": distance_unit,
    }
    if position is not None:
        changes["position"] = position
    bridge = BridgeConfig.paper(**changes) if variant == "paper" else BridgeConfig(**changes)

    named = augmenting if isinstance(augmenting, Mapping) else {"augmenting": augmenting}
    if not named:
        raise ValueError("augmenting is empty, but a composition needs at least one model")
    options = {
        "dtype": dtype,
        "device_map": device_map,
        "trust_remote_code": trust_remote_code,
    }
    packed = quantization_for(quantization_config, ["anchor", *named])

    def load(name: str, base: Base) -> PreTrainedModel:
        return load_base(base, role_of(name), **options, quantization_config=packed.get(name))

    anchor_model = load("anchor", anchor)
    models = {name: load(name, base) for name, base in named.items()}
    # A model loaded by name has its tokenizer where its weights are; others, where they came from.
    by_name = {"anchor": anchor, **named}
    ours, theirs = gather_tokenizers(
        {
            name: by_name[name] if isinstance(by_name[name], (str, os.PathLike)) else model
            for name, model in {"anchor": anchor_model, **models}.items()
        },
        tokenizer,
        augmenting_tokenizers,
        trust_remote_code,
    )
    alignments = resolve_alignments(alignment, ours, theirs)
    if connections is None:
        connections = [
            connection
            for name, model in models.items()
            for connection in spaced_connections(
                name, decoder.num_layers(model), decoder.num_layers(anchor_model), every
            )
        ]
    config = ComposedConfig(
        anchor_config=anchor_model.config,
        augmenting_configs={name: model.config for name, model in models.items()},
        connections=list(connections),
        bridge=bridge,
        reads=reads,
        alignments=alignments,
        bases={
            name: {"name_or_path": reference(model), "revision": None}
            for name, model in {"anchor": anchor_model, **models}.items()
        },
    )
    model = ComposedForCausalLM(config, anchor_model, models)
    model.bridges.to(bridge_dtype)
    model.set_tokenizers(ours, {name: t for name, t in theirs.items() if t is not None})
    return model


def gather_tokenizers(
    models: Mapping[str, Any],
    tokenizer: Any,
    augmenting_tokenizers: Any,
    trust_remote_code: bool,
) -> tuple[PreTrainedTokenizerBase | None, dict[str, PreTrainedTokenizerBase | None]]:
    """The tokenizers given, loaded where they are paths, or else those of the models.

    Args:
        models: "anchor" and the augmenting models: names where they were loaded by name.
        tokenizer, augmenting_tokenizers: As in `compose`.
        trust_remote_code: For tokenizers loaded here.

    Raises:
        ValueError: If a name is unknown, or missing where there are several.
    """
    names = [name for name in models if name != "anchor"]
    given = for_augmenting(augmenting_tokenizers, names, "augmenting_tokenizers")

    def find(wanted: Any, model: Any) -> PreTrainedTokenizerBase | None:
        if isinstance(wanted, (str, os.PathLike)):
            place = resolve_gguf(os.fspath(wanted))
            return AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code)
        if wanted is not None:
            return wanted
        if isinstance(model, PreTrainedModel):
            return find_tokenizer(model.config.name_or_path)
        return load_tokenizer(os.fspath(model), trust_remote_code=trust_remote_code)

    theirs = {name: find(given.get(name), models[name]) for name in names}
    return find(tokenizer, models["anchor"]), theirs


def resolve_alignments(
    rule: str,
    tokenizer: PreTrainedTokenizerBase | None,
    augmenting_tokenizers: Mapping[str, PreTrainedTokenizerBase | None],
) -> dict[str, str]:
    """How each augmenting model is aligned.

    Args:
        rule: As in `compose`.
        tokenizer, augmenting_tokenizers: As far as they are at hand. Where they are not, the
            models are taken to share their tokens.

    Raises:
        ValueError: If the rule does not exist or cannot be followed.
    """
    if rule not in ("auto", *get_args(AlignmentRule)):
        raise ValueError(
            f"alignment is {rule!r}, but must be 'auto', 'identity', 'committed', 'prefix' or "
            "'char_end'"
        )
    alignments = {}
    for name, theirs in augmenting_tokenizers.items():
        if tokenizer is None or theirs is None:
            if rule not in ("auto", "identity"):
                missing = "the anchor" if tokenizer is None else f"augmenting model {name!r}"
                raise ValueError(
                    f"alignment is {rule!r}, but {missing} has no tokenizer beside it; pass "
                    "tokenizer= and augmenting_tokenizers="
                )
            if tokenizer is not theirs:
                known = "the anchor's" if theirs is None else f"that of augmenting model {name!r}"
                warnings.warn(
                    f"only one tokenizer is at hand, {known}; the anchor and augmenting model "
                    f"{name!r} are taken to share their tokens (pass tokenizer= and "
                    "augmenting_tokenizers= if they do not)",
                    stacklevel=3,
                )
            alignments[name] = "identity"
            continue
        is_same = tokenizes_alike(tokenizer, theirs)
        if rule == "identity" and not is_same:
            raise ValueError(
                f"alignment is 'identity', but augmenting model {name!r} splits text into other "
                "tokens than the anchor does; leave alignment out"
            )
        alignments[name] = ("identity" if is_same else "committed") if rule == "auto" else rule
    return alignments
