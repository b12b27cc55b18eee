"""What a run shows of itself: speed and memory, curves, TensorBoard's logs, probes."""

import json
import math
import random
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from matplotlib.image import imread
from transformers import GenerationConfig, TrainerCallback, TrainerState

from graftlm import ComposedForCausalLM, curves, meter
from graftlm.curves import Curves, draw_curves, figure_of
from graftlm.probes import check_whole
from graftlm.recipe import Recipe
from graftlm.training import prepare, training_arguments
from test_training import NEEDED, At, add_callback, assert_same, weights
from tiny import character_tokenizer, meddling, quick_recipe, save_pair, sums, write_lines


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return save_pair(tmp_path_factory.mktemp("models"))


@pytest.fixture
def values(models: tuple[str, str], tmp_path: Path, no_curves: None) -> dict[str, Any]:
    return quick_recipe(models, tmp_path)


def train(values: dict[str, Any], resume: bool = False, **changes: Any) -> Path:
    prepare(Recipe.from_mapping(values | changes), resume=resume).run()
    return Path(values["output_dir"])


def history(folder: Path, key: str) -> list[dict[str, Any]]:
    """What was logged together with a value."""
    state = json.loads((folder / "trainer_state.json").read_text())
    return [entry for entry in state["log_history"] if key in entry]


# ---- speed and memory --------------------------------------------------------------------


class Clock(TrainerCallback):
    """A step takes 2 s, to evaluate 50 s, and to save 90 s."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.now_s += 2.0

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.now_s += 50.0

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.now_s += 90.0


def test_speed_counts_what_was_trained_on_and_no_time_of_anything_else(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two batches of 3 a step, logged every second step, also by a run that goes on at step 4."""
    rows = sums(18)
    values["data"] = write_lines(tmp_path / "data.jsonl", *rows)
    values["eval_data"] = write_lines(tmp_path / "eval.jsonl", *sums(5))
    values["training"] |= {"gradient_accumulation_steps": 2, "logging_first_step": False}
    values["training"] |= {"train_sampling_strategy": "sequential", "max_steps": 6}
    values["training"] |= {"logging_steps": 2, "eval_steps": 3, "save_steps": 4}
    clock = Clock()
    add_callback(monkeypatch, clock)
    monkeypatch.setattr(meter.time, "perf_counter", lambda: clock.now_s)
    sizes = [len(row["prompt"] + row["completion"]) + 1 for row in rows]  # and the end of the text
    steps = [sum(sizes[first : first + 6]) for first in (0, 6, 12)] * 2
    expected = [(steps[i] + steps[i + 1]) / 4.0 for i in (0, 2, 4)]
    assert len(set(expected)) == 3
    for resume in (False, True):
        logs = history(train(values, resume), "loss")
        assert [log["step"] for log in logs] == [2, 4, 6]
        assert [log["examples_per_second"] for log in logs] == [3.0, 3.0, 3.0]
        assert [log["tokens_per_second"] for log in logs] == expected
        shutil.rmtree(tmp_path / "out" / "checkpoint-6")


def test_processes_are_added_up_and_memory_is_that_of_the_largest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Two:
        device = torch.device("cpu")

        def gather(self, here: torch.Tensor) -> torch.Tensor:
            other = torch.tensor([5, 70, 10**12])
            return torch.cat([here, other])

    accelerator: Any = Two()
    times = iter([10.0, 14.0, 100.0])
    monkeypatch.setattr(meter.time, "perf_counter", lambda: next(times))
    counter = meter.Meter(accelerator)
    counter.count({"input_ids": torch.ones(3, 4), "attention_mask": torch.eye(3, 4)})
    counter.count({"input_ids": torch.ones(2, 11)})  # nothing is padding without a mask
    with counter.paused():
        read = counter.read()
    assert read == {
        "examples_per_second": (3 + 2 + 5) / 4,
        "tokens_per_second": (3 + 22 + 70) / 4,
        "memory_bytes": 10**12,
    }


def test_memory_on_a_cpu_is_what_the_process_occupies(values: dict[str, Any]) -> None:
    values["training"] |= {"max_steps": 2}
    (_, last) = history(train(values), "loss")
    assert last["memory_bytes"] == pytest.approx(psutil.Process().memory_info().rss, rel=0.5)


# ---- curves.png --------------------------------------------------------------------------


