"""The frozen models a composition rests on: load them, know them again, refuse others."""

import hashlib
import os
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from graftlm import decoder, gguf
from graftlm.errors import CheckpointMismatchError
from graftlm.packing import holds_plain_weights, quantization_of
from graftlm.sharding import whole
from graftlm.tokenization import find_tokenizer, tokenizer_fingerprint

Base = PreTrainedModel | str | os.PathLike[str]

# What loading, saving or running changes without changing what the model computes.
VOLATILE = {
    "_name_or_path",
    "architectures",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "quantization_config",
    "return_dict",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}


def role_of(name: str) -> str:
    """How messages name one part of a composition."""
    return "the anchor" if name == "anchor" else f"augmenting model {name!r}"


def load_base(base: Base, role: str, **options: Any) -> PreTrainedModel:
    """A loaded model, checked to be a decoder we can compose.

    Args:
        base: A loaded model, a path (of a folder or a GGUF file) or a hub id.
        role: How a message names it, such as "the anchor".
        options: For `from_pretrained`; those that are None are left out. A GGUF file is
            converted in `cache_dir`.

    Raises:
        UnsupportedModelError: If it is not such a decoder.
        ValueError: If `base` looks like a path but nothing is there, its file is damaged, or it
            is a loaded model that should be quantized.
    """
    if isinstance(base, (str, os.PathLike)):
        path = os.fspath(base)
        folder = gguf.resolve(path, options.get("cache_dir"))
        if (os.path.isabs(path) or path.startswith(".")) and not os.path.isdir(folder):
            raise ValueError(f"{role} is {path!r}, but there is no such folder")
        given = {name: value for name, value in options.items() if value is not None}
        try:
            base = AutoModelForCausalLM.from_pretrained(folder, **given)
        except SafetensorError as error:
            raise ValueError(
                f"{role} at {path!r} has a damaged .safetensors file ({error}); fetch it again"
            ) from error
        if folder != path:  # so that it is found again when the converted copy is gone
            base.config.name_or_path = os.path.abspath(path)
    elif options.get("quantization_config") is not None:
        raise ValueError(
            f"{role} is loaded already, so quantization_config comes too late for it; quantize it "
            "when loading it, or name the models to quantize, as in {'anchor': '4bit'}"
        )
    decoder.check_decoder(base, role)
    return base


def for_augmenting(given: Any, names: list[str], what: str) -> dict[str, Any]:
    """What was given for the augmenting models, by name; for an only one it may go without.

    Args:
        given: One for the only model, several by name, or None.
        names: Of the augmenting models.
        what: How a message calls the argument.

    Raises:
        ValueError: If a name is unknown, or missing where there are several.
    """
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        if len(names) != 1:
            raise ValueError(
                f"{what} is a single one, but there are {len(names)} augmenting models: "
                f"{', '.join(names)}; pass a dictionary"
            )
        return {names[0]: given}
    unknown = sorted(set(given) - set(names))
    if unknown:
        raise ValueError(f"{what} names {unknown[0]!r}, but there is only {', '.join(names)}")
    return dict(given)


def reference(model: PreTrainedModel) -> str | None:
    """Where a model came from: its hub id, or the absolute path of its folder or GGUF file."""
    name = model.config.name_or_path
    return os.path.abspath(name) if name and os.path.exists(name) else name or None


def fingerprint(
    model: PreTrainedModel, *, with_head: bool, tokenizer: PreTrainedTokenizerBase | None = None
) -> dict[str, str | None]:
    """What tells a base model from any other: hashes over its weights and its tokenizer.

    Args:
        model: The base model.
        with_head: Whether its head matters, as the anchor's does.
        tokenizer: Its tokenizer; by default the one beside it.

    Returns:
        `dtype`; `quantization`, how the weights are packed, or None; `weights`, over the bytes as
        they are; `weights_bfloat16`, over the weights rounded to bfloat16, so that a model can be
        known again in another precision (both None for packed or offloaded weights); `tokenizer`,
        None if there is none beside the model.
    """
    tokenizer = tokenizer or find_tokenizer(model.config.name_or_path)
    exact = rounded = None
    if holds_plain_weights(model):
        exact = weights_hash(model, with_head=with_head)
        rounded = weights_hash(model, with_head=with_head, dtype=torch.bfloat16)
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantization": quantization_of(model),
        "weights": exact,
        "weights_bfloat16": rounded,
        "tokenizer": tokenizer_fingerprint(tokenizer) if tokenizer else None,
    }


