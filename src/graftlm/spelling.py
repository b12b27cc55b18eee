"""The text of single tokens, as each adds it to those before."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Spelling:
    """Text spelled so far, as far as it matters to the tokens behind it.

    How a token is spelled depends on those before it (a space, half a character), so it is
    decoded together with them. Texts of consecutive tokens join to the whole text; a token that
    ends within a character adds nothing, and the one that completes it adds the character.
    `start` makes the first one.

    Args:
        tokenizer: None spells a token as its number.
        marks: Its tokens that are marks rather than text.
        shown, pending: Tokens whose text is known, and tokens that end in half a character.
    """

    tokenizer: PreTrainedTokenizerBase | None
    marks: frozenset[int] = field(repr=False)
    shown: tuple[int, ...] = ()
    pending: tuple[int, ...] = ()

    @classmethod
    def start(cls, tokenizer: PreTrainedTokenizerBase | None) -> "Spelling":
        """The spelling before the first token."""
        return cls(tokenizer, frozenset() if tokenizer is None else marks_of(tokenizer))

    def add(self, token: int) -> tuple[str, "Spelling"]:
        """The text one more token adds, and the spelling after it."""
        if self.tokenizer is None:
            return f"#{token}", self
        name = self.tokenizer.convert_ids_to_tokens(token)
        if name is None:  # a row of the embedding that no token uses
            return f"#{token}", replace(self, shown=(), pending=())
        if token in self.marks:
            return str(name), replace(self, shown=(), pending=())
        pending = (*self.pending, token)
        before, text = self.decode(self.shown), self.decode((*self.shown, *pending))
        if len(text) <= len(before) or text.endswith("\ufffd"):
            return "", replace(self, pending=pending)
        return text[len(before) :], replace(self, shown=pending, pending=())

    def decode(self, tokens: tuple[int, ...]) -> str:
        """The text of some tokens, nothing in it tidied."""
        assert self.tokenizer is not None
        if not tokens:
            return ""
        text = self.tokenizer.decode(
            list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return str(text)


def marks_of(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that are marks rather than text; some tokenizers call their bytes special.

    Not to be asked for each token: tokenizers build the table of added tokens, which has
    thousands of rows in Gemma's, anew whenever it is read.
    """
    added = tokenizer.added_tokens_decoder.items()
    is_byte = re.compile("<0x[0-9A-F]{2}>").fullmatch
    return frozenset(k for k, token in added if token.special and not is_byte(token.content))


def spell(spelling: Spelling, tokens: Iterable[int]) -> tuple[list[str], list[Spelling]]:
    """The text each token adds, and the spellings before the first and after each."""
    texts, spellings = [], [spelling]
    for token in tokens:
        text, spelling = spelling.add(token)
        texts.append(text)
        spellings.append(spelling)
    return texts, spellings
