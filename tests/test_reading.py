"""What an anchor token sees in training is what the tokens up to it give at inference."""

import itertools
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from graftlm.reading import IdentityReader, TextReader, read_row
from graftlm.reproduce.real_models import find_model
from test_stable import REAL, TEXT, canonical
from tokenizers_zoo import zoo_tokenizer
from two_tokenizers import byte_tokenizer, word_tokenizer

KINDS = ("gpt2", "qwen", "metaspace_first", "llama2", "unigram", "bert")
PAIRS = list(itertools.permutations(KINDS, 2))
RARELY = settings(
    max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


def check_pair(
    anchor: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, text: str, later: str
) -> None:
    """Every anchor token of a text, against the tokens up to it alone and before another text."""
    reader, whole = TextReader(anchor, other), canonical(other)
    ids = anchor(text, add_special_tokens=False)["input_ids"]
    row = read_row(reader, None, ids, [True] * len(ids))
    num_special = len(reader.stable.prefix_ids)
    other_ids = anchor(later, add_special_tokens=False)["input_ids"]
    reading = None
    for column, token in enumerate(ids):
        step = read_row(reader, reading, [token], [True])
        reading = step.reading
        # Decoding step by step sees as many tokens as training did, and the same ones.
        assert step.visible == [row.visible[column]]
        assert step.ids == row.ids[step.ranks[0] : step.ranks[-1] + 1] if step.ids else True
        changed = [*ids[: column + 1], *other_ids]
        again = read_row(reader, None, changed, [True] * len(changed))
        seen = row.visible[column]
        assert again.visible[column] == seen
        assert again.ids[:seen] == row.ids[:seen]
    # What is settled begins the tokens of the text, as the other tokenizer alone has them.
    spelled = anchor.backend_tokenizer.decode(ids, skip_special_tokens=True)
    if "\ufffd" not in spelled:
        settled = row.ids[num_special:]
        assert settled == whole(spelled)[: len(settled)]


@pytest.mark.parametrize(("ours", "theirs"), PAIRS[::7])
@RARELY
@given(text=TEXT, later=TEXT)
def test_training_sees_what_decoding_sees(ours: str, theirs: str, text: str, later: str) -> None:
    check_pair(zoo_tokenizer(ours), zoo_tokenizer(theirs), text, later)


@pytest.mark.slow
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
@settings(RARELY, max_examples=40)
@given(text=TEXT, later=TEXT)
def test_every_pair_of_kinds(ours: str, theirs: str, text: str, later: str) -> None:
    check_pair(zoo_tokenizer(ours), zoo_tokenizer(theirs), text, later)


@pytest.fixture(scope="module")
def real() -> dict[str, Any]:
    """The real tokenizers that are at hand."""
    places = {name: find_model(name) for name in REAL}
    return {name: AutoTokenizer.from_pretrained(p) for name, p in places.items() if p is not None}


@pytest.mark.slow
@pytest.mark.parametrize(("ours", "theirs"), [*itertools.permutations(REAL, 2)])
def test_every_pair_of_real_tokenizers(real: dict[str, Any], ours: str, theirs: str) -> None:
    missing = sorted({ours, theirs} - set(real))
    if missing:
        pytest.skip(f"{missing[0]} was not fetched; run make models CODER=1")

    @settings(RARELY, max_examples=15)
    @given(text=TEXT, later=TEXT)
    def check(text: str, later: str) -> None:
        check_pair(real[ours], real[theirs], text, later)

    check()


@settings(RARELY, max_examples=40)
@given(text=TEXT, later=TEXT)
def test_prefix_shows_the_tokens_of_the_text_so_far(text: str, later: str) -> None:
    """Each branch, behind what is settled, is how the other tokenizer splits the text so far."""
    anchor, other = byte_tokenizer(), word_tokenizer()
    reader, whole = TextReader(anchor, other, "prefix"), canonical(other)
    ids = anchor(text + later, add_special_tokens=False)["input_ids"]
    row = read_row(reader, None, ids, [True] * len(ids))
    for column in range(len(ids)):
        spelled = anchor.backend_tokenizer.decode(ids[: column + 1], skip_special_tokens=True)
        if "\ufffd" in spelled:
            continue
        branch = [
            token
            for token, number in zip(row.ids, row.branches, strict=True)
            if number and number == row.branch[column]
        ]
        seen = row.ids[: row.visible[column]] + branch
        assert seen[len(reader.stable.prefix_ids) :] == whole(spelled)
        assert row.num_seen[column] == len(seen)
        if branch:  # it is not what the text goes on with, which is run once
            first = row.branches.index(row.branch[column])
            settled = list(zip(row.ids, row.ends, strict=True))[: row.branches.count(0)]
            there = settled[row.visible[column] : row.visible[column] + 1]
            assert (row.ids[first], row.ends[first]) not in there


def test_tokens_that_stay_as_they_are_are_run_once() -> None:
    """Only a half word, and the last one, which no text has settled, have branches."""
    anchor, other = byte_tokenizer(), word_tokenizer()
    ids = anchor("The fox and the dog", add_special_tokens=False)["input_ids"]
    row = read_row(TextReader(anchor, other, "prefix"), None, ids, [True] * len(ids))
    assert anchor.convert_ids_to_tokens(ids) == [
        "The",
        "Ġf",
        "o",
        "x",
        "Ġa",
        "n",
        "d",
        "Ġthe",
        "Ġdog",
    ]
    read = ["<s>", "▁The", "▁fox", "▁and", "▁the", "▁f", "▁f", "o", "▁a", "▁a", "n", "▁dog"]
    assert other.convert_ids_to_tokens(row.ids) == read
    assert row.branches == [0, 0, 0, 0, 0, 1, 2, 2, 3, 4, 4, 5]
    assert row.visible == [2, 2, 2, 3, 3, 3, 4, 5, 5]
    assert row.branch == [0, 1, 2, 0, 3, 4, 0, 0, 5]


def test_tokens_that_are_not_read_show_nothing_new() -> None:
    reader = TextReader(byte_tokenizer(), word_tokenizer())
    ids = byte_tokenizer()("The fox and the dog")["input_ids"]
    padded = read_row(reader, None, [0, 0, *ids], [False, False] + [True] * len(ids))
    plain = read_row(reader, None, ids, [True] * len(ids))
    assert padded.ids == plain.ids
    assert padded.visible == [1, 1, *plain.visible]


def test_a_smaller_vocabulary_leaves_holes() -> None:
    row = read_row(IdentityReader(10), None, [3, 12, 9, 10, 0], [True] * 5)
    assert row.ids == [3, 9, 0]
    assert row.visible == [1, 1, 2, 2, 3]
