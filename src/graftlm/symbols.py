"""What tokens say: characters of text, and special tokens, which spell nothing."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

Symbols = tuple[str | int, ...]  # characters, and ids of special tokens


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that spell nothing."""
    added = tokenizer.added_tokens_decoder.items()
    return frozenset(index for index, token in added if token.special)


def spell(
    tokenizer: PreTrainedTokenizerBase,
    shown: tuple[int, ...],
    pending: tuple[int, ...],
    token: int,
) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
    """The text one token adds, and the new `shown` and `pending` tokens.

    How a token is spelled depends on the tokens before it (a space, half a character), so it is
    decoded together with them.

    Args:
        tokenizer: A fast one.
        shown: Tokens whose text is known.
        pending: Tokens behind them that end in half a character.
        token: The next one.
    """
    pending = (*pending, token)
    before = decode(tokenizer, shown)
    text = decode(tokenizer, (*shown, *pending))
    if len(text) <= len(before) or text.endswith("\ufffd"):
        return "", shown, pending
    return text[len(before) :], pending, ()


def decode(tokenizer: Any, tokens: tuple[int, ...]) -> str:
    """The text of some tokens."""
    if not tokens:
        return ""
    return tokenizer.backend_tokenizer.decode(list(tokens), skip_special_tokens=False)


def symbols_in(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> Symbols:
    """What a fast tokenizer's tokens say."""
    special, symbols = special_ids(tokenizer), []
    shown: tuple[int, ...] = ()
    pending: tuple[int, ...] = ()
    for index in ids:
        if index in special:
            symbols.append(index)
            pending = ()
            continue
        text, shown, pending = spell(tokenizer, shown, pending, index)
        symbols += text
    return tuple(symbols)


def symbols_of(tokenizer: PreTrainedTokenizerBase, text: str) -> Symbols:
    """What a text with special tokens in it says; some of them swallow the space beside them."""
    special = sorted(
        ((token, i) for i, token in tokenizer.added_tokens_decoder.items() if token.special),
        key=lambda entry: -len(entry[0].content),
    )
    symbols: list[str | int] = []
    while text:
        found = next(((t, i) for t, i in special if text.startswith(t.content)), None)
        if found is None:
            symbols.append(text[0])
            text = text[1:]
            continue
        token, index = found
        while token.lstrip and symbols and isinstance(symbols[-1], str) and symbols[-1].isspace():
            symbols.pop()
        symbols.append(index)
        text = text[len(token.content) :]
        text = text.lstrip() if token.rstrip else text
    return tuple(symbols)


def text_of(symbols: Symbols) -> str:
    """The characters of it."""
    return "".join(symbol for symbol in symbols if isinstance(symbol, str))
