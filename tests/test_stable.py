"""Settled tokens begin the tokens of every continuation, however the text was cut."""

import copy
import pickle
import random
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerBase

from graftlm.reproduce.real_models import find_model
from graftlm.stable import StableTokenizer
from tokenizers_zoo import MAKERS, TEXTS, zoo_tokenizer

REAL = ("smollm2-135m-instruct", "gemma-3-270m", "qwen2.5-coder-0.5b-instruct")
ALPHABETS = (
    "abcdefghinorst",
    "ABCDEST éüşğıåäöñß",
    "абвгдеийостр АБ",
    "ابتثجحخدرسلمنهوي َُِّْ",
    "कखगमनसहतरय ािीुेोौ्ंँ़",
    "กขคมนยรสะาำิีุู่้๊์",
    "人生而自由在尊严和权利上一律平等。,，、",
    "すべてのにんげんはガギパ。ーァｶﾞﾟ",
    "한국어모든 ᄀ나ᅥᆨᆫ",
    "0123456789٣४²½Ⅷ",
    "      ",
    "\n\n\n \t\r",
    "'’stdmlvreS",
    '()[]{}<>/=+-*_.,:;!?#"`',
    "😀👍🏽👩🚀❤🇮🇩\u200d\ufe0f\u20e3",
    "aeo\u0301\u0302\u0323\u0308\u0338\u3099",
    "ﬁ㍿①ªΩÅ\u00a0\u3000\u2028\x0b\x85\u200b\x00\ufffd\ue000",
    "▁▁Ġ a",
)
FRAGMENTS = (
    *(
        "<table>",
        "<tab",
        "</table>",
        "<tr>",
        "\n\n\n",
        "\n\n",
        "<left>",
        "<right>",
        "born",
        "reborn",
    ),
    *("<Table>", "equal in", "ÉTÉ", "<|end|>", "<s>", "<unk>", "<0x0A>", "[CLS]", "<", "don't"),
    *("they've", "I'LL", " it's", "    ", "        return x\n", "\n    ", "\r\n", "  \n  ", " the"),
    *(" human beings", "tokenizers", "ration", "1234567", "``", "''", "👩‍🚀", "👍🏽", "e\u0301"),
    *(text[n : n + 12] for text in TEXTS for n in range(0, len(text), 12)),
)
PIECES = st.one_of(
    st.sampled_from(FRAGMENTS),
    st.sampled_from(ALPHABETS).flatmap(lambda letters: st.text(letters, min_size=1, max_size=5)),
)
TEXT = st.lists(PIECES, max_size=5).map("".join)


def canonical(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], list[int]]:
    """Token ids of a whole text, by a tokenizer that was never in our hands."""
    whole = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    whole.encode_special_tokens = True
    whole.no_truncation()
    whole.no_padding()
    return lambda text: whole.encode(text, add_special_tokens=False).ids


def ids(tokens: tuple[tuple[int, int], ...]) -> list[int]:
    return [token for token, _ in tokens]


def check(
    stable: StableTokenizer,
    whole: Callable[[str], list[int]],
    chunks: list[str],
    continuation: str,
) -> None:
    """What the first chunks settle stays, and the rest completes it."""
    text, settled, tail = "", (), stable.start()
    for chunk in chunks:
        tail, more = stable.append(tail, chunk)
        text, settled = text + chunk, settled + more
        assert ids(settled) + ids(stable.finish(tail)) == whole(text)
        assert sum(number for _, number in settled) + len(tail.text) == len(text)
        assert all(number >= 0 for _, number in settled)
        assert whole(text + continuation)[: len(settled)] == ids(settled)
    assert stable.append(stable.start(), text) == (tail, settled)


@pytest.fixture(scope="module", params=list(MAKERS))
def small(request) -> tuple[StableTokenizer, Callable[[str], list[int]]]:
    tokenizer = zoo_tokenizer(request.param)
    return StableTokenizer(tokenizer), canonical(tokenizer)


@settings(max_examples=6, deadline=None, derandomize=True, database=None)
@given(chunks=st.lists(TEXT, max_size=3), continuation=TEXT)
def test_no_continuation_changes_what_is_settled(small, chunks, continuation):
    stable, whole = small
    check(stable, whole, chunks, continuation)


