"""Tokens that no continuation of a text can change.

    text so far -> tokens that every continuation of it begins with

A tokenizer decides late: `" the"` may yet become `" therefore"`. Two rules tell what is settled.
Words (pre-tokens) are settled once they come out the same whatever is written behind them, tried
with one continuation for each kind of character that tokenizers tell apart
(`graftlm.tokenizer_rules`). Within the last, open word, BPE and Unigram form a tree that tells
(`graftlm.word_tree`), so that scripts without spaces need not wait for punctuation.

Text is read character by character, so that the result cannot depend on how it was cut.
"""

import functools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from graftlm.characters import joins_backward, with_marks
from graftlm.tokenizer_rules import AddedTokens, Rules, begins_once, without_prefix
from graftlm.word_tree import WordTree, backend, common

CACHE_SIZE = 2**15
# Longer contexts are cut at a token, where the model allows it.
MAX_CONTEXT = 256


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
        self.begins_once = begins_once(spec)
        inner = without_prefix(spec)
        self.inner = self.backend if inner is None else backend({**inner, "post_processor": None})
        self.added = AddedTokens(spec, self.backend)
        self.tree = WordTree.of(spec, self.backend, self.inner)
        self.outlines: dict[str, Outline] = {}
        self.step = functools.lru_cache(CACHE_SIZE)(self.read)

    def start(self) -> Tail:
        """Before any text."""
        return Tail("", "")

    def behind_special(self) -> Tail:
        """Behind a special token in a text, which some tokenizers do not take for a beginning."""
        return Tail("", "", inside=self.begins_once)

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


def prefix_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Special tokens a tokenizer puts before a text."""
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    whole = tokenizer.encode("a").ids
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return tuple(whole[:start])
    return ()


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
