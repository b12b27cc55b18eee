"""Switch connections off, rank them by the loss without them, and leave some out."""

import copy
import json
import math
import re
import struct
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from families import (
    REPRESENTATIVE,
    generated,
    left_padded,
    open_bridges,
    tiny,
    tiny_llama,
    token_ids,
)
from graftlm import (
    ComposedForCausalLM,
    Connection,
    cache_states,
    compose,
    prune,
    rank_connections,
)
from graftlm.cli import main
from graftlm.cli.usefulness import check_output
from graftlm.pruning import keep_connections
from graftlm.usefulness import SwitchedOff, Usefulness
from graftlm.usefulness_picture import draw_usefulness
from tiny import character_tokenizer, save_model, sums, write_lines
from two_tokenizers import batch_of, byte_tokenizer, compose_pair, word_tokenizer

TOLERANCE = {"atol": 5e-6, "rtol": 1e-5}


def two_models(anchor: str = "llama", **options: Any) -> Any:
    """An anchor that reads two models, three layers of each."""
    bases = {"code": tiny("gpt2", 1), "sw": tiny("llama", 2, hidden_size=32)}
    return open_bridges(compose(tiny(anchor), bases, every=1, **options))


def of(model: Any, name: str) -> list[Connection]:
    """The connections of one augmenting model."""
    return [c for c in model.config.connections if c.augmenting == name]


class Closed:
    """Within this context the bridges of some connections add exactly zero: the slow way."""

    def __init__(self, model: Any, connections: Iterable[Connection]):
        places = [model.config.connections.index(c) for c in connections]
        self.weights = [model.bridges[k].cross_o.weight for k in places]

    def __enter__(self) -> None:
        self.kept = [weight.detach().clone() for weight in self.weights]
        for weight in self.weights:
            weight.data.zero_()

    def __exit__(self, *exc: object) -> None:
        for weight, kept in zip(self.weights, self.kept, strict=True):
            weight.data.copy_(kept)


# ---- switching off -------------------------------------------------------------------------


@pytest.mark.parametrize("family", sorted(REPRESENTATIVE))
@torch.no_grad()
def test_without_any_connection_it_is_the_anchor_bit_for_bit(family):
    model = open_bridges(compose(tiny(family), tiny_llama(), every=2))
    ids, batch = token_ids(2, 9), left_padded([5, 3])
    alone, opened = model.anchor(ids).logits, model(ids).logits
    with model.without(model.config.connections):
        assert torch.equal(model(ids).logits, alone)
        for mine, theirs in zip(
            generated(model, batch, 5), generated(model.anchor, batch, 5), strict=True
        ):
            assert torch.equal(mine, theirs)
    assert torch.equal(model(ids).logits, opened)
    assert not torch.equal(alone, opened)


@torch.no_grad()
def test_each_connection_off_is_its_bridge_closed():
    model, ids = two_models(), token_ids(2, 9)
    whole, seen = model(ids).logits, []
    for connection in model.config.connections:
        with Closed(model, [connection]):
            expected = model(ids).logits
        with model.without([connection]):
            seen.append(model(ids).logits)
        assert torch.equal(seen[-1], expected)
    for first in range(len(seen)):  # and no two of them are the same
        for second in range(first):
            assert not torch.equal(seen[first], seen[second])
    assert torch.equal(model(ids).logits, whole)


@torch.no_grad()
def test_a_model_that_is_off_is_not_run_as_with_scale_zero():
    model, ids, batch = two_models(), token_ids(2, 9), left_padded([5, 3])
    calls = []
    first_layer = model.augmenting["code"].transformer.h[0]
    first_layer.register_forward_hook(lambda *_: calls.append(1))
    with model.without(of(model, "code")):
        logits, decoded = model(ids).logits, generated(model, batch, 5)
    assert not calls
    model.set_scale("code", 0)
    assert torch.equal(model(ids).logits, logits)
    for mine, theirs in zip(generated(model, batch, 5), decoded, strict=True):
        assert torch.equal(mine, theirs)
    assert not torch.equal(model.anchor(ids).logits, logits)