def test_curves_show_what_was_logged() -> None:
    log = [
        {"step": 1, "loss": 5.0, "learning_rate": 0.1, "tokens_per_second": 70.0},
        {"step": 2, "eval_loss": 4.5},
        {"step": 3, "loss": 4.0, "learning_rate": 0.3, "tokens_per_second": 90.0},
        {"step": 3, "train_loss": 4.7},
        {"step": 4, "eval_loss": 3.5},
    ]
    drawn = {
        (axes.get_title(loc="right"), line.get_label().strip("_0123456789")): line.get_xydata()
        for axes in figure_of(log).axes
        for line in axes.lines
    }
    assert {key: points.tolist() for key, points in drawn.items()} == {
        ("loss", "training"): [[1, 5.0], [3, 4.0]],
        ("loss", "evaluation"): [[2, 4.5], [4, 3.5]],
        ("learning rate", "child"): [[1, 0.1], [3, 0.3]],
        ("tokens/s", "child"): [[1, 70.0], [3, 90.0]],
    }


@pytest.mark.parametrize(
    ("losses", "evaluated", "scale"),
    [
        ([5.0, 0.4], 0.6, "log"),
        ([5.0, 0.6], 0.4, "log"),
        ([5.0, 0.6], 0.6, "linear"),  # less than a decade
        ([5.0, 0.0], 0.6, "linear"),  # which a logarithm has no place for
        ([5.0, math.nan], 0.4, "linear"),
        ([5.0, math.inf], 0.4, "linear"),
    ],
)
def test_the_losses_axis_is_logarithmic_where_they_span_a_decade(
    losses: list[float], evaluated: float, scale: str
) -> None:
    log = [{"step": k, "loss": loss} for k, loss in enumerate(losses)]
    figure = figure_of([*log, {"step": 2, "eval_loss": evaluated}])
    axes = figure.axes[0]
    assert axes.get_yscale() == scale
    assert axes.get_title(loc="right") == {"log": "loss, logarithmic", "linear": "loss"}[scale]
    figure.draw_without_rendering()
    if scale == "log":
        assert {"0.5", "1", "2", "5"} <= {text.get_text() for text in axes.get_yticklabels()}


def test_curves_of_a_stopped_run_go_on(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    values["training"] |= {"max_steps": 8}
    drawn: list[list[int]] = []

    def noting(log: Any, path: Path) -> None:
        drawn.append([entry["step"] for entry in log if "loss" in entry])
        draw_curves(log, path)

    monkeypatch.setattr(curves, "draw_curves", noting)
    with monkeypatch.context() as patch:
        add_callback(patch, At(step=5))
        folder = train(values)
    assert drawn == [list(range(1, n + 1)) for n in (4, 6, 6)]  # saved, stopped, ended
    picture = folder / "curves.png"
    assert imread(picture).shape[2] == 4
    assert imread(picture).min() < 0.5 < imread(picture).max()
    before = picture.read_bytes()
    train(values, resume=True)
    assert drawn[-1] == list(range(1, 9))
    assert picture.read_bytes() != before
    assert not list(folder.glob(".*"))


def test_only_the_first_process_draws_and_only_what_is_new(tmp_path: Path) -> None:
    log = [{"step": 1, "loss": 2.0}]
    other = TrainerState(log_history=log, is_world_process_zero=False)
    first = TrainerState(log_history=log, is_world_process_zero=True)
    drawing = Curves(tmp_path)
    drawing.draw(other)
    assert not list(tmp_path.iterdir())
    drawing.draw(first)
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]
    (tmp_path / "curves.png").unlink()
    drawing.draw(first)
    assert not list(tmp_path.iterdir())


# ---- whom a run reports to ---------------------------------------------------------------


def reports(**training: Any) -> list[str]:
    found = training_arguments(Recipe.from_mapping(NEEDED | {"training": training})).report_to
    assert isinstance(found, list)
    return found


def test_whom_a_run_reports_to(monkeypatch: pytest.MonkeyPatch) -> None:
    assert reports(report_to=["wandb", "trackio"]) == ["wandb", "trackio"]
    assert reports(report_to="trackio") == ["trackio"]
    assert reports(report_to="none") == []
    monkeypatch.setattr("graftlm.watching.is_tensorboard_available", lambda: True)
    assert reports() == ["tensorboard"]


