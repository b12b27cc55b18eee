"""The text of single tokens, as each adds it to those before."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Spelling:
    """Text spelled so far, as far as it matters to the tokens behind it.

    How a token is spelled depends on those before it (a space, half a character), so it is
    decoded together with them. Texts of consecutive tokens join to the whole text; a token that
    ends within a character adds nothing, and the one that completes it adds the character.

    Args:
        tokenizer: None spells a token as its number.
        shown, pending: Tokens whose text is known, and tokens that end in half a character.
    """

    tokenizer: PreTrainedTokenizerBase | None
    shown: tuple[int, ...] = ()
    pending: tuple[int, ...] = ()

    def add(self, token: int) -> tuple[str, "Spelling"]:
        """The text one more token adds, and the spelling after it."""
        if self.tokenizer is None:
            return f"#{token}", self
        name = self.tokenizer.convert_ids_to_tokens(token)
        if name is None:  # a row of the embedding that no token uses
            return f"#{token}", Spelling(self.tokenizer)
        if is_special(self.tokenizer, token, str(name)):
            return str(name), Spelling(self.tokenizer)
        pending = (*self.pending, token)
        before, text = self.decode(self.shown), self.decode((*self.shown, *pending))
        if len(text) <= len(before) or text.endswith("\ufffd"):
            return "", Spelling(self.tokenizer, self.shown, pending)
        return text[len(before) :], Spelling(self.tokenizer, pending)

    def decode(self, tokens: tuple[int, ...]) -> str:
        """The text of some tokens, nothing in it tidied."""
        assert self.tokenizer is not None
        if not tokens:
            return ""
        text = self.tokenizer.decode(
            list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return str(text)


def is_special(tokenizer: PreTrainedTokenizerBase, token: int, name: str) -> bool:
    """Whether a token is a mark rather than text; some tokenizers call their bytes special."""
    added = tokenizer.added_tokens_decoder.get(token)
    return added is not None and added.special and not re.fullmatch("<0x[0-9A-F]{2}>", name)


def spell(spelling: Spelling, tokens: Iterable[int]) -> tuple[list[str], list[Spelling]]:
    """The text each token adds, and the spellings before the first and after each."""
    texts, spellings = [], [spelling]
    for token in tokens:
        text, spelling = spelling.add(token)
        texts.append(text)
        spellings.append(spelling)
    return texts, spellings
