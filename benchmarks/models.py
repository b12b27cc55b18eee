"""The measured models: random weights in given shapes, because time does not depend on values.

Systems that are compared share their frozen weights (`twin`), so that no copy of them takes
another place in memory and in the processor's caches.
"""

import copy
import functools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from graftlm import ComposedForCausalLM, Connection, compose
from graftlm.config import spaced_connections

SMOLLM2_135M: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "vocab_size": 49152,
    "max_position_embeddings": 16384,
    "tie_word_embeddings": True,
}
TINY: dict[str, Any] = SMOLLM2_135M | {
    "hidden_size": 64,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 112,
    "vocab_size": 130,
}
LLAMA_8B = Path(__file__).parent / "shapes" / "llama-8b"

SIZES = ("tiny", "small", "large")
# A quarter of the width makes 10 % of the parameters, the paper's ratio of PaLM2-XXS to PaLM2-S.
NARROWER = {"half": 2, "tenth": 4}


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """One point at which is measured; plain data, so that a child process can be told.

    Args:
        size: The anchor's shape: "small" is SmolLM2-135M's, "large" Llama 3.1 8B's.
        augmenting: The augmenting models, each "half" as wide as the anchor or of a "tenth" of its
            parameters.
        connections: "paper" for every fourth augmenting layer, evenly over the anchor; "middle"
            for half as many, over the anchor's upper half; or a number, evenly over both.
        narrow: Bridges of a sixth of the anchor's width, with a third of its heads.
        batch, length: Of the training step, or the prompt.
        checkpointing: Whether activations are computed again in the backward pass.
    """

    size: str = "small"
    augmenting: tuple[str, ...] = ("half",)
    connections: str | int = "paper"
    narrow: bool = False
    batch: int = 1
    length: int = 512
    checkpointing: bool = False
    dtype: str = "float32"
    device: str = "cpu"

    @classmethod
    def of(cls, values: dict[str, Any]) -> "Setting":
        """The setting that JSON describes."""
        return cls(**values | {"augmenting": tuple(values["augmenting"])})

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """What a setting describes, in memory."""

    setting: Setting
    anchor: PreTrainedModel
    augmenting: dict[str, PreTrainedModel]
    connections: list[Connection]
    input_ids: Tensor

    def compose(self) -> ComposedForCausalLM:
        """The composed model, of twins of the models."""
        augmenting = {name: twin(model) for name, model in self.augmenting.items()}
        size = narrow_bridges(self.anchor.config) if self.setting.narrow else {}
        return compose(twin(self.anchor), augmenting, connections=self.connections, **size)

    def highest(self, name: str) -> int:
        """The highest layer of an augmenting model that is read."""
        return max(c.augmenting_layer for c in self.connections if c.augmenting == name)

    @property
    def first(self) -> int:
        """The lowest anchor layer that is written to."""
        return min(c.anchor_layer for c in self.connections)


def anchor_config(size: str) -> PreTrainedConfig:
    """The anchor's shape."""
    if size == "large":
        return AutoConfig.from_pretrained(LLAMA_8B)
    return AutoConfig.for_model(**(TINY if size == "tiny" else SMOLLM2_135M))


def narrowed(config: PreTrainedConfig, factor: int) -> PreTrainedConfig:
    """The same depth, vocabulary and number of heads, at a fraction of the width."""
    config = copy.deepcopy(config)
    config.hidden_size //= factor
    config.intermediate_size //= factor
    config.head_dim = config.hidden_size // config.num_attention_heads
    return config


def narrow_bridges(config: PreTrainedConfig) -> dict[str, Any]:
    """Arguments of `compose`: a sixth of the anchor's width, a third of its heads."""
    num_heads = max(config.num_attention_heads // 3, 1)
    return {"width": config.hidden_size // 6 // num_heads * num_heads, "num_heads": num_heads}


@functools.cache
def random_model(size: str, part: str, dtype: str, device: str) -> PreTrainedModel:
    """The anchor or an augmenting model, "half" or "tenth"; the same object each time."""
    config = anchor_config(size)
    if part != "anchor":
        config = narrowed(config, NARROWER[part])
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """A copy with modules of its own (hooks, adapters, modes) around the same weights."""
    shared = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


def build(setting: Setting) -> Case:
    """Make the models and the data."""
    place = (setting.dtype, setting.device)
    anchor = random_model(setting.size, "anchor", *place)
    names = [f"{part}_{number}" for number, part in enumerate(setting.augmenting)]
    augmenting = {
        name: random_model(setting.size, part, *place)
        for name, part in zip(names, setting.augmenting, strict=True)
    }
    torch.manual_seed(1)
    return Case(
        setting=setting,
        anchor=anchor,
        augmenting=augmenting,
        connections=connections(setting.connections, names, anchor.config.num_hidden_layers),
        input_ids=torch.randint(
            anchor.config.vocab_size, (setting.batch, setting.length), device=setting.device
        ),
    )


def connections(kind: str | int, names: Sequence[str], layers: int) -> list[Connection]:
    """The connections of models that are all of one depth."""
    if kind == "paper":
        return [c for name in names for c in spaced_connections(name, layers, layers, every=4)]
    if kind == "middle":
        pairs = middle_pairs(layers)
    else:
        number = int(kind)
        pairs = [(k * layers // number - 1, k * layers // number - 1) for k in range(1, number + 1)]
    return [
        Connection(augmenting=name, augmenting_layer=low, anchor_layer=high)
        for name in names
        for low, high in pairs
    ]


def middle_pairs(layers: int) -> list[tuple[int, int]]:
    """Every eighth augmenting layer or so, from the middle of the anchor to its end."""
    number = max((layers // 4 + 1) // 2, 1)
    middle = layers // 2 - 1
    gap = (layers - 1 - middle) / max(number - 1, 1)
    return [((k + 1) * layers // number - 1, middle + round(k * gap)) for k in range(number)]


def num_parameters(model: Any, *, trainable: bool = False) -> int:
    """Parameters, tied ones once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable)