@pytest.mark.parametrize("make", [two_models, compose_pair])
@torch.no_grad()
def test_decoding_with_a_cache_is_decoding_without(make):
    """The cache of a bridge that is off has as many keys as the others'."""
    model = open_bridges(make())
    batch = batch_of("The quick", "def add(fi") if make is compose_pair else left_padded([5, 3])
    for connection in model.config.connections:
        with model.without([connection]):
            _, cached = generated(model, batch, 6)
            _, uncached = generated(model, batch, 6, use_cache=False)
        with Closed(model, [connection]):
            _, expected = generated(model, batch, 6)
        assert_close(cached, uncached, **TOLERANCE)
        assert_close(cached, expected, **TOLERANCE)


@torch.no_grad()
def test_a_cache_is_read_on_when_a_connection_is_on_again():
    model, ids = two_models(), token_ids(2, 9)
    for connection in model.config.connections:
        with Closed(model, [connection]):
            cache = model(ids[:, :5], use_cache=True).past_key_values
        expected = model(ids[:, 5:], past_key_values=cache).logits
        with model.without([connection]):
            cache = model(ids[:, :5], use_cache=True).past_key_values
        assert torch.equal(model(ids[:, 5:], past_key_values=cache).logits, expected)


@torch.no_grad()
def test_contexts_add_up_and_end_with_an_error():
    model, ids = two_models(), token_ids(2, 9)
    first, second, *_ = model.config.connections
    whole = model(ids).logits
    with model.without([first, second, first]):
        both = model(ids).logits
    with model.without([first]), model.without([second]):
        assert torch.equal(model(ids).logits, both)
    with pytest.raises(KeyError), model.without([first]):
        raise KeyError
    assert torch.equal(model(ids).logits, whole)


@torch.no_grad()
def test_other_threads_and_other_models_are_not_switched_off():
    model, ids = two_models(), token_ids(2, 9)
    other = keep_connections(model, model.config.connections)  # shares the frozen models
    whole, found = model(ids).logits, []

    def run() -> None:
        with torch.no_grad():
            found.append(model(ids).logits)

    with model.without(of(model, "sw")):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        found.append(other(ids).logits)
        assert not torch.equal(model(ids).logits, whole)
    for logits in found:
        assert torch.equal(logits, whole)


@pytest.mark.slow
@pytest.mark.parametrize("whole", [True, False])
@torch.no_grad()
def test_compiled_it_is_switched_off_too(whole):
    torch.compiler.reset()
    model, ids = two_models(), token_ids(2, 9)
    expected = {}
    connections = model.config.connections
    choices = [(), connections[:1], of(model, "code"), connections, connections[2:4]]
    for number, off in enumerate(choices):
        with model.without(off):
            expected[number] = model(ids, use_cache=False).logits
    compiled: Any = model
    if whole:
        compiled = torch.compile(model, backend="eager", fullgraph=True)
    else:
        for layer in model.anchor.model.layers:
            layer.compile(backend="eager")
    for number, off in enumerate(choices):
        with model.without(off):
            assert_close(compiled(ids, use_cache=False).logits, expected[number], **TOLERANCE)
    torch.compiler.reset()


def test_bridges_that_are_off_have_no_gradient():
    model, ids = two_models().train(), token_ids(2, 9)
    off = model.config.connections[1]
    with model.without([off]):
        model(ids, labels=ids).loss.backward()
    for connection, bridge in zip(model.config.connections, model.bridges, strict=True):
        has_gradient = {p.grad is not None for p in bridge.parameters()}
        assert has_gradient == {connection != off}


def test_there_is_no_such_connection(tmp_path):
    model = two_models()
    odd = Connection(augmenting="code", augmenting_layer=2, anchor_layer=0)
    words = r"there is no Connection\(augmenting='code', augmenting_layer=2, anchor_layer=0\); con"
    with pytest.raises(ValueError, match=words + ".* lists the 6 there are"), model.without([odd]):
        pass
    with pytest.raises(ValueError, match=words):
        keep_connections(model, [odd])
    with pytest.raises(ValueError, match="connections is empty, but a composed model needs one"):
        keep_connections(model, [])
    rows = [{"input_ids": [5, 6], "labels": [5, 6]}]
    with (
        pytest.raises(ValueError, match=r"'sw' is switched off \(within without\), so that it"),
        model.without(of(model, "sw")),
    ):
        cache_states(model, rows, tmp_path)