@pytest.mark.slow
@settings(
    max_examples=200,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(chunks=st.lists(TEXT, max_size=6), continuation=TEXT)
def test_no_continuation_changes_what_is_settled_at_length(small, chunks, continuation):
    stable, whole = small
    check(stable, whole, chunks, continuation)


@pytest.mark.parametrize("text", TEXTS[::5])
def test_real_text(small, text):
    """Ordinary text in many scripts, one character after another."""
    stable, whole = small
    tail, settled = stable.append(stable.start(), text)
    assert ids(settled) + ids(stable.finish(tail)) == whole(text)
    assert settled


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_real_tokenizers(name):
    """Three tokenizers as they are published."""
    folder = find_model(name)
    if folder is None:
        pytest.skip(f"{name} has not been fetched")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    stable, whole = StableTokenizer(tokenizer), canonical(tokenizer)

    @settings(max_examples=200, deadline=None, database=None)
    @given(chunks=st.lists(TEXT, max_size=6), continuation=TEXT)
    def settles(chunks, continuation):
        check(stable, whole, chunks, continuation)

    settles()


def read(stable: StableTokenizer, tokenizer: PreTrainedTokenizerBase, text: str) -> list[str]:
    """The tokens settled after a text, as they are written in the vocabulary."""
    settled = ids(stable.append(stable.start(), text)[1])
    return [str(token) for token in tokenizer.convert_ids_to_tokens(settled)]


def test_a_word_is_settled_when_the_next_begins():
    tokenizer = zoo_tokenizer("gpt2")
    stable = StableTokenizer(tokenizer)
    assert "".join(read(stable, tokenizer, "All human")) == "All"
    assert "".join(read(stable, tokenizer, "All human ")) == "AllĠhuman"


def test_scripts_without_spaces_do_not_wait_for_punctuation():
    for name in ("gpt2", "llama2", "gemma", "unigram"):
        tokenizer = zoo_tokenizer(name)
        tail, _ = StableTokenizer(tokenizer).append(StableTokenizer(tokenizer).start(), TEXTS[8])
        assert len(tail.text) <= 8, name


def test_an_added_token_waits_for_a_longer_one():
    tokenizer = zoo_tokenizer("gemma")
    stable = StableTokenizer(tokenizer)
    assert read(stable, tokenizer, "a\n\n") == ["a"]
    assert read(stable, tokenizer, "a\n\nb")[:2] == ["a", "\n\n"]
    assert read(stable, tokenizer, "a<tab") == ["a"]
    assert read(stable, tokenizer, "a<table>") == ["a", "<table>"]


def test_special_tokens_in_the_text_are_text():
    for name in ("gpt2", "llama2", "bert"):
        tokenizer = zoo_tokenizer(name)
        stable = StableTokenizer(tokenizer)
        tail, settled = stable.append(stable.start(), "a <s> b ")
        assert tokenizer.backend_tokenizer.token_to_id("<s>") not in ids(
            settled + stable.finish(tail)
        )


def test_characters_are_counted_on_the_last_token_that_shares_them():
    """Bytes of one character come together."""
    tokenizer = zoo_tokenizer("gpt2")
    stable = StableTokenizer(tokenizer)
    _, settled = stable.append(stable.start(), "𝒜 x ")
    assert [number for _, number in settled][:4] == [0, 0, 0, 1]


def test_tokens_put_before_a_text():
    found = {name: StableTokenizer(zoo_tokenizer(name)).prefix_ids for name in MAKERS}
    assert found["llama3"] == found["llama2"] == found["bert"] == found["roberta"] == (1,)
    assert found["unigram"] == found["gpt2"] == ()  # unigram puts one behind


@pytest.mark.parametrize(
    "name", ["gemma", *(pytest.param(n, marks=pytest.mark.slow) for n in ("llama2", "gpt2"))]
)
def test_long_runs_keep_a_short_context(name):
    """Reading on takes the same time however long the text is."""
    stable = StableTokenizer(zoo_tokenizer(name))
    letters = random.Random(0).choices("abcdefghi人生自由", k=400)
    tail, _ = stable.append(stable.start(), "".join(letters))
    assert len(tail.context) <= 257
    assert len(tail.text) <= 32


def test_the_given_tokenizer_is_left_as_it_is():
    tokenizer = copy.deepcopy(zoo_tokenizer("llama2"))
    tokenizer.backend_tokenizer.enable_truncation(5)
    before = tokenizer.backend_tokenizer.to_str()
    stable = StableTokenizer(tokenizer)
    tail, settled = stable.append(stable.start(), TEXTS[0])
    assert len(settled + stable.finish(tail)) > 5
    assert tokenizer.backend_tokenizer.to_str() == before
    assert not tokenizer.backend_tokenizer.encode_special_tokens


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_do_the_same(copied):
    for name in ("llama2_added", "llama3"):
        stable = StableTokenizer(zoo_tokenizer(name))
        tail, settled = stable.append(stable.start(), TEXTS[11])
        again = copied(stable)
        assert again.prefix_ids == stable.prefix_ids
        assert again.append(again.start(), TEXTS[11]) == (tail, settled)
        assert again.finish(tail) == stable.finish(tail)


def test_slow_tokenizers_are_refused():
    with pytest.raises(ValueError, match="tokenizer is a ByT5Tokenizer, but .* needs a fast"):
        StableTokenizer(ByT5Tokenizer())
