"""How the tokens of a word may change as it goes on: a tree, for BPE and Unigram.

    tokens(word + more) = tokens(word[:q]) + [a token from q to beyond the word] + ...

for some q where word[q:] begins an entry of the vocabulary, or q = len(word). What
tokens(word[:q]) have in common for all such q is settled.
"""

import json
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

if TYPE_CHECKING:
    from graftlm.stable import Pieces, Token


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
        self, found: "Pieces", start: int, text: str, inside: bool, end: int | None = None
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

    def spell_unknown(self, tokens: "list[Token]", text: str) -> str:
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


def backend(spec: dict[str, Any]) -> Tokenizer:
    """The tokenizer of a JSON, which reads literal special tokens as text."""
    made = Tokenizer.from_str(json.dumps(spec))
    made.encode_special_tokens = True
    return made


def split(tokenizer: Tokenizer, text: str) -> list[str]:
    """The words of a text that has no added tokens, as the model sees them."""
    if tokenizer.normalizer is not None:
        text = tokenizer.normalizer.normalize_str(text)
    if tokenizer.pre_tokenizer is None:
        return [text]
    return [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]


def common(first: Sequence[object], second: Sequence[object], limit: int) -> int:
    """How many elements two sequences have in common from the start, up to a limit."""
    if first[:limit] == second[:limit]:
        return min(limit, len(first))
    pairs = zip(first[:limit], second, strict=False)
    return next((n for n, (one, other) in enumerate(pairs) if one != other), len(second))
