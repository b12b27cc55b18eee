"""What an augmenting model with tokens of its own reads in one pass, and remembers between passes.

Rows settle different numbers of augmenting tokens, so a pass over several rows is padded on the
right. In the cache that padding stays behind as holes, which nobody sees. A model that cannot
skip holes (recurrent, or with positions counted by slot) is run row by row instead.
"""

import copy
import itertools
from collections.abc import Sequence
from typing import Any, TypedDict

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)
from transformers.configuration_utils import PreTrainedConfig

from graftlm.growing_cache import let_grow
from graftlm.reading import Reader, Reading, RowPass, read_row

HOLE = -1


class AugmentingTokens(TypedDict):
    """The tokens one augmenting model reads in one pass, and who sees them.

    All are integer tensors. `batch` rows; `seq` anchor tokens and `aug_seq` augmenting tokens of
    this pass.

    Args:
        input_ids: (batch, aug_seq), 0 for padding.
        ranks: (batch, aug_seq), the token's number in its row, from 0; -1 for padding.
        ends: (batch, aug_seq), where the token ends in the text, in characters.
        branches: (batch, aug_seq), 0 for settled tokens, else the number of the branch.
        bases: (batch, aug_seq), how many tokens of branch 0 stand before the token in its line.
        starts: (batch, aug_seq), the rank of the first token of its document.
        position_ids: (batch, aug_seq), the token's number in its document.
        visible: (batch, seq), how many tokens of branch 0 an anchor token sees of its row: those
            of the text up to it, whether settled there or left as they are by what follows.
        hidden: (batch, seq), how many of these it does not see, being of earlier documents.
        branch: (batch, seq), the branch an anchor token sees besides, or 0.
        num_seen: (batch, seq), how many tokens it sees with those of the branch.
        chars: (batch, seq), characters of text up to each anchor token.
    """

    input_ids: Tensor
    ranks: Tensor
    ends: Tensor
    branches: Tensor
    bases: Tensor
    starts: Tensor
    position_ids: Tensor
    visible: Tensor
    hidden: Tensor
    branch: Tensor
    num_seen: Tensor
    chars: Tensor


def columns_of(tokens: AugmentingTokens, start: int, end: int) -> AugmentingTokens:
    """The same, as far as it concerns some of the anchor's tokens."""
    of_anchor = ("visible", "hidden", "branch", "num_seen", "chars")
    given: Any = tokens
    made: Any = dict(given) | {name: given[name][:, start:end] for name in of_anchor}
    return made


