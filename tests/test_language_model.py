"""Small language models: trained, interrupted, gone on with, and measured."""

import json
import math
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from graftlm import compose
from graftlm.reproduce import language_model
from graftlm.reproduce.files import alone
from graftlm.reproduce.language_model import (
    bits_per_byte,
    cut,
    find_tokenizer,
    pack,
    train_language_model,
    train_tokenizer,
)
from tiny import save_model
from tiny_language_model import SETTINGS

QUIET = Console(quiet=True)
LINES = ["Wodala munthuyo wosayenda mu uphungu wa oipa.", "Blessed is the man who walks."] * 8


def train(output: Path, **changes: Any) -> Path:
    """Train for ten updates."""
    arguments: dict[str, Any] = {"settings": SETTINGS, "console": QUIET} | changes
    return train_language_model(arguments.pop("texts", LINES), output=output, **arguments)


def tokenizer_of(folder: Path | str) -> Any:
    """As transformers' users load it."""
    return AutoTokenizer.from_pretrained(folder)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_weights(one: Path, other: Path) -> None:
    torch.testing.assert_close(weights(one), weights(other), rtol=0, atol=0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("trained"), held_out={"two lines": LINES[:2]})


def test_a_tokenizer_writes_any_text() -> None:
    tokenizer = train_tokenizer(LINES, 300)
    assert len(tokenizer) == 300
    for text in ("Wodala wa", " Ñe'ẽ\n\t", "敏捷 \U0001f600", "\x00<s"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text
    encoded = tokenizer("Wodala ma", return_offsets_mapping=True)
    assert encoded["input_ids"][0] == tokenizer.bos_token_id
    offsets = encoded["offset_mapping"][1:]
    assert offsets[0][0] == 0
    assert offsets[-1][1] == 9
    assert [end for _, end in offsets[:-1]] == [start for start, _ in offsets[1:]]


def test_a_tokenizer_is_trained_once(tmp_path, monkeypatch) -> None:
    first = find_tokenizer(LINES, 280, tmp_path)
    monkeypatch.setattr(language_model, "train_tokenizer", lambda *_: pytest.fail("again"))
    assert find_tokenizer(LINES, 280, tmp_path).get_vocab() == first.get_vocab()
    [folder] = tmp_path.glob("tokenizer-*")
    assert tokenizer_of(folder)(LINES)["input_ids"] == first(LINES)["input_ids"]


def test_few_texts_are_not_read_too_often(tmp_path: Path) -> None:
    """A model that knew its 17,000 tokens of Xhosa by heart knew no other."""
    settings = replace(SETTINGS, most_passes=3)
    assert settings.steps(num_rows=100) == SETTINGS.steps(num_rows=100) == 10
    assert settings.steps(num_rows=12) == 3 * 12 // 4
    assert settings.steps(num_rows=1) == 1
    folder = train(tmp_path, settings=replace(SETTINGS, most_passes=1))
    record = json.loads((folder / "language_model.json").read_text(encoding="utf-8"))
    assert 0.5 < record["passes over them"] <= 1
    assert record["losses"][-1][0] < 10


def test_texts_are_packed_whole() -> None:
    tokenizer = train_tokenizer(LINES, 300)
    rows = pack(["Wodala", "man"], tokenizer, 3)
    assert str(tokenizer.decode(rows.flatten())).startswith("<s>Wodala</s><s>")
    with pytest.raises(ValueError, match="texts have 0 tokens, but a row has 16; give more text"):
        pack([], tokenizer, 16)


def test_rows_are_drawn_anew_in_every_pass() -> None:
    rows = torch.arange(10).view(5, 2)
    drawn = language_model.Rows(rows, 12, seed=3)
    firsts = [int(drawn[k]["input_ids"][0]) // 2 for k in range(12)]
    assert sorted(firsts[:5]) == sorted(firsts[5:10]) == [0, 1, 2, 3, 4]
    assert firsts[:5] != firsts[5:10]
    assert len(drawn) == 12
    assert language_model.Rows(rows, 12, seed=3).order == drawn.order


def test_a_model_learns_its_texts_and_is_an_ordinary_folder(trained) -> None:
    record = json.loads((trained / "language_model.json").read_text())
    losses = [loss for _, loss in record["losses"]]
    assert losses[0] > math.log(300) - 0.3
    assert losses[-1] < losses[0] - 1
    model = AutoModelForCausalLM.from_pretrained(trained)
    tokenizer = tokenizer_of(trained)
    assert model.dtype == torch.float32
    assert record["parameters"] == model.num_parameters()
    scored = bits_per_byte(model.eval(), tokenizer, LINES[:2])
    assert record["bits per byte"]["two lines"] == pytest.approx(scored, rel=1e-5)
    assert [path.name for path in trained.parent.iterdir() if "partial" in path.name] == []


def test_the_same_seed_gives_the_same_weights(trained, tmp_path) -> None:
    again = train(tmp_path)
    assert again.name == trained.name
    assert_same_weights(again, trained)
    other = train(tmp_path, seed=1)
    assert other.name != trained.name
    assert not torch.equal(weights(other)["model.norm.weight"], weights(again)["model.norm.weight"])


class StopsAtFive(language_model.Interruption):
    """Ctrl-C in the fifth update."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5:
            self.signal = signal.SIGINT
        super().on_step_end(args, state, control, **kwargs)


def test_an_interrupted_training_goes_on(trained, tmp_path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(language_model, "Interruption", StopsAtFive)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path)
    assert not (tmp_path / trained.name).exists()
    work = tmp_path / f"{trained.name}.partial"
    checkpoints = sorted(path.name for path in work.iterdir())
    assert checkpoints == ["checkpoint-4", "checkpoint-5"]
    kinds = {path.suffix for path in (work / "checkpoint-5").iterdir()}
    assert kinds == {".json", ".safetensors"}
    assert_same_weights(train(tmp_path), trained)
    assert not work.exists()


def test_one_process_at_a_time_makes_a_folder(tmp_path, capsys) -> None:
    """The second of two runs removed what the first was at."""
    order = []

    def second() -> None:
        with alone(tmp_path / "model"):
            order.append("second")

    with alone(tmp_path / "model"):
        waiting = threading.Thread(target=second)
        waiting.start()
        told, end = "", time.monotonic() + 60
        while "waiting for the process that makes" not in told and time.monotonic() < end:
            told += capsys.readouterr().err
            time.sleep(0.01)
        order.append("first")
    waiting.join()
    assert order == ["first", "second"]


@pytest.mark.slow
def test_a_killed_training_goes_on_from_its_last_checkpoint(trained, tmp_path) -> None:
    code = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import conftest, test_language_model as here
class Killed(here.language_model.Interruption):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 7:
            os._exit(9)
here.language_model.Interruption = Killed
here.train(here.Path({str(tmp_path)!r}))
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    work = tmp_path / f"{trained.name}.partial"
    assert (work / "checkpoint-6").is_dir()
    (work / "checkpoint-6" / "trainer_state.json").unlink()  # cut off while it was written
    with pytest.warns(UserWarning, match="checkpoint-6 is incomplete"):
        assert_same_weights(train(tmp_path), trained)


def test_a_finished_training_is_not_repeated(trained, monkeypatch) -> None:
    monkeypatch.setattr(language_model, "fit", lambda *args, **kwargs: pytest.fail("again"))
    assert train(trained.parent) == trained


def test_a_model_goes_on_with_other_texts(trained, tmp_path) -> None:
    texts = ["Mulungu adalenga kumwamba ndi dziko lapansi."] * 20
    further = train(tmp_path, texts=texts, start_from=trained)
    one, other = (tokenizer_of(folder) for folder in (trained, further))
    assert one.get_vocab() == other.get_vocab()
    before, after = (AutoModelForCausalLM.from_pretrained(f).eval() for f in (trained, further))
    assert bits_per_byte(after, one, texts[:1]) < bits_per_byte(before, one, texts[:1]) - 1
    short = replace(SETTINGS, learning_rate=0.0)
    same = train(tmp_path, texts=texts, start_from=trained, settings=short)
    assert_same_weights(same, trained)
    words = "tokenizer is given beside start_from, but a model keeps its own; leave one of them out"
    with pytest.raises(ValueError, match=words):
        train(tmp_path, start_from=trained, tokenizer=one)


def test_it_composes_with_an_anchor_of_other_tokens(trained, tmp_path) -> None:
    anchor = save_model(tmp_path / "anchor", max_position_embeddings=64)
    model = compose(anchor, str(trained))
    tokenizer = tokenizer_of(anchor)
    batch = tokenizer("Wodala: man\nEnglish:", return_tensors="pt")
    ids = batch["input_ids"]
    assert model(input_ids=ids).logits.shape == (1, ids.shape[1], len(tokenizer))


def test_bits_per_byte_by_hand(trained) -> None:
    model = AutoModelForCausalLM.from_pretrained(trained).eval()
    tokenizer = tokenizer_of(trained)
    texts = ["Wodala ñe", "Blessed is the man who", "x"]
    bits = 0.0
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        logs = model(ids).logits.log_softmax(-1)[0, :-1]
        bits -= logs.gather(1, ids[0, 1:, None]).sum().item() / math.log(2)
    size = sum(len(text.encode()) for text in texts)
    assert bits_per_byte(model, tokenizer, texts) == pytest.approx(bits / size, rel=1e-5)
    assert bits_per_byte(model, tokenizer, texts, 2) == pytest.approx(bits / size, rel=1e-5)


def test_long_texts_are_cut_at_spaces() -> None:
    text = "word " * 250
    pieces = cut(text)
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 500
    assert all(piece.startswith(" word") for piece in pieces[1:])
    assert [len(piece) for piece in cut("x" * 1001)] == [500, 500, 1]
    assert cut("") == []
