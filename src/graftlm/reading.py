"""Read a row of anchor tokens with another tokenizer, token by token.

    anchor tokens -> the text they spell so far -> augmenting tokens that this text settles

A `Reading` is what one augmenting model has read of one row. It depends on the tokens up to its
own only, so that training, which reads whole rows, and decoding, which reads on and on, see the
same. It never changes: beams and rollbacks share readings.
"""

import itertools
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from graftlm.chat import ChatFormat, MessageFinder
from graftlm.stable import StableTokenizer, Tail
from graftlm.symbols import Symbols, special_ids, spell


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Reading:
    """What has been read up to one anchor token.

    Args:
        previous: The reading one anchor token earlier; None before the first.
        num_tokens: Augmenting tokens that are settled, special ones included.
        num_chars: Characters of text the augmenting model has been given, markup included.
        new_ids: The augmenting tokens this anchor token settled.
        new_ends: Where each of them ends, in characters of the text.
        shown, pending: Anchor tokens whose text is known, as far as they matter to those behind
            them, and anchor tokens that end in half a character.
        role: Whose message is open in a chat.
        held: What may be the beginning of a chat's markup.
        tail: Text that is not settled yet.
        settled_chars: Characters of text before `tail`.
    """

    previous: "Reading | None" = field(repr=False)
    num_tokens: int
    num_chars: int = 0
    new_ids: tuple[int, ...] = ()
    new_ends: tuple[int, ...] = ()
    shown: tuple[int, ...] = ()
    pending: tuple[int, ...] = ()
    role: str = ""
    held: Symbols = ()
    tail: Tail = field(default_factory=lambda: Tail("", ""))
    settled_chars: int = 0

    def skip(self) -> "Reading":
        """The reading after a column that holds no token for the augmenting model."""
        return replace(self, previous=self, new_ids=(), new_ends=())

    def __deepcopy__(self, memo: object) -> "Reading":
        return self  # it never changes, and a copy would follow `previous` to the first token

    def back(self, num_columns: int) -> "Reading":
        """The reading some columns earlier."""
        reading = self
        for _ in range(num_columns):
            assert reading.previous is not None
            reading = reading.previous
        return reading


class Reader(Protocol):
    """Turns anchor tokens into the tokens of one augmenting model."""

    # Which tokens are shown: see `graftlm.compose`.
    alignment: str

    @property
    def shows_unsettled(self) -> bool:
        """Whether tokens are shown that are taken back when more is known."""
        return self.alignment in ("prefix", "char_end")

    def start(self) -> Reading:
        """Before the first anchor token."""
        ...

    def read(self, reading: Reading, token: int) -> Reading:
        """After one more anchor token."""
        ...

    def unsettled(self, reading: Reading) -> tuple[tuple[int, int], ...]:
        """Tokens of the text that is not settled, as (id, end in characters)."""
        ...


class Writing:
    """What one anchor token gives the augmenting model: text, or markup with special tokens."""

    def __init__(self, stable: StableTokenizer, reading: Reading):
        self.stable = stable
        self.tail = reading.tail
        self.num_chars = reading.num_chars
        self.settled_chars = reading.settled_chars
        self.ids: list[int] = []
        self.ends: list[int] = []

    def add_text(self, text: str) -> None:
        """Text, in which nothing is special."""
        self.num_chars += len(text)
        self.tail, settled = self.stable.append(self.tail, text)
        self.settle(settled)

    def add_markup(self, symbols: Symbols) -> None:
        """Text and special tokens, of which each settles all text before it."""
        for is_text, group in itertools.groupby(symbols, key=lambda s: isinstance(s, str)):
            if is_text:
                self.add_text("".join(map(str, group)))
                continue
            for token in group:
                self.settle(self.stable.finish(self.tail))
                self.settled_chars = self.num_chars  # some tokenizers drop spaces
                self.tail = self.stable.behind_special()
                self.settle([(int(token), 0)])

    def settle(self, tokens: Iterable[tuple[int, int]]) -> None:
        """Note tokens, given with their numbers of characters."""
        for index, num_chars in tokens:
            self.settled_chars += num_chars
            self.ids.append(index)
            self.ends.append(self.settled_chars)