class ReadingCache:
    """What is remembered of an augmenting model with tokens of its own.

    Args:
        config: Of the augmenting model as it is run.
        by_row: Whether to run it row by row, each with a cache of its own.
    """

    def __init__(self, config: PreTrainedConfig, by_row: bool):
        self.config = config
        self.by_row = by_row
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.readings: list[Reading] = []
        self.num_columns = 0
        self.caches: list[Cache] = []
        self.ranks = self.ends = self.branches = torch.empty(0, 0, dtype=torch.long)

    def new_cache(self) -> Cache:
        """An empty cache of the augmenting model.

        It keeps every token: a sliding window would count holes, and could not be rolled back.
        """
        return let_grow(DynamicCache(config=None if keeps_keys_only(self.config) else self.config))

    def extend(self, tokens: AugmentingTokens, readings: list[Reading]) -> None:
        """Remember a pass."""
        if not self.readings:
            batch = len(readings)
            self.caches = [self.new_cache() for _ in range(batch if self.by_row else 1)]
            self.ranks = self.ends = self.branches = tokens["ranks"].new_empty(batch, 0)
        self.readings = readings
        self.num_columns += tokens["visible"].shape[1]
        self.ranks = torch.cat([self.ranks, tokens["ranks"]], dim=1)
        self.ends = torch.cat([self.ends, tokens["ends"]], dim=1)
        self.branches = torch.cat([self.branches, tokens["branches"]], dim=1)

    def forget_unsettled(self) -> None:
        """Turn tokens that later text may change into holes."""
        if self.readings:
            known = torch.tensor([r.num_tokens for r in self.readings], device=self.ranks.device)
            forgotten = (self.ranks >= known[:, None]) | (self.branches > 0)
            self.ranks = self.ranks.masked_fill(forgotten, HOLE)

    def drop_last_holes(self) -> int:
        """Give up the last slots, as far as they are holes in every row; returns their number."""
        filled = (self.ranks != HOLE).any(0)
        num_slots = int(filled.nonzero().max()) + 1 if bool(filled.any()) else 0
        num_dropped = self.ranks.shape[1] - num_slots
        if num_dropped:
            self.ranks, self.ends = self.ranks[:, :num_slots], self.ends[:, :num_slots]
            self.branches = self.branches[:, :num_slots]
            if not self.by_row:
                self.caches[0].crop(-num_dropped)
        return num_dropped

    def crop(self, num_columns: int) -> int:
        """Forget the last anchor tokens; returns how many slots the bridges must forget."""
        self.readings = [reading.back(num_columns) for reading in self.readings]
        self.num_columns -= num_columns
        return self.roll_back()

    def roll_back(self) -> int:
        """Forget what the readings do not hold; returns how many slots the bridges must forget."""
        before = (self.ranks != HOLE).sum(1)
        self.forget_unsettled()
        if self.by_row:
            removed = before - (self.ranks != HOLE).sum(1)
            for cache, number in zip(self.caches, removed.tolist(), strict=True):
                if number:
                    cache.crop(-number)
        return self.drop_last_holes()

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order; a row may be named several times."""
        if not self.readings:
            return
        index = torch.tensor(rows)  # on the CPU it can index tensors of any device
        self.readings = [self.readings[row] for row in rows]
        self.ranks, self.ends = self.ranks[index], self.ends[index]
        self.branches = self.branches[index]
        if self.by_row:
            # Recurrent states are changed in place, so that a row taken twice needs two.
            self.caches = [copy.deepcopy(self.caches[row]) for row in rows]
        else:
            self.caches[0].batch_select_indices(index)


def keeps_keys_only(config: PreTrainedConfig) -> bool:
    """Whether all the model remembers is keys and values, of all tokens or of a window."""
    kinds = {type(layer) for layer in DynamicCache(config=config).layers}
    return kinds <= {DynamicLayer, DynamicSlidingWindowLayer}


def read_batch(
    reader: Reader,
    readings: Sequence[Reading | None],
    tokens: Int[Tensor, "batch seq"],
    is_read: Tensor | None,
) -> tuple[AugmentingTokens, list[Reading]]:
    """Read on in every row.

    Args:
        reader: Of the augmenting model.
        readings: After the tokens before; None at the beginning of a row.
        tokens: Anchor tokens.
        is_read: (batch, seq), 0 for tokens that are not for the augmenting model; None for none.

    Returns:
        The tokens to run, and the readings after them.
    """
    rows = [
        read_row(reader, reading, row, keep)
        for reading, row, keep in zip(
            readings, tokens.tolist(), wanted(tokens, is_read), strict=True
        )
    ]
    # Whole rows get a hole at least: with nothing to read, a bridge still belongs to the graph.
    at_least = int(all(reading is None for reading in readings))
    made = batched([row_columns([row]) for row in rows], tokens.device, at_least)
    return made, [row.reading for row in rows]


def wanted(tokens: Int[Tensor, "batch seq"], is_read: Tensor | None) -> list[list[bool]]:
    """Which tokens are for the augmenting model; all if nothing is said."""
    if is_read is None:
        return [[True] * tokens.shape[1]] * len(tokens)
    return is_read.bool().tolist()


def read_documents(
    reader: Reader,
    tokens: Int[Tensor, "batch seq"],
    position_ids: Int[Tensor, "batch seq"],
    is_read: Tensor | None,
) -> AugmentingTokens:
    """Read rows of packed documents, each from a fresh start.

    A document begins wherever the positions do not go on by one, as in `packed_segments`.

    Args:
        reader: Of the augmenting model.
        tokens: Anchor tokens.
        position_ids: Their positions.
        is_read: As in `read_batch`.
    """
    rows = []
    for row, positions, keep in zip(
        tokens.tolist(), position_ids.tolist(), wanted(tokens, is_read), strict=True
    ):
        starts = [k for k, p in enumerate(positions) if k == 0 or p != positions[k - 1] + 1] + [
            len(row)
        ]
        documents = [
            read_row(reader, None, row[start:end], keep[start:end])
            for start, end in itertools.pairwise(starts)
        ]
        rows.append(row_columns(documents))
    return batched(rows, tokens.device, at_least=1)


def row_columns(documents: list[RowPass]) -> dict[str, list[int]]:
    """The documents of one row, one behind the other."""
    columns: dict[str, list[int]] = {name: [] for name in AugmentingTokens.__annotations__}
    rank = branch = 0
    for document in documents:
        num_columns, num_tokens = len(document.visible), len(document.ids)
        moved = {
            "input_ids": document.ids,
            "ranks": [rank + k for k in document.ranks],
            "ends": document.ends,
            "branches": [k and branch + k for k in document.branches],
            "bases": [rank + k for k in document.bases],
            "starts": [rank] * num_tokens,
            "position_ids": document.ranks,
            "visible": [rank + k for k in document.visible],
            "hidden": [rank] * num_columns,
            "branch": [k and branch + k for k in document.branch],
            "num_seen": document.num_seen,
            "chars": document.chars,
        }
        for name, values in moved.items():
            columns[name] += values
        rank += document.branches.count(0)
        branch += max(document.branch, default=0)
    return columns


def batched(
    rows: list[dict[str, list[int]]], device: torch.device, at_least: int = 0
) -> AugmentingTokens:
    """Rows as tensors, padded on the right to `at_least` augmenting tokens."""
    fillers = {"ranks": HOLE}
    per_token = ("input_ids", "ranks", "ends", "branches", "bases", "starts", "position_ids")
    made: Any = {
        name: padded(
            [row[name] for row in rows],
            fillers.get(name, 0),
            at_least if name in per_token else 0,
        ).to(device)
        for name in AugmentingTokens.__annotations__
    }
    return made


def padded(rows: list[list[int]], value: int, at_least: int = 0) -> Int[Tensor, "batch longest"]:
    """Rows of unequal length as one tensor, padded on the right."""
    longest = max(at_least, *(len(row) for row in rows))
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows], dtype=torch.long)


def seen_by(
    tokens: AugmentingTokens, ranks: Tensor, branches: Tensor
) -> Bool[Tensor, "batch aug_seq slots"]:
    """Which slots each new augmenting token sees: its line of text, and nothing else.

    Args:
        tokens: The new ones. Padding sees all, so that no row is empty; nobody sees padding.
        ranks, branches: (batch, slots), of all slots.
    """
    rank, branch = ranks[:, None, :], branches[:, None, :]
    own = {name: tokens[name][:, :, None] for name in ("ranks", "branches", "bases", "starts")}
    is_settled = (branch == 0) & (rank < own["bases"])
    is_own_branch = (branch > 0) & (branch == own["branches"]) & (rank <= own["ranks"])
    seen = (rank >= own["starts"]) & (rank != HOLE) & (is_settled | is_own_branch)
    return seen | (own["ranks"] == HOLE)
