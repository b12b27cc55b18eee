"""Training in two processes is training in one; a run goes on in another layout than it began in.

Layouts are started by `accelerate launch` with the files in examples/accelerate, on gloo. Two
processes of 3 examples each take the steps of one process over 6.
"""

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from graftlm.recipe import Recipe
from graftlm.training import prepare
from test_training import assert_same, output_of, start, weights, write_recipe
from tiny import save_model, sums, write_lines

ROOT = Path(__file__).parent.parent
ON_CPU = str(Path(__file__).with_name("on_cpu.py"))
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None or shutil.which("c++") is None,
    reason="deepspeed, or the compiler it needs on a CPU, is not installed",
)
LAYOUTS = ["ddp", "fsdp2", pytest.param("zero3", marks=needs_deepspeed)]
# In one worker, which makes each run once.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("distributed")]
Run = Callable[..., Path]


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A recipe of two epochs and more, in the default, shuffled order; tied weights too."""
    folder = tmp_path_factory.mktemp("given")
    smaller = {"hidden_size": 16, "intermediate_size": 28, "num_hidden_layers": 3}
    return {
        "anchor": save_model(folder / "anchor", seed=1, tie_word_embeddings=True),
        "augmenting": save_model(folder / "augmenting", seed=2, **smaller),
        "data": write_lines(folder / "data.jsonl", *sums(18)),
        "eval_data": write_lines(folder / "eval.jsonl", *sums(6)),
        "every": 2,
        "training": {
            "max_steps": 8,
            "learning_rate": 0.01,
            "save_steps": 4,
            "eval_steps": 4,
            "logging_steps": 1,
        },
    }


@pytest.fixture(scope="module")
def run(values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Trains in a layout, from the beginning or from a copy of a checkpoint; once for each."""
    done: dict[tuple[str, Path | None], Path] = {}

    def run_once(layout: str, begin: Path | None = None) -> Path:
        if (layout, begin) not in done:
            folder = tmp_path_factory.mktemp(layout)
            if begin is not None:
                shutil.copytree(begin, folder / begin.name)
            train_in(layout, values | {"output_dir": str(folder)}, resume=begin is not None)
            done[layout, begin] = folder
        return done[layout, begin]

    return run_once


def train_in(layout: str, values: dict[str, Any], *, resume: bool) -> None:
    size = 6 if layout == "single" else 3
    sizes = {"per_device_train_batch_size": size, "per_device_eval_batch_size": size}
    training = values["training"] | sizes
    if layout == "single":
        recipe = Recipe.from_mapping(values | {"training": training | {"use_cpu": True}})
        prepare(recipe, resume=resume).run()
        return
    # With use_cpu accelerate would not look for DeepSpeed.
    training |= {} if layout == "zero3" else {"use_cpu": True}
    path = write_recipe(
        Path(values["output_dir"]).with_suffix(".yaml"), values | {"training": training}
    )
    config = ROOT / "examples" / "accelerate" / f"{layout}.yaml"
    options = f"--config_file={config} --num_processes=2 --mixed_precision=no"
    launcher = (sys.executable, "-m", "accelerate.commands.launch", *options.split())
    script = ("-m", "graftlm") if layout == "ddp" else (ON_CPU,)
    flags = ("--debug", *(["--resume"] if resume else []))
    process = start(*script, "train", path, *flags, launcher=launcher)
    text = output_of(process, seconds=280)
    assert process.returncode == 0, text
    assert text.count("saved in ") == 1, text
    assert text.count("step 8/8  loss") == 1, text


def logged(folder: Path, key: str) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry[key] for entry in history if key in entry]


def tokens_an_example(folder: Path) -> list[float]:
    """Which speeds do not tell, but both count."""
    speeds = zip(
        logged(folder, "tokens_per_second"), logged(folder, "examples_per_second"), strict=True
    )
    return [tokens / examples for tokens, examples in speeds]