# ---- the loss without ----------------------------------------------------------------------


def rows(lengths: tuple[int, ...] = (5, 11, 3, 8, 7)) -> list[dict[str, Any]]:
    """Examples of random tokens; prompts of different lengths have no loss."""
    made = []
    for number, length in enumerate(lengths):
        ids = token_ids(1, length, seed=number)[0].tolist()
        start = number % 3
        made.append({"input_ids": ids, "labels": [-100] * start + ids[start:]})
    return made


def loss_of(model: Any, examples: list[dict[str, Any]]) -> tuple[list[float], list[int]]:
    """The summed loss and the number of labels of each example, run alone."""
    losses, counts = [], []
    for row in examples:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        with torch.no_grad():
            logits = model(input_ids=ids, labels=labels, use_cache=False).logits
        logs = F.log_softmax(logits[0, :-1].double(), dim=-1)
        found = [
            -float(logs[k, label]) for k, label in enumerate(labels[0, 1:].tolist()) if label >= 0
        ]
        losses.append(sum(found))
        counts.append(len(found))
    return losses, counts


def mean_without(model: Any, examples: Any, off: Iterable[Connection]) -> float:
    """Nats a token with bridges closed by hand."""
    with Closed(model, off):
        losses, counts = loss_of(model, examples)
    return sum(losses) / sum(counts)


def with_tokenizer(**options: Any) -> Any:
    """Two models that know how text is split; all share their tokens."""
    model = two_models(**options)
    model.set_tokenizers(character_tokenizer(), {})
    return model


@pytest.mark.parametrize("reads", ["sequence", "prompt"])
def test_losses_are_those_computed_by_hand(reads):
    model, examples = with_tokenizer(reads=reads), rows()
    model.train()
    before = copy.deepcopy(model.bridges.state_dict())
    found = rank_connections(model, examples, batch_size=2)
    assert model.training
    model.eval()
    all_on, counts = loss_of(model, examples)
    assert (found.num_examples, found.num_labels) == (5, sum(counts))
    assert found.loss == pytest.approx(sum(all_on) / sum(counts), abs=1e-6)
    parts = {**{n: of(model, n) for n in ("code", "sw")}, "anchor": model.config.connections}
    for off in (*found.connections, *found.augmenting.values(), found.anchor):
        with Closed(model, off.connections):
            losses, _ = loss_of(model, examples)
        assert off.loss == pytest.approx(sum(losses) / sum(counts), abs=1e-6)
        assert off.change == pytest.approx(off.loss - found.loss, abs=1e-9)
        gaps = [a - b - off.change * n for a, b, n in zip(losses, all_on, counts, strict=True)]
        error = math.sqrt(sum(gap**2 for gap in gaps) * 5 / 4) / sum(counts)
        assert off.error == pytest.approx(error, abs=1e-6)
    assert list(found.anchor.connections) == parts["anchor"]
    assert {name: list(off.connections) for name, off in found.augmenting.items()} == {
        name: parts[name] for name in ("code", "sw")
    }
    for ranked in (found.connections, tuple(found.augmenting.values())):
        changes = [off.change for off in ranked]
        assert changes == sorted(changes, reverse=True)
        assert len(set(changes)) == len(changes)
    assert len(found.connections) == 6
    for name, weight in model.bridges.state_dict().items():
        assert torch.equal(weight, before[name])


def test_batches_and_repetition_change_nothing():
    model, examples = with_tokenizer(), rows()
    first = rank_connections(model, examples, batch_size=1)
    assert rank_connections(model, examples, batch_size=1) == first
    other = rank_connections(model, examples, batch_size=4)
    for one, two in zip(first.connections, other.connections, strict=True):
        assert one.connections == two.connections
        assert one.loss == pytest.approx(two.loss, abs=1e-6)
    some = rank_connections(model, examples, limit=1)
    assert (some.num_examples, some.num_labels, some.anchor.error) == (1, 4, None)
    assert rank_connections(model, examples, limit=99).num_examples == 5


