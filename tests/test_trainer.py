"""Checkpoints of `ComposedTrainer`: what is in them, what is refused."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainingArguments

from graftlm import CheckpointMismatchError, ComposedTrainer, compose
from graftlm.checkpoint import read_config
from graftlm.optimizer_state import check_writable, gather, read, restore, write
from graftlm.recipe import Recipe
from graftlm.trainer import check_layout, check_precision, check_same
from graftlm.training import prepare
from test_training import assert_same, weights
from tiny import quick_recipe, save_pair


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return save_pair(tmp_path_factory.mktemp("models"))


@pytest.fixture
def values(models: tuple[str, str], tmp_path: Path, no_curves: None) -> dict[str, Any]:
    return quick_recipe(models, tmp_path, max_steps=4, save_steps=2)


def train(values: dict[str, Any], resume: bool = False) -> Path:
    prepare(Recipe.from_mapping(values), resume=resume).run()
    return Path(values["output_dir"])


def cut_back(values: dict[str, Any]) -> Path:
    """Trains, and leaves the first checkpoint only."""
    folder = train(values)
    shutil.rmtree(folder / "checkpoint-4")
    return folder / "checkpoint-2"


def test_a_checkpoint_holds_the_state_of_each_bridge_weight_and_no_other(
    values: dict[str, Any],
) -> None:
    checkpoint = train(values) / "checkpoint-4"
    assert not list(checkpoint.glob("optimizer.pt"))
    names = set(weights(checkpoint))
    with safe_open(checkpoint / "optimizer.safetensors", "pt") as file:
        state = json.loads(file.metadata()["optimizer"])
        keys = set(file.keys())
    expected = {f"{key}/{name}" for key in ("exp_avg", "exp_avg_sq", "step") for name in names}
    assert keys == expected
    assert [set(g["settings"]["betas"]) for g in state["groups"]] == [{0.9, 0.999}] * 2
    assert {name for group in state["groups"] for name in group["parameters"]} == names


@pytest.mark.parametrize(
    "optim",
    ["adafactor", *(pytest.param(o, marks=pytest.mark.slow) for o in ("sgd", "adamw_torch"))],
)
def test_any_optimizer_goes_on_bit_for_bit(values: dict[str, Any], optim: str) -> None:
    """SGD keeps nothing, Adafactor numbers beside tensors of other shapes."""
    values["training"]["optim"] = optim
    folder = train(values)
    whole = weights(folder)
    shutil.rmtree(folder / "checkpoint-4")
    train(values, resume=True)
    assert_same(weights(folder), whole)


def test_the_best_bridges_are_taken_at_the_end(values: dict[str, Any]) -> None:
    best = {"load_best_model_at_end": True, "eval_steps": 2, "learning_rate": 3.0}
    values |= {"eval_fraction": 0.25, "training": values["training"] | best}
    folder = train(values)
    state = json.loads((folder / "trainer_state.json").read_text())
    assert_same(weights(folder), weights(state["best_model_checkpoint"]))
    told = json.loads((folder / "training.json").read_text())["metrics"]
    assert told["eval_loss"] == state["best_metric"]  # of what is saved
    steps = [entry["step"] for entry in state["log_history"] if "eval_loss" in entry]
    assert steps == [2, 4]  # the curve has no second value at its end


def test_a_finished_run_that_goes_on_tells_no_loss_of_no_steps(values: dict[str, Any]) -> None:
    train(values)
    values["eval_fraction"] = 0.25
    with pytest.warns(UserWarning, match="the recipe differs in eval_fraction"):
        training = prepare(Recipe.from_mapping(values), resume=True)
    assert training.run().metrics.keys() == {"eval_loss", "eval_perplexity"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 2}, "has num_heads 4, but this run has 2; start anew"),
        ({"position": "none"}, "has position 'distance', but this run has 'none'"),
        ({"reads": "prompt"}, "has reads 'sequence', but this run has 'prompt'"),
    ],
)
def test_a_checkpoint_that_no_weight_tells_apart_is_refused(
    values: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    cut_back(values)
    with (
        pytest.warns(UserWarning, match="the recipe differs in"),
        pytest.raises(CheckpointMismatchError, match=re.escape(message)),
    ):
        prepare(Recipe.from_mapping(values | change), resume=True).run()


def test_a_checkpoint_on_another_base_is_refused(values: dict[str, Any], tmp_path: Path) -> None:
    """Trained anew in place between two parts of a run."""
    values["augmenting"] = str(shutil.copytree(values["augmenting"], tmp_path / "moving"))
    cut_back(values)
    tensors = load_file(tmp_path / "moving" / "model.safetensors")
    moved = {name: tensor + 0.01 for name, tensor in tensors.items()}
    save_file(moved, tmp_path / "moving" / "model.safetensors", metadata={"format": "pt"})
    message = "checkpoint-2 was trained on another augmenting model 'augmenting': its weights diff"
    with pytest.raises(CheckpointMismatchError, match=message):
        train(values, resume=True)


def test_a_run_that_has_ended_is_not_trained_on(values: dict[str, Any]) -> None:
    """It took one step more, if it had ended within an epoch."""
    values["training"] |= {"max_steps": 4, "lr_scheduler_type": "constant"}
    whole = weights(train(values))
    folder = train(values, resume=True)
    assert_same(weights(folder), whole)
    assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == 4


def test_labels_are_not_smoothed(values: dict[str, Any]) -> None:
    message = r"label_smoothing_factor is 0\.1, but Trainer would compare"
    arguments = TrainingArguments(values["output_dir"], label_smoothing_factor=0.1)
    model = compose(values["anchor"], values["augmenting"])
    with pytest.raises(ValueError, match=message):
        ComposedTrainer(model, arguments)
    values["training"]["label_smoothing_factor"] = 0.1
    with pytest.raises(ValueError, match=message):  # before any model is loaded
        prepare(Recipe.from_mapping(values))


def test_a_setting_that_says_what_is_so_by_default_is_the_same(values: dict[str, Any]) -> None:
    checkpoint = str(cut_back(values))
    same = prepare(Recipe.from_mapping(values | {"output_dir": "other", "num_heads": 4}))
    check_same(read_config(checkpoint), same.model.config, checkpoint)


def test_a_checkpoint_without_the_optimizer_is_refused(values: dict[str, Any]) -> None:
    """As `save_only_model` leaves one, and as version 0.1 did beside its optimizer.pt."""
    checkpoint = cut_back(values)
    (checkpoint / "optimizer.safetensors").rename(checkpoint / "optimizer.pt")
    message = "checkpoint-2 holds no optimizer.safetensors: it was saved with save_only_model, or "
    with pytest.raises(CheckpointMismatchError, match=message):
        train(values, resume=True)


def test_a_damaged_optimizer_is_refused(values: dict[str, Any]) -> None:
    checkpoint = cut_back(values)
    file = checkpoint / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(CheckpointMismatchError, match=r"optimizer\.safetensors is cut off or dam"):
        train(values, resume=True)


def test_a_checkpoint_of_other_bridges_is_refused(values: dict[str, Any]) -> None:
    cut_back(values)
    values |= {"every": None, "connections": ["0-1", "2-3"]}
    message = "checkpoint-2 has the connections .*, but this run has augmenting:0-1, augmenting:2-3"
    with (
        pytest.warns(UserWarning, match="the recipe differs in connections, every"),
        pytest.raises(CheckpointMismatchError, match=message),
    ):
        train(values, resume=True)


def test_the_state_of_other_parameters_is_refused(tmp_path: Path) -> None:
    here, there = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    state = gather(torch.optim.AdamW([here]), {here: "x"}, keep=True)
    message = r"somewhere does not fit the optimizer: x is in group 0 of only one of them"
    with pytest.raises(CheckpointMismatchError, match=message):
        restore(torch.optim.AdamW([there]), {there: "y"}, state, "somewhere")


def test_state_and_settings_survive_the_file(tmp_path: Path) -> None:
    parameter = nn.Parameter(torch.tensor([1.0, -2.0, 0.3]))
    settings = {"lr": 0.1 + 0.2, "betas": (0.7, 0.8), "weight_decay": 1e-17}
    optimizer = torch.optim.AdamW([parameter], **settings)
    parameter.grad = torch.tensor([1e-30, 3.0, -0.1])
    optimizer.step()
    write(gather(optimizer, {parameter: "w"}, keep=True), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["optimizer.safetensors"]
    fresh = torch.optim.AdamW([parameter])
    restore(fresh, {parameter: "w"}, read(tmp_path), "there")
    for key, value in optimizer.state[parameter].items():
        assert torch.equal(fresh.state[parameter][key], value), key
    for key, value in settings.items():
        assert fresh.param_groups[0][key] == value
    assert set(load_file(tmp_path / "optimizer.safetensors")) == {
        "exp_avg/w",
        "exp_avg_sq/w",
        "step/w",
    }


def test_a_state_that_no_file_holds_is_refused() -> None:
    parameter: Any = nn.Parameter(torch.ones(3, 5))
    with pytest.raises(ValueError, match="keeps history as a dict, which graftlm cannot save; ch"):
        check_writable("history", {}, parameter)
    check_writable("row", torch.ones(3), parameter)
    parameter.ds_id, parameter.ds_shape = 0, torch.Size([3, 5])  # as DeepSpeed marks it
    message = r"row of shape \(3,\) for a parameter of shape \(3, 5\), which cannot be spread"
    with pytest.raises(ValueError, match=message):
        check_writable("row", torch.ones(3), parameter)


def test_only_bridges_are_trained(models: tuple[str, str], tmp_path: Path) -> None:
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    model = compose(*models)
    with pytest.raises(TypeError, match="trains a ComposedForCausalLM, not a LlamaForCausalLM; us"):
        ComposedTrainer(model=model.anchor, args=arguments)
    model.anchor.get_input_embeddings().requires_grad_(True)
    message = r"model\.anchor\.model\.embed_tokens\.weight requires gradients, but checkpoints"
    with pytest.raises(ValueError, match=message):
        ComposedTrainer(model=model, args=arguments)


def test_older_ways_to_spread_a_model_are_refused() -> None:
    check_layout("zero_stage", 3, 3)
    with pytest.raises(
        ValueError, match="zero_stage is 2, but graftlm trains with zero_stage 3 on"
    ):
        check_layout("zero_stage", 2, 3)


def test_float16_under_deepspeed_is_refused() -> None:
    check_precision(False)
    with pytest.raises(ValueError, match="fp16 is on, but under DeepSpeed a resumed run would sta"):
        check_precision(True)
