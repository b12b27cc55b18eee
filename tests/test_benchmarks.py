"""The benchmarks measure what they say: no test of how fast anything is."""

import functools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import decoding, growth, memory, models, peers, timing, training_step
from benchmarks.models import Setting

REPOSITORY = Path(__file__).parent.parent

# PEFT asks transformers in a way that transformers is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
TINY = Setting(size="tiny", batch=2, length=7)


def run(folder: Path, *words: str) -> dict:
    """The results that `python -m benchmarks` writes for tiny models."""
    command = [sys.executable, "-m", "benchmarks", "--shape", "tiny", "--rounds", "2"]
    command += ["--threads", "1", "--device", "cpu", "--output", str(folder), *words]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "results.json").read_text())


# ---- what is compared ------------------------------------------------------------------------


@pytest.mark.parametrize("connections", ["paper", "middle", 1, 5])
def test_the_floor_runs_backward_exactly_from_the_first_connection_up(connections):
    case = models.build(replace(TINY, connections=connections))
    anchor = training_step.anchor_from_first_connection(case)
    reached = []

    def watch(number, module, args, output):
        if output.requires_grad:
            output.register_hook(lambda gradient: reached.append(number))

    for number, layer in enumerate(anchor.model.layers):
        layer.register_forward_hook(functools.partial(watch, number))
    training_step.floor_step([], anchor, case.input_ids)(timing.no_lap)
    first = min(c.anchor_layer for c in case.connections)
    assert sorted(reached) == list(range(first, 12))
    assert all(weight.grad is None for weight in anchor.parameters())


def test_the_floor_runs_the_augmenting_model_without_what_is_not_read():
    case = models.build(TINY)
    trunk = training_step.shortened(case.augmenting["half_0"], 5)
    assert len(trunk.layers) == 5
    assert len(case.augmenting["half_0"].model.layers) == 12
    recorded = case.augmenting["half_0"](case.input_ids, output_hidden_states=True)
    assert torch.equal(
        trunk(case.input_ids).last_hidden_state, trunk.norm(recorded.hidden_states[5])
    )


@pytest.mark.parametrize("size", ["tiny", pytest.param("small", marks=pytest.mark.slow)])
@pytest.mark.parametrize("connections", ["paper", "middle"])
@pytest.mark.parametrize("narrow", [False, True])
def test_lora_trains_as_many_parameters_as_the_bridges(size, connections, narrow):
    case = models.build(
        replace(TINY, size=size, connections=connections, narrow=narrow, device="meta")
    )
    bridges = models.num_parameters(case.compose(), trainable=True)
    assert training_step.num_bridge_parameters(case) == bridges
    lora = models.num_parameters(training_step.with_lora(case), trainable=True)
    # Of tiny narrow bridges, half a layer's share is more than 2 %.
    few = size == "tiny" and narrow
    assert lora == pytest.approx(bridges, rel=0.07 if few else 0.02)


def test_narrow_bridges_have_a_sixth_of_the_width():
    case = models.build(replace(TINY, size="small", narrow=True, device="meta"))
    for bridge in case.compose().bridges:
        assert (bridge.cross_q.out_features, bridge.num_heads) == (96, 3)