def test_a_file_is_read_as_for_training(tmp_path):
    """Models of other tokens; the loss is on the completion and the end of the text."""
    model = open_bridges(compose_pair())
    data = write_lines(tmp_path / "d.jsonl", *sums(4))
    found = rank_connections(model, data)
    examples = []
    for row in sums(4):
        prompt, ids = (
            byte_tokenizer()(text)["input_ids"]
            for text in (row["prompt"], row["prompt"] + row["completion"])
        )
        ids = [*ids, byte_tokenizer().eos_token_id]
        start = len(prompt) if ids[: len(prompt)] == prompt else len(prompt) - 1
        examples.append({"input_ids": ids, "labels": [-100] * start + ids[start:]})
    assert found.num_labels == loss_sizes(examples)
    assert found.loss == pytest.approx(mean_without(model, examples, []), abs=1e-6)
    for off in found.connections:
        expected = mean_without(model, examples, off.connections)
        assert off.loss == pytest.approx(expected, abs=1e-6)
    with pytest.warns(UserWarning, match="longer than max_length 5 and were cut"):
        shorter = rank_connections(model, Path(data), max_length=5)
    assert shorter.num_labels == loss_sizes([{"labels": row["labels"][:5]} for row in examples])
    with pytest.raises(ValueError, match="max_length is 121, but the context of the anchor is 120"):
        rank_connections(model, data, max_length=121)


def loss_sizes(examples: list[dict[str, Any]]) -> int:
    """Labels of examples whose first token has none."""
    return sum(label != -100 for row in examples for label in row["labels"])


# ---- pruning -------------------------------------------------------------------------------


def test_pruning_leaves_out_what_is_missed_least():
    model, examples = with_tokenizer(), rows()
    found = prune(model, examples, keep=2, batch_size=3)
    assert found.usefulness == rank_connections(model, examples, batch_size=3)
    off: list[Connection] = []
    for step in found.steps:
        left = [c for c in model.config.connections if c not in off]
        losses = {c: mean_without(model, examples, [*off, c]) for c in left}
        best = min(losses, key=losses.__getitem__)
        off.append(best)
        assert set(step.connections) == set(off)
        assert step.loss == pytest.approx(losses[best], abs=1e-6)
    kept = [c for c in model.config.connections if c not in off]
    assert found.model.config.connections == kept
    assert found.loss == found.steps[-1].loss
    assert len(model.config.connections) == 6  # the model itself is as it was
    again = rank_connections(found.model, examples, batch_size=3)
    assert again.loss == found.loss
    assert again.anchor.loss == found.usefulness.anchor.loss


def test_one_at_a_time_is_better_than_by_rank():
    """By rank, connections would go that are of use only once others are gone."""
    model, examples = open_bridges(with_tokenizer(), seed=6), rows()
    found = prune(model, examples, keep=1)
    last = [off.connections[0] for off in found.usefulness.connections[1:]]
    assert found.loss < mean_without(model, examples, last) - 0.01