class TextReader(Reader):
    """Reads through the text: for an augmenting model with a tokenizer of its own.

    Args:
        anchor: The anchor's tokenizer.
        augmenting: The augmenting model's.
        alignment: "committed" shows a token once no continuation of the text can change it;
            "prefix" and "char_end" show all tokens of the text so far.
    """

    def __init__(
        self,
        anchor: PreTrainedTokenizerBase,
        augmenting: PreTrainedTokenizerBase,
        alignment: str = "committed",
    ):
        if not isinstance(anchor, PreTrainedTokenizerFast):
            raise ValueError(
                f"the anchor's tokenizer is a {type(anchor).__name__}, but reading its tokens as "
                "text needs a fast one, a PreTrainedTokenizerFast"
            )
        self.anchor = anchor
        self.augmenting = augmenting
        self.stable = StableTokenizer(augmenting)
        self.finder = MessageFinder.of(anchor)
        self.their_format = ChatFormat.written(augmenting)
        self.alignment = alignment
        self.special = special_ids(anchor)

    def start(self) -> Reading:
        """Before the first token: what the augmenting tokenizer puts before any text."""
        ids = self.stable.prefix_ids
        return Reading(
            previous=None,
            num_tokens=len(ids),
            new_ids=ids,
            new_ends=(0,) * len(ids),
            tail=self.stable.start(),
        )

    def read(self, reading: Reading, token: int) -> Reading:
        """After one more anchor token; special tokens spell nothing, but may mark a message."""
        if token in self.special:
            text, symbols, shown, pending = "", (token,), reading.shown, ()
        else:
            text, shown, pending = spell(self.anchor, reading.shown, reading.pending, token)
            symbols = tuple(text)
        held: Symbols = ()
        found = [("text", text)]
        if self.finder is not None:
            held, found = self.finder.find(reading.held, symbols)
        writing, role = Writing(self.stable, reading), reading.role
        for kind, value in found:
            if kind == "text" or (kind == "close" and not role):  # nothing to close: it is text
                writing.add_text(value)
            elif kind == "close":
                writing.add_markup(self.footer(role))
                role = ""
            else:
                if role:  # some templates end a user's message with the next one's header only
                    writing.add_markup(self.footer(role))
                role, is_first = value, not writing.num_chars
                if is_first and self.their_format is not None and self.their_format.writes_bos:
                    writing.tail = self.stable.behind_special()
                writing.add_markup(self.header(role, is_first=is_first))
        return Reading(
            previous=reading,
            num_tokens=reading.num_tokens + len(writing.ids),
            num_chars=writing.num_chars,
            new_ids=tuple(writing.ids),
            new_ends=tuple(writing.ends),
            shown=shown,
            pending=pending,
            role=role,
            held=held,
            tail=writing.tail,
            settled_chars=writing.settled_chars,
        )

    def header(self, role: str, is_first: bool) -> Symbols:
        """What the augmenting model's template writes before a message.

        A model without one reads the contents as paragraphs.
        """
        if self.their_format is None:
            return () if is_first else ("\n", "\n")
        headers = self.their_format.headers
        if is_first and headers[role] == headers["user"]:
            return self.their_format.first
        return headers[role]

    def footer(self, role: str) -> Symbols:
        """What it writes behind a message."""
        if self.their_format is None:
            return ()
        return self.their_format.footers[role]

    def unsettled(self, reading: Reading) -> tuple[tuple[int, int], ...]:
        """Tokens of the text so far that are not settled."""
        rest, end = [], reading.settled_chars
        for index, num_chars in self.stable.finish(reading.tail):
            end += num_chars
            rest.append((index, end))
        return tuple(rest)


class IdentityReader(Reader):
    """Reads the anchor's own tokens, but for those a smaller vocabulary lacks.

    Args:
        vocab_size: Tokens of the augmenting model.
    """

    alignment = "identity"

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def start(self) -> Reading:
        """Before the first token."""
        return Reading(previous=None, num_tokens=0)

    def read(self, reading: Reading, token: int) -> Reading:
        """After one more token, which is its own text of length 1."""
        place = reading.num_chars + 1
        if token >= self.vocab_size:
            return replace(reading.skip(), num_chars=place)
        return Reading(
            previous=reading,
            num_tokens=reading.num_tokens + 1,
            num_chars=place,
            new_ids=(token,),
            new_ends=(place,),
        )

    def unsettled(self, reading: Reading) -> tuple[tuple[int, int], ...]:
        """Nothing: a token is what it is."""
        return ()


