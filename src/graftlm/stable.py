"""Tokens that no continuation of a text can change.

    text so far -> tokens that every continuation of it begins with

A tokenizer decides late: `" the"` may yet become `" therefore"`. Two rules tell what is settled.
Words (pre-tokens) are settled once they come out the same whatever is written behind them, tried
with `PROBES`, one continuation for each kind of character that tokenizers tell apart. Within the
last, open word, BPE and Unigram give

    tokens(word + more) = tokens(word[:q]) + [a token from q to beyond the word] + ...

for some q where word[q:] begins an entry of the vocabulary, or q = len(word). What
tokens(word[:q]) have in common for all such q is settled.

Text is read character by character, so that the result cannot depend on how it was cut.
"""

import functools
import json
import re
import unicodedata
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

CACHE_SIZE = 2**15
# Longer contexts are cut at a token, where the model allows it.
MAX_CONTEXT = 256

# Continuations that end a word, or carry it on, in all ways tokenizers know. Those that change
# most come first, since nothing is settled as soon as two of them disagree from the beginning.
LITERAL_PROBES = ("a", " ", "s", " a", "  ", "▁", "▁a", ".", "1", "\n", "的")
PROBES = (
    *("a", " ", "s", "1", ".", "\n", " a", "'", "A", "e", "的", "\u0301", "\t", "t", "  "),
    *("m", "d", "l", "ll", "re", "ve", "'s", "'t", "'ll", "'re", "'ve", "'S", "T", "LL", "Aa"),
    *("12", "123", "1234", "1a", " 1", ".a", "..", ". ", ".\n", ",", "-", "_", "/", "#", "<", "("),
    *("\n\n", "\r", "\r\n", "\n ", "\n a", " \n", "  \n", " \n a", "   a", "\t\t", "\ta", " ."),
    *("\u00a0", "\u3000", "\u2028", "。", "あ", "ア", "ー", "한", "ᅡ", "ᆨ", "я", "Я", "λ", "é"),
    *("ب", "َ", "א", "क", "ि", "ा", "्", "ก", "ั", "า", "๑", "٣", "२", "²", "½", "Ⅷ", "€", "`", "``"),
    *("''", "😀", "\u200d", "\ufe0f", "🏽", "🇩", "\u20e3", "ǅ", "ʰ", "\x00", "\u200b", "\ufffd"),
)


@dataclass(frozen=True, slots=True)
class Tail:
    """Text that has been read but not settled, and what stands right before it.

    Args:
        context: Settled text just before, enough to tokenise `text` as within the whole.
        text: Not settled yet.
        num_settled: Tokens of `context`.
        inside: Whether text stands right before `context`, so that the tokenizer must not treat
            it as the beginning of a text, where many put a space.
    """

    context: str
    text: str
    num_settled: int = 0
    inside: bool = False


Token = tuple[int, tuple[int, int]]


class Pieces(NamedTuple):
    """An encoded window: each token's id, place in the text and word."""

    tokens: list[Token]
    words: list[int | None]

    def begin(self, index: int) -> int:
        """Where a token begins in the text."""
        return self.tokens[index][1][0]

    def end(self, index: int) -> int:
        """Where a token ends in the text."""
        return self.tokens[index][1][1]

    def ids(self, start: int, end: int | None) -> list[int]:
        """Token ids alone."""
        return [token for token, _ in self.tokens[start:end]]

    def shares_character(self, index: int) -> bool:
        """Whether a token begins in the character that the token before it ends in."""
        return self.begin(index) < self.end(index - 1)

    def place(self, index: int) -> int:
        """Where the tokens before this one end in the text."""
        return self.end(index - 1) if index else 0

    def word_ends(self) -> list[int]:
        """Where words end in the text."""
        return [self.place(n) for n in range(1, len(self.words) + 1) if self.is_word_end(n)]

    def is_word_end(self, index: int) -> bool:
        """Whether a word ends before this token."""
        if index in (0, len(self.words)):
            return True
        return self.words[index - 1] != self.words[index]

    def is_cut(self, index: int) -> bool:
        """Whether whole characters stand before this token."""
        return index in (0, len(self.words)) or not self.shares_character(index)

    def word_end(self, index: int) -> int:
        """The token that follows the word of this token."""
        return next(n for n in range(index + 1, len(self.words) + 1) if self.is_word_end(n))

    def joined(self, index: int, rest: "Pieces", place: int) -> "Pieces":
        """The tokens before `index`, and then others, whose text begins at `place`."""
        tokens = [(token, (place + begin, place + end)) for token, (begin, end) in rest.tokens]
        words = [-1 - word if word is not None else None for word in rest.words]
        return Pieces([*self.tokens[:index], *tokens], [*self.words[:index], *words])


