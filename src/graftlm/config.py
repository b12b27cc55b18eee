"""What a composition is: which models, which layers are connected, and how the bridges look."""

import copy
import importlib
import math
import re
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar, Literal, Self, get_args

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from graftlm.errors import CheckpointMismatchError

FORMAT_VERSION = 2  # 2: the unit of a normalised update is a median, not a mean square
Position = Literal["none", "distance", "rotary"]
Reads = Literal["sequence", "prompt"]
AlignmentRule = Literal["identity", "committed", "prefix", "char_end"]
DistanceUnit = Literal["characters", "tokens"]


@dataclass(frozen=True, kw_only=True, slots=True)
class BridgeConfig:
    """The shape of every bridge of a composition.

    Args:
        num_heads: N_H. None takes the anchor's number of attention heads, as the paper does.
        width: Total width of queries, keys and values, a multiple of `num_heads`. None takes
            the anchor's hidden size, as the paper does; a smaller one is a bottleneck.
        norm: RMSNorm on both inputs, and the update in units of the anchor's hidden states
            (see `graftlm.bridge.typical_size`): scales of real models differ 1000-fold.
        position: "none" is the paper's content-only attention; "distance" subtracts a fixed
            slope times the distance in tokens in three quarters of the heads (as ALiBi does);
            "rotary" turns queries and keys by their positions (as RoPE does).
        distance_unit: What positions count where the tokenizers differ: "characters" of the text
            (4 of them stand for a token), or "tokens" of the augmenting model.
        gate: Multiply the update by tanh of a learned scalar that starts at zero (Flamingo).
        bias: Biases in all five linear maps.

    Raises:
        ValueError: If an option is none of its choices, or a number is not positive.
    """

    num_heads: int | None = None
    width: int | None = None
    norm: bool = True
    position: Position = "distance"
    distance_unit: DistanceUnit = "characters"
    gate: bool = False
    bias: bool = False

    def __post_init__(self) -> None:
        for name, choices in (("position", Position), ("distance_unit", DistanceUnit)):
            if getattr(self, name) not in get_args(choices):
                options = ", ".join(repr(choice) for choice in get_args(choices))
                raise ValueError(f"{name} is {getattr(self, name)!r}, but must be one of {options}")
        for name in ("num_heads", "width"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{name} is {value!r}, but must be a positive whole number")

    @classmethod
    def paper(cls, **changes: Any) -> Self:
        """The bare equations of the paper: no normalisation, no positions, no gate, no bias."""
        options: dict[str, Any] = {"norm": False, "position": "none"} | changes
        return cls(**options)

    def resolve(self, anchor_size: int, anchor_heads: int) -> Self:
        """The same shape with `num_heads` and `width` filled in from the anchor.

        Raises:
            ValueError: If the width is not a multiple of the number of heads, or "rotary" is
                asked for with an odd head width.
        """
        num_heads = self.num_heads or anchor_heads
        width = self.width or anchor_size
        if width % num_heads:
            raise ValueError(
                f"width {width} is not a multiple of num_heads {num_heads}; pass num_heads= or "
                "width= so that it is"
            )
        if self.position == "rotary" and (width // num_heads) % 2:
            raise ValueError(
                f"position='rotary' needs an even head width, but width {width} over "
                f"{num_heads} heads gives {width // num_heads}"
            )
        return replace(self, num_heads=num_heads, width=width)


@dataclass(frozen=True, kw_only=True, slots=True)
class Connection:
    """A pair of layers: the anchor layer reads the augmenting layer. It has no weights.

    Args:
        augmenting: Name of the augmenting model; an only one is called "augmenting".
        augmenting_layer, anchor_layer: From 0; layer i stands for the hidden states after block i.

    Raises:
        ValueError: If a layer is not a whole number from 0.
    """

    augmenting: str = "augmenting"
    augmenting_layer: int
    anchor_layer: int

    def __post_init__(self) -> None:
        for name in ("augmenting_layer", "anchor_layer"):
            value = getattr(self, name)
            if type(value) is not int or value < 0:
                raise ValueError(f"{name} is {value!r}, but layers are whole numbers from 0")


def spaced_connections(
    augmenting: str, augmenting_layers: int, anchor_layers: int, every: int
) -> list[Connection]:
    """The paper's rule: every 4th augmenting layer, spread evenly over the anchor.

    Paper: CALM, sections 3.1 and 4: n = N_A / 4 layers of each model at uniform gaps, paired
    in order. Where the first one sits is not stated; we let each gap end at its layer:
    N_A = 28, N_B = 30, every 4 gives 3-3, 7-7, 11-11, 15-16, 19-20, 23-24, 27-29. A model of
    fewer than `every` layers is read at its last one.

    Raises:
        ValueError: If `every` is not a positive whole number.
    """
    if type(every) is not int or every < 1:
        raise ValueError(f"every is {every!r}, but must be a positive whole number")
    wanted = max(augmenting_layers // every, 1)
    count = min(wanted, anchor_layers)
    gap = every if count == wanted <= augmenting_layers // every else augmenting_layers / count
    return [
        Connection(
            augmenting=augmenting,
            augmenting_layer=int(k * gap) - 1,
            anchor_layer=k * anchor_layers // count - 1,
        )
        for k in range(1, count + 1)
    ]


class ComposedConfig(PreTrainedConfig):
    """Everything about a composed model but its weights.

    Args:
        anchor_config: Configuration of the anchor.
        augmenting_configs: Configurations of the augmenting models, by name.
        connections: Which layers are connected; kept sorted by anchor layer.
        bridge: The shape of the bridges.
        reads: "sequence" if the augmenting models get every token, the generated ones included
            (the paper's method); "prompt" if they get the prompt only (its "encoder" ablation).
        alignments: For each augmenting model: "identity" if it reads the anchor's tokens; else
            which tokens of its own an anchor token sees, "committed", "prefix" or "char_end".
        scales: Factor on the updates of each augmenting model; 0 switches it off.
        bases: For "anchor" and each augmenting model: `name_or_path`, `revision`, `fingerprint`.
        weights_sha256: Hash of the bridges' file, set when saving.
        format_version: Version of this layout of the checkpoint.
    """

    model_type = "graftlm"
    auto_map: ClassVar[
        dict[str, str]
    ] = {}  # read by TRL on the class; our classes are no remote code
    has_no_defaults_at_init = True

    anchor_config: Any = None
    augmenting_configs: dict[str, Any] = field(default_factory=dict)
    connections: list[Connection] = field(default_factory=list)
    bridge: BridgeConfig = field(default_factory=BridgeConfig)
    reads: str = "sequence"
    alignments: dict[str, str] = field(default_factory=dict)
    scales: dict[str, float] = field(default_factory=dict)
    bases: dict[str, Any] = field(default_factory=dict)
    weights_sha256: str | None = None
    format_version: int = FORMAT_VERSION

    def __post_init__(self, **kwargs: Any) -> None:
        # Who has a configuration may ask AutoModelForCausalLM for the model next. Not at the top:
        # transformers is still importing when this module registers the configuration.
        importlib.import_module("graftlm.causal_lm")
        if self.format_version > FORMAT_VERSION:
            raise CheckpointMismatchError(
                f"this checkpoint has format version {self.format_version}, but this graftlm "
                f"reads versions up to {FORMAT_VERSION}; upgrade graftlm"
            )
        is_normalised = self.bridge["norm"] if isinstance(self.bridge, dict) else self.bridge.norm
        if self.format_version < 2 and is_normalised:
            raise CheckpointMismatchError(
                f"this checkpoint has format version {self.format_version}, of graftlm 0.1, whose "
                "normalised bridges had another unit; train again, or use graftlm 0.1"
            )
        if self.reads not in get_args(Reads):
            raise ValueError(f"reads is {self.reads!r}, but must be 'sequence' or 'prompt'")
        self.anchor_config = as_config(self.anchor_config)
        self.augmenting_configs = {
            name: as_config(config) for name, config in self.augmenting_configs.items()
        }
        connections = [
            c if isinstance(c, Connection) else Connection(**c) for c in self.connections
        ]
        # In a fixed order, so that sums do not depend on how a dictionary was written down.
        self.connections = sorted(
            connections, key=lambda c: (c.anchor_layer, c.augmenting, c.augmenting_layer)
        )
        if not isinstance(self.bridge, BridgeConfig):
            self.bridge = BridgeConfig(**self.bridge)
        self.alignments = dict.fromkeys(self.augmenting_configs, "identity") | self.alignments
        for name, alignment in self.alignments.items():
            if alignment not in get_args(AlignmentRule):
                raise ValueError(
                    f"alignment of {name!r} is {alignment!r}, but must be 'identity', 'committed', "
                    "'prefix' or 'char_end'"
                )
        self.scales = dict.fromkeys(self.augmenting_configs, 1.0) | self.scales
        if self.anchor_config is not None:
            anchor = self.anchor_config.get_text_config(decoder=True)
            for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
                kwargs.setdefault(name, getattr(anchor, name, None))
            self.check_connections()
        super().__post_init__(**kwargs)

    def check_connections(self) -> None:
        """Refuse connections to models or layers that do not exist.

        How many layers a model with code of its own has is known once it is loaded.

        Raises:
            ValueError: Naming the connection and what exists.
        """
        anchor_layers = getattr(self.get_text_config(), "num_hidden_layers", math.inf)
        seen = set()
        for number, connection in enumerate(self.connections):
            if connection in seen:
                raise ValueError(f"connection {number} appears twice: {connection}")
            seen.add(connection)
            if connection.augmenting not in self.augmenting_configs:
                names = ", ".join(repr(name) for name in self.augmenting_configs)
                raise ValueError(
                    f"connection {number} reads augmenting model {connection.augmenting!r}, but "
                    f"there is only {names}"
                )
            config = self.augmenting_configs[connection.augmenting].get_text_config(decoder=True)
            layers = getattr(config, "num_hidden_layers", math.inf)
            if connection.augmenting_layer >= layers:
                raise ValueError(
                    f"connection {number} reads augmenting layer {connection.augmenting_layer}, "
                    f"but {connection.augmenting!r} ({config.model_type}) has layers 0 to "
                    f"{layers - 1}"
                )
            if connection.anchor_layer >= anchor_layers:
                raise ValueError(
                    f"connection {number} writes to anchor layer {connection.anchor_layer}, but "
                    f"the anchor ({self.anchor_config.model_type}) has layers 0 to "
                    f"{anchor_layers - 1}"
                )
        for name in self.augmenting_configs:
            if not re.fullmatch(r"[A-Za-z0-9_]+", name) or name in ("anchor", "composed"):
                raise ValueError(
                    f"augmenting model name {name!r} must consist of letters, digits and "
                    "underscores, and not be 'anchor' or 'composed'"
                )
            if not any(connection.augmenting == name for connection in self.connections):
                raise ValueError(
                    f"augmenting model {name!r} has no connection; add one or leave the model out"
                )
        unknown = set(self.scales) - set(self.augmenting_configs)
        if unknown:
            raise ValueError(f"scales names unknown augmenting models: {sorted(unknown)}")

    def get_text_config(self, decoder: Any = None, encoder: Any = None) -> PreTrainedConfig:
        """The anchor's: caches, vocabulary and generation all see the anchor."""
        del decoder, encoder
        if self.anchor_config is None:
            return self
        return self.anchor_config.get_text_config(decoder=True)

    @property
    def vocab_size(self) -> int:
        """Tokens in the anchor's vocabulary."""
        return self.get_text_config().vocab_size

    @property
    def hidden_size(self) -> int:
        """Width of the anchor."""
        return self.get_text_config().hidden_size

    @property
    def num_hidden_layers(self) -> int:
        """Depth of the anchor."""
        return self.get_text_config().num_hidden_layers

    @property
    def num_attention_heads(self) -> int:
        """Attention heads of the anchor."""
        return self.get_text_config().num_attention_heads

    @property
    def max_position_embeddings(self) -> int | None:
        """Context of the anchor in tokens."""
        return getattr(self.get_text_config(), "max_position_embeddings", None)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for config.json, the sub-configurations in full."""
        typed = ("anchor_config", "augmenting_configs", "connections", "bridge")
        bare = copy.copy(self)
        for name in typed:
            bare.__dict__[name] = None
        output = super(ComposedConfig, bare).to_dict()
        output["anchor_config"] = as_dict(self.anchor_config) if self.anchor_config else None
        output["augmenting_configs"] = {
            name: as_dict(config) for name, config in self.augmenting_configs.items()
        }
        output["connections"] = [asdict(connection) for connection in self.connections]
        output["bridge"] = asdict(self.bridge)
        return output

    def to_diff_dict(self) -> dict[str, Any]:
        """All of it: a checkpoint must not depend on what the defaults will be one day."""
        return {name: value for name, value in self.to_dict().items() if value is not None}


class OwnCodeConfig(PreTrainedConfig):
    """The settings of a model with code of its own, until that comes with the model."""


def as_dict(config: PreTrainedConfig) -> dict[str, Any]:
    """A configuration as plain data; whose class is the model's own code is marked."""
    is_own = type(config).__module__.startswith("transformers_modules")
    mark = {"own_code": True} if is_own or isinstance(config, OwnCodeConfig) else {}
    return config.to_dict() | mark


def as_config(config: Any) -> PreTrainedConfig | None:
    """A configuration object from one, or from its dictionary."""
    if not isinstance(config, dict):
        return config
    kind = config.get("model_type")
    settings = {name: value for name, value in config.items() if name != "own_code"}
    if "own_code" in config or (kind not in CONFIG_MAPPING and "auto_map" in config):
        return type("OwnCodeConfig", (OwnCodeConfig,), {"model_type": kind})(**settings)
    if kind in CONFIG_MAPPING:
        return AutoConfig.for_model(**settings)
    raise CheckpointMismatchError(
        f"this transformers knows no model type {kind!r}, which the checkpoint was composed of; "
        "upgrade transformers"
    )


AutoConfig.register("graftlm", ComposedConfig, exist_ok=True)