def test_what_is_kept_is_kept_as_it_is(tmp_path):
    """Bridges bit for bit, tokenizers, where the bases are; a model without connection goes."""
    places = {
        name: save_model(tmp_path / name, seed=seed, **shape)
        for seed, (name, shape) in enumerate(
            {
                "anchor": {},
                "code": {"hidden_size": 16, "intermediate_size": 28, "num_hidden_layers": 3},
                "sw": {"hidden_size": 32, "num_hidden_layers": 2},
            }.items()
        )
    }
    bases = {name: places[name] for name in ("code", "sw")}
    model = open_bridges(compose(places["anchor"], bases, every=1, bridge_dtype=torch.bfloat16))
    model.set_scale("code", 0.5)
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(tmp_path / "whole")
    whole = json.loads((tmp_path / "whole" / "config.json").read_text())
    kept = [of(model, "code")[2], of(model, "code")[0]]
    small = keep_connections(model, kept)
    assert small.anchor is model.anchor
    small.save_pretrained(tmp_path / "small")
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert config["scales"] == {"code": 0.5}
    assert list(config["alignments"]) == list(config["augmenting_configs"]) == ["code"]
    assert config["bases"] == {name: whole["bases"][name] for name in ("anchor", "code")}
    assert config["bases"]["code"]["fingerprint"]["weights"]
    assert config["connections"] == [
        {"augmenting": "code", "augmenting_layer": 0, "anchor_layer": 0},
        {"augmenting": "code", "augmenting_layer": 2, "anchor_layer": 3},
    ]
    assert config["bridge"] == whole["bridge"]
    generation = json.loads((tmp_path / "small" / "generation_config.json").read_text())
    assert generation["max_new_tokens"] == 7
    loaded = ComposedForCausalLM.from_pretrained(tmp_path / "small")
    assert loaded.processor is not None
    places_of = [model.config.connections.index(c) for c in loaded.config.connections]
    for bridge, place in zip(loaded.bridges, places_of, strict=True):
        for name, weight in model.bridges[place].state_dict().items():
            assert weight.dtype == torch.bfloat16
            assert torch.equal(bridge.state_dict()[name], weight)
    ids = token_ids(2, 9)
    off = [c for c in model.config.connections if c not in kept]
    with model.without(off), torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert list(model.config.bases) == ["anchor", "code", "sw"]
    assert model.config.scales == {"code": 0.5, "sw": 1.0}


def test_a_model_of_other_tokens_is_pruned_with_its_tokenizer():
    sizes = {"first": len(word_tokenizer()), "second": 320}
    names = {name: tiny_llama(vocab_size=size) for name, size in sizes.items()}
    model = open_bridges(
        compose(
            tiny("llama", 1, vocab_size=320),
            names,
            every=2,
            tokenizer=byte_tokenizer(),
            augmenting_tokenizers={"first": word_tokenizer(), "second": byte_tokenizer()},
        )
    )
    assert model.config.alignments == {"first": "committed", "second": "identity"}
    for name, tokenizers in (("first", ["anchor", "first"]), ("second", ["anchor"])):
        small = keep_connections(model, of(model, name))
        assert small.processor is not None
        assert list(small.processor.all_tokenizers) == tokenizers
        assert list(small.model.readers) == tokenizers[1:]
        batch = batch_of("The quick brown fox", "def add(fi")
        off = [c for c in model.config.connections if c.augmenting != name]
        with model.without(off), torch.no_grad():
            assert torch.equal(small(**batch).logits, model(**batch).logits)


# ---- what is refused -----------------------------------------------------------------------


def test_what_cannot_be_measured():
    model = two_models()
    with pytest.raises(ValueError, match="has no tokenizer to read examples with; call its set_t"):
        rank_connections(model, rows())
    model = with_tokenizer()
    for name in ("limit", "batch_size", "max_length"):
        for value in (0, 2.5):
            options: dict[str, Any] = {name: value}
            words = f"{name} is {value!r}, but must be a positive whole number"
            with pytest.raises(ValueError, match=words):
                rank_connections(model, rows(), **options)
    with pytest.raises(ValueError, match="there is nothing to measure on: 0 examples have no tok"):
        rank_connections(model, [])
    silent = [{"input_ids": [5, 6, 7], "labels": [5, -100, -100]}]
    with pytest.raises(ValueError, match="there is nothing to measure on: 1 examples have no tok"):
        rank_connections(model, silent)
    model.bridges[2].cross_v.weight.data[3, 1] = math.nan
    with pytest.raises(ValueError, match="the loss of example 0 is nan, so that nothing can be r"):
        rank_connections(model, rows())


@pytest.mark.parametrize("keep", [0, -1, 6, 7, 2.0, True])
def test_how_many_can_be_kept(keep):
    words = f"keep is {keep!r}, but must be a whole number from 1 to 5, less than the 6 connections"
    with pytest.raises(ValueError, match=words):
        prune(with_tokenizer(), rows(), keep=keep)


