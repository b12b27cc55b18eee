"""Run an augmenting model that reads tokens of its own, as the text settles them."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from graftlm import decoder
from graftlm.alignment import Alignment, Blocks, align_by_rank
from graftlm.augmenting_tokens import (
    HOLE,
    AugmentingTokens,
    ReadingCache,
    columns_of,
    keeps_keys_only,
    read_batch,
    read_documents,
    seen_by,
)
from graftlm.config import DistanceUnit
from graftlm.frozen_states import take_states
from graftlm.masks import masks_by_position, skips_holes
from graftlm.reading import Reader

if TYPE_CHECKING:
    from graftlm.cache import ComposedCache
    from graftlm.composed import ComposedModel
    from graftlm.passes import ForwardPass, PassInputs


def has_reader(model: "ComposedModel", name: str) -> bool:
    """Whether an augmenting model reads tokens of its own, or only some of the anchor's."""
    return name in model.readers or model.config.alignments[name] != "identity"


def run_reader(
    model: "ComposedModel", forward_pass: "ForwardPass", name: str, inputs: "PassInputs"
) -> None:
    """Capture the hidden states of what one augmenting model reads of the new tokens."""
    view = model.running_view(name)
    if model.config.alignments[name] == "prefix" and not skips_holes(view):
        raise ValueError(
            f"augmenting model {name!r} is a {type(view).__name__}, which cannot run several "
            "endings of a text at once, as alignment='prefix' needs; use 'committed'"
        )
    cache = forward_pass.cache
    reading = None if cache is None else cache.readings[name]
    if reading is None:
        tokens = read_tokens(model, name, inputs)
        ranks, ends, branches = tokens["ranks"], tokens["ends"], tokens["branches"]
    else:
        tokens = read_on(model, name, reading, cache, inputs)
        ranks, ends, branches = reading.ranks, reading.ends, reading.branches
    if not ranks.shape[1]:
        return
    if inputs.frozen_states is not None:
        take_states(model, forward_pass, name, inputs.frozen_states, tokens["ranks"].shape)
    elif tokens["ranks"].shape[1]:
        check_context(view, name, tokens)
        run_read_tokens(model, forward_pass, name, tokens, reading)

    def make(start: int, end: int) -> Alignment:
        return align_by_rank(
            columns_of(tokens, start, end),
            ranks,
            ends,
            branches,
            position=model.config.bridge.position,
            unit=distance_unit(model, name),
            num_heads=model.num_bridge_heads,
        )

    width = ranks.numel() * model.num_bridge_heads
    forward_pass.plan[name] = Blocks(make, tokens["visible"].shape[1], width, reading is not None)


def read_tokens(model: "ComposedModel", name: str, inputs: "PassInputs") -> AugmentingTokens:
    """What an augmenting model reads of whole rows: as prepared, or read here."""
    # A prompt mask or other tokens to read may not have been known when they were prepared.
    is_prepared = inputs.augmenting_inputs is not None
    if is_prepared and inputs.prompt_mask is None and inputs.read_ids is None:
        assert inputs.augmenting_inputs is not None
        if name not in inputs.augmenting_inputs:
            raise ValueError(
                f"augmenting_inputs lacks augmenting model {name!r}; make them with "
                "ComposedProcessor, or leave them out"
            )
        prepared: Any = inputs.augmenting_inputs[name]
        device = inputs.tokens_to_read.device
        made: Any = {key: tensor.to(device) for key, tensor in prepared.items()}
        return made
    tokens, position_ids = inputs.tokens_to_read, inputs.position_ids
    is_read = inputs.columns_to_read(0)
    if inputs.attention_mask is None and position_ids is not None:
        positions = position_ids.expand_as(tokens)
        return read_documents(reader(model, name), tokens, positions, is_read)
    return read_batch(reader(model, name), [None] * len(tokens), tokens, is_read)[0]


def read_on(
    model: "ComposedModel",
    name: str,
    reading: ReadingCache,
    cache: "ComposedCache",
    inputs: "PassInputs",
) -> AugmentingTokens:
    """Read the new tokens of a pass with a cache, and remember them."""
    past = int(cache.get_seq_length())
    if reading.num_columns != past:
        raise ValueError(
            f"the cache holds {past} tokens, of which augmenting model {name!r} has read "
            f"{reading.num_columns}, so it cannot read on; it was switched off: start with a "
            "fresh cache"
        )
    if reading.config.model_type in decoder.STATE_IN_MODEL:
        raise ValueError(
            f"augmenting model {name!r} keeps its state in itself and not in a cache, so its rows "
            "cannot advance one by one; pass use_cache=False"
        )
    shows_unsettled = reader(model, name).shows_unsettled
    if shows_unsettled and not keeps_keys_only(reading.config):
        raise ValueError(
            f"augmenting model {name!r} is recurrent and cannot take tokens back, which "
            "alignment='char_end' needs; use 'committed', or use_cache=False"
        )
    if past and shows_unsettled:
        cache.drop_slots(name, reading.roll_back())
    ids = inputs.tokens_to_read
    tokens, readings = read_batch(
        reader(model, name),
        reading.readings or [None] * len(ids),
        ids,
        inputs.columns_to_read(past, prompt_only=model.config.reads == "prompt"),
    )
    reading.extend(tokens, readings)
    return tokens


