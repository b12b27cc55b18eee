"""Chats across tokenizers: find messages in one model's markup, write them in another's.

Every chat template writes a message as header, content, footer. `ChatFormat` learns a model's
headers and footers from chats of known contents. `MessageFinder` recognises them in the text and
special tokens a reading comes across, one symbol at a time.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from graftlm.symbols import Symbols, symbols_in, symbols_of, text_of

ROLES = ("system", "user", "assistant")
# For an anchor without a template of its own, beside an augmenting model that has one.
PLAIN_TEMPLATE = (
    "{% for m in messages %}### {{ m['role'] | capitalize }}\n{{ m['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}### Assistant\n{% endif %}"
)
CONTENTS = ("zq1qz", "zq2qz", "zq3qz")  # that no template writes
TURNS = tuple(
    {"role": role, "content": content}
    for role, content in zip(("user", "assistant", "user"), CONTENTS, strict=True)
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatFormat:
    """What a model's template writes around messages.

    Args:
        headers: Before a message, by role.
        footers: Behind it.
        first: Before the user's message that opens a chat; BOS is no part of it.
        writes_bos: Whether the template puts BOS before it, so that it does not begin the text.
        opening: Before an answer that is to be generated; may say more than the header, such as
            `<think>`.
    """

    headers: Mapping[str, Symbols]
    footers: Mapping[str, Symbols]
    first: Symbols
    writes_bos: bool
    opening: Symbols

    @classmethod
    def written(cls, tokenizer: PreTrainedTokenizerBase) -> "ChatFormat | None":
        """As text to be tokenized; None if there is no template that marks messages."""
        return learn(tokenizer, symbols_of)

    @classmethod
    def tokenized(cls, tokenizer: PreTrainedTokenizerBase) -> "ChatFormat | None":
        """As the tokens of a chat say it: some swallow a space or a line break, or add one."""

        def symbols(tokenizer: PreTrainedTokenizerBase, text: str) -> Symbols:
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            return symbols_in(tokenizer, list(ids))

        return learn(tokenizer, symbols)


def learn(
    tokenizer: PreTrainedTokenizerBase,
    read: Callable[[PreTrainedTokenizerBase, str], Symbols],
) -> ChatFormat | None:
    """The format of a template, from chats that it writes."""
    if not tokenizer.chat_template:
        return None

    def render(*messages: dict[str, str], opens_turn: bool = False) -> Symbols:
        text: Any = tokenizer.apply_chat_template(
            [*messages], tokenize=False, add_generation_prompt=opens_turn
        )
        return read(tokenizer, text)

    user, assistant, again = CONTENTS
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    try:
        start, closed = cut(render(TURNS[0]), user)
        _, opened = cut(render(TURNS[0], opens_turn=True), user)
        _, ended = cut(render(*TURNS[:2]), assistant)
        # What stands in a history, which may be less than what stands in the last turn.
        answered, rest = cut(cut(render(*TURNS), user)[1], assistant)
        between, _ = cut(rest, again)
    except (TemplateError, ValueError, TypeError):
        return None  # no template for chats such as this one
    if opened[: len(closed)] != closed:  # the end of a text may be no part of its last message
        closed = without_end(closed, (eos,))
    if between[: len(ended)] != ended:
        ended = without_end(ended, (eos,))
    starts = ((opened, closed), (answered, closed), (between, ended))
    if any(whole[: len(part)] != part for whole, part in starts):
        return None
    headers = {"user": between[len(ended) :], "assistant": answered[len(closed) :]}
    footers = {"user": closed, "assistant": ended}
    if not headers["assistant"]:  # what ends a question begins the answer
        headers["assistant"], footers["user"] = closed, ()
    if not is_mark(headers["user"]) or headers["user"] == headers["assistant"]:
        return None
    if not is_mark(footers["user"] + headers["assistant"]):
        return None
    writes_bos, start = start[:1] == (bos,), without_start(start, (bos,))
    # A system prompt that nobody asked for may stand before the first message.
    first = start if ends_with(headers["user"], start) and is_mark(start) else headers["user"]
    # Some templates have no turn for a system message; what it says is then a user's.
    headers["system"], footers["system"] = headers["user"], closed
    try:
        before, rest = cut(render({"role": "system", "content": again}, TURNS[0]), again)
        after, _ = cut(rest, user)
    except (TemplateError, ValueError, TypeError):
        before = after = ()
    before = without_start(before, (bos,))
    users = (headers["user"], first)
    behind = next((header for header in users if ends_with(after, header)), None)
    if behind is not None and before not in users:
        headers["system"] = system_header(before, first)
        footers["system"] = without_end(after, behind)
    return ChatFormat(
        headers=headers,
        footers=footers,
        first=first,
        writes_bos=writes_bos,
        opening=opened[len(closed) :],
    )


def system_header(before: Symbols, user: Symbols) -> Symbols:
    """The header among what stands before a system message, which may go on with the date.

    It is the user's with another role, if it begins so.
    """
    try:
        ahead, behind = cut(user, "user")
    except ValueError:
        return before
    header = (*ahead, *"system", *behind)
    return header if before[: len(header)] == header else before


def cut(symbols: Symbols, content: str) -> tuple[Symbols, Symbols]:
    """What stands before and behind a content.

    Raises:
        ValueError: If it is not there exactly once.
    """
    wanted, size = tuple(content), len(content)
    places = [k for k in range(len(symbols)) if symbols[k : k + size] == wanted]
    if len(places) != 1:
        raise ValueError(content)
    return symbols[: places[0]], symbols[places[0] + size :]


def ends_with(symbols: Symbols, end: Symbols) -> bool:
    """Whether something ends with something that is not nothing."""
    return bool(end) and symbols[-len(end) :] == end


def without_start(symbols: Symbols, start: Symbols) -> Symbols:
    """The same without its beginning, if it begins so."""
    return symbols[len(start) :] if symbols[: len(start)] == start else symbols


def without_end(symbols: Symbols, end: Symbols) -> Symbols:
    """The same without its end, if it ends so."""
    return symbols[: -len(end)] if ends_with(symbols, end) else symbols


def is_mark(symbols: Symbols) -> bool:
    """Whether it says more than spaces and line breaks do, which any text may hold."""
    return any(isinstance(symbol, int) or not symbol.isspace() for symbol in symbols)


class MessageFinder:
    """Replaces the headers and footers of one model in a stream of symbols by what they say.

    A footer of plain text, such as a blank line, is one only where a header follows, and a header
    of spaces only behind a footer.

    Args:
        chat_format: Of the model whose markup it is, as its tokens say it.
    """

    def __init__(self, chat_format: ChatFormat):
        headers = [(chat_format.headers[role], role) for role in ROLES]
        headers.append((chat_format.first, "user"))
        headers.append((chat_format.opening or chat_format.headers["assistant"], "assistant"))
        marks = [(header, role) for header, role in headers if is_mark(header)]
        blanks = [(header, role) for header, role in headers if header and not is_mark(header)]
        self.patterns: dict[Symbols, list[tuple[str, str]]] = {}
        for footer in sorted({*chat_format.footers.values()} - {()}, key=repr):
            words = text_of(footer)
            is_plain = len(words) == len(footer)
            if not is_plain:
                self.patterns[footer] = [("close", words)]
            behind = marks if is_plain else []
            if footer == chat_format.footers["user"]:
                behind = [*behind, *blanks]
            for header, role in behind:
                self.patterns[footer + header] = [("close", words), ("open", role)]
        for header, role in marks:
            self.patterns[header] = [("open", role)]
        self.beginnings = {
            pattern[:length] for pattern in self.patterns for length in range(1, len(pattern))
        }

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "MessageFinder | None":
        """The finder for a tokenizer's chats; None if it marks no messages that could be found."""
        chat_format = ChatFormat.tokenized(tokenizer)
        if chat_format is None:
            return None
        finder = cls(chat_format)
        chat: Any = tokenizer.apply_chat_template(list(TURNS), tokenize=True, return_dict=False)
        _, found = finder.find((), symbols_in(tokenizer, list(chat)))
        opened_by, said = "", []
        for kind, value in found:
            if kind == "open":
                opened_by = value
            elif kind == "text" and value.strip() in CONTENTS:
                said.append({"role": opened_by, "content": value.strip()})
        return finder if said == list(TURNS) else None

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
