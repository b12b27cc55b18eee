"""What an experiment is: models, data, systems and metrics, declared in one file each."""

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from graftlm.reproduce.example import Data, Example
from graftlm.reproduce.metrics import Metric
from graftlm.reproduce.systems import SYSTEMS, System


@dataclass(frozen=True, kw_only=True, slots=True)
class Models:
    """Folders with a model and its tokenizer each.

    Args:
        anchor: m_B.
        augmenting: m_A, or several, by name.
        vanilla: The augmenting models before they became specialists, where there are such.
    """

    anchor: Path
    augmenting: Mapping[str, Path]
    vanilla: Mapping[str, Path] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Composition:
    """How models are connected; all but the connections as for `compose`.

    Args:
        connections: (augmenting layer, anchor layer), the same for each augmenting model.
    """

    connections: tuple[tuple[int, int], ...]
    width: int | None = None
    num_heads: int | None = None
    position: Literal["none", "distance", "rotary"] | None = None
    variant: str = "graftlm"
    gate: bool = False
    alignment: str = "auto"
    distance_unit: Literal["characters", "tokens"] = "characters"


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """How systems are trained; the learning rate falls along a cosine to nothing.

    Args:
        examples: Seen in all, the same ones by every system of a seed.
        distinct: The share of D_C that is used, drawn once a seed; None is all.
        domain_examples: Seen besides those by systems that learn from the domain.
        learning_rate, lora_learning_rate, full_learning_rate: Of bridges, of LoRA, and of the
            anchor's own weights.
        warmup: Share of all updates.
        by_length: Whether batches hold examples of about equal length.
        bf16: Whether to run with autocast.
    """

    examples: int
    batch_size: int
    learning_rate: float
    lora_learning_rate: float
    full_learning_rate: float
    domain_examples: int
    distinct: float | None = None
    weight_decay: float = 0.01
    warmup: float = 0.1
    by_length: bool = True
    bf16: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Test:
    """How one test is scored.

    Args:
        metrics: The first is the one that counts.
        stop: Where an answer ends, beside the end of the text.
        needs_no_more: Whether nothing that could follow an answer's text would change its score,
            so that it ends there.
        most_tokens: Of an answer; by default a third more than the longest reference of its batch.
        answered: How many examples of a group are answered; likelihoods are of all.
        paper: What the paper says of it, for the report.
    """

    __test__ = False  # pytest would collect it

    metrics: tuple[Metric, ...]
    stop: str | None = None
    needs_no_more: Callable[[Example, str], bool] | None = None
    most_tokens: int | None = None
    answered: int | None = None
    paper: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Goal:
    """What an experiment was to show.

    Args:
        says: In words.
        test, group, metric: Which number; None takes every group, and the test's first metric.
        at_least: The composed model's number.
        beats: Systems it must beat: by `margin` (in the metric's unit), with p below `level`.
        at_most_ratio, at_least_ratio: Of the composed model's number to the anchor's.
    """

    says: str
    test: str
    group: str | None = None
    metric: str | None = None
    at_least: float | None = None
    beats: tuple[str, ...] = ()
    margin: float = 0.0
    level: float | None = None
    at_most_ratio: float | None = None
    at_least_ratio: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Experiment:
    """Data, models, systems and metrics. Functions are of modules, so that processes share them.

    Args:
        name: Of the command.
        title, about: For the report: what it is, where the data is from, how it was split.
        models: Finds or makes the models in a folder, of the augmenting models those that are to
            be read (see `System.reads_model`), on a device; called once before everything.
        data: The examples of a seed; ablations may change its other arguments.
        tests: By name, as in the data.
        systems: The controls that apply, and ablations; keys as on the command line.
        pipeline: For the control that works in text alone: from an example and from what the
            augmenting model says to it, what the anchor is given and what the answer begins with.
        asks: What the augmenting model is asked in that control; by default the example itself.
        in_bf16: Whether weights are kept in bfloat16; a machine that is slow in it takes float32
            (`runner.suited`).
        answer_batch: Examples answered at a time.
        changes: What the command line changed, for the report.
    """

    name: str
    title: str
    about: str
    models: Callable[[Path, Set[str], str], Models]
    data: Callable[..., Data]
    tests: Mapping[str, Test]
    composition: Composition
    training: Training
    systems: Mapping[str, System] = field(default_factory=lambda: dict(SYSTEMS))
    ablations: Mapping[str, System] = field(default_factory=dict)
    goals: Sequence[Goal] = ()
    pipeline: Callable[[Example, str], tuple[Example, str]] | None = None
    asks: Callable[[Example], Example] | None = None
    in_bf16: bool = False
    answer_batch: int = 48
    changes: Mapping[str, Any] = field(default_factory=dict)

    def system(self, name: str) -> System:
        """A system or ablation by its name."""
        return {**self.systems, **self.ablations}[name]
