"""The playground: who writes what, for whom, and how it ends."""

import copy
import itertools
import logging
import math
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from families import tiny, tiny_llama
from graftlm import compose, explain
from graftlm.playground import runs
from graftlm.playground.runs import Column, Limits, Playground, Request, Run
from graftlm.playground.sampling import Sampler
from graftlm.playground.turns import Turns
from playgrounds import LIMITS, composed, wait_until, written
from tiny import character_tokenizer, meddling
from two_tokenizers import compose_pair, word_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return composed(tmp_path_factory.mktemp("models"))


@pytest.fixture
def playground(model: Any) -> Iterator[Playground]:
    made = Playground(model, character_tokenizer(), LIMITS)
    yield made
    made.close()


def greedy(model: Any, tokenizer: Any, prompt: str, count: int) -> str:
    """What a model writes when it is asked directly."""
    ids = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    found = model.generate(**ids, max_new_tokens=count, do_sample=False, pad_token_id=0)
    return tokenizer.decode(found[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


# ---- turns and samples -------------------------------------------------------------------


def test_threads_take_turns_in_the_order_in_which_they_came() -> None:
    turns, log = Turns(), []

    def work(name: str) -> None:
        with turns:
            for _ in range(3):
                log.append(name)
                turns.pass_on()
            log.append(name.upper())

    threads = [threading.Thread(target=work, args=(name,)) for name in "abc"]
    with turns:
        for count, thread in enumerate(threads, start=2):
            thread.start()
            wait_until(lambda count=count: len(turns.queue) == count)
        assert not log
    for thread in threads:
        thread.join()
    assert "".join(log) == "abcabcabcABC"


def test_an_error_ends_a_turn() -> None:
    turns = Turns()
    with pytest.raises(KeyError), turns:
        raise KeyError
    with turns:
        assert len(turns.queue) == 1


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"),
    [(0, 1.0, [0, 1, 2, 3, 4]), (4, 1.0, [0, 1, 2, 4]), (0, 0.9, [1, 2, 4]), (2, 0.9, [1, 4])],
)
def test_samples_have_the_distribution_of_the_softmax(
    top_k: int, top_p: float, kept: list[int]
) -> None:
    """At temperature 0.7 the probabilities are 5, 51, 14, 1 and 29 percent."""
    logits, count = torch.tensor([0.3, 2.0, 1.1, -1.0, 1.6]), 40_000
    sampler = Sampler(seed=3, temperature=0.7, top_k=top_k, top_p=top_p)
    noisy = sampler(torch.zeros(count, 1), logits.expand(count, 5))
    drawn = Counter(noisy.argmax(-1).tolist())
    weights = {token: math.exp(logits[token] / 0.7) for token in kept}
    assert set(drawn) == set(kept)
    for token, weight in weights.items():
        p = weight / sum(weights.values())
        assert abs(drawn[token] - count * p) < 4 * math.sqrt(count * p * (1 - p))


def test_samples_depend_on_nobody_else() -> None:
    def draw() -> list[int]:
        sampler = Sampler(seed=7, temperature=1.0, top_k=0, top_p=1.0)
        torch.rand(3)  # another visitor's
        return [int(sampler(torch.zeros(1, 1), torch.zeros(1, 50)).argmax()) for _ in range(20)]

    assert draw() == draw()


# ---- one visitor -------------------------------------------------------------------------


def test_everyone_writes_what_they_would_alone(playground: Playground, model: Any) -> None:
    tokenizer = playground.tokenizer
    run = playground.start("one", Request(prompt="1+2=", max_new_tokens=20, scales={"code": 0.75}))
    texts = written(run)
    model.set_scale("code", 0.75)
    expected = {
        "anchor": greedy(model.anchor, tokenizer, "1+2=", 20),
        "code": greedy(model.augmenting["code"], tokenizer, "1+2=", 20),
        "composed": greedy(model, tokenizer, "1+2=", 20),
    }
    model.set_scale("code", 1)
    assert texts == expected
    assert len(set(texts.values())) == 3
    assert all(len(c.seconds) == len(c.ids) > 0 for c in run.columns.values())


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_the_models_files_say_nothing_of_what_is_written(
    playground: Playground, model: Any, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = Request(prompt="1+2=", max_new_tokens=20, temperature=temperature, seed=3)
    expected = written(playground.start("one", request))
    for part in (model, model.anchor, model.augmenting["code"]):
        monkeypatch.setattr(part, "generation_config", meddling(do_sample=True, top_k=1))
    assert written(playground.start("one", request)) == expected


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_nothing_read_is_the_anchors_exact_text(playground: Playground, temperature: float) -> None:
    request = Request(
        prompt="abc", max_new_tokens=30, scales={"code": 0}, temperature=temperature, seed=4
    )
    texts = written(playground.start("one", request))
    assert texts["composed"] == texts["anchor"] != ""


def test_a_seed_says_what_is_sampled(playground: Playground) -> None:
    def sample(**changes: Any) -> dict[str, str]:
        settings: dict[str, Any] = {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "seed": 1}
        request = Request(prompt="abc", max_new_tokens=12, **settings | changes)
        return written(playground.start("one", request))

    first = sample()
    assert sample() == first
    assert sample(seed=2) != first
    assert sample(temperature=0.0) != first


def test_a_chat_is_in_each_models_markup(playground: Playground, model: Any) -> None:
    texts = written(playground.start("one", Request(prompt="hi", chat=True, max_new_tokens=9)))
    prompt = "<|user|>hi<|end|><|assistant|>"
    assert texts["composed"] == greedy(model, playground.tokenizer, prompt, 9)
    plain = Playground(model, character_tokenizer(chat_template=None), LIMITS)
    assert not plain.can_chat
    with pytest.raises(ValueError, match="the anchor's tokenizer has no chat template; choose com"):
        plain.start("one", Request(prompt="hi", chat=True))


def test_a_model_of_other_tokens_reads_the_prompt_in_its_own() -> None:
    model = compose_pair()
    playground = Playground(model, model.processor.tokenizer, LIMITS)
    run = playground.start("one", Request(prompt="The quick brown", max_new_tokens=7))
    texts = written(run)
    augmenting = model.augmenting["augmenting"]
    expected = greedy(augmenting, word_tokenizer(), "The quick brown", 7)
    assert texts["augmenting"] == expected
    assert run.columns["augmenting"].prompt_ids == word_tokenizer()("The quick brown")["input_ids"]
    assert texts["anchor"] == greedy(model.anchor, playground.tokenizer, "The quick brown", 7)


def test_half_a_character_is_shown_when_it_is_whole() -> None:
    model = compose_pair()
    column = Column(model.processor.tokenizer, Turns(), threading.Event())
    with column.turns:
        for token in model.processor.tokenizer("狐")["input_ids"]:
            assert column.text == ""
            column.put(torch.tensor([token]))
    assert column.text == "狐"


def test_speed_is_that_of_the_tokens_after_the_first() -> None:
    column = Column(character_tokenizer(), Turns(), threading.Event())
    assert math.isnan(column.speed)
    column.seconds = [4.0]
    assert math.isnan(column.speed)
    column.seconds = [4.0, 0.5, 0.25, 0.75]
    assert column.speed == 2.0


@pytest.mark.parametrize(
    ("num_tokens", "seconds", "has_ended", "words"),
    [
        (1, [0.004], False, "1 token · first after 4.0 ms"),
        (3, [0.126, 0.25, 0.25], False, "3 tokens · first after 0.13 s · then 4 tokens/s"),
        (2, [1, 0.5], True, "1 token and end · first after 1.00 s · then 2 tokens/s"),
        (1, [0.0996], True, "0 tokens and end · first after 100 ms"),
    ],
)
def test_the_note_below_a_text(
    num_tokens: int, seconds: list[float], has_ended: bool, words: str
) -> None:
    pytest.importorskip("gradio")
    from graftlm.playground.page import note

    column = Column(character_tokenizer(), Turns(), threading.Event())
    column.ids, column.seconds, column.has_ended = [9] * num_tokens, seconds, has_ended
    assert words in note(column)


def test_the_end_of_text_is_told_from_other_ends(
    playground: Playground, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = Request(prompt="abc", max_new_tokens=9)
    run = playground.start("one", request)
    written(run)
    assert not any(column.has_ended for column in run.columns.values())
    first = {name: column.ids[0] for name, column in run.columns.items()}
    config = copy.deepcopy(model.generation_config)
    config.eos_token_id = first["composed"]
    monkeypatch.setattr(model, "generation_config", config)
    run = playground.start("one", request)
    written(run)
    assert run.columns["composed"].has_ended
    assert run.columns["composed"].ids == [first["composed"]]


# ---- how a run ends ----------------------------------------------------------------------


def began(run: Run) -> None:
    wait_until(lambda: all(len(column.ids) > 2 for column in run.columns.values()))


@pytest.mark.parametrize("how", ["stop", "leave", "start", "close", "looks"])
def test_a_run_ends_when_nobody_reads_it(playground: Playground, how: str) -> None:
    run = playground.start("one", Request(prompt="a", max_new_tokens=3000))
    other = playground.start("two", Request(prompt="b", max_new_tokens=3000))
    looks = run.looks()
    next(looks)
    began(run)
    assert not run.is_over
    actions = {
        "stop": lambda: playground.stop("one"),
        "leave": lambda: playground.leave("one"),
        "start": lambda: playground.start("one", Request(prompt="c", max_new_tokens=1)),
        "close": playground.close,
        "looks": looks.close,
    }
    actions[how]()
    run.wait()
    assert run.is_over
    assert all(2 < len(column.ids) < 3000 for column in run.columns.values())
    assert other.stopping.is_set() == (how == "close")
    left = {
        "stop": ["one", "two"],
        "leave": ["two"],
        "start": ["two", "one"],
        "close": [],
        "looks": ["one", "two"],
    }
    assert list(playground.runs) == left[how]


def test_a_refused_request_changes_nothing(playground: Playground) -> None:
    """The page still shows the texts of the last run, whose attention may be asked for."""
    run = playground.start("one", Request(prompt="a", max_new_tokens=3))
    written(run)
    with pytest.raises(ValueError, match="the prompt is empty"):
        playground.start("one", Request(prompt=" "))
    assert playground.runs == {"one": run}
    assert not run.stopping.is_set()
    assert playground.explain("one").num_prompt == 1


def test_close_waits_for_runs_that_were_left(
    playground: Playground, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread may be in the middle of a long prompt, where it does not look whether to stop."""
    reached, going_on = threading.Event(), threading.Event()
    encode = playground.encode

    def slowly(*args: Any) -> Any:
        reached.set()
        going_on.wait()
        return encode(*args)

    monkeypatch.setattr(playground, "encode", slowly)
    run = playground.start("one", Request(prompt="a", max_new_tokens=3))
    reached.wait()
    playground.leave("one")
    closing = threading.Thread(target=playground.close)
    closing.start()
    closing.join(0.2)
    assert closing.is_alive()
    going_on.set()
    closing.join()
    assert not any(thread.is_alive() for thread in run.threads)
    playground.start("two", Request(prompt="a", max_new_tokens=1)).wait()
    assert playground.threads.isdisjoint(run.threads)


def test_looks_end_with_the_run(playground: Playground) -> None:
    run = playground.start("one", Request(prompt="a", max_new_tokens=4))
    for _ in run.looks():
        pass
    assert run.is_over
    assert [len(column.ids) for column in run.columns.values()] == [4, 4, 4]


# ---- several visitors --------------------------------------------------------------------


def test_visitors_do_not_mix(playground: Playground, model: Any) -> None:
    """Each has a slider of its own, a prompt and a seed; all write at the same time."""
    requests = {
        number: Request(
            prompt=f"{number}+", max_new_tokens=12, scales={"code": number / 2},
            temperature=0.8 * (number % 2), seed=number,
        )
        for number in range(3)
    }  # fmt: skip
    alone = {number: written(playground.start(number, r)) for number, r in requests.items()}
    together = {number: playground.start(number, r) for number, r in requests.items()}
    assert {number: written(run) for number, run in together.items()} == alone
    assert len({texts["composed"] for texts in alone.values()}) == 3
    assert model.config.scales == {"code": 1.0}
    assert not model.is_anchor_only


# ---- what goes wrong ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt": "x" * 41}, "the prompt has 41 characters, but this page takes up to 40; short"),
        ({"prompt": " \n"}, "the prompt is empty, so there is nothing to continue; write one"),
        ({"max_new_tokens": 3001}, "new tokens is 3001, but must be from 1 to 3000 on this page"),
        ({"max_new_tokens": 0}, "new tokens is 0, but must be from 1 to 3000 on this page"),
        ({"temperature": -0.5}, "temperature is -0.5, but must be from 0 to 10"),
        ({"temperature": math.nan}, "temperature is nan, but must be from 0 to 10"),
        ({"top_p": 0}, "top-p is 0, but must be from 0.01 to 1"),
        ({"top_k": -1}, "top-k is -1, but must be from 0 to 1000"),
        ({"seed": -1}, "seed is -1, but must be from 0 to 4294967296"),
        ({"max_new_tokens": 1.5}, "new tokens is 1.5, but must be a whole number; write 1 or 2"),
        ({"top_k": 2.5}, "top-k is 2.5, but must be a whole number; write 2 or 3"),
        ({"seed": 0.5}, "seed is 0.5, but must be a whole number; write 0 or 1"),
        ({"scales": {"code": 11}}, "scale of code is 11, but must be from -10 to 10"),
    ],
)
def test_requests_that_are_refused(
    changes: dict[str, Any], words: str, playground: Playground
) -> None:
    asked: dict[str, Any] = {"prompt": "1+2="}
    with pytest.raises(ValueError, match=words):
        playground.start("one", Request(**asked | changes))
    assert not playground.runs


def test_limits_are_positive() -> None:
    with pytest.raises(ValueError, match="max_characters is 0, but must be a positive whole numb"):
        Limits(max_characters=0)
    with pytest.raises(ValueError, match="max_new_tokens is -3, but must be a positive whole num"):
        Limits(max_new_tokens=-3)


def errors(playground: Playground, **request: Any) -> dict[str, str]:
    asked: dict[str, Any] = {"prompt": "1+2=", "max_new_tokens": 5}
    run = playground.start("one", Request(**asked | request))
    run.wait()
    return {name: column.error for name, column in run.columns.items()}


def test_a_text_longer_than_a_model_has_positions_for() -> None:
    """An index error from inside an embedding tells nobody anything."""
    size = len(character_tokenizer())
    model = compose(
        tiny_llama(vocab_size=size), tiny("gpt2", vocab_size=size, max_position_embeddings=32)
    )
    playground = Playground(model, character_tokenizer(), LIMITS)
    assert set(errors(playground, max_new_tokens=28).values()) == {""}
    found = errors(playground, max_new_tokens=29)
    words = "prompt and new tokens are 33 tokens together, but augmenting has positions for 32; sh"
    assert found["anchor"] == ""
    assert found["augmenting"].startswith(words)
    assert found["composed"].startswith(words)


def test_what_a_part_cannot_write_alone(playground: Playground, model: Any) -> None:
    size = len(character_tokenizer())
    anchor = tiny_llama(vocab_size=size)
    small = compose(anchor, tiny("gpt2", vocab_size=20), tokenizer=character_tokenizer(),
                    augmenting_tokenizers=character_tokenizer())  # fmt: skip
    found = errors(Playground(small, character_tokenizer(), LIMITS))
    token = max(character_tokenizer()("1+2=")["input_ids"])
    words = f"the prompt holds token {token}, but augmenting has tokens 0 to 19 only"
    assert found == {"anchor": "", "augmenting": words, "composed": ""}
    headless = compose(copy.deepcopy(anchor), tiny_llama(vocab_size=size).base_model)
    found = errors(Playground(headless, character_tokenizer(), LIMITS))
    words = (
        "augmenting model 'augmenting' was composed without its head, so it writes nothing alone"
    )
    assert found == {"anchor": "", "augmenting": words, "composed": ""}


def test_an_unexpected_error_is_said_and_logged(
    playground: Playground, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("our own bug")

    monkeypatch.setattr(playground, "encode", fail)
    with caplog.at_level(logging.ERROR):
        found = errors(playground)
    assert set(found.values()) == {"RuntimeError: our own bug (the terminal shows where)"}
    assert "the playground's composed failed" in caplog.text
    with playground.turns:
        assert len(playground.turns.queue) == 1


# ---- attention ---------------------------------------------------------------------------


def test_the_last_run_of_a_visitor_is_explained(playground: Playground, model: Any) -> None:
    scales = {"code": 0.5}
    run = playground.start("one", Request(prompt="1+2=", max_new_tokens=6, scales=scales))
    playground.start("two", Request(prompt="xyz", max_new_tokens=3)).wait()
    text = written(run)["composed"]
    found = playground.explain("one")
    assert found.num_prompt == 4
    assert "".join(found.tokens) == "1+2=" + text
    assert found.scales == scales
    with model.scaled(scales):
        ids = [*run.columns["composed"].prompt_ids, *run.columns["composed"].ids]
        expected = model.explain(input_ids=ids, num_prompt=4)
    assert found.to_json() == expected.to_json()


def test_others_write_on_while_attention_is_computed(
    playground: Playground, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All waited from its first pass until its last number was computed."""
    written(playground.start("one", Request(prompt="1+2=", max_new_tokens=6)))
    expected = playground.explain("one").to_json()
    alone = playground.start("two", Request(prompt="abc", max_new_tokens=30))
    written(alone)
    order, take, compute, seen = [], Turns.__enter__, explain.likeliest, []

    def watched(turns: Turns) -> Turns:
        taken = take(turns)
        order.append(threading.current_thread().name)
        return taken

    def slowly(*args: Any) -> Any:
        if not seen:
            seen.extend(len(column.ids) + 3 for column in other.columns.values())
            columns = other.columns.values()
            wait_until(lambda: all(len(c.ids) >= n for c, n in zip(columns, seen, strict=True)))
        return compute(*args)

    monkeypatch.setattr(Turns, "__enter__", watched)
    monkeypatch.setattr(explain, "likeliest", slowly)
    other = playground.start("two", Request(prompt="abc", max_new_tokens=3000))
    began(other)
    assert playground.explain("one").to_json() == expected
    assert not other.is_over
    wait_until(lambda: all(len(column.ids) > 30 for column in other.columns.values()))
    other.stop()
    written(other)
    for name, column in other.columns.items():
        assert column.ids[:30] == alone.columns[name].ids
    ours = [place for place, name in enumerate(order) if name == threading.current_thread().name]
    assert len(ours) == 4  # passes: composed, anchor, what is read, augmenting model
    assert all(later - earlier > 1 for earlier, later in itertools.pairwise(ours))


def test_attention_that_cannot_be_shown(
    playground: Playground, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="nothing has been written yet; press Generate first"):
        playground.explain("one")
    playground.start("one", Request(prompt="1+2=", max_new_tokens=6)).wait()
    monkeypatch.setattr(runs, "MAX_WEIGHTS", 400)
    assert sum(weights.size for weights in playground.explain("one").attention) == 400
    monkeypatch.setattr(runs, "MAX_WEIGHTS", 399)
    words = "the text has 10 tokens, whose attention is about 400 numbers, .* up to 399; ask for"
    with pytest.raises(ValueError, match=words):
        playground.explain("one")
