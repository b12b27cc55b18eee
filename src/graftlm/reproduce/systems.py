"""The systems that are compared: the composed model, its parts, and the controls.

Every control answers one doubt: whether the gain comes from the augmenting model at all
(`random`, `wrong`, `wrong-test`), from what it is a specialist in (`vanilla`), from more
parameters (`lora`, `self`), or whether it could be had without composing (`lora-domain`, `full`,
`pipeline`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class System:
    """One row of the tables.

    Args:
        title: For the report.
        trains: What learns: the bridges, adapters of the anchor's linear maps ("lora"), of its
            embeddings too ("lora-embeddings"), all of the anchor, or nothing.
        reads_model: What the bridges read: the augmenting models, the same before they became
            specialists, randomly initialised ones, or the anchor itself.
        reads: "prompt" keeps the answer from the augmenting models.
        wrong: Whether they read another example in training, or in the test.
        learns: "domain" trains on the augmenting models' texts first, as many as
            `Training.domain_examples` says; "mixed" on both at a time.
        alone: For systems without bridges: whose answer it is.
        one_by_one: Whether the augmenting models' bridges are trained in turn, earlier ones frozen.
        only: Of several augmenting models, those that are there; all if empty.
        composition, training, data: What differs from the experiment's settings.
    """

    title: str
    trains: Literal["bridges", "lora", "lora-embeddings", "anchor"] | None = "bridges"
    reads_model: Literal["augmenting", "vanilla", "random", "anchor"] = "augmenting"
    reads: Literal["sequence", "prompt"] = "sequence"
    wrong: tuple[Literal["training", "test"], ...] = ()
    learns: Literal["composition", "domain", "mixed"] = "composition"
    alone: Literal["anchor", "augmenting", "pipeline"] | None = None
    one_by_one: bool = False
    only: tuple[str, ...] = ()
    composition: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)

    @property
    def has_adapters(self) -> bool:
        """Whether it is the anchor with LoRA."""
        return self.trains in ("lora", "lora-embeddings")


OURS = "composed"
SYSTEMS = {
    "augmenting": System(title="m_A alone", trains=None, alone="augmenting"),
    "anchor": System(title="m_B alone", trains=None, alone="anchor"),
    "pipeline": System(
        title="text pipeline: m_A's output in m_B's prompt", trains=None, alone="pipeline"
    ),
    OURS: System(title="**composed (CALM)**"),
    "wrong-test": System(title="composed, tested with another example's states", wrong=("test",)),
    "wrong": System(
        title="trained and tested with another example's states", wrong=("training", "test")
    ),
    "random": System(title="composed with a random m_A", reads_model="random"),
    "vanilla": System(title="composed with m_A before specialisation", reads_model="vanilla"),
    "self": System(title="composed with a copy of m_B", reads_model="anchor"),
    "prompt": System(title="m_A reads the prompt only", reads="prompt"),
    "lora": System(title="LoRA on D_C, as many parameters", trains="lora"),
    "lora-domain": System(title="LoRA on domain data and D_C", trains="lora", learns="domain"),
    "full": System(
        title="full fine-tuning on domain data and D_C", trains="anchor", learns="domain"
    ),
}
# The composed model of a seed is scored twice, not trained twice.
SAME_TRAINING = {"wrong-test": OURS}
