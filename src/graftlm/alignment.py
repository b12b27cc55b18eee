"""Which augmenting positions each anchor position may read.

The paper says nothing about the mask. Its decoding (section 3.1) forces it: at step t the
augmenting model has seen x_1..x_t only. With shared tokens, position t reads augmenting positions
up to t (`align`); with tokens of its own, those that x_1..x_t settle (`align_by_rank`).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int, Real
from torch import Tensor

from graftlm.augmenting_tokens import AugmentingTokens
from graftlm.bridge import distance_bias
from graftlm.config import DistanceUnit, Position


@dataclass(frozen=True, kw_only=True, slots=True)
class Alignment:
    """What the bridges of one augmenting model need to know about positions in one forward pass.

    Args:
        query_positions: Positions of the anchor tokens of this pass, counted in tokens.
        new_key_positions: Positions of the augmenting tokens that were run in this pass.
        cross_mask: See `Bridge.forward`.
        any_visible: False where a position may read nothing; its update is dropped. None if
            every position reads something.
    """

    query_positions: Real[Tensor, "#batch seq"]
    new_key_positions: Real[Tensor, "#batch new_seq"]
    cross_mask: Tensor | None
    any_visible: Bool[Tensor, "#batch seq 1"] | None


WHOLE = 2**26  # numbers of a mask (256 MB) up to which it is made once, for all bridges
BLOCK = 2**24  # numbers of the mask of one block of a longer prompt


class Blocks:
    """The alignment of the tokens of one pass, for all bridges of an augmenting model.

    A prompt is aligned block by block, each time anew: what "distance" adds to the scores of
    8,192 tokens at once are 2.4 GB for 9 heads. Where gradients are computed it is kept whole.

    Args:
        make: Aligns the tokens from a first to a last (exclusive).
        length: How many there are.
        width: Numbers a row of the mask has, for all rows of the batch.
        is_cached: Whether keys come from a cache, so that blocks can share them.
    """

    def __init__(
        self, make: Callable[[int, int], Alignment], length: int, width: int, is_cached: bool
    ):
        may_split = is_cached and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        self.make = make
        self.length = length
        self.size = max(1, BLOCK // width)
        self.whole = None if may_split and length * width > WHOLE else make(0, length)

    def __iter__(self) -> Iterator[tuple[slice, Alignment]]:
        if self.whole is not None:
            yield slice(0, self.length), self.whole
            return
        for start in range(0, self.length, self.size):
            end = min(start + self.size, self.length)
            yield slice(start, end), self.make(start, end)


def align(
    *,
    past_length: int | Tensor,
    query_length: int,
    kept_length: int | Tensor,
    new_length: int,
    key_length: int,
    readable: Bool[Tensor, "batch aug_seq"] | None,
    segments: Int[Tensor, "batch seq"] | None,
    position: Position,
    num_heads: int,
    device: torch.device,
) -> Alignment:
    """Let each position read the augmenting states of its own and of earlier tokens.

    Args:
        past_length, query_length: Anchor tokens before and in this pass; lengths of static
            caches are tensors.
        kept_length, new_length: Keys from before and of this pass.
        key_length: Keys the attention sees; a static cache shows its empty slots too.
        readable: False for keys that nobody may read (padding, or not part of the prompt).
        segments: Number of the packed document each position belongs to; None if not packed.
        position, num_heads: Of the bridges, for the distance bias.
        device: Where the masks are made.
    """
    query_positions = torch.arange(query_length, device=device) + past_length
    key_positions = torch.arange(key_length, device=device)
    visible = (key_positions[None, :] <= query_positions[:, None])[None]  # (1, seq, aug_seq)
    any_visible = None
    if segments is not None:
        visible = visible & (segments[:, :, None] == segments[:, None, :key_length])
    if readable is not None:
        visible = visible & readable[:, None, :key_length]
        any_visible = visible.any(-1, keepdim=True)
        # A row without any key would be NaN; it reads all of them, and its update is dropped.
        visible = visible | ~any_visible

    cross_mask: Tensor | None = visible[:, None]  # (#batch, 1, seq, aug_seq)
    if position == "distance":
        cross_mask = distance_bias(num_heads, query_positions[None], key_positions[None], visible)
    elif readable is None and segments is None and not isinstance(kept_length, Tensor):
        # Plain causal attention, or one query that reads all: the fast kernels need no mask.
        # A static cache has empty slots, which must stay hidden.
        all_filled = key_length == kept_length + new_length
        is_plain = all_filled and (query_length == 1 or key_length == query_length)
        cross_mask = None if is_plain else cross_mask
    return Alignment(
        query_positions=query_positions[None],
        new_key_positions=torch.arange(new_length, device=device)[None] + kept_length,
        cross_mask=cross_mask,
        any_visible=any_visible,
    )


CHARACTERS_A_TOKEN = 4  # of English text; what a distance of one token stands for


def align_by_rank(
    tokens: AugmentingTokens,
    ranks: Int[Tensor, "batch aug_seq"],
    ends: Int[Tensor, "batch aug_seq"],
    branches: Int[Tensor, "batch aug_seq"],
    *,
    position: Position,
    unit: DistanceUnit,
    num_heads: int,
) -> Alignment:
    """Let each anchor token read the augmenting tokens that the text up to it gives.

    Args:
        tokens: What is read in this pass.
        ranks, ends, branches: Number in the row (-1 for holes), end in characters and branch
            (0 for none) of every key, the new ones last.
        position, unit, num_heads: Of the bridges.
    """
    rank = ranks[:, None, :]
    settled = (rank >= tokens["hidden"][:, :, None]) & (rank < tokens["visible"][:, :, None])
    branch = branches[:, None, :]
    visible = (branch == 0) & settled
    visible = visible | ((branch > 0) & (branch == tokens["branch"][:, :, None]) & (rank >= 0))
    any_visible = visible.any(-1, keepdim=True)
    visible = visible | ~any_visible  # an empty row would be NaN; its update is dropped
    if unit == "characters":
        query_positions = tokens["chars"] / CHARACTERS_A_TOKEN
        key_positions = ends / CHARACTERS_A_TOKEN
    else:
        query_positions = tokens["hidden"] + tokens["num_seen"] - 1
        key_positions = ranks
    cross_mask: Tensor = visible[:, None]
    if position == "distance":
        cross_mask = distance_bias(num_heads, query_positions, key_positions, visible)
    num_new = tokens["ranks"].shape[1]
    return Alignment(
        query_positions=query_positions,
        new_key_positions=key_positions[:, key_positions.shape[1] - num_new :],
        cross_mask=cross_mask,
        any_visible=any_visible,
    )


def readable_keys(
    attention_mask: Tensor | None, prompt_mask: Tensor | None, key_length: int
) -> Bool[Tensor, "batch aug_seq"] | None:
    """Which keys hold tokens, and prompt tokens if asked; None if all of them.

    Args:
        attention_mask: (batch, any length), 1 for tokens and 0 for padding, or None. What it
            does not cover are later slots of a static cache; causality hides them.
        prompt_mask: (batch, any length), 1 for tokens of the prompt, or None to read all.
        key_length: Number of keys.
    """
    readable = None
    if attention_mask is not None:
        missing = max(key_length - attention_mask.shape[1], 0)
        readable = F.pad(attention_mask.bool(), (0, missing), value=True)[:, :key_length]
    if prompt_mask is not None:
        missing = max(key_length - prompt_mask.shape[1], 0)
        prompt = F.pad(prompt_mask.bool(), (0, missing))[:, :key_length]
        readable = prompt if readable is None else readable & prompt.to(readable.device)
    if readable is None or torch.compiler.is_compiling():
        return readable
    return None if bool(readable.all()) else readable


def packed_segments(position_ids: Int[Tensor, "#batch seq"]) -> Int[Tensor, "batch seq"] | None:
    """Number of the packed document of each position, or None if there is only one a row.

    A document begins wherever the positions do not go on by one (transformers' convention
    when there is no attention mask).
    """
    first = position_ids[:, :1] - 1
    segments = (torch.diff(position_ids, prepend=first, dim=-1) != 1).cumsum(-1)
    if not torch.compiler.is_compiling() and not bool(segments.any()):
        return None
    return segments