def test_without_tensorboard_only_who_asks_for_it_is_told(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("graftlm.watching.is_tensorboard_available", lambda: False)
    del values["training"]["report_to"]
    values["training"] |= {"max_steps": 1}
    folder = train(values)
    assert not (folder / "logs").exists()
    assert "tensorboard" not in "".join(capfd.readouterr()).lower()
    for chosen in ("tensorboard", ["wandb", "tensorboard"]):
        message = f"training.report_to is {chosen!r}, but the tensorboard package is missing; pip"
        with pytest.raises(ValueError, match=re.escape(message)):
            reports(report_to=chosen)


def test_tensorboard_holds_the_log_and_the_probes(values: dict[str, Any]) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    del values["training"]["report_to"]
    values["training"] |= {"max_steps": 5, "eval_strategy": "no"}  # evaluated after training
    folder = train(values, eval_fraction=0.2, probe=["1+2=", "7"], probe_tokens=3)
    (file,) = (folder / "logs").iterdir()
    events = EventAccumulator(str(file)).Reload()
    for name in ("loss", "tokens_per_second", "memory_bytes"):
        logged = {log["step"]: log[name] for log in history(folder, name)}
        seen = {event.step: event.value for event in events.Scalars(f"train/{name}")}
        assert seen == pytest.approx(logged, rel=1e-6), name
    (evaluation,) = history(folder, "eval_loss")
    (event,) = events.Scalars("eval/loss")
    assert (event.step, event.value) == (5, pytest.approx(evaluation["eval_loss"]))
    for number, sample in enumerate(samples(folder)):
        (event,) = events.Tensors(f"probe/{number}/text_summary")
        text = event.tensor_proto.string_val[0].decode()
        lines = (sample["prompt"] + sample["text"]).split("\n")
        assert text == "\n".join(f"    {line}" for line in lines)


def test_tensorboard_shows_each_step_of_a_killed_run_once(values: dict[str, Any]) -> None:
    """The run was killed at step 7, two steps behind its last checkpoint."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    del values["training"]["report_to"]
    values["training"] |= {"max_steps": 7, "save_steps": 5, "logging_steps": 1}
    folder = train(values)
    shutil.rmtree(folder / "checkpoint-7")
    (file,) = (folder / "logs").iterdir()
    file.rename(file.with_name("events.out.tfevents.0"))  # before the next, also in one second
    train(values, resume=True)
    assert len(list((folder / "logs").iterdir())) == 2
    events = EventAccumulator(str(folder / "logs")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 8))


def test_the_folder_of_the_logs_may_come_from_the_environment(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "elsewhere"))
    values["training"] |= {"report_to": "tensorboard", "max_steps": 1}
    assert not (train(values) / "logs").exists()
    assert len(list((tmp_path / "elsewhere").iterdir())) == 1


# ---- probes ------------------------------------------------------------------------------

PROBES: dict[str, Any] = {"probe": ["3+4=", "a b"], "probe_tokens": 7}


def samples(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "probes.jsonl").read_text().splitlines()]


class Draws(TrainerCallback):
    """Notes the state of all random numbers at the beginning of each step."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        numbers: Any = np.random.get_state()
        torch_state = torch.get_rng_state().tolist()
        self.seen.append((random.getstate(), numbers[1].tolist(), numbers[2], torch_state))


@pytest.mark.slow
def test_probes_change_nothing_of_the_training(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also not where the anchor's files ask for sampling."""
    shutil.copytree(values["anchor"], tmp_path / "sampling")
    config = GenerationConfig(do_sample=True, temperature=0.7, top_p=0.8, top_k=9)
    config.save_pretrained(tmp_path / "sampling")
    values |= {"anchor": str(tmp_path / "sampling"), "eval_fraction": 0.2}
    values["training"] |= {"max_steps": 6, "eval_steps": 2}
    runs = []
    for number, more in enumerate(({}, PROBES)):
        draws = Draws()
        with monkeypatch.context() as patch:
            add_callback(patch, draws)
            train(values | more, output_dir=str(tmp_path / str(number)))
        folder = tmp_path / str(number)
        losses = [log["loss"] for log in history(folder, "loss")]
        losses += [log["eval_loss"] for log in history(folder, "eval_loss")]
        runs.append((losses, weights(folder), draws.seen))
    (losses, trained, drawn), (losses_beside, trained_beside, drawn_beside) = runs
    assert len(samples(tmp_path / "1")) == 6
    assert losses == losses_beside
    assert drawn == drawn_beside
    assert_same(trained, trained_beside)


def greedy(model: ComposedForCausalLM, prompt: str, num_tokens: int) -> str:
    """By hand and without any cache."""
    tokenizer = character_tokenizer()
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    for _ in range(num_tokens):
        with torch.no_grad():
            token = model(ids, use_cache=False).logits[:, -1].argmax(-1)
        if token == tokenizer.eos_token_id:
            break
        ids = torch.cat([ids, token[:, None]], dim=1)
    return str(tokenizer.decode(ids[0, start:], skip_special_tokens=True))


def test_a_probe_is_what_the_composed_model_of_that_step_writes(values: dict[str, Any]) -> None:
    """At each evaluation; checkpoints are of the same steps here."""
    values["training"] |= {"eval_steps": 2, "save_steps": 2, "max_steps": 4, "learning_rate": 0.1}
    folder = train(values, eval_fraction=0.2, **PROBES)
    found = {(s["step"], s["prompt"]): s["text"] for s in samples(folder)}
    assert list(found) == [(step, prompt) for step in (2, 4) for prompt in PROBES["probe"]]
    for (step, prompt), text in found.items():
        model = ComposedForCausalLM.from_pretrained(folder / f"checkpoint-{step}").eval()
        assert text == greedy(model, prompt, 7), (step, prompt)
    assert len(set(found.values())) == 4


def test_a_probe_is_greedy_whatever_the_anchors_files_say(
    values: dict[str, Any], tmp_path: Path
) -> None:
    shutil.copytree(values["anchor"], tmp_path / "meddling")
    meddling().save_pretrained(tmp_path / "meddling")
    values["anchor"] = str(tmp_path / "meddling")
    values["training"] |= {"max_steps": 1}
    folder = train(values, **PROBES)
    model = ComposedForCausalLM.from_pretrained(folder).eval()
    assert model.generation_config.num_beams == 3
    for sample in samples(folder):
        assert sample["text"] == greedy(model, sample["prompt"], 7)


def test_the_model_is_saved_before_it_is_probed_last(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("no memory left")

    monkeypatch.setattr("graftlm.probes.Probes.take_last", fail)
    values["training"] |= {"max_steps": 1}
    with pytest.raises(RuntimeError, match="no memory left"):
        train(values, **PROBES)
    folder = Path(values["output_dir"])
    assert (folder / "trainer_state.json").is_file()
    assert not (folder / "training_args.bin").exists()
    ComposedForCausalLM.from_pretrained(folder)


@pytest.mark.slow
def test_without_evaluation_probes_come_with_checkpoints_and_at_the_end(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that was stopped takes none, and one that goes on ends with the same file."""
    values["training"] |= {"max_steps": 5, "save_steps": 2}
    folder = train(values, **PROBES)
    whole = samples(folder)
    assert [sample["step"] for sample in whole] == [2, 2, 4, 4, 5, 5]
    shutil.rmtree(folder)
    with monkeypatch.context() as patch:
        add_callback(patch, At(step=2, number=signal.SIGTERM))
        train(values, **PROBES)
    assert samples(folder) == whole[:2]
    # As if the first run had been killed only after its next checkpoint was due.
    with (folder / "probes.jsonl").open("a") as file:
        file.write(json.dumps({"step": 4, "prompt": "a", "text": "late"}) + "\n")
    train(values, resume=True, **PROBES)
    assert samples(folder) == whole


def test_the_last_probe_is_of_the_best_bridges_where_these_are_saved(
    values: dict[str, Any],
) -> None:
    values["training"] |= {"load_best_model_at_end": True, "learning_rate": 3.0, "eval_steps": 2}
    values["training"] |= {"save_steps": 2, "max_steps": 6}
    folder = train(values, eval_fraction=0.25, **PROBES)
    model = ComposedForCausalLM.from_pretrained(folder).eval()
    for sample in samples(folder)[-2:]:
        assert sample["text"] == greedy(model, sample["prompt"], 7)


def test_other_probes_are_no_other_run(values: dict[str, Any], recwarn: Any) -> None:
    values["training"] |= {"max_steps": 1}
    train(values, **PROBES)
    prepare(Recipe.from_mapping(values | {"probe": "b"}), resume=True)
    assert not [w for w in recwarn if "differs" in str(w.message)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"probe": 3}, "probe is 3, but must be a text to continue, or a list of such texts"),
        ({"probe": ["a", ""]}, r"probe is \['a', ''\], but must be a text to continue, or a l"),
        ({"probe_tokens": 0}, "probe_tokens is 0, but must be at least 1 token"),
        ({"probe_tokens": "9"}, "probe_tokens is '9', but must be a whole number"),
    ],
)
def test_a_wrong_probe_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe.from_mapping(NEEDED | changes)


def test_a_probe_beyond_the_context_is_refused_before_any_model_loads(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graftlm.training.compose", lambda *a, **k: pytest.fail("loaded"))
    message = (
        "probe '1234' has 4 tokens and probe_tokens is 93, but the context of the anchor is 96"
    )
    with pytest.raises(ValueError, match=message):
        train(values, probe="1234", probe_tokens=93)
    monkeypatch.setattr("graftlm.training.AutoTokenizer.from_pretrained", lambda *a, **k: Silent())
    with pytest.raises(ValueError, match="probe ' ' has no tokens, so there is nothing to contin"):
        train(values, probe=" ")


class Silent:
    """A tokenizer that drops blanks."""

    def __call__(self, text: str, **options: Any) -> dict[str, Any]:
        return {"input_ids": [1] * len(text.strip())}


def test_probes_of_a_spread_model_are_refused() -> None:
    recipe = Recipe.from_mapping(NEEDED | {"probe": "once upon"})
    check_whole(recipe, False)
    check_whole(Recipe.from_mapping(NEEDED), True)
    with pytest.raises(ValueError, match="probe is 'once upon', but under FSDP and DeepSp"):
        check_whole(recipe, True)
