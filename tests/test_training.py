"""Recipes, and training as they say: what is refused, what is reported, what is saved."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file
from transformers import TrainerCallback, trainer

from graftlm import ComposedForCausalLM, Connection
from graftlm.recipe import Recipe, parse_connection, read_yaml
from graftlm.resuming import Interruption, last_checkpoint
from graftlm.sizes import bridge_parameters, part_sizes, trainable_share, training_memory
from graftlm.training import Training, prepare, training_arguments
from tiny import quick_recipe, save_model, save_pair, sums, write_lines

NEEDED = {"anchor": "a", "augmenting": "b", "data": "d.jsonl", "output_dir": "out"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return save_pair(tmp_path_factory.mktemp("models"))


@pytest.fixture
def values(models: tuple[str, str], tmp_path: Path, no_curves: None) -> dict[str, Any]:
    return quick_recipe(models, tmp_path)


def train(values: dict[str, Any], resume: bool = False, **changes: Any) -> Training:
    training = prepare(Recipe.from_mapping(values | changes), resume=resume)
    training.run()
    return training


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(folder, "model.safetensors"))


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


# ---- recipes -----------------------------------------------------------------------------


def test_a_recipe_survives_json_and_yaml(tmp_path: Path) -> None:
    recipe = Recipe.from_mapping(
        NEEDED
        | {
            "augmenting": {"code": "b"},
            "connections": [
                "code:1-2",
                {"augmenting": "code", "augmenting_layer": 0, "anchor_layer": 3},
            ],
            "eval_fraction": 0.2,
            "gate": True,
            "probe": ["one", "two"],
            "training": {"learning_rate": 0.5},
        }
    )
    assert recipe.connections == (
        Connection(augmenting="code", augmenting_layer=1, anchor_layer=2),
        Connection(augmenting="code", augmenting_layer=0, anchor_layer=3),
    )
    assert Recipe.from_mapping(json.loads(json.dumps(recipe.to_json()))) == recipe
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(recipe.to_json()))))
    assert Recipe.from_mapping(read_yaml(tmp_path / "r.yaml")) == recipe


def test_numbers_in_yaml_are_numbers(tmp_path: Path) -> None:
    """YAML 1.1 takes 3e-4, without a point, for a text."""
    (tmp_path / "r.yaml").write_text("training:\n  learning_rate: 3e-4\n  weight_decay: 1.5E-2\n")
    found = read_yaml(tmp_path / "r.yaml")["training"]
    assert found == {"learning_rate": 3e-4, "weight_decay": 0.015}


def test_paths_may_start_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somebody")
    paths = {"output_dir": "~/out", "data": "~/d.jsonl", "eval_data": "~/e.jsonl"}
    recipe = Recipe.from_mapping(NEEDED | paths)
    assert (recipe.output_dir, recipe.data) == ("/somebody/out", "/somebody/d.jsonl")
    assert recipe.eval_data == "/somebody/e.jsonl"
    assert training_arguments(recipe).output_dir == "/somebody/out"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", r"r\.yaml, line 2: not valid YAML: expected ',' or ']'"),
        ("a: 1\nb: 2\na: 3", r"r\.yaml, line 3: not valid YAML: key 'a' appears twice"),
        ("just text", r"r\.yaml must hold keys and values"),
        ("training: fast", r"r\.yaml: training must hold keys and values, not 'fast'"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "r.yaml").write_text(text + "\n")
    with pytest.raises(ValueError, match=message):
        read_yaml(tmp_path / "r.yaml")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"anchr": "x"}, "the recipe has an unknown key 'anchr', did you mean 'anchor'"),
        ({"learning_rate": 1}, "has 'learning_rate' at its top level; put it in training:"),
        ({"data": None}, "has no 'data'; every recipe needs anchor, augmenting, data, output_dir"),
        ({"anchor": 3}, "anchor is 3, but must be a text"),
        ({"augmenting": {}}, "augmenting is empty, but a composition needs at least one model"),
        ({"every": 4, "connections": ["1-2"]}, "every is 4 and connections lists 1, but only one"),
        ({"every": 0}, "every is 0, but must be a positive whole number"),
        ({"every": True}, "every is True, but must be a whole number"),
        ({"connections": "1-2"}, "connections is '1-2', but must be a list such as"),
        ({"connections": ["1,2"]}, "connection '1,2' must be AUGMENTING_LAYER-ANCHOR_LAYER or"),
        ({"connections": [{"anchor_layer": 1}]}, "connection {'anchor_layer': 1} must be"),
        ({"connections": ["code:1-2"]}, "connection 1-2 reads augmenting model 'code', but there "),
        ({"variant": "calm"}, "variant is 'calm', but must be one of 'graftlm', 'paper'"),
        ({"reads": "all"}, "reads is 'all', but must be one of 'sequence', 'prompt'"),
        ({"position": "alibi"}, "position is 'alibi', but must be one of 'none', 'distance', "),
        ({"num_heads": 0}, "num_heads is 0, but must be a positive whole number"),
        ({"dtype": "fp8"}, "dtype is 'fp8', but must be one of 'auto', 'float32'"),
        ({"bridge_dtype": "auto"}, "bridge_dtype is 'auto', but must be one of 'float32'"),
        ({"max_length": 1}, "max_length is 1, but must be at least 2 tokens"),
        ({"max_length": "long"}, "max_length is 'long', but must be a whole number"),
        ({"gate": "yes"}, "gate is 'yes', but must be yes or no"),
        ({"eval_fraction": 1.0}, r"eval_fraction is 1\.0, but must be between 0 and 1"),
        ({"eval_fraction": 0.1, "eval_data": "e"}, r"eval_data is 'e' and eval_fraction is 0\.1"),
        ({"training": {"eval_strategy": "steps"}}, "training.eval_strategy is 'steps', but there "),
        ({"training": {"load_best_model_at_end": True}}, "load_best_model_at_end is True, but th"),
        (
            {"training": {"learning_rat": 1}},
            "training has an unknown key 'learning_rat', did you mean 'learning_rate'",
        ),
        ({"training": {"seed": 1}}, "training.seed cannot be set; write seed at the top level"),
        ({"training": {"max_steps": "ten"}}, "training.max_steps is 'ten', but must be a whole n"),
        ({"training": {"learning_rate": "1"}}, "learning_rate is '1', but must be a number$"),
        ({"training": {"bf16": 1}}, "training.bf16 is 1, but must be yes or no"),
        ({"training": {"max_steps": 1.5}}, r"max_steps is 1\.5, but must be a whole number"),
    ],
)
def test_a_wrong_recipe_is_refused_before_any_model_loads(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe.from_mapping(NEEDED | changes)


def test_connections_are_read_from_short_forms() -> None:
    plain = Connection(augmenting_layer=3, anchor_layer=15)
    assert parse_connection("3-15") == parse_connection(plain) == plain
    assert parse_connection({"augmenting_layer": 3, "anchor_layer": 15}) == plain


def test_training_arguments_go_over_our_defaults() -> None:
    arguments = training_arguments(Recipe.from_mapping(NEEDED | {"seed": 7}))
    assert (arguments.learning_rate, arguments.seed, arguments.output_dir) == (3e-4, 7, "out")
    assert (arguments.bf16, arguments.ddp_find_unused_parameters) == (False, False)
    assert arguments.eval_strategy == "no"
    changes = {
        "eval_fraction": 0.1,
        "training": {"learning_rate": 1, "lr_scheduler_type": "linear"},
    }
    arguments = training_arguments(Recipe.from_mapping(NEEDED | changes))
    assert (arguments.learning_rate, arguments.lr_scheduler_type) == (1, "linear")
    assert (arguments.eval_strategy, arguments.eval_steps) == ("steps", 0.1)


def test_an_option_without_effect_warns() -> None:
    recipe = Recipe.from_mapping(NEEDED | {"training": {"do_predict": True}})
    with pytest.warns(UserWarning, match=r"training\.do_predict has no effect"):
        training_arguments(recipe)


# ---- before training ---------------------------------------------------------------------


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("graftlm.training.compose", refuse)


@pytest.mark.usefixtures("no_weights")
def test_what_needs_no_weights_is_checked_first(values: dict[str, Any]) -> None:
    changes = {"every": None, "connections": ["1-9"]}
    with pytest.raises(ValueError, match=r"writes to anchor layer 9, but .* has layers 0 to 3"):
        train(values, **changes)
    with pytest.raises(ValueError, match="max_length is 97, but the context of the anchor is 96 "):
        train(values, max_length=97)
    with pytest.raises(ValueError, match=r"data 'none\.jsonl' does not exist"):
        train(values, data="none.jsonl")
    with pytest.raises(ValueError, match="is 'nowhere', which is no checkpoint"):
        train(values, training={"resume_from_checkpoint": "nowhere"})


def test_several_models_and_their_shorter_context(values: dict[str, Any], tmp_path: Path) -> None:
    short = save_model(tmp_path / "short", seed=3, max_position_embeddings=48)
    values |= {"augmenting": {"one": values["augmenting"], "two": short}}
    with pytest.raises(ValueError, match="the context of augmenting model 'two' is 48 tokens"):
        prepare(Recipe.from_mapping(values | {"max_length": 64}))
    training = prepare(Recipe.from_mapping(values))
    assert training.max_length == 48
    assert {c.augmenting for c in training.model.config.connections} == {"one", "two"}


def test_bridge_options_reach_the_model(values: dict[str, Any]) -> None:
    values |= {"every": None, "connections": ["1-2", "0-3"], "bias": True, "gate": True}
    values |= {"num_heads": 2, "width": 12, "position": "rotary", "variant": "paper"}
    values |= {"bridge_dtype": "bfloat16", "reads": "prompt", "dtype": "float16"}
    model = prepare(Recipe.from_mapping(values)).model
    assert [(c.augmenting_layer, c.anchor_layer) for c in model.config.connections] == [
        (1, 2),
        (0, 3),
    ]
    bridge = model.config.bridge
    assert (bridge.num_heads, bridge.width, bridge.position) == (2, 12, "rotary")
    assert (bridge.bias, bridge.gate, bridge.norm) == (True, True, False)
    assert {p.dtype for p in model.bridges.parameters()} == {torch.bfloat16}
    assert (model.config.reads, model.anchor.dtype) == ("prompt", torch.float16)


def test_sizes_count_every_part_once(values: dict[str, Any]) -> None:
    model = prepare(Recipe.from_mapping(values | {"every": 3, "gate": True})).model
    assert len(model.bridges) == 1
    parts = bridge_parameters(model)
    assert parts == {
        "norms": 24 + 16,
        "f_proj": 16 * 24,
        "W^Q": 24 * 24,
        "W^K": 24 * 24,
        "W^V": 24 * 24,
        "W^O": 24 * 24,
        "gate": 1,
    }
    sizes = part_sizes(model)
    assert sizes["bridges"].num_trainable == sum(parts.values())
    assert (sizes["anchor"].num_trainable, sizes["augmenting"].num_trainable) == (0, 0)
    total = sum(p.numel() for p in model.parameters())
    assert trainable_share(sizes) == sum(parts.values()) / total
    memory = training_memory(model, batch_size=2, length=5, checkpointing=False)
    trained = 4 * sum(parts.values())
    assert (memory["bridges"], memory["gradients"]) == (trained, trained)
    assert memory["optimizer (AdamW)"] == 2 * trained
    assert memory["frozen models"] == 4 * (total - sum(parts.values()))
    less = training_memory(model, batch_size=2, length=5, checkpointing=True)
    twice = training_memory(model, batch_size=4, length=5, checkpointing=False)
    assert twice["activations (rough)"] == 2 * memory["activations (rough)"]
    assert less["activations (rough)"] < memory["activations (rough)"]


# ---- training ----------------------------------------------------------------------------


def test_only_bridges_change_and_the_folder_loads(values: dict[str, Any]) -> None:
    training = train(values, eval_fraction=0.25)
    bases = {"anchor": training.model.anchor, **training.model.augmenting}
    for name, base in bases.items():
        state = base.state_dict()
        for key, tensor in weights(values[name]).items():
            assert torch.equal(tensor, state[key]), key
    folder = values["output_dir"]
    saved = ComposedForCausalLM.from_pretrained(folder)
    ids = torch.tensor([[9, 17, 30]])
    with torch.no_grad():
        assert torch.equal(saved(ids).logits, training.model.eval()(ids).logits)
        assert not torch.equal(saved(ids).logits, saved.anchor(ids).logits)
    record = json.loads(Path(folder, "training.json").read_text())
    assert record["data"]["examples"] == 15
    assert record["data"]["evaluation_examples"] == 5
    assert (record["state"], record["step"]) == ("finished", 12)
    assert record["metrics"]["eval_perplexity"] > 1
    assert Path(folder, "trainer_state.json").is_file()
    assert Path(folder, "tokenizer.json").is_file()


def test_evaluation_data_of_its_own(values: dict[str, Any], tmp_path: Path) -> None:
    values["eval_data"] = write_lines(tmp_path / "eval.jsonl", *sums(4))
    values["training"] |= {"eval_strategy": "epoch", "max_steps": 2}
    train(values)
    record = json.loads(Path(values["output_dir"], "training.json").read_text())
    assert record["metrics"]["eval_loss"] > 0
    assert record["data"]["evaluation_examples"] == 4


def test_the_same_seed_gives_the_same_weights(values: dict[str, Any], tmp_path: Path) -> None:
    runs = []
    for number, seed in enumerate((1, 1, 2)):
        values |= {"output_dir": str(tmp_path / str(number)), "seed": seed}
        train(values, training=values["training"] | {"max_steps": 2, "save_strategy": "no"})
        runs.append(weights(values["output_dir"]))
    assert_same(runs[0], runs[1])
    assert any(not torch.equal(tensor, runs[2][name]) for name, tensor in runs[0].items())


class At(TrainerCallback):
    """Sends this process a signal at the end of one step."""

    def __init__(self, step: int, number: int = signal.SIGINT, times: int = 1):
        self.step, self.number, self.times = step, number, times

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)


def add_callback(monkeypatch: pytest.MonkeyPatch, callback: TrainerCallback) -> None:
    callbacks = [*trainer.DEFAULT_CALLBACKS, callback]
    monkeypatch.setattr(trainer, "DEFAULT_CALLBACKS", callbacks)


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_an_interrupted_run_resumes_as_if_nothing_had_happened(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    train(values)
    whole = weights(values["output_dir"])
    values["output_dir"] = str(tmp_path / "second")
    with monkeypatch.context() as patch:
        add_callback(patch, At(step=5, number=number))
        outcome = prepare(Recipe.from_mapping(values)).run()
    assert (outcome.stopped_by, outcome.step) == (number, 6)
    assert outcome.folder == str(tmp_path / "second" / "checkpoint-6")
    assert not (tmp_path / "second" / "model.safetensors").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with pytest.raises(ValueError, match="already holds checkpoint-6; pass --resume to continue"):
        train(values)
    resumed = prepare(Recipe.from_mapping(values), resume=True)
    assert resumed.checkpoint == outcome.folder
    assert resumed.run().step == 12
    assert_same(weights(values["output_dir"]), whole)


def test_a_second_ctrl_c_stops_at_once(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    add_callback(monkeypatch, At(step=2, times=2))
    with pytest.raises(KeyboardInterrupt):
        train(values)
    assert last_checkpoint(Path(values["output_dir"])) is None


def test_an_epoch_cut_short_is_not_evaluated(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    add_callback(monkeypatch, At(step=2))
    values["training"] |= {"eval_strategy": "epoch", "save_strategy": "epoch"}
    training = prepare(Recipe.from_mapping(values | {"eval_fraction": 0.2}))
    outcome = training.run()
    state = json.loads(Path(outcome.folder, "trainer_state.json").read_text())
    assert state["global_step"] == 3
    assert not any("eval_loss" in entry for entry in state["log_history"])


def test_a_checkpoint_cut_off_while_written_is_passed_over(
    values: dict[str, Any], tmp_path: Path
) -> None:
    train(values)
    whole = weights(values["output_dir"])
    folder = Path(values["output_dir"])
    state = folder / "checkpoint-12" / "trainer_state.json"
    state.write_text(state.read_text()[:50])
    with pytest.warns(UserWarning, match="checkpoint-12 is incomplete"):
        resumed = prepare(Recipe.from_mapping(values), resume=True)
    assert resumed.checkpoint == str(folder / "checkpoint-8")
    assert resumed.run().step == 12
    assert_same(weights(folder), whole)


def test_resuming_says_what_has_changed(values: dict[str, Any]) -> None:
    with pytest.warns(UserWarning, match="out holds no checkpoint to resume from; starting at"):
        train(values, resume=True)
    with pytest.warns(UserWarning, match="the recipe differs in seed from the one this run was"):
        prepare(Recipe.from_mapping(values | {"seed": 3}), resume=True)


@pytest.mark.parametrize("resume", [False, True])
def test_a_finished_run_without_checkpoints_is_not_replaced(
    values: dict[str, Any], resume: bool
) -> None:
    values["training"] |= {"max_steps": 1, "save_strategy": "no"}
    prepare(Recipe.from_mapping(values)).run()
    with pytest.raises(ValueError, match="out holds a finished run and no checkpoint to go on fr"):
        prepare(Recipe.from_mapping(values), resume=resume)


def test_a_named_checkpoint_is_resumed(values: dict[str, Any]) -> None:
    train(values)
    named = str(Path(values["output_dir"], "checkpoint-8"))
    values["training"] |= {"resume_from_checkpoint": named}
    with pytest.raises(ValueError, match="also holds checkpoint-12, which --resume would take"):
        prepare(Recipe.from_mapping(values))
    # A run that was started from elsewhere goes on from its own.
    own = str(Path(values["output_dir"], "checkpoint-12"))
    with pytest.warns(UserWarning, match="the recipe differs in training"):
        assert prepare(Recipe.from_mapping(values), resume=True).checkpoint == own
    elsewhere = str(shutil.copytree(named, Path(values["output_dir"]).parent / "elsewhere"))
    values["training"] |= {"resume_from_checkpoint": elsewhere}
    with pytest.raises(ValueError, match="already holds checkpoint-12; pass --resume"):
        prepare(Recipe.from_mapping(values))
    shutil.rmtree(own)
    values["training"] |= {"resume_from_checkpoint": named}
    assert prepare(Recipe.from_mapping(values)).checkpoint == named


def test_a_stopped_run_keeps_its_checkpoint_beside_the_best(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where one is to be kept only, it was the best one."""
    on_step_end = Interruption.on_step_end

    def interrupt(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 6:
            self.receive(signal.SIGINT, None)
        on_step_end(self, args, state, control, **kwargs)

    monkeypatch.setattr(Interruption, "on_step_end", interrupt)
    one = {"load_best_model_at_end": True, "save_total_limit": 1, "eval_steps": 4}
    values |= {"eval_fraction": 0.25, "training": values["training"] | one}
    outcome = prepare(Recipe.from_mapping(values)).run()
    assert (outcome.step, outcome.stopped_by) == (6, signal.SIGINT)
    assert last_checkpoint(Path(values["output_dir"])) == Path(outcome.folder)


# ---- what is shown -----------------------------------------------------------------------


def test_progress_in_a_terminal_and_in_a_file(values: dict[str, Any], tmp_path: Path) -> None:
    console = Console(force_terminal=True, width=120, record=True, file=io.StringIO())
    prepare(Recipe.from_mapping(values | {"eval_fraction": 0.2})).run(console)
    shown = console.export_text()
    assert "12/12" in shown
    for word in ("eval loss", "examples/s", "tokens/s", "memory"):
        assert word in shown
    values["output_dir"] = str(tmp_path / "second")
    console = Console(width=120, record=True, file=io.StringIO())
    prepare(Recipe.from_mapping(values)).run(console)
    lines = [line for line in console.export_text().splitlines() if line]
    assert len(lines) == 12
    line = r"step 12/12  loss [\d.]+  lr [\d.e-]+  [\d.,]+ examples/s  [\d,]+ tokens/s  memory "
    assert re.fullmatch(line + r"[\d.]+ [MG]B  left 0:00:00", lines[-1])


def test_signals_are_left_alone_outside_the_main_thread() -> None:
    handlers = []

    def work() -> None:
        with Interruption().caught():
            handlers.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert handlers == [signal.default_int_handler]


def test_a_signal_behind_the_last_step_finishes(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It came too late for a checkpoint, and the trained bridges were lost."""

    def late(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == state.max_steps:
            self.receive(signal.SIGINT, None)

    monkeypatch.setattr(Interruption, "on_evaluate", late, raising=False)
    values["training"] |= {"save_strategy": "no", "eval_strategy": "steps", "eval_steps": 12}
    outcome = prepare(Recipe.from_mapping(values | {"eval_fraction": 0.2})).run()
    assert outcome.stopped_by is None
    assert Path(outcome.folder, "model.safetensors").exists()


# ---- processes ---------------------------------------------------------------------------


def start(*words: str, launcher: tuple[str, ...] = (sys.executable, "-m", "graftlm")) -> Any:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*launcher, *words],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def output_of(process: Any, seconds: float = 120) -> str:
    """All it prints until its end; a hanging one is ended, with its children."""
    try:
        return process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise


def wait_for(path: Path, process: Any, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.01)


def write_recipe(path: Path, values: dict[str, Any]) -> str:
    path.write_text(yaml.safe_dump(values))
    return str(path)


@pytest.mark.slow
def test_kill_and_resume_end_with_the_same_weights(values: dict[str, Any], tmp_path: Path) -> None:
    values["training"] |= {"max_steps": 60, "save_steps": 3, "eval_steps": 7}
    values["eval_fraction"] = 0.2
    train(values)
    whole = weights(values["output_dir"])
    values["output_dir"] = str(tmp_path / "killed")
    recipe = write_recipe(tmp_path / "r.yaml", values)
    for step in (6, 21):
        process = start("train", recipe, *(["--resume"] if step > 6 else []))
        wait_for(tmp_path / "killed" / f"checkpoint-{step}", process)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        process.stdout.close()
    process = start("train", recipe, "--resume")
    text = output_of(process)
    assert process.returncode == 0, text
    assert "Resuming from" in text
    assert_same(weights(tmp_path / "killed"), whole)


@pytest.mark.slow
def test_ctrl_c_leaves_a_checkpoint_and_says_how_to_go_on(
    values: dict[str, Any], tmp_path: Path
) -> None:
    values["training"] |= {"max_steps": 500, "save_steps": 5, "dataloader_num_workers": 1}
    recipe = write_recipe(tmp_path / "r.yaml", values)
    process = start("train", recipe)
    wait_for(Path(values["output_dir"], "checkpoint-5"), process)
    process.send_signal(signal.SIGINT)
    text = output_of(process)
    assert process.returncode == 130, text
    assert f"continue with: graftlm train {recipe} --resume" in text.replace("\n", " ")
    assert last_checkpoint(Path(values["output_dir"])) is not None


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [1, 2])
def test_launched_by_accelerate_and_by_torchrun(
    values: dict[str, Any], tmp_path: Path, num_processes: int
) -> None:
    """Two processes of 3 examples each take the step of one process over 6.

    Accelerate starts several processes only on GPUs; what it uses there is torch's launcher.
    """
    # Plain gradient descent: Adam would turn roundings of tiny gradients into full steps.
    values["training"] |= {"max_steps": 3, "optim": "sgd", "learning_rate": 1.0}
    values["training"] |= {"per_device_train_batch_size": 6, "use_cpu": True, "data_seed": 1}
    values["training"] |= {"train_sampling_strategy": "sequential"}
    train(values)
    whole = weights(values["output_dir"])
    values["output_dir"] = str(tmp_path / "launched")
    values["training"]["per_device_train_batch_size"] = 6 // num_processes
    values["probe"] = ["1+2="]
    recipe = write_recipe(tmp_path / "r.yaml", values)
    launchers = {
        1: "accelerate.commands.launch --cpu --num_processes=1 --num_machines=1 "
        "--mixed_precision=no --dynamo_backend=no",
        2: "torch.distributed.run --standalone --nproc_per_node=2",
    }
    launcher = (sys.executable, "-m", *launchers[num_processes].split())
    process = start("-m", "graftlm", "train", recipe, launcher=launcher)
    text = output_of(process)
    assert process.returncode == 0, text
    assert text.count("saved in ") == 1, text
    assert text.count("step 3/3  probe '1+2='") == 1, text
    for name, tensor in weights(tmp_path / "launched").items():
        torch.testing.assert_close(tensor, whole[name], atol=1e-5, rtol=1e-5, msg=name)