def weights_hash(
    model: PreTrainedModel, *, with_head: bool, dtype: torch.dtype | None = None
) -> str:
    """SHA-256 over the names, shapes and bytes of a model's weights.

    Args:
        model: The base model.
        with_head: Whether to include the head.
        dtype: Hash the weights rounded to this type.
    """
    digest = hashlib.sha256()
    for name, tensor in weights_of(model, with_head=with_head):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        if dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(dtype)
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def weights_of(model: PreTrainedModel, *, with_head: bool) -> Iterator[tuple[str, Tensor]]:
    """The weights a composition uses, sorted by name; the same for a model without its head.

    Where they are spread over processes, every process must ask for them.
    """
    parts: dict[str, Any] = {"": decoder.trunk(model)}
    if with_head and model.get_output_embeddings() is not None:
        parts["head."] = model.get_output_embeddings()
    for prefix, part in parts.items():
        for name, tensor in sorted(part.state_dict(keep_vars=True).items()):
            yield f"{prefix}{name}", whole(tensor)


def config_difference(here: PreTrainedConfig, there: PreTrainedConfig) -> str | None:
    """The first setting in which two configurations would compute different things, or None."""
    ours, theirs = here.to_dict(), there.to_dict()
    names = sorted((set(ours) | set(theirs)) - VOLATILE)
    return next((name for name in names if ours.get(name) != theirs.get(name)), None)


def check_base(
    model: PreTrainedModel,
    role: str,
    config: PreTrainedConfig,
    known: dict[str, str | None] | None,
    *,
    with_head: bool,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Refuse a base model that is not the one a checkpoint was made for.

    Weights that are packed, here or there, cannot be compared; packed otherwise is a warning.

    Args:
        model: The base model.
        role: How the message names it.
        config: Its configuration in the checkpoint.
        known: Its `fingerprint` in the checkpoint, or None.
        with_head: Whether its head matters.
        tokenizer: Its tokenizer; by default the one beside it.

    Raises:
        CheckpointMismatchError: Saying whether the configuration, the weights or the tokenizer
            differs.
    """
    different = config_difference(model.config, config)
    if different:
        here, there = model.config.to_dict(), config.to_dict()
        raise CheckpointMismatchError(
            f"{role} is not the model this checkpoint was made for: its configuration has "
            f"{different}={here.get(different)!r}, the checkpoint says {there.get(different)!r}"
        )
    known = known or {}
    tokenizer = tokenizer or find_tokenizer(model.config.name_or_path)
    if tokenizer and known.get("tokenizer") not in (None, tokenizer_fingerprint(tokenizer)):
        raise CheckpointMismatchError(
            f"{role} is not the model this checkpoint was made for: its tokenizer at "
            f"{model.config.name_or_path!r} differs"
        )
    here, there = quantization_of(model), known.get("quantization")
    if here != there and (there or known.get("weights")):
        dtype = str(model.dtype).removeprefix("torch.")
        warnings.warn(
            f"{role} is in {here or dtype} here, but the bridges were trained on "
            f"{there or known['dtype']} weights; the two were not compared, and results may "
            "differ a little",
            stacklevel=3,
        )
        return
    if known.get("weights") is None:
        return
    if not holds_plain_weights(model):
        warnings.warn(f"{role} is offloaded, so its weights were not compared", stacklevel=3)
        return
    kind, dtype = comparable(model, known)
    found = weights_hash(model, with_head=with_head, dtype=dtype)
    if found != known[kind]:
        raise CheckpointMismatchError(
            f"{role} is not the model this checkpoint was made for: its weights differ "
            f"(SHA-256 {found[:12]}..., the checkpoint says {str(known[kind])[:12]}...)"
        )


def comparable(
    model: PreTrainedModel, known: Mapping[str, str | None]
) -> tuple[str, torch.dtype | None]:
    """Which hash of a fingerprint to compare with, and the precision to take ours in.

    Weights made in a narrower type are compared in that type, others rounded to bfloat16, which
    float32 and bfloat16 survive.
    """
    made_in = getattr(torch, known["dtype"] or "")
    if model.dtype == made_in:
        return "weights", None
    if torch.finfo(made_in).bits < torch.finfo(model.dtype).bits:
        return "weights", made_in
    return "weights_bfloat16", torch.bfloat16