# ---- on the command line -------------------------------------------------------------------


@pytest.fixture(scope="module")
def composed(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A composed folder of two augmenting models, and data."""
    place = tmp_path_factory.mktemp("composed")
    smaller = {"hidden_size": 16, "intermediate_size": 28, "num_hidden_layers": 3}
    bases = {
        "code": save_model(place / "code", seed=2, **smaller),
        "sw": save_model(place / "sw", seed=3, **smaller),
    }
    model = open_bridges(compose(save_model(place / "anchor", seed=1), bases, every=1))
    model.save_pretrained(place / "model")
    return str(place / "model"), write_lines(place / "data.jsonl", *sums(9))


def printed(capsys: pytest.CaptureFixture[str], *words: str, status: int = 0) -> str:
    """What `graftlm inspect` prints."""
    assert main(["inspect", *words]) == status
    captured = capsys.readouterr()
    return captured.err if status else captured.out


def test_inspect_ranks_and_prunes(composed, tmp_path, capsys):
    folder, data = composed
    out = tmp_path / "deep" / "out"
    words = ["--usefulness", data, "--limit", "7", "--batch-size", "3", "--length", "40"]
    shown = printed(capsys, folder, *words, "--prune", "2", "--output", str(out))
    model = ComposedForCausalLM.from_pretrained(folder)
    options = {"limit": 7, "batch_size": 3, "max_length": 40}
    expected = prune(model, data, keep=2, **options)
    lines = [line.split() for line in shown.splitlines()]
    for off in expected.usefulness.connections:
        (c,) = off.connections
        place = [c.augmenting, str(c.augmenting_layer), str(c.anchor_layer)]
        numbers = [f"{off.loss:.4f}", f"{off.change:+.4f}", f"{off.error:.4f}"]
        assert [*place, *numbers] in lines
    ranked = [off.connections[0] for off in expected.usefulness.connections]
    start = next(k for k, line in enumerate(lines) if line[:1] == ["nothing"])
    assert lines[start] == ["nothing", f"{expected.usefulness.loss:.4f}"]
    assert [line[0] for line in lines[start + 1 : start + 7]] == [c.augmenting for c in ranked]
    kept = ", ".join(
        f"{c.augmenting}:{c.augmenting_layer}-{c.anchor_layer}"
        for c in expected.model.config.connections
    )
    assert f"Kept: {kept}. Loss {expected.loss:.4f}; " in shown
    assert shown.endswith(f"Numbers and picture: {out}\n")

    numbers = json.loads((out / "usefulness.json").read_text())
    assert numbers["data"] == data
    assert numbers["loss"] == expected.usefulness.loss
    assert [row["change"] for row in numbers["connections"]] == [
        off.change for off in expected.usefulness.connections
    ]
    assert numbers["pruned"]["loss"] == expected.loss
    record = json.loads((out / "pruned" / "pruning.json").read_text())
    assert record == json.loads(json.dumps(expected.to_json()))
    assert (out / "usefulness.png").read_bytes().startswith(b"\x89PNG")
    loaded = ComposedForCausalLM.from_pretrained(out / "pruned")
    assert rank_connections(loaded, data, **options).loss == expected.loss
    assert sorted(path.name for path in out.iterdir()) == [
        "pruned",
        "usefulness.json",
        "usefulness.png",
    ]


def test_results_are_not_written_over(tmp_path):
    for name in ("usefulness.json", "usefulness.png", "pruned"):
        words = f"{name} is there already; delete it, or choose another output folder"
        (tmp_path / name).mkdir()
        with pytest.raises(ValueError, match=words):
            check_output(tmp_path, is_pruned=True)
        if name == "pruned":
            check_output(tmp_path, is_pruned=False)
            with pytest.raises(ValueError, match=words):
                prune(with_tokenizer(), rows(), keep=5).save_pretrained(tmp_path / name)
        (tmp_path / name).rmdir()
    check_output(tmp_path, is_pruned=True)


def test_inspect_prints_without_a_folder_to_write_to(composed, tmp_path, capsys):
    folder, data = composed
    shown = printed(
        capsys, folder, "--usefulness", data, "--device", "cpu", "--anchor", anchor_of(folder)
    )
    assert "Usefulness" in shown
    assert "Pruning" not in shown
    assert "tokens with a loss in 9 examples" in shown


def anchor_of(folder: str) -> str:
    """Where the anchor of a composed folder is."""
    config = json.loads((Path(folder) / "config.json").read_text())
    return config["bases"]["anchor"]["name_or_path"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prune", "2"], "--prune needs --usefulness"),
        (["--limit", "2"], "--limit needs --usefulness"),
        (["--output", "x"], "--output needs --attention TEXT or --usefulness DATA"),
        (["--device-map", "auto"], "--device-map needs --attention TEXT or --usefulness DATA"),
        (["--usefulness", "d", "--prune", "2"], "--prune needs --output FOLDER, for the pruned"),
        (["--usefulness", "d", "--output", "FILE"], "file', which is a file; name a folder"),
        (["--usefulness", "/no/data"], "data '/no/data' does not exist"),
        (["--usefulness", "EMPTY"], "leaves nothing to train on: it is empty"),
        (
            ["--usefulness", "DATA", "--prune", "6", "--output", "NEW"],
            "keep is 6, but must be a whole number from 1 to 5, less than the 6 connections",
        ),
    ],
)
def test_inspect_refuses(words, message, composed, tmp_path, capsys):
    folder, data = composed
    (tmp_path / "file").write_text("something else")
    places = {
        "FILE": str(tmp_path / "file"),
        "EMPTY": write_lines(tmp_path / "empty.jsonl"),
        "DATA": data,
        "NEW": str(tmp_path / "new"),
    }
    words = [places.get(word, word) for word in words]
    assert message in printed(capsys, folder, *words, status=2)
    assert not (tmp_path / "new").exists()


def test_inspect_refuses_a_folder_without_tokenizer(composed, tmp_path, capsys):
    folder, data = composed
    model = ComposedForCausalLM.from_pretrained(folder)
    for base in (model.anchor, *model.augmenting.values()):
        base.config.name_or_path = ""
    model.set_tokenizers(None, {})
    model.save_pretrained(tmp_path / "bare")
    words = [str(tmp_path / "bare"), "--usefulness", data]
    assert "has no tokenizer to read examples with" in printed(capsys, *words, status=2)


def test_the_guide_runs(composed, tmp_path, monkeypatch, capsys):
    folder, data = composed
    monkeypatch.chdir(tmp_path)
    Path("composed").symlink_to(folder)
    Path("held_out.jsonl").symlink_to(data)
    page = (Path(__file__).parents[1] / "docs" / "pruning.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    exec(compile(block, "docs/pruning.md", "exec"), {})
    assert capsys.readouterr().out.count("Connection(") == 6 + 2
    assert ComposedForCausalLM.from_pretrained("smaller").config.connections


def test_a_picture_of_many(tmp_path):
    """Twelve models have more parts than there are colours."""
    connections = [
        Connection(augmenting=f"m{k}", augmenting_layer=k, anchor_layer=2 * k) for k in range(12)
    ]

    def off(*some: Connection) -> SwitchedOff:
        return SwitchedOff(connections=some, loss=1.5, change=0.1, error=None)

    usefulness = Usefulness(
        num_examples=1,
        num_labels=5,
        loss=1.4,
        anchor=off(*connections),
        augmenting={c.augmenting: off(c) for c in connections},
        connections=tuple(map(off, connections)),
    )
    sizes = []
    for steps in ((), [off(*connections[: k + 1]) for k in range(11)]):
        path = tmp_path / f"{len(steps)}.png"
        draw_usefulness(usefulness, path, steps=steps)
        sizes.append(struct.unpack(">II", path.read_bytes()[16:24]))
    assert sizes[0] == (900, 1155)
    assert sizes[1] == (1650, 1155)