def check_context(view: PreTrainedModel, name: str, tokens: AugmentingTokens) -> None:
    """Refuse texts beyond the positions an augmenting model has learned, which have no vector.

    Raises:
        ValueError: Naming the model and its context.
    """
    size = decoder.learned_positions(view)
    if size is not None and int(tokens["position_ids"].max()) >= size:
        raise ValueError(
            f"the text has {int(tokens['position_ids'].max()) + 1} tokens of augmenting model "
            f"{name!r}, but its context is {size}; shorten the text"
        )


def run_read_tokens(
    model: "ComposedModel",
    forward_pass: "ForwardPass",
    name: str,
    tokens: AugmentingTokens,
    reading: ReadingCache | None,
) -> None:
    """Run an augmenting model over the tokens read in this pass."""
    view, input_ids = model.running_view(name), tokens["input_ids"]
    is_packed = bool(tokens["hidden"].any())
    if is_packed and not skips_holes(view):
        run_pieces(model, forward_pass, name, tokens, document_pieces(tokens))
        return
    if reading is not None and reading.by_row:
        run_pieces(model, forward_pass, name, tokens, row_pieces(tokens, reading))
        return
    arguments = decoder.call_arguments(
        view,
        input_ids=input_ids,
        attention_mask=mask_of(view, tokens, reading, is_packed),
        query_length=input_ids.shape[1],
        cache=None if reading is None else reading.caches[0],
        position_ids=tokens["position_ids"],
    )
    model.capture(forward_pass, name, arguments)


def mask_of(
    view: PreTrainedModel, tokens: AugmentingTokens, reading: ReadingCache | None, is_packed: bool
) -> Any:
    """What an augmenting model takes as `attention_mask`: a plain one where that says enough."""
    has_branches = bool(tokens["branches"].any())
    is_first = reading is None or reading.ranks.shape[1] == tokens["ranks"].shape[1]
    if is_first and not has_branches and not is_packed:
        return (tokens["ranks"] != HOLE).long()
    ranks = tokens["ranks"] if reading is None else reading.ranks
    branches = tokens["branches"] if reading is None else reading.branches
    seen = seen_by(tokens, ranks, branches)
    if reading is not None:
        return masks_by_position(view, seen, tokens["ranks"], ranks)
    positions = tokens["position_ids"].masked_fill(ranks == HOLE, HOLE)
    return masks_by_position(view, seen, positions, positions)


Piece = tuple[int, int, int, Cache | None]  # row, first and last (exclusive) column, cache


def row_pieces(tokens: AugmentingTokens, reading: ReadingCache) -> Iterator[Piece]:
    """Each row's new tokens, to be run with the row's own cache."""
    # Some recurrent models of transformers read several tokens wrongly behind a cache.
    is_first = reading.ranks.shape[1] == tokens["ranks"].shape[1]
    one_by_one = not is_first and not keeps_keys_only(reading.config)
    for row, cache in enumerate(reading.caches):
        length = int((tokens["ranks"][row] != HOLE).sum())
        for start, end in spans(length, one_by_one):
            yield row, start, end, cache


def document_pieces(tokens: AugmentingTokens) -> Iterator[Piece]:
    """Each packed document, to be run alone."""
    for row, (starts, ranks) in enumerate(
        zip(tokens["starts"].tolist(), tokens["ranks"].tolist(), strict=True)
    ):
        filled = [start for start, rank in zip(starts, ranks, strict=True) if rank != HOLE]
        for start in sorted(set(filled)):
            yield row, start, start + filled.count(start), None


def run_pieces(
    model: "ComposedModel",
    forward_pass: "ForwardPass",
    name: str,
    tokens: AugmentingTokens,
    pieces: Iterator[Piece],
) -> None:
    """Run pieces one by one, and put their states together again."""
    layers = {c.augmenting_layer for c in model.config.connections if c.augmenting == name}
    view, shape = model.running_view(name), tokens["input_ids"].shape
    states: dict[int, Tensor] = {}
    for row, start, end, cache in pieces:
        arguments = decoder.call_arguments(
            view,
            input_ids=tokens["input_ids"][row : row + 1, start:end],
            attention_mask=None,
            query_length=end - start,
            cache=cache,
            position_ids=tokens["position_ids"][row : row + 1, start:end],
        )
        model.capture(forward_pass, name, arguments)
        for layer in layers:
            state = forward_pass.states[name, layer]
            whole = states.setdefault(layer, state.new_zeros(*shape, state.shape[-1]))
            whole[row, start:end] = state[0]
    forward_pass.states |= {(name, layer): whole for layer, whole in states.items()}


def spans(length: int, one_by_one: bool) -> list[tuple[int, int]]:
    """The columns in which to run so many tokens."""
    if one_by_one:
        return [(k, k + 1) for k in range(length)]
    return [(0, length)] if length else []


def reader(model: "ComposedModel", name: str) -> Reader:
    """How an augmenting model reads the anchor's tokens.

    Raises:
        ValueError: If the tokenizers are not there.
    """
    if name not in model.readers:
        raise ValueError(
            f"augmenting model {name!r} has a tokenizer of its own, but the tokenizers are "
            "not at hand; pass tokenizer= and augmenting_tokenizers="
        )
    return model.readers[name]


def distance_unit(model: "ComposedModel", name: str) -> DistanceUnit:
    """What positions count; tokens where both models share them."""
    is_shared = model.config.alignments[name] == "identity"
    return "tokens" if is_shared else model.config.bridge.distance_unit
