"""Frozen models in packed weights: from what a user says to the configurations of transformers."""

import importlib.util
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers import BitsAndBytesConfig, TorchAoConfig
from transformers.utils.quantization_config import QuantizationConfigMixin

# The names of a recipe and the command line, and the package each needs.
SCHEMES = {"8bit": "bitsandbytes", "4bit": "bitsandbytes", "int8wo": "torchao"}
FIELDS = set(inspect.signature(BitsAndBytesConfig).parameters) - {"kwargs"}


def quantization_for(given: Any, names: Iterable[str]) -> dict[str, Any]:
    """The configuration of each part that is to be quantized, by name.

    Args:
        given: A configuration of transformers, one of `SCHEMES`, or the fields of
            `BitsAndBytesConfig`, for all parts; or any of these by the names of parts.
        names: "anchor" and the augmenting models.

    Raises:
        ValueError: If it is none of these, or a package is missing.
    """
    names = list(names)
    if given is None:
        return {}
    if not isinstance(given, Mapping) or set(given) & (FIELDS | {"quant_method"}):
        return dict.fromkeys(names, configuration(given))
    unknown = sorted(map(str, set(given) - set(names)))
    if unknown:
        raise ValueError(
            f"quantization of {unknown[0]!r}, which is neither a field of BitsAndBytesConfig nor "
            f"one of the models {', '.join(names)}"
        )
    return {name: configuration(one) for name, one in given.items() if one is not None}


def configuration(given: Any) -> Any:
    """The configuration of one model.

    Raises:
        ValueError: If there is none of that name, or its package is missing.
    """
    is_fields = isinstance(given, Mapping)
    if isinstance(given, QuantizationConfigMixin) or (is_fields and "quant_method" in given):
        return given  # transformers checks it
    if is_fields and (given.get("load_in_8bit") or given.get("load_in_4bit")):
        require("bitsandbytes")
        if unknown := sorted(set(given) - FIELDS):
            raise ValueError(f"quantization has {unknown[0]!r}, no field of BitsAndBytesConfig")
        return BitsAndBytesConfig(**given)
    if not isinstance(given, str) or given not in SCHEMES:
        raise ValueError(
            f"quantization is {given!r}, but must be one of {', '.join(map(repr, SCHEMES))}, "
            "fields of BitsAndBytesConfig with load_in_8bit or load_in_4bit true, or a "
            "configuration of transformers"
        )
    require(SCHEMES[given])
    if given == "8bit":
        # Its default of 6 treats channels by the largest value in the batch: not causal at all.
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    if given == "4bit":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    from torchao.quantization import Int8WeightOnlyConfig  # slow to import

    return TorchAoConfig(Int8WeightOnlyConfig())


def require(package: str) -> None:
    """Refuse what needs a package that is not there.

    Raises:
        ValueError: Naming it.
    """
    if importlib.util.find_spec(package) is None:
        raise ValueError(
            f"quantization needs the {package} package, which is missing; pip install "
            "'graftlm[quantized]'"
        )