@pytest.mark.parametrize("make", [models.Case.compose, training_step.with_lora])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_trains_and_leaves_the_frozen_weights_as_they_are(make, checkpointing):
    case = models.build(replace(TINY, checkpointing=checkpointing))
    frozen = [*case.anchor.parameters(), *case.augmenting["half_0"].parameters()]
    before = [weight.clone() for weight in frozen]
    model = make(case)
    step = training_step.step_of(model, case)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    start = [weight.detach().clone() for weight in trained]
    for _ in range(2):  # a fresh bridge, or LoRA, passes nothing back through its last map
        step(timing.no_lap)
    assert all(torch.equal(a, b) for a, b in zip(frozen, before, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(trained, start, strict=True))


def test_a_composed_step_starts_at_the_anchors_loss():
    case = models.build(TINY)
    ids = {"input_ids": case.input_ids, "labels": case.input_ids}
    assert torch.equal(case.compose()(**ids).loss, case.anchor(**ids).loss)


def test_twins_share_their_weights_and_nothing_else():
    anchor = models.random_model("tiny", "anchor", "float32", "cpu")
    copy = models.twin(anchor)
    pairs = zip(anchor.parameters(), copy.parameters(), strict=True)
    assert all(a is b for a, b in pairs)
    assert not set(anchor.modules()) & set(copy.modules())


def test_shapes_are_those_of_the_models_they_are_named_after():
    with torch.device("meta"):
        count = {
            part: models.num_parameters(models.random_model("small", part, "float32", "meta"))
            for part in ("anchor", "half", "tenth")
        }
    assert count["anchor"] == 134_515_008  # as published
    assert count["tenth"] / count["anchor"] == pytest.approx(0.1, abs=0.01)
    assert models.anchor_config("small").hidden_size == 2 * 288
    pairs = models.middle_pairs(30)
    assert pairs == [(6, 14), (14, 19), (21, 24), (29, 29)]


def test_every_decoder_reads_the_prompt_and_the_same_number_of_tokens():
    systems = decoding.decoders(models.build(TINY), batch=3)
    alone = systems["anchor"].model.generate(
        systems["anchor"].prompt, max_new_tokens=3, do_sample=False, eos_token_id=None
    )
    for system in systems.values():
        system.prefill(timing.no_lap)
        parts = getattr(system, "parts", [system])
        for part in parts:
            part.cache.batch_repeat_interleave(3)
        for _ in range(2):
            system.step(timing.no_lap)
        assert [part.cache.get_seq_length() for part in parts] == [7 + 2]
    # Its first token is the prompt's last, read twice, so it is not generate's; but a fresh
    # composed model must write what its anchor does.
    assert alone.shape == (1, 7 + 3)
    assert torch.equal(systems["composed"].token, systems["anchor"].token)
    assert systems["composed"].token.shape == (3, 1)


def test_operations_of_ours_are_those_of_the_floor_and_the_bridges():
    case = models.build(TINY)
    systems = {name: make(case) for name, make in training_step.SYSTEMS.items()}
    times = timing.measure(systems, rounds=2, device="cpu")
    bridges = sum(p.numel() for b in case.compose().bridges for p in b.parameters() if p.dim() == 2)
    tokens = case.input_ids.numel()
    attention = len(case.connections) * tokens * 7 * 64
    # Forward 2, backward 4 a weight; but nothing flows back into what the first layers wrote.
    more = times.flops["composed"] - times.flops["floor"]
    assert 0.8 * 6 * bridges * tokens < more <= 6 * bridges * tokens + 16 * attention
    assert set(times.rounds["composed"][0]) == {"forward", "backward", "optimizer", "total"}


# ---- timing ----------------------------------------------------------------------------------


def test_rounds_take_turns_and_ratios_are_taken_round_by_round():
    order = []
    steps = {name: lambda lap, name=name: order.append(name) for name in "abc"}
    timing.measure(steps, rounds=3, device="cpu", warmups=1)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"
    rounds = {
        "a": [{"total": 2.0}, {"total": 9.0}, {"total": 4.0}],
        "b": [{"total": 1.0}, {"total": 3.0}, {"total": 2.0}],
        "c": [{"total": 1.0}, {"total": 1.5}, {"total": 3.0}],
    }
    times = timing.Times(rounds, {"a": 10, "b": 4, "c": 1})
    goal = timing.Goal(system="a", against=("b", "c"), at_most=0.9)
    [ratio] = times.ratios([goal, timing.Goal(system="cached", against=("a",), at_most=1.0)])
    assert ratio == {
        "name": "a / (b + c)",
        "goal": 0.9,
        "met": False,
        "median": 1.0,
        "min": 0.8,
        "max": 2.0,
        "of_fastest": 2.0 / 2.0,
        "by_flops": 2.0,
    }


# ---- the command -----------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_writes_results_tables_and_plots(tmp_path):
    results = run(tmp_path, "--only", "training,decoding")
    assert set(results["sections"]) == {"training", "decoding"}
    for section in results["sections"].values():
        assert section["complete"]
        assert section["run"]["command"].startswith("python -m benchmarks --shape tiny")
        assert section["run"]["hardware"]["threads"] == 1
    rows = results["sections"]["training"]["rows"]
    assert [(row["setting"]["connections"], row["setting"]["narrow"]) for row in rows] == [
        ("paper", False),
        ("middle", False),
        ("paper", True),
        ("middle", True),
    ]
    paper = rows[0]
    assert set(paper["seconds"]) == {"composed", "cached", "floor", "lora"}
    ratios = ["composed / floor", "composed / lora", "cached / lora"]
    assert [ratio["name"] for ratio in paper["ratios"]] == ratios
    rows = results["sections"]["decoding"]["rows"]
    assert [row["ratios"][0]["goal"] for row in rows if "ratios" in row] == [1.05] * 4
    assert all("GPU" in row["not_measured"] for row in rows if row.get("compiled"))
    table = (tmp_path / "results.md").read_text()
    assert "| **composed / floor** |" in table
    assert "paper connections, narrow," in table
    assert "≤ 1.03" in table
    assert "not measured: needs a GPU" in table
    for name in ("training.png", "decoding.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")

    again = run(tmp_path, "--only", "training", "--dtype", "bfloat16")
    assert again["sections"]["decoding"] == results["sections"]["decoding"]
    assert again["sections"]["training"]["rows"][0]["setting"]["dtype"] == "bfloat16"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_measured_and_drawn_beside_what_is_counted(tmp_path):
    results = run(tmp_path, "--only", "memory", "--quick")
    rows = results["sections"]["memory"]["rows"]
    assert len(rows) == 8
    assert {row["setting"]["dtype"] for row in rows} == {"float32", "bfloat16"}
    for row in rows:
        assert set(row["bytes"]) == {"composed", "lora"}
        assert [ratio["goal"] for ratio in row["ratios"]] == [0.85]
    curve = growth.curves(replace(TINY, batch=1), quick=True)[0]
    found = growth.memory(curve, threads=1)
    assert found["at"] == [8, 16]
    assert found["expected"][1] > found["expected"][0] > 0
    assert len(found["measured"]) == 2


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peaks_are_those_of_the_steps_alone():
    before = memory.start_watching("cpu")
    block = torch.ones(30_000_000)  # 120 MB
    del block
    assert 115e6 < memory.highest("cpu") - before < 150e6
    assert memory.highest("cpu") - memory.start_watching("cpu") > 100e6


@pytest.mark.slow
def test_a_child_that_fails_says_why():
    with pytest.raises(memory.NotMeasuredError, match="ended with 1: KeyError: 'nothing'"):
        memory.peak_bytes("nothing", TINY, threads=1)


def test_growth_is_drawn_beside_the_counted_slope():
    curve = growth.curves(replace(TINY, batch=1), quick=True)[0]
    row = growth.times(curve, rounds=2)
    flops = [value / row["expected"][0] for value in row["expected"]]
    assert row["at"] == [8, 16]
    assert 1.9 < flops[1] < 2.3  # twice the tokens, and a little more attention


# ---- other implementations -------------------------------------------------------------------


@pytest.mark.slow
def test_peers_are_known_by_their_files(tmp_path):
    file = tmp_path / "one" / "CALM_pytorch" / "CALM.py"
    file.parent.mkdir(parents=True)
    file.write_text("raise ImportError('no such thing here')\n")
    assert peers.kind_of(tmp_path / "one") == "calm-pytorch"
    [row] = peers.rows(tmp_path / "two", sys.executable, size="tiny", quick=True)
    assert "two holds no implementation known here" in row["not_measured"]
    rows = list(peers.rows(tmp_path / "one", sys.executable, size="tiny", quick=True))
    assert [row["measured"] for row in rows] == ["step", "decoding"]
    for row in rows:
        assert row["not_measured"].endswith("ImportError: no such thing here")


@pytest.mark.slow
def test_ours_is_measured_by_the_driver_of_the_peers():
    task = peers.shapes("tiny") | {"path": "", "family": "gemma", "length": 9, "steps": 1}
    step = peers.run(sys.executable, task | {"kind": "graftlm", "task": "step"})
    assert len(step["seconds"]) == 1
    widths = {"query, key, value, out": 4 * 64 * 64, "projection": 32 * 64, "norms": 64 + 32}
    assert step["trained"] == 6 * sum(widths.values())
    task |= {"prompt": 4, "tokens": 3, "task": "decoding", "kind": "graftlm"}
    assert peers.run(sys.executable, task)["tokens_per_second"] > 0
