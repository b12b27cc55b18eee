"""curves.png: what a training run has logged so far, drawn."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

FILE = "curves.png"
LOSS_COLOR, EVALUATION_COLOR, OTHER_COLOR = "#8fb8c6", "#c2571a", "#1f6f8b"
Log = Sequence[Mapping[str, Any]]


class Curves(TrainerCallback):
    """Draws the log of a run whenever it was evaluated or saved, and at its end.

    A checkpoint holds the log, so that a resumed run's curves begin where the first one's did.

    Args:
        folder: Where to; only the first process of a run writes.
    """

    def __init__(self, folder: str | Path):
        self.path = Path(folder, FILE)
        self.num_drawn = 0

    def draw(self, state: TrainerState) -> None:
        """Draw, if there is anything new."""
        if state.is_world_process_zero and len(state.log_history) > self.num_drawn:
            draw_curves(state.log_history, self.path)
            self.num_drawn = len(state.log_history)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """After an evaluation."""
        self.draw(state)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """After a checkpoint, the last one of a stopped run too."""
        self.draw(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """At the end, or where a run was stopped."""
        self.draw(state)


def points(log: Log, name: str) -> tuple[list[int], list[float]]:
    """The steps at which a value was logged, and the values."""
    found = [(entry["step"], entry[name]) for entry in log if name in entry]
    return [step for step, _ in found], [value for _, value in found]


def plot(axes: Any, steps: list[int], values: list[float], **line: Any) -> None:
    """A line, or a dot where there is nothing to join."""
    axes.plot(steps, values, linewidth=1.5, **{"marker": "o" if len(steps) == 1 else ""} | line)


def spans_a_decade(values: Sequence[float]) -> bool:
    """Whether all are positive numbers and the greatest is more than ten times the least."""
    if not values or not all(0 < value < math.inf for value in values):
        return False
    return max(values) > 10 * min(values)


def make_logarithmic(axes: Any) -> None:
    """A logarithmic axis upwards, with numbers as people write them at 1, 2 and 5."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def draw_curves(log: Log, path: Path) -> None:
    """Write the PNG; it is replaced whole.

    Args:
        log: As `Trainer` keeps it in `state.log_history`.
        path: Of the PNG.
    """
    temporary = path.with_name(f".{path.name}")
    figure_of(log).savefig(temporary, dpi=110, format="png")
    temporary.replace(path)


def figure_of(log: Log) -> Any:
    """Losses above; learning rate and speed below.

    The losses' axis is logarithmic if all are positive and span more than a decade: on a linear
    one, what comes after the first steps would be one flat line.
    """
    from matplotlib.figure import Figure  # slow to import; without pyplot it needs no display

    figure = Figure(figsize=(8, 5.4))
    figure.subplots_adjust(left=0.08, right=0.95, bottom=0.09, top=0.94, wspace=0.3, hspace=0.4)
    axes = figure.subplot_mosaic(
        [["loss", "loss"], ["learning_rate", "tokens_per_second"]], height_ratios=[1.7, 1]
    )
    plot(axes["loss"], *points(log, "loss"), color=LOSS_COLOR, label="training")
    steps, losses = points(log, "eval_loss")
    if steps:
        line = {"color": EVALUATION_COLOR, "marker": "o", "markersize": 3.5, "label": "evaluation"}
        plot(axes["loss"], steps, losses, **line)
        axes["loss"].annotate(
            f"{losses[-1]:.4g}",
            (steps[-1], losses[-1]),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            color=EVALUATION_COLOR,
        )
    axes["loss"].legend(frameon=False)
    is_logarithmic = spans_a_decade(points(log, "loss")[1] + losses)
    if is_logarithmic:
        make_logarithmic(axes["loss"])
    for name in ("learning_rate", "tokens_per_second"):
        plot(axes[name], *points(log, name), color=OTHER_COLOR)
        axes[name].set_ylim(bottom=0)
    axes["learning_rate"].ticklabel_format(axis="y", scilimits=(-2, 3))
    axes["tokens_per_second"].yaxis.set_major_formatter("{x:,.0f}")
    titles = {"loss": "loss, logarithmic" if is_logarithmic else "loss"}
    titles |= {"learning_rate": "learning rate", "tokens_per_second": "tokens/s"}
    for name, title in titles.items():
        axes[name].set_title(title, loc="right", fontsize=10)
        axes[name].set_xlabel("step")
        axes[name].spines[["top", "right"]].set_visible(False)
        axes[name].grid(axis="y", alpha=0.25)
        axes[name].set_xlim(left=0)
    return figure
