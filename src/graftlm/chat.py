"""Chats across tokenizers: find messages in one model's markup, write them in another's.

Every chat template writes a message as header, content, footer. `ChatFormat.of` learns a model's
headers and footers by rendering a chat of known contents. `MessageFinder` recognises them in the
text and special tokens a reading comes across, one symbol at a time.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

ROLES = ("system", "user", "assistant")
# For an anchor without a template of its own, beside an augmenting model that has one.
PLAIN_TEMPLATE = (
    "{% for m in messages %}### {{ m['role'] | capitalize }}\n{{ m['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}### Assistant\n{% endif %}"
)
CONTENTS = ("\u2460one\u2460", "\u2461two\u2461", "\u2462three\u2462")

Symbols = tuple[str | int, ...]  # characters of text, and ids of special tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatFormat:
    """What a model's template writes around messages, as text that holds special tokens.

    Args:
        headers: Before a message, by role.
        footers: Behind it.
        opening: Before an answer that is to be generated; may say more than the header, such as
            `<think>`.
    """

    headers: Mapping[str, str]
    footers: Mapping[str, str]
    opening: str

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "ChatFormat | None":
        """The format of a tokenizer's chat template; None if there is none that marks messages."""
        if not tokenizer.chat_template:
            return None
        user, assistant, again = CONTENTS
        turns = [
            {"role": "user", "content": user},
            {"role": "assistant", "content": assistant},
            {"role": "user", "content": again},
        ]

        def render(messages: list[dict[str, str]], opens_turn: bool = False) -> str:
            text: Any = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=opens_turn
            )
            return text

        try:
            start, closed = render(turns[:1]).split(user)
            _, opened = render(turns[:1], opens_turn=True).split(user)
            _, ended = render(turns[:2]).split(assistant)
            between = render(turns).split(assistant)[1].split(again)[0]
            answered = render(turns[:2]).split(user)[1].split(assistant)[0]
        except (TemplateError, ValueError, TypeError, IndexError):
            return None  # no template for chats such as this one
        ended = ended.removesuffix(tokenizer.eos_token or "") or ended
        starts = (opened.startswith(closed), answered.startswith(closed), between.startswith(ended))
        if not all(starts):
            return None
        headers = {"user": between[len(ended) :], "assistant": answered[len(closed) :]}
        footers = {"user": closed, "assistant": ended}
        try:
            system = [{"role": "system", "content": again}]
            text = render([*system, *turns[:1]])
            before, after = text.split(again)
            footers["system"] = after.split(user)[0].removesuffix(headers["user"])
            # What stands before everything (BOS) is no part of the header.
            start = start.removesuffix(headers["user"])
            headers["system"] = before.removeprefix(common_start(before, start, headers))
        except (TemplateError, ValueError, TypeError):
            # Some templates know no system; what it says is then a user's turn.
            headers["system"], footers["system"] = headers["user"], footers["user"]
        if not all(headers.values()):
            return None
        return cls(headers=headers, footers=footers, opening=opened[len(closed) :])


def common_start(one: str, other: str, headers: Mapping[str, str]) -> str:
    """What two renderings begin with, up to where the headers begin."""
    first = next(iter(headers["user"]))
    length = 0
    while length < min(len(one), len(other)) and one[length] == other[length]:
        length += 1
    shared = one[:length]
    # A default system prompt may make more of it shared than what stands before everything.
    return shared[: shared.index(first)] if first in shared else shared


class MessageFinder:
    """Replaces the headers and footers of one model in a stream of symbols by what they say.

    A footer of plain text, such as a blank line, is one only where a header follows.

    Args:
        tokenizer: Of the model whose markup it is.
        chat_format: Of that tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat_format: ChatFormat):
        headers = [(chat_format.headers[role], role) for role in ROLES]
        headers.append((chat_format.opening or chat_format.headers["assistant"], "assistant"))
        self.patterns: dict[Symbols, list[tuple[str, str]]] = {}
        for footer in sorted(set(chat_format.footers.values()) - {""}):
            symbols = symbols_of(tokenizer, footer)
            words = "".join(s for s in symbols if isinstance(s, str))
            if words != footer:
                self.patterns[symbols] = [("close", words)]
                continue
            for header, role in headers:
                both = symbols_of(tokenizer, footer + header)
                self.patterns[both] = [("close", footer), ("open", role)]
        for header, role in headers:
            self.patterns[symbols_of(tokenizer, header)] = [("open", role)]
        self.beginnings = {
            pattern[:length] for pattern in self.patterns for length in range(1, len(pattern))
        }

    def find(self, held: Symbols, symbols: Symbols) -> tuple[Symbols, list[tuple[str, str]]]:
        """Read on.

        Args:
            held: Symbols that may begin a header or footer, from the call before.
            symbols: The next ones.

        Returns:
            What may begin one now, and what was found: ("open", role), ("close", the text of the
            footer) or ("text", text). Special tokens that are not part of any are dropped.
        """
        found: list[tuple[str, str]] = []
        for symbol in symbols:
            held = (*held, symbol)
            while held and held not in self.beginnings:
                # The longest that is one whole; else the first symbol is none.
                length = next((n for n in range(len(held), 0, -1) if held[:n] in self.patterns), 0)
                if length:
                    found += self.patterns[held[:length]]
                elif isinstance(held[0], str):
                    found.append(("text", held[0]))
                held = held[length or 1 :]
        return held, list(joined(found))


def joined(found: list[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """The same with neighbouring texts as one."""
    text = ""
    for kind, value in found:
        if kind == "text":
            text += value
            continue
        if text:
            yield "text", text
            text = ""
        yield kind, value
    if text:
        yield "text", text


def symbols_of(tokenizer: PreTrainedTokenizerBase, text: str) -> Symbols:
    """Text with special tokens in it, as characters and ids."""
    special = sorted(
        ((t.content, i) for i, t in tokenizer.added_tokens_decoder.items() if t.special),
        key=lambda entry: -len(entry[0]),
    )
    symbols: list[str | int] = []
    while text:
        token = next(((c, i) for c, i in special if text.startswith(c)), None)
        symbols.append(text[0] if token is None else token[1])
        text = text[1 if token is None else len(token[0]) :]
    return tuple(symbols)