def assert_close(one: Path, other: Path) -> None:
    """Equal but for the order of additions: losses of 4.6 to 1e-6, bridges to 2e-5.

    Adam makes a step of full size, here 1e-2, of a gradient that is nearly zero, so that its
    roundings come back larger in the weights than in the losses.
    """
    for key, bound in (("loss", 1e-6), ("eval_loss", 2e-6)):
        assert logged(one, key)
        assert logged(one, key) == pytest.approx(logged(other, key), abs=bound, rel=0)
    here, there = weights(one), weights(other)
    assert here.keys() == there.keys()
    for name, tensor in here.items():
        torch.testing.assert_close(tensor, there[name], atol=2e-5, rtol=0, msg=name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_processes_train_as_one(run: Run, layout: str) -> None:
    assert_close(run(layout), run("single"))
    counted = tokens_an_example(run("single"))
    assert len(set(counted)) > 2
    assert tokens_an_example(run(layout)) == pytest.approx(counted)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_checkpoints_hold_the_bridges_only_in_every_layout(run: Run, layout: str) -> None:
    single, spread = run("single") / "checkpoint-4", run(layout) / "checkpoint-4"

    def files(folder: Path) -> set[str]:
        return {p.name for p in folder.iterdir() if not p.name.startswith("rng_state")}

    assert files(single) == files(spread)
    assert {p.name for p in spread.glob("rng*")} == {"rng_state_0.pth", "rng_state_1.pth"}
    bridges = load_file(spread / "model.safetensors")
    for name in ("model.safetensors", "optimizer.safetensors"):
        with safe_open(spread / name, "pt") as here, safe_open(single / name, "pt") as there:
            assert set(here.keys()) == set(there.keys())
            assert {key.split("/")[-1] for key in here.keys()} == set(bridges)  # noqa: SIM118
    size = sum(tensor.nbytes for tensor in bridges.values())
    assert (spread / "optimizer.safetensors").stat().st_size < 2 * size + 5000
    assert (spread / "model.safetensors").stat().st_size < size + 2000


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_frozen_models_are_spread_and_left_as_they_are(run: Run, layout: str) -> None:
    folder = run(layout)
    seen = [json.loads((folder / f"witness-{n}.json").read_text()) for n in (0, 1)]
    config = json.loads((folder / "config.json").read_text())
    single = json.loads((run("single") / "config.json").read_text())
    for process in seen:
        assert process["local"] < 0.55 * process["whole"]
        assert process["anchor"] == config["bases"]["anchor"]["fingerprint"]["weights"]
    assert seen[0]["local"] + seen[1]["local"] >= seen[0]["whole"]
    assert seen[0]["bridges_local"] < sum(t.numel() for t in weights(folder).values())
    # The fingerprints and the counts on the model card are those of the whole models.
    assert config["bases"] == single["bases"]
    assert (folder / "README.md").read_text() == (run("single") / "README.md").read_text()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_goes_on_in_one_process(run: Run, layout: str) -> None:
    assert_close(run("single", run(layout) / "checkpoint-4"), run("single"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_of_one_process_goes_on_in_two(run: Run, layout: str) -> None:
    assert_close(run(layout, run("single") / "checkpoint-4"), run("single"))


@needs_deepspeed
def test_a_run_goes_from_one_way_of_spreading_to_the_other(run: Run) -> None:
    assert_close(run("fsdp2", run("zero3") / "checkpoint-4"), run("single"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_going_on_in_the_same_layout_changes_no_bit(run: Run, layout: str) -> None:
    whole = run(layout)
    again = run(layout, whole / "checkpoint-4")
    assert_same(weights(again), weights(whole))
    assert logged(again, "loss") == logged(whole, "loss")
    last = "checkpoint-8/optimizer.safetensors"
    assert_same(load_file(again / last), load_file(whole / last))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_states_that_one_process_computed_are_read_in_two(
    run: Run, layout: str, values: dict[str, Any], tmp_path: Path
) -> None:
    cached = values | {"states_cache": str(tmp_path / "states")}
    prepare(Recipe.from_mapping(cached | {"output_dir": str(tmp_path / "none")})).with_states()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "states").rglob("*.*")}
    train_in(layout, cached | {"output_dir": str(tmp_path / "out")}, resume=False)
    assert_close(tmp_path / "out", run("single"))
    assert {path: path.stat().st_mtime_ns for path in before} == before
