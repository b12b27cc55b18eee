"""A training recipe: what to compose, what to train it on, and how; checked before any model loads.

Read from a YAML file, from flags, or both. Everything that can be wrong about it without looking
at a model is found here, in one sentence.
"""

import difflib
import os
import re
import types
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from enum import Enum
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch
import yaml
from transformers import TrainingArguments

from graftlm.config import (
    AlignmentRule,
    BridgeConfig,
    Connection,
    DistanceUnit,
    Position,
    Reads,
    spaced_connections,
)
from graftlm.quantized import quantization_for

DTYPES = ("float32", "bfloat16", "float16")
VARIANTS = ("graftlm", "paper")
# Fields of TrainingArguments that a recipe states once, at its top level.
OWN_FIELDS = ("output_dir", "seed")


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Everything `graftlm train` needs to know.

    Args:
        anchor: Path or hub id of the anchor.
        augmenting: Path or hub id of the augmenting model, or several by name.
        data: Training data: a file, a folder or a `datasets` name; see `graftlm.data`.
        output_dir: Folder for the checkpoints and, at the end, the composed model.
        every: Connect every n-th augmenting layer; by default the paper's 4.
        connections: Which layers to connect, instead of `every`: "3-5", "code:3-5" or mappings
            with `augmenting`, `augmenting_layer` and `anchor_layer`.
        variant, position, num_heads, width, gate, bias, reads, alignment, distance_unit: As in
            `graftlm.compose`.
        eval_data: Evaluation data, of the same kinds.
        eval_fraction: Part of `data` to hold out for evaluation instead, between 0 and 1.
        max_length: Tokens an example is cut to; by default 1024, or the models' context if that
            is shorter.
        completions_only: No loss on prompts and on turns that are not the assistant's.
        dtype: Of the frozen models; "auto" keeps that of their files.
        bridge_dtype: Of the bridges.
        seed: Of fresh bridges, of the order of the data, of the held-out part.
        device_map: As in transformers, for the frozen models.
        quantize: Pack the weights of the frozen models: "8bit", "4bit", "int8wo", fields of
            `BitsAndBytesConfig`, or any of these by the names of models.
        trust_remote_code: Run code that comes with the models.
        tokenizer: Path or hub id of the tokenizer; by default the anchor's.
        states_cache: Folder for the hidden states of the frozen models: they are computed once,
            and training reads them from there.
        states_dtype: Their precision there; "auto" is that of the models.
        probe: One or several prompts that the composed model continues at each evaluation.
        probe_tokens: How many tokens it writes at most.
        training: Fields of `transformers.TrainingArguments`, over `graftlm.training.DEFAULTS`.
    """

    anchor: str
    augmenting: str | Mapping[str, str]
    data: str
    output_dir: str
    every: int | None = None
    connections: tuple[Connection, ...] | None = None
    variant: str = "graftlm"
    position: Position | None = None
    num_heads: int | None = None
    width: int | None = None
    gate: bool = False
    bias: bool = False
    reads: Reads = "sequence"
    alignment: str = "auto"
    distance_unit: DistanceUnit = "characters"
    eval_data: str | None = None
    eval_fraction: float | None = None
    max_length: int | None = None
    completions_only: bool = True
    dtype: str = "auto"
    bridge_dtype: str = "float32"
    seed: int = 42
    device_map: str | Mapping[str, Any] | None = None
    quantize: str | Mapping[str, Any] | None = None
    trust_remote_code: bool = False
    tokenizer: str | None = None
    states_cache: str | None = None
    states_dtype: str = "auto"
    probe: tuple[str, ...] | None = None
    probe_tokens: int = 64
    training: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        checked_below = ("connections", "probe", "training")
        for name in (f.name for f in fields(self) if f.name not in checked_below):
            check_type(name, getattr(self, name), hints[name])
        for name in ("output_dir", "data", "eval_data", "states_cache"):
            if (path := getattr(self, name)) is not None:  # the dataclass is frozen
                object.__setattr__(self, name, os.path.expanduser(path))
        if self.connections is not None:
            parsed = tuple(parse_connection(entry) for entry in as_list(self.connections))
            object.__setattr__(self, "connections", parsed)
        if self.probe is not None:
            object.__setattr__(self, "probe", as_prompts(self.probe))
        check_choice("variant", self.variant, VARIANTS)
        check_choice("reads", self.reads, get_args(Reads))
        check_choice("alignment", self.alignment, ("auto", *get_args(AlignmentRule)))
        check_choice("distance_unit", self.distance_unit, get_args(DistanceUnit))
        check_choice("dtype", self.dtype, ("auto", *DTYPES))
        check_choice("states_dtype", self.states_dtype, ("auto", *DTYPES))
        check_choice("bridge_dtype", self.bridge_dtype, DTYPES)
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"max_length is {self.max_length}, but must be at least 2 tokens")
        if self.eval_fraction is not None and not 0 < self.eval_fraction < 1:
            raise ValueError(f"eval_fraction is {self.eval_fraction}, but must be between 0 and 1")
        if self.probe_tokens < 1:
            raise ValueError(f"probe_tokens is {self.probe_tokens}, but must be at least 1 token")
        self.check_bridges()
        quantization_for(self.quantize, ["anchor", *self.models])
        self.check_training()

    def check_bridges(self) -> None:
        """Refuse connections and bridge options that contradict each other or the models."""
        if self.every is not None:
            if self.connections is not None:
                raise ValueError(
                    f"every is {self.every} and connections lists {len(self.connections)}, but "
                    "only one of the two can say which layers are connected"
                )
            spaced_connections("augmenting", 1, 1, self.every)  # checks the number
        names = list(self.models)
        if not names:
            raise ValueError("augmenting is empty, but a composition needs at least one model")
        for connection in self.connections or ():
            if connection.augmenting not in names:
                raise ValueError(
                    f"connection {connection.augmenting_layer}-{connection.anchor_layer} reads "
                    f"augmenting model {connection.augmenting!r}, but there is only "
                    f"{', '.join(map(repr, names))}"
                )
        BridgeConfig(
            num_heads=self.num_heads, width=self.width, position=self.position or "distance"
        )

    def check_training(self) -> None:
        """Refuse training options that do not exist, have the wrong type, or contradict the data.

        Raises:
            ValueError: Naming the option, and the nearest one that exists.
        """
        check_type("training", self.training, Mapping)
        hints = get_type_hints(TrainingArguments)
        known = {f.name for f in fields(TrainingArguments) if f.init}
        for name, value in self.training.items():
            if name in OWN_FIELDS:
                raise ValueError(
                    f"training.{name} cannot be set; write {name} at the top level of the recipe"
                )
            if name not in known:
                raise ValueError(
                    f"training has an unknown key {name!r}{nearest(name, known)}; it takes the "
                    "fields of transformers.TrainingArguments"
                )
            check_type(f"training.{name}", value, hints[name])
        if self.eval_data is not None and self.eval_fraction is not None:
            raise ValueError(
                f"eval_data is {self.eval_data!r} and eval_fraction is {self.eval_fraction}, but "
                "only one of the two can say what to evaluate on"
            )
        if not self.evaluates:
            for name in ("eval_strategy", "eval_on_start", "load_best_model_at_end"):
                if self.training.get(name, False) not in (False, "no"):
                    raise ValueError(
                        f"training.{name} is {self.training[name]!r}, but there is no evaluation "
                        "data; give eval_data or eval_fraction"
                    )

    @property
    def evaluates(self) -> bool:
        """Whether there is something to evaluate on."""
        return self.eval_data is not None or self.eval_fraction is not None

    @property
    def models(self) -> dict[str, str]:
        """The augmenting models by name."""
        if isinstance(self.augmenting, str):
            return {"augmenting": self.augmenting}
        return dict(self.augmenting)

    def compose_options(self) -> dict[str, Any]:
        """The keyword arguments of `graftlm.compose`."""
        same = ("variant", "position", "num_heads", "width", "gate", "bias", "reads", "dtype")
        same += ("alignment", "distance_unit")
        options = {name: getattr(self, name) for name in (*same, "device_map", "trust_remote_code")}
        options["bridge_dtype"] = getattr(torch, self.bridge_dtype)
        options["connections"] = self.connections
        options["quantization_config"] = self.quantize
        return options | ({} if self.every is None else {"every": self.every})

    def to_json(self) -> dict[str, Any]:
        """Plain data, from which `from_mapping` makes an equal recipe."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def changed(self, **changes: Any) -> "Recipe":
        """The same recipe with other values, checked again."""
        return replace(self, **changes)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], source: str = "the recipe") -> "Recipe":
        """The recipe a mapping describes.

        Raises:
            ValueError: If a key is unknown or missing; `source` says where.
        """
        known = {f.name for f in fields(cls)}
        for name in values:
            if name not in known:
                if name in {f.name for f in fields(TrainingArguments)}:
                    raise ValueError(f"{source} has {name!r} at its top level; put it in training:")
                raise ValueError(f"{source} has an unknown key {name!r}{nearest(name, known)}")
        needed = [f.name for f in fields(cls) if f.default is f.default_factory is MISSING]
        missing = [name for name in needed if values.get(name) is None]
        if missing:
            raise ValueError(
                f"{source} has no {', '.join(map(repr, missing))}; every recipe needs "
                f"{', '.join(needed)}"
            )
        return cls(**{name: value for name, value in values.items() if value is not None})


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a recipe file.

    Raises:
        ValueError: If it is not YAML, not a mapping, or says one thing twice.
    """
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=RecipeLoader)
    except yaml.YAMLError as exc:
        where = getattr(exc, "problem_mark", None)
        line = "" if where is None else f", line {where.line + 1}"
        problem = getattr(exc, "problem", None) or str(exc)
        raise ValueError(f"{path}{line}: not valid YAML: {problem}") from exc
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold keys and values, such as 'anchor: some/model'")
    if isinstance(values.get("training", {}), dict):
        return values
    raise ValueError(f"{path}: training must hold keys and values, not {values['training']!r}")


class RecipeLoader(yaml.SafeLoader):
    """Plain YAML in which `3e-4` is a number (YAML 1.1 wants `3.0e-4`) and no key comes twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As in the base class, but a repeated key is an error, not silently the last one."""
        seen = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"key {key_node.value!r} appears twice",
                    problem_mark=key_node.start_mark,
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep=deep)


RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?\d[\d_]*(\.\d*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)


def parse_connection(entry: Any) -> Connection:
    """A connection from "3-5" or "code:3-5" (augmenting layer, anchor layer) or from a mapping.

    Raises:
        ValueError: If it is none of these.
    """
    if isinstance(entry, Connection):
        return entry
    if isinstance(entry, Mapping):
        layers = {"augmenting_layer", "anchor_layer"}
        if layers <= set(entry) <= layers | {"augmenting"}:
            return Connection(**entry)
    match = re.fullmatch(r"(?:(\w+):)?(\d+)-(\d+)", entry) if isinstance(entry, str) else None
    if match is None:
        raise ValueError(
            f"connection {entry!r} must be AUGMENTING_LAYER-ANCHOR_LAYER or "
            "NAME:AUGMENTING_LAYER-ANCHOR_LAYER, such as '3-5' or 'code:3-5'"
        )
    name, augmenting_layer, anchor_layer = match.groups()
    return Connection(
        augmenting=name or "augmenting",
        augmenting_layer=int(augmenting_layer),
        anchor_layer=int(anchor_layer),
    )


def as_list(value: Any) -> list[Any]:
    """The entries of a list or tuple.

    Raises:
        ValueError: If it is something else.
    """
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"connections is {value!r}, but must be a list such as ['3-5', '7-11']")
    return list(value)


def as_prompts(value: Any) -> tuple[str, ...]:
    """One prompt or several, as several.

    Raises:
        ValueError: If one is empty, or no text.
    """
    prompts = (value,) if isinstance(value, str) else value
    if isinstance(prompts, (list, tuple)) and all(isinstance(p, str) and p for p in prompts):
        return tuple(prompts)
    raise ValueError(f"probe is {value!r}, but must be a text to continue, or a list of such texts")


def nearest(name: str, known: set[str]) -> str:
    """A question for a message, if a known name is much like this one."""
    found = difflib.get_close_matches(str(name), known, n=1)
    return f", did you mean {found[0]!r}?" if found else ""


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Refuse a value that is not among the choices."""
    if value not in choices:
        options = ", ".join(map(repr, choices))
        raise ValueError(f"{name} is {value!r}, but must be one of {options}")


def check_type(name: str, value: Any, hint: Any) -> None:
    """Refuse a value that its annotation does not allow; a text is never taken for a number.

    Raises:
        ValueError: Saying what it should be.
    """
    is_union = get_origin(hint) in (Union, types.UnionType)
    kinds = [get_origin(kind) or kind for kind in (get_args(hint) if is_union else [hint])]
    classes = [kind for kind in kinds if isinstance(kind, type)]
    if len(classes) < len(kinds) or any(issubclass(kind, Enum) for kind in classes):
        classes.append(str)  # choices, checked by name elsewhere
    if float in classes:
        classes.append(int)
    fits = isinstance(value, tuple(classes))
    if isinstance(value, bool) and bool not in classes:
        fits = False
    if not fits:
        words = {"str": "a text", "int": "a whole number", "float": "a number", "bool": "yes or no"}
        names = [words.get(k.__name__, k.__name__) for k in classes if k not in (type(None),)]
        names = [word for word in names if word != "a whole number" or float not in classes]
        raise ValueError(f"{name} is {value!r}, but must be {' or '.join(dict.fromkeys(names))}")
