"""What the connections of a composed model are good for: the loss with some of them switched off.

Losses are means over all tokens with a loss, in nats, and differences of such. They do not add
up: of two connections that tell the same, each can go, but not both.
"""

import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from graftlm.caching import batches
from graftlm.collation import IGNORED
from graftlm.composed import move_to_device
from graftlm.config import Connection
from graftlm.data import fitting_length, load_examples
from graftlm.passes import prompt_of
from graftlm.processor import ComposedDataCollator

if TYPE_CHECKING:
    from graftlm.causal_lm import ComposedForCausalLM


@dataclass(frozen=True, kw_only=True, slots=True)
class SwitchedOff:
    """What it costs to switch connections off.

    Args:
        connections: Those that are off; all others are on.
        loss: The loss without them.
        change: By how much it is above the loss with everything on; negative if it fell.
        error: Standard error of `change` over the examples; None for a single example.
    """

    connections: tuple[Connection, ...]
    loss: float
    change: float
    error: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Usefulness:
    """What each part of a composed model is good for.

    Args:
        num_examples: That were measured on.
        num_labels: Their tokens with a loss.
        loss: With everything on.
        anchor: With every connection off, which leaves the anchor.
        augmenting: With one augmenting model off, by its name; the most useful comes first.
        connections: With one connection off; the most useful comes first.
    """

    num_examples: int
    num_labels: int
    loss: float
    anchor: SwitchedOff
    augmenting: dict[str, SwitchedOff]
    connections: tuple[SwitchedOff, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def rank_connections(
    model: "ComposedForCausalLM",
    data: Any,
    *,
    limit: int | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
    console: Console | None = None,
) -> Usefulness:
    """Measure the loss with each connection and each augmenting model switched off.

    Every choice is one pass over the examples: as many as there are connections and augmenting
    models, and two more. The model is left as it was.

    Args:
        model: The composed model, with its tokenizers.
        data: As for training: a file, a folder or a `datasets` name, whose rows have a loss on
            completions only; or a dataset or list of `input_ids`, `labels` and perhaps `read_ids`.
        limit: Use the first examples only.
        batch_size: Examples to run at once.
        max_length: Tokens after which an example of a file is cut; by default as in training.
        console: Where to show progress; by default nowhere.

    Raises:
        ValueError: If the model lacks tokenizers, or there is nothing to measure on.
    """
    options = {"limit": limit, "batch_size": batch_size, "max_length": max_length}
    return Probe.of(model, data, console=console, **options).rank()


class Probe:
    """Measures the loss of a composed model on the same examples, whatever is switched off.

    Args:
        model: The composed model.
        examples: A dataset or list.
        num_labels: Tokens with a loss of each example to use.
        batch_size: Examples to run at once.
        console: Where to show progress.
    """

    def __init__(
        self,
        model: "ComposedForCausalLM",
        examples: Any,
        num_labels: Tensor,
        batch_size: int,
        console: Console,
    ):
        self.model = model
        self.examples = examples
        self.num_labels = num_labels
        self.batch_size = batch_size
        self.console = console
        self.known: dict[frozenset[Connection], Tensor] = {}  # loss of each example, summed

    @classmethod
    def of(
        cls,
        model: "ComposedForCausalLM",
        data: Any,
        *,
        limit: int | None,
        batch_size: int,
        max_length: int | None,
        console: Console | None,
    ) -> "Probe":
        """Read the data; arguments are those of `rank_connections`.

        Raises:
            ValueError: If the model lacks tokenizers, or there is nothing to measure on.
        """
        numbers = {"limit": limit, "batch_size": batch_size, "max_length": max_length}
        for name, value in numbers.items():
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{name} is {value!r}, but must be a positive whole number")
        if model.processor is None:
            raise ValueError(
                "the composed model has no tokenizer to read examples with; call its "
                "set_tokenizers first"
            )
        if isinstance(data, (str, os.PathLike)):
            configs = {"anchor": model.config.anchor_config, **model.config.augmenting_configs}
            length = fitting_length(configs, max_length)
            tokenizer = model.processor.tokenizer
            data = load_examples(os.fspath(data), tokenizer, max_length=length).dataset
        used = range(len(data) if limit is None else min(limit, len(data)))
        num_labels = torch.tensor([count_labels(data[k]["labels"]) for k in used])
        if not num_labels.sum():
            raise ValueError(
                f"there is nothing to measure on: {len(used)} examples have no token with a loss"
            )
        return cls(model, data, num_labels, batch_size, console or Console(quiet=True))

    # ---- losses --------------------------------------------------------------------------

    def measure(self, choices: Iterable[Collection[Connection]], title: str) -> None:
        """Find the loss with each choice of connections off, unless it is known.

        Args:
            choices: Connections to switch off together.
            title: Of the progress bar.

        Raises:
            ValueError: If a loss is not a finite number.
        """
        new = [off for off in dict.fromkeys(map(frozenset, choices)) if off not in self.known]
        count, was_training = len(self.num_labels), self.model.training
        found = {off: torch.zeros(count, dtype=torch.float64) for off in new}
        assert self.model.processor is not None
        collate = ComposedDataCollator(self.model.processor)
        self.model.eval()
        try:
            with Progress(console=self.console, disable=not self.console.is_terminal) as progress:
                task = progress.add_task(title, total=count * len(new))
                for rows in batches(self.examples, range(count), self.batch_size):
                    batch = collate([self.examples[k] for k in rows])
                    batch = move_to_device(batch, self.model.device)
                    for off, losses in found.items():
                        with self.model.without(off):
                            losses[rows] = row_losses(self.model, batch)
                        progress.advance(task, len(rows))
        finally:
            self.model.train(was_training)
        for losses in found.values():
            if not bool(losses.isfinite().all()):
                row = int(losses.isfinite().logical_not().nonzero()[0])
                raise ValueError(
                    f"the loss of example {row} is {float(losses[row])}, so that nothing can be "
                    "ranked; look for weights that are not finite, or use another precision"
                )
        self.known |= found

    def result(self, off: Collection[Connection]) -> SwitchedOff:
        """What was measured with these connections off.

        The error is that of a ratio estimate: examples are drawn, and of each all its tokens.
        """
        all_on, losses = self.known[frozenset()], self.known[frozenset(off)]
        count, num_labels = len(losses), self.num_labels.double()
        changes = losses - all_on
        change = changes.sum() / num_labels.sum()
        error = None
        if count > 1:
            squares = (changes - change * num_labels).square().sum() * count / (count - 1)
            error = float(squares.sqrt() / num_labels.sum())
        return SwitchedOff(
            connections=tuple(c for c in self.model.config.connections if c in off),
            loss=float(losses.sum() / num_labels.sum()),
            change=float(change),
            error=error,
        )

    def rank(self) -> Usefulness:
        """Every connection and every augmenting model, each alone switched off."""
        connections = self.model.config.connections
        models = {
            name: [c for c in connections if c.augmenting == name] for name in self.model.augmenting
        }
        singles = [(connection,) for connection in connections]
        self.measure([(), connections, *models.values(), *singles], "switched off one by one")
        parts = {name: self.result(off) for name, off in models.items()}
        return Usefulness(
            num_examples=len(self.num_labels),
            num_labels=int(self.num_labels.sum()),
            loss=self.result(()).loss,
            anchor=self.result(connections),
            augmenting=dict(sorted(parts.items(), key=lambda item: -item[1].change)),
            connections=tuple(sorted(map(self.result, singles), key=lambda off: -off.change)),
        )


def label(connection: Connection) -> str:
    """A connection in few characters, as `--connect` takes it."""
    return f"{connection.augmenting}:{connection.augmenting_layer}-{connection.anchor_layer}"


def count_labels(labels: Any) -> int:
    """Tokens of an example that have a loss; the first is never predicted."""
    return sum(int(label) != IGNORED for label in labels[1:])


@torch.no_grad()
def row_losses(model: "ComposedForCausalLM", batch: Mapping[str, Any]) -> Float[Tensor, " batch"]:
    """The loss of each row of a batch, summed over its tokens."""
    labels = batch["labels"]
    # Not the labels: the anchor would make a loss of them too, a mean over the batch.
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    inputs |= {"prompt_mask": prompt_of(labels), "use_cache": False}
    logits = model(**inputs).logits[:, :-1]
    targets = labels[:, 1:].to(logits.device)
    has_loss = targets != IGNORED
    losses = F.cross_entropy(logits[has_loss].float(), targets[has_loss], reduction="none")
    rows = has_loss.nonzero()[:, 0].cpu()
    sums = torch.zeros(len(targets), dtype=torch.float64)
    return sums.index_add(0, rows, losses.cpu().double())