class Outline(NamedTuple):
    """Where the words of a window end, however it goes on.

    Args:
        closed: The end of the words that stay as they are.
        ends: Where the next word may end within the window.
        goes_on: Whether it may go on beyond.
    """

    closed: int
    ends: tuple[int, ...]
    goes_on: bool


class StableTokenizer:
    """A tokenizer that says at each character which tokens are settled.

    Literal special tokens in the text are text. The tokenizer given is copied.

    Args:
        tokenizer: A fast one, as the others do not tell where a token ends.

    Raises:
        ValueError: The tokenizer is not a fast one.
    """

    prefix_ids: tuple[int, ...]

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise ValueError(
                f"tokenizer is a {type(tokenizer).__name__}, but a model with tokens of its own "
                "needs a fast tokenizer, a PreTrainedTokenizerFast; only these tell where a "
                "token ends"
            )
        spec = json.loads(tokenizer.backend_tokenizer.to_str())
        spec["truncation"] = spec["padding"] = None
        for random in ("dropout", "alpha", "nbest_size"):
            spec["model"].pop(random, None)
        self.set_up(spec)
        self.prefix_ids = prefix_ids(self.backend)
        self.backend.post_processor = None  # it would trim offsets

    def __getstate__(self) -> dict[str, Any]:
        return {"prefix_ids": self.prefix_ids, "spec": self.backend.to_str()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.prefix_ids = state["prefix_ids"]
        self.set_up(json.loads(state["spec"]))

    def set_up(self, spec: dict[str, Any]) -> None:
        """Make everything from a tokenizer's JSON."""
        self.backend = backend(spec)
        self.rules = Rules(spec)
        inner = without_prefix(spec)
        self.inner = self.backend if inner is None else backend({**inner, "post_processor": None})
        self.added = AddedTokens(spec, self.backend)
        self.tree = WordTree.of(spec, self.backend, self.inner)
        self.outlines: dict[str, Outline] = {}
        self.step = functools.lru_cache(CACHE_SIZE)(self.read)

    def start(self) -> Tail:
        """Before any text."""
        return Tail("", "")

    def append(self, tail: Tail, text: str) -> tuple[Tail, tuple[tuple[int, int], ...]]:
        """Read on.

        Returns:
            The new tail, and the tokens that are settled now, as (id, number of characters). Of
            tokens that share a character the last one counts it.
        """
        settled: tuple[tuple[int, int], ...] = ()
        for character in text:
            tail, more = self.step(tail, character)
            settled += more
        return tail, settled

    def finish(self, tail: Tail) -> tuple[tuple[int, int], ...]:
        """The remaining tokens if the text ends here."""
        found = self.encode(tail.context + tail.text, tail.inside)
        return counted(found, tail.num_settled, len(found.tokens), len(tail.context))

    def encode(self, window: str, inside: bool) -> Pieces:
        """Tokens of a window."""
        if not inside or self.inner is self.backend:
            return self.pieces(self.backend, window)
        found = self.pieces(self.inner, window)
        for index, (token, (begin, _)) in enumerate(found.tokens[:-1]):
            if token in self.added.ids:  # behind it, a text begins anew
                rest = self.pieces(self.backend, window[begin:])
                return found.joined(index, rest, begin)
        return found

    def pieces(self, tokenizer: Tokenizer, text: str) -> Pieces:
        """Tokens of a text."""
        found = tokenizer.encode(text, add_special_tokens=False)
        places = found.offsets
        if self.rules.joins and any(map(joins_backward, text)):
            places = [with_marks(text, begin, end) for begin, end in places]
        return Pieces(list(zip(found.ids, places, strict=True)), found.word_ids)

    def read(self, tail: Tail, character: str) -> tuple[Tail, tuple[tuple[int, int], ...]]:
        """Read one character."""
        tail = Tail(tail.context, tail.text + character, tail.num_settled, tail.inside)
        settled: tuple[tuple[int, int], ...] = ()
        while True:
            found, closed, num = self.settle(tail)
            if num <= tail.num_settled:
                return tail, settled
            settled += counted(found, tail.num_settled, num, len(tail.context))
            tail = self.move_on(tail, found, closed, num)

    def settle(self, tail: Tail) -> tuple[Pieces, int, int]:
        """The tokens of the window; how many are in closed words, and how many are settled."""
        window = tail.context + tail.text
        window = window[: self.rules.known(window)]
        base = self.encode(window, tail.inside)
        num = len(base.tokens)
        if len(window) <= len(tail.context) or num <= tail.num_settled:
            return base, 0, 0
        for probe in self.rules.probes[:2]:
            other = self.encode(window + probe, tail.inside)
            num = common(base.tokens, other.tokens, num)
            if num <= tail.num_settled:
                return base, 0, 0
        kinds = self.kinds_of(window, base)
        if kinds is None:
            closed, num = self.settled_by_probes(base, window, tail, num)
        else:
            closed, num = self.settled_by_kinds(base, window, kinds, num)
        while not base.is_cut(num):
            num -= 1
        return base, min(closed, num), num

    def kinds_of(self, window: str, base: Pieces) -> str | None:
        """What kinds of characters the window has, if only these decide where its words end."""
        if any(token in self.added.ids for token, _ in base.tokens) or self.added.places(window):
            return None
        return self.rules.kinds(window)

    def settled_by_kinds(self, base: Pieces, window: str, kinds: str, num: int) -> tuple[int, int]:
        """How many tokens are closed and settled, where the kinds of characters decide.

        Args:
            num: At most.
        """
        outline = self.outlines.get(kinds)
        if outline is None:
            if len(self.outlines) >= CACHE_SIZE:
                self.outlines.clear()
            outline = self.outlines[kinds] = self.outline(window)
        start = sum(end <= outline.closed for _, (_, end) in base.tokens)
        if self.tree is None or num <= start or not outline.goes_on:
            return start, start
        for end in outline.ends:
            num = common(base.tokens, self.encode(window[:end], False).tokens, num)
        word = self.tree.spell(base, start, window, False)
        return start, min(num, start + self.tree.num_settled(word))

    def outline(self, window: str) -> Outline:
        """Where the words of a window end, however it goes on."""
        texts = (window, *(window + probe for probe in self.rules.probes))
        found = [self.encode(text, False).word_ends() for text in texts]
        closed = 0
        for end in found[0]:
            if end > len(window) or any(end not in ends for ends in found):
                break
            closed = end
        following = {next((e for e in ends if e > closed), closed) for ends in found}
        # Where the window's own word ends does not count: it is among those compared anyway.
        return Outline(
            closed,
            tuple(sorted(end for end in following if closed < end < len(window))),
            max(following) > len(window),
        )

    def settled_by_probes(self, base: Pieces, window: str, tail: Tail, num: int) -> tuple[int, int]:
        """How many tokens are closed and settled, as all continuations that are tried tell.

        Args:
            num: At most.
        """
        ends = [n for n in range(num + 1) if base.is_word_end(n)]
        others = []
        for text in self.alternatives(window, len(tail.context)):
            other = self.encode(text, tail.inside)
            num = common(base.tokens, other.tokens, num)
            if num <= tail.num_settled:
                return 0, 0
            ends = [n for n in ends if n <= num and other.is_word_end(n)]
            others.append((text, other))
        return ends[-1], self.in_word(base, others, ends[-1], num, window, tail.inside)

    def alternatives(self, window: str, first: int) -> Iterable[str]:
        """The window where an added token may cut it short, and as it may go on."""
        for place in self.added.places(window):
            yield window[: max(place, first)]
        for probe in self.rules.probes:
            yield window + probe

    def in_word(
        self,
        base: Pieces,
        others: Sequence[tuple[str, Pieces]],
        start: int,
        num: int,
        window: str,
        inside: bool,
    ) -> int:
        """How many tokens are settled, with those of the open word begun at token `start`.

        Args:
            num: Tokens that all `others` begin with.
        """
        if self.tree is None or num == start:
            return start
        word = self.tree.spell(base, start, window, inside)
        longer = [
            (text, other, end)
            for text, other in others
            if start < len(other.tokens)
            and other.end((end := other.word_end(start)) - 1) > len(window)
        ]
        spelled = [self.tree.spell(other, start, text, inside, end) for text, other, end in longer]
        ids = [other.ids(start, end) for _, other, end in longer]
        if not all(text.startswith(word) for text in spelled) or not any(
            self.tree.tokenize(text) == tokens for text, tokens in zip(spelled, ids, strict=True)
        ):
            return start
        return min(num, start + self.tree.num_settled(word))

    def move_on(self, tail: Tail, found: Pieces, closed: int, num: int) -> Tail:
        """The tail once `num` tokens of the window are settled, `closed` of them whole words."""
        window = tail.context + tail.text
        start = self.context_start(found, closed, num)
        while True:
            begin = found.end(start - 1) if start else 0
            inside = tail.inside or begin > 0
            end = found.end(num - 1)
            new = Tail(window[begin:end], window[end:], num - start, inside)
            if start == 0 or self.is_same(new, found.tokens[start:], begin, window):
                return new
            start -= 1

    def context_start(self, found: Pieces, closed: int, num: int) -> int:
        """The token from which on settled tokens are kept as context."""
        start = num
        if not self.rules.is_one_word:
            ends = [n for n in range(closed + 1) if found.is_cut(n) and found.is_word_end(n)]
            start = ends[max(0, len(ends) - 1 - self.rules.num_words)]
            if self.rules.may_cut_words and found.place(num) - found.place(start) > MAX_CONTEXT:
                near = found.place(num) - MAX_CONTEXT // 4
                start = next(n for n in range(start, num + 1) if found.place(n) >= near)
                start = next(n for n in range(start, num + 1) if found.is_cut(n))
        # Behind an added token a text begins anew, so that it must be seen.
        return start - (start > 0 and found.tokens[start - 1][0] in self.added.ids)

    def is_same(self, tail: Tail, tokens: list[Token], begin: int, window: str) -> bool:
        """Whether the window that begins at `begin` goes on with the same tokens."""
        if self.rules.num_words == 0 and len(tail.context) < MAX_CONTEXT // 4:
            return True
        again = self.encode(window[begin : self.rules.known(window)], tail.inside).tokens
        return again == [(token, (a - begin, b - begin)) for token, (a, b) in tokens]


class Rules:
    """What a tokenizer's normalizer and pre-tokenizer may do, read off its JSON.

    Args:
        spec: The tokenizer's JSON.

    Attributes:
        may_cut_words: Whether a word may be begun at any of its tokens.
        is_one_word: Whether all text between two added tokens is one word of a BPE model, which
            may be begun at any token.
        num_words: How many settled words the next one depends on, at most.
        probes: Continuations to try.
    """

    def __init__(self, spec: dict[str, Any]):
        normalizers = steps(spec["normalizer"], "normalizers")
        splitters = [
            step
            for step in steps(spec["pre_tokenizer"], "pretokenizers")
            if not never_splits(step, normalizers)
        ]
        flags = ("lstrip", "rstrip", "single_word")
        flagged = any(token[flag] for token in spec["added_tokens"] for flag in flags)
        self.is_one_word = not splitters and spec["model"]["type"] == "BPE" and not flagged
        self.num_words = int(flagged or len(splitters) > 1 or any(map(looks_back, splitters)))
        literal = all(step["type"] in ("Metaspace", "Split") for step in splitters) and all(
            "Regex" not in step.get("pattern", {}) for step in splitters
        )
        self.probes = LITERAL_PROBES if literal else PROBES
        kinds = {step["type"] for step in normalizers}
        # Tokens of BPE go on alike from any token. Unigram adds up rounded scores, which may
        # settle a tie otherwise when begun elsewhere.
        self.may_cut_words = spec["model"]["type"] == "BPE"
        self.splits_by_kind = (
            kinds <= {"NFC"}
            and self.num_words == 0
            and len(splitters) == 1
            and splits_by_kind(splitters[0])
        )
        self.joins_any = not kinds <= {*COMPOSING, *BY_CHARACTER}
        self.joins = self.joins_any or bool(kinds & COMPOSING)

    def kinds(self, window: str) -> str | None:
        """One character for each of the window, equal where the pre-tokenizer sees no difference.

        None where that is not known.
        """
        if not self.splits_by_kind:
            return None
        if self.joins and not unicodedata.is_normalized("NFC", window):
            return None
        if self.joins and any(map(joins_backward, window)):  # several tokens may end in one place
            return None
        if "'" in window:  # letters of contractions are told apart
            return "".join(c if c.casefold().isascii() else kind(c) for c in window)
        return "".join(map(kind, window))

    def known(self, window: str) -> int:
        """How many characters of a window the normalizer will not join with later ones."""
        if not self.joins:
            return len(window)
        end = len(window)
        while end and joins_backward(window[end - 1]):
            end -= 1
        if not end or window[end - 1].isspace():
            return end
        if end < len(window) or self.joins_any or joins_forward(window[end - 1]):
            return end - 1
        return end


class AddedTokens:
    """Tokens that are cut out of a text before all others.

    Args:
        spec: The tokenizer's JSON.
        tokenizer: Made of it.

    Attributes:
        ids: Those that occur in text; special ones do not.
    """

    def __init__(self, spec: dict[str, Any], tokenizer: Tokenizer):
        tokens = spec["added_tokens"]
        self.ids = frozenset(token["id"] for token in tokens if not token["special"])
        self.normalizer = tokenizer.normalizer
        self.raw = beginnings(token["content"] for token in tokens)
        self.normalized: frozenset[str] = frozenset()
        if self.normalizer is not None:
            contents = [token["content"] for token in tokens if token["normalized"]]
            self.normalized = beginnings(map(self.normalizer.normalize_str, contents))
        # A token that must stand alone is not settled at its own end.
        self.raw |= {token["content"] for token in tokens if token["single_word"]}
        self.strips = any(token["lstrip"] for token in tokens)
        self.longest = max(map(len, self.raw | self.normalized), default=0)

    def places(self, window: str) -> list[int]:
        """Where an added token may begin that the window does not end yet."""
        size = len(window)
        starts = range(max(0, size - self.longest), size)
        found = {n for n in starts if window[n:] in self.raw}
        if self.normalizer is not None and self.normalized:
            text = self.normalizer.normalize_str(window)
            lengths = [n for n in range(1, self.longest + 1) if text[-n:] in self.normalized]
            if lengths:  # which raw characters these are is not known exactly
                found |= set(range(max(0, size - 2 * max(lengths) - 2), size))
        if self.strips:  # the spaces before it, if it comes next
            found |= {len(window[:n].rstrip()) for n in {*found, size}} - {size}
        return sorted(found)


class WordTree:
    """How the tokens of a word change as it goes on.

    Args:
        model: Of the tokenizer; never takes a word from the vocabulary as it is.
        tokenizer: Whose words these are.
        inner: The same in the middle of a text.
        vocabulary: Of its model.
        unk_id: The unknown token, if there is one.
        byte_ids: Tokens that stand for a byte.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Tokenizer,
        inner: Tokenizer,
        vocabulary: Iterable[str],
        unk_id: int | None,
        byte_ids: Iterable[int | None],
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.inner = inner
        self.vocabulary = sorted(vocabulary)
        self.unk_id = unk_id
        # These do not spell the text they stand for.
        self.unknown = frozenset({unk_id, *byte_ids})
        self.longest = max(map(len, self.vocabulary), default=0)

    @classmethod
    def of(cls, spec: dict[str, Any], tokenizer: Tokenizer, inner: Tokenizer) -> "WordTree | None":
        """The tree of a model, or None where its tokens do not form one."""
        model = spec["model"]
        if model["type"] == "Unigram":
            vocabulary = [piece for piece, _ in model["vocab"]]
            unk_id = model["unk_id"]
        elif model["type"] == "BPE" and not (
            model["end_of_word_suffix"] or model["continuing_subword_prefix"]
        ):
            vocabulary = list(model["vocab"])
            unk_id = model["vocab"].get(model["unk_token"])
        else:
            return None
        bytes_as = [f"<0x{n:02X}>" for n in range(256)] if model["byte_fallback"] else []
        plain = tokenizer
        if model.get("ignore_merges"):  # a word in the vocabulary is one token, but others not
            plain = backend({**spec, "model": {**model, "ignore_merges": False}})
        return cls(
            plain.model, tokenizer, inner, vocabulary, unk_id, map(tokenizer.token_to_id, bytes_as)
        )

    def tokenize(self, word: str) -> list[int]:
        """Token ids of a word."""
        return [token.id for token in self.model.tokenize(word)]

    def spell(
        self, found: Pieces, start: int, text: str, inside: bool, end: int | None = None
    ) -> str:
        """Tokens `start` to `end` of a text in the model's own letters."""
        ids = found.ids(start, end)
        if self.unknown.isdisjoint(ids):
            return "".join(str(self.tokenizer.id_to_token(token)) for token in ids)
        # Without added tokens the words are those of the pre-tokenizer.
        words = split(self.inner if inside else self.tokenizer, text)
        first, last = found.words[start], found.words[-1]
        if first is not None and last is not None and len(words) == last + 1:
            return "".join(words[first : None if end is None else first + 1])
        return self.spell_unknown(found.tokens[start:end], text)

    def spell_unknown(self, tokens: list[Token], text: str) -> str:
        """Tokens in the model's own letters, unknown ones by the text they stand for."""
        spelled, place = "", 0
        for token, (first, last) in tokens:
            if token not in self.unknown:
                spelled += str(self.tokenizer.id_to_token(token))
            elif last > place:  # else one more byte of the same character
                part = text[first:last]
                normalizer = self.inner.normalizer
                spelled += part if normalizer is None else normalizer.normalize_str(part)
                place = last
        return spelled

    def begins_entry(self, text: str) -> bool:
        """Whether the vocabulary has a longer entry that begins with this text."""
        place = bisect_left(self.vocabulary, text)
        if place < len(self.vocabulary) and self.vocabulary[place] == text:
            place += 1
        return place < len(self.vocabulary) and self.vocabulary[place].startswith(text)

    def num_settled(self, word: str) -> int:
        """How many tokens all words have in common that go on behind this one."""
        ids = self.without_open_end(self.tokenize(word))
        num = len(ids)
        for place in range(max(0, len(word) - self.longest), len(word)):
            if num == 0:
                break
            if self.begins_entry(word[place:]):
                num = common(ids, self.without_open_end(self.tokenize(word[:place])), num)
        return num

    def without_open_end(self, ids: list[int]) -> list[int]:
        """Without an unknown token at the end, which grows if the next is unknown too."""
        return ids[:-1] if ids and ids[-1] == self.unk_id else ids


# Normalizers that join characters with those before them; and such as look at each on its own.
COMPOSING = frozenset({"NFC", "NFD", "NFKC", "NFKD", "StripAccents", "BertNormalizer"})
BY_CHARACTER = frozenset({"Prepend", "Replace", "Lowercase", "Strip", "Nmt", "ByteLevel"})


def backend(spec: dict[str, Any]) -> Tokenizer:
    """The tokenizer of a JSON, which reads literal special tokens as text."""
    made = Tokenizer.from_str(json.dumps(spec))
    made.encode_special_tokens = True
    return made


def prefix_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Special tokens a tokenizer puts before a text."""
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    whole = tokenizer.encode("a").ids
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return tuple(whole[:start])
    return ()


def split(tokenizer: Tokenizer, text: str) -> list[str]:
    """The words of a text that has no added tokens, as the model sees them."""
    if tokenizer.normalizer is not None:
        text = tokenizer.normalizer.normalize_str(text)
    if tokenizer.pre_tokenizer is None:
        return [text]
    return [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]


def steps(component: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    """The parts of a normalizer or pre-tokenizer in order."""
    if component is None:
        return []
    if component["type"] != "Sequence":
        return [component]
    return [step for part in component[name] for step in steps(part, name)]


def never_splits(step: dict[str, Any], normalizers: list[dict[str, Any]]) -> bool:
    """Whether a pre-tokenizer leaves text in one piece."""
    if step["type"] == "ByteLevel":
        return not step["use_regex"]
    if step["type"] == "Metaspace":
        return not step["split"]
    pattern = step.get("pattern", {}).get("String")
    # Gemma: splits at spaces, after these were replaced.
    return pattern is not None and any(
        normalizer["type"] == "Replace"
        and normalizer["pattern"] == step["pattern"]
        and pattern not in normalizer["content"]
        for normalizer in normalizers[-1:]
    )


def splits_by_kind(step: dict[str, Any]) -> bool:
    """Whether a pre-tokenizer tells only Unicode categories, ASCII characters and spaces apart.

    Of the ASCII letters, only those of contractions, behind an apostrophe.
    """
    if step["type"] == "ByteLevel":
        return not step["add_prefix_space"]
    pattern = step.get("pattern", {}).get("Regex")
    if step["type"] != "Split" or pattern is None or step["invert"] or not pattern.isascii():
        return False
    plain = re.sub(r"\\[pP]\{[A-Z][a-z]?\}|\\[sSrnt]|\(\?i:|\{\d(,\d)?\}", "", pattern)
    return "\\" not in plain and set(re.findall(r"[A-Za-z0-9]", plain)) <= set("sdmtlvreSDMTLVRE")


@functools.cache
def kind(character: str) -> str:
    """A character that stands for all of its Unicode category."""
    category = unicodedata.category(character)
    if category == "Cn" or character.isspace() or (character.isascii() and category[0] not in "LN"):
        return character
    return chr(0xE000 + 128 * ord(category[0]) + ord(category[1]))


def looks_back(step: dict[str, Any]) -> bool:
    """Whether a pre-tokenizer may look at text before the word it cuts off."""
    known = ("Metaspace", "ByteLevel", "Digits", "Punctuation", "Whitespace", "WhitespaceSplit")
    if step["type"] in (*known, "BertPreTokenizer", "CharDelimiterSplit"):
        return False
    if step["type"] != "Split":
        return True
    pattern = step["pattern"].get("Regex", "")
    return re.search(r"\(\?<|(?<!\[)\^|\\[bBAGK]", pattern) is not None


def without_prefix(spec: dict[str, Any]) -> dict[str, Any] | None:
    """The tokenizer as it is in the middle of a text, if it treats the beginning otherwise."""
    normalizers = [
        {**step, "strip_left": False} if step["type"] == "Strip" else step
        for step in steps(spec["normalizer"], "normalizers")
        if step["type"] != "Prepend"
    ]
    splitters = steps(spec["pre_tokenizer"], "pretokenizers")
    if splitters and splitters[0]["type"] == "Metaspace":
        splitters[0] = {**splitters[0], "prepend_scheme": "never"}
    if splitters and splitters[0]["type"] == "ByteLevel":
        splitters[0] = {**splitters[0], "add_prefix_space": False}
    if normalizers == steps(spec["normalizer"], "normalizers") and splitters == steps(
        spec["pre_tokenizer"], "pretokenizers"
    ):
        return None
    return {
        **spec,
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": splitters} if splitters else None,
    }


def beginnings(contents: Iterable[str]) -> frozenset[str]:
    """What these begin with, themselves left out."""
    return frozenset(content[:n] for content in contents for n in range(1, len(content)))


def common(first: Sequence[object], second: Sequence[object], limit: int) -> int:
    """How many elements two sequences have in common from the start, up to a limit."""
    if first[:limit] == second[:limit]:
        return min(limit, len(first))
    pairs = zip(first[:limit], second, strict=False)
    return next((n for n, (one, other) in enumerate(pairs) if one != other), len(second))


def with_marks(text: str, begin: int, end: int) -> tuple[int, int]:
    """A token's place, characters and the marks on them counting as one."""
    while 0 < begin < len(text) and joins_backward(text[begin]):
        begin -= 1
    while 0 < end < len(text) and joins_backward(text[end]):
        end += 1
    return begin, end


def counted(found: Pieces, start: int, end: int, place: int) -> tuple[tuple[int, int], ...]:
    """Tokens as (id, number of characters), the text before `place` being counted already."""
    result = []
    for index in range(start, end):
        token, (_, last) = found.tokens[index]
        if (index + 1 < end and found.shares_character(index + 1)) or last < place:
            last = place
        result.append((token, last - place))
        place = last
    return tuple(result)


@functools.cache
def joins_backward(character: str) -> bool:
    """Whether a normalizer may join a character with the one before it."""
    first = unicodedata.normalize("NFKD", character)[0]
    return unicodedata.category(first) in ("Mn", "Mc", "Me", "Cf") or is_jamo(first)


@functools.cache
def joins_forward(character: str) -> bool:
    """Whether a normalizer may join a character with one that joins backward."""
    parts = unicodedata.normalize("NFKD", character)
    return unicodedata.category(parts[-1])[0] == "M" or any(
        part in starters() for part in (character, parts[-1], unicodedata.normalize("NFC", parts))
    )


def is_jamo(character: str) -> bool:
    """Whether a character is a vowel or final consonant of a Hangul syllable."""
    return "\u1160" <= character <= "\u11ff" or "\ud7b0" <= character <= "\ud7ff"


@functools.cache
def starters() -> frozenset[str]:
    """Characters that Unicode composes with a following one."""
    hangul = {chr(code) for code in (*range(0x1100, 0x1200), *range(0xAC00, 0xD7A4))}
    decompositions = (unicodedata.decomposition(chr(code)) for code in range(0x30000))
    pairs = (text.split() for text in decompositions if text and text[0] != "<")
    return frozenset(hangul | {chr(int(pair[0], 16)) for pair in pairs if len(pair) == 2})