@dataclass(frozen=True, kw_only=True, slots=True)
class RowPass:
    """What one pass reads of one row.

    Args:
        ids: Augmenting tokens to run in this pass: settled ones, then those of each branch. A
            branch is how the text up to one anchor token ends if nothing follows, as far as that
            differs from how it goes on.
        ranks: The number of each in its line of text, from the row's first token on.
        ends: Where each ends in the text, in characters.
        branches: 0 for settled tokens, else the number of the branch.
        bases: How many tokens of branch 0 stand before each in its line.
        visible: For each anchor token, how many tokens it may see of those that are settled in
            the end: its own text's, so that nothing of the future is seen.
        branch: The branch each anchor token sees too, or 0.
        chars: For each anchor token, how many characters the tokens up to it spell.
        num_seen: For each anchor token, how many tokens it sees in all.
        reading: The reading after the last anchor token.
    """

    ids: list[int]
    ranks: list[int]
    ends: list[int]
    branches: list[int]
    bases: list[int]
    visible: list[int]
    branch: list[int]
    chars: list[int]
    num_seen: list[int]
    reading: Reading


def read_row(
    reader: Reader, reading: Reading | None, tokens: Iterable[int], is_read: Iterable[bool]
) -> RowPass:
    """Read some more anchor tokens of a row.

    Args:
        reader: Of the augmenting model.
        reading: After the tokens before, or None at the beginning of a row.
        tokens: Anchor tokens.
        is_read: False for tokens that are not for the augmenting model, such as padding.
    """
    ids: list[int] = []
    ends: list[int] = []
    first_rank = 0 if reading is None else reading.num_tokens
    if reading is None:
        reading = reader.start()
        ids, ends = list(reading.new_ids), list(reading.new_ends)
    readings: list[Reading] = []
    for token, wanted in zip(tokens, is_read, strict=True):
        reading = reader.read(reading, token) if wanted else reading.skip()
        ids += reading.new_ids
        ends += reading.new_ends
        readings.append(reading)
    if reader.alignment == "char_end":
        for index, end in reader.unsettled(reading):
            ids.append(index)
            ends.append(end)
    chars = [node.num_chars for node in readings]
    visible = [node.num_tokens for node in readings]
    if reader.alignment == "char_end":
        visible = [first_rank + bisect_right(ends, n) for n in chars]
    ranks = list(range(first_rank, first_rank + len(ids)))
    made = RowPass(
        ids=ids,
        ranks=ranks,
        ends=ends,
        branches=[0] * len(ids),
        bases=[rank + 1 for rank in ranks],
        visible=visible,
        branch=[0] * len(readings),
        chars=chars,
        num_seen=list(visible),
        reading=reading,
    )
    if reader.alignment == "prefix":
        add_branches(made, reader, readings, first_rank)
    return made


def add_branches(row: RowPass, reader: Reader, readings: list[Reading], first_rank: int) -> None:
    """Let each anchor token see how the text up to it would end.

    Tokens that later text leaves as they are get no branch: the settled ones are the same, with
    the same tokens before them, and are run once.
    """
    settled = list(zip(row.ids, row.ends, strict=True))
    number, before = 0, None
    same, branch, length = 0, 0, 0
    for column, reading in enumerate(readings):
        # Columns that add no text see what the column before sees.
        if before is None or (reading.tail, reading.num_tokens) != before:
            before = reading.tail, reading.num_tokens
            unsettled = reader.unsettled(reading)
            length = len(unsettled)
            start = reading.num_tokens - first_rank
            same = num_equal(unsettled, settled[start : start + length])
            number += same < length
            branch = number if same < length else 0
            for k, (index, end) in enumerate(unsettled[same:], start=same):
                row.ids.append(index)
                row.ranks.append(reading.num_tokens + k)
                row.ends.append(end)
                row.branches.append(branch)
                row.bases.append(reading.num_tokens + same)
        row.visible[column] = reading.num_tokens + same
        row.branch[column] = branch
        row.num_seen[column] = reading.num_tokens + length


def num_equal(first: Sequence[object], second: Sequence[object]) -> int:
    """How many two sequences have in common at their beginning."""
    pairs = zip(first, second, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
