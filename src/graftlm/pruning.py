"""Fewer connections: leave out those that the loss misses least."""

import copy
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from graftlm._version import __version__
from graftlm.causal_lm import ComposedForCausalLM
from graftlm.config import Connection
from graftlm.usefulness import Probe, SwitchedOff, Usefulness

RECORD = "pruning.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Pruning:
    """A pruned model, and what it was found by.

    Args:
        model: The composed model with the connections that are left.
        usefulness: What was measured of the whole model.
        steps: What was off after each step, one connection more at a time.
    """

    model: ComposedForCausalLM
    usefulness: Usefulness
    steps: tuple[SwitchedOff, ...]

    @property
    def loss(self) -> float:
        """Of the pruned model."""
        return self.steps[-1].loss

    def to_json(self) -> dict[str, Any]:
        """Plain data: what is left, its loss, and how it got there."""
        return {
            "graftlm": __version__,
            "num_examples": self.usefulness.num_examples,
            "num_labels": self.usefulness.num_labels,
            "loss_before": self.usefulness.loss,
            "loss": self.loss,
            "loss_of_anchor": self.usefulness.anchor.loss,
            "connections": [asdict(c) for c in self.model.config.connections],
            "steps": [asdict(step) for step in self.steps],
        }

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Save the pruned model, and its losses beside it in `pruning.json`.

        Args:
            folder: Where to; it must not exist.

        Raises:
            ValueError: If it does.
        """
        folder = Path(folder)
        check_absent(folder)
        self.model.save_pretrained(folder)
        write_json(folder / RECORD, self.to_json())


def prune(
    model: ComposedForCausalLM,
    data: Any,
    *,
    keep: int,
    limit: int | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
    console: Console | None = None,
) -> Pruning:
    """Leave out connections, one at a time: always the one without which the loss is least.

    After each step the loss without each of those that are left is measured anew, because it
    changes when others go. From n connections to k that is (n - k)(n + k + 1) / 2 passes over the
    examples.

    Args:
        model: The composed model, with its tokenizers. It is left as it was.
        data, limit, batch_size, max_length, console: As in `rank_connections`.
        keep: How many connections to keep.

    Raises:
        ValueError: If there are not more connections than that, or nothing to measure on.
    """
    connections = model.config.connections
    if type(keep) is not int or not 0 < keep < len(connections):
        raise ValueError(
            f"keep is {keep!r}, but must be a whole number from 1 to {len(connections) - 1}, less "
            f"than the {len(connections)} connections there are"
        )
    options = {"limit": limit, "batch_size": batch_size, "max_length": max_length}
    probe = Probe.of(model, data, console=console, **options)
    usefulness = probe.rank()
    steps: list[SwitchedOff] = []
    off: frozenset[Connection] = frozenset()
    while len(connections) - len(off) > keep:
        choices = [off | {c} for c in connections if c not in off]
        probe.measure(choices, f"pruning to {len(connections) - len(off) - 1}")
        off = min(choices, key=lambda choice: probe.result(choice).loss)
        steps.append(probe.result(off))
    kept = [c for c in connections if c not in off]
    return Pruning(model=keep_connections(model, kept), usefulness=usefulness, steps=tuple(steps))


def keep_connections(
    model: ComposedForCausalLM, connections: Iterable[Connection]
) -> ComposedForCausalLM:
    """A composed model with some of the connections of another, and the weights of their bridges.

    It shares the frozen models; an augmenting model that nothing is left of is left out.

    Args:
        model: The other; it is left as it was.
        connections: Those to keep.

    Raises:
        ValueError: If there is no such connection, or none at all.
    """
    indices = sorted(model.model.indices_of(connections))
    if not indices:
        raise ValueError("connections is empty, but a composed model needs one at least")
    kept = [model.config.connections[index] for index in indices]
    names = [name for name in model.augmenting if any(c.augmenting == name for c in kept)]
    config = copy.copy(model.config)
    config.connections = kept
    for part in ("augmenting_configs", "alignments", "scales"):
        setattr(config, part, {name: getattr(model.config, part)[name] for name in names})
    config.bases = {
        name: copy.deepcopy(base)
        for name, base in model.config.bases.items()
        if name in ("anchor", *names)
    }
    config.check_connections()
    pruned = ComposedForCausalLM(
        config, model.anchor, {name: model.augmenting[name] for name in names}
    )
    for index, bridge in zip(indices, pruned.bridges, strict=True):
        weights = model.bridges[index].state_dict()
        bridge.to(next(iter(weights.values())).dtype).load_state_dict(weights)
    pruned.generation_config = copy.deepcopy(model.generation_config)
    processor = model.processor
    if processor is not None:
        pruned.set_tokenizers(processor.tokenizer, processor.augmenting_tokenizers)
    return pruned


# ---- files -------------------------------------------------------------------------------


def check_absent(path: Path) -> None:
    """Refuse to write over what is there.

    Raises:
        ValueError: Naming it.
    """
    if path.exists():
        raise ValueError(f"{path} is there already; delete it, or choose another output folder")


def write_json(path: Path, content: Any) -> None:
    """Write plain data, whole or not at all."""
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)
