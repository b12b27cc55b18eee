"""Compute what training never changes once, and keep it in a states cache.

cache_states(model, dataset, folder) -> StatesCache

The work is cut into parts, which are shared out over the processes of a distributed run; it goes
on where it stopped.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from transformers.integrations import is_fsdp_enabled

from graftlm import decoder
from graftlm.augmenting_tokens import HOLE
from graftlm.bases import VOLATILE, reference, role_of
from graftlm.collation import IGNORED
from graftlm.frozen_states import connected_layers, record_anchor
from graftlm.own_tokens import has_reader, read_tokens
from graftlm.packing import inner_tensors, quantization_of
from graftlm.passes import PassInputs, prompt_of
from graftlm.sharding import is_spread, whole, whole_shape
from graftlm.sizes import readable_bytes
from graftlm.states_cache import (
    Layout,
    StatesCache,
    data_hash,
    missing_parts,
    read_layout,
    write_layout,
    write_part,
)

if TYPE_CHECKING:
    from graftlm.causal_lm import ComposedForCausalLM
    from graftlm.composed import ComposedModel

PART_BYTES = 256e6  # of hidden states a file, about: what is lost when work is stopped
SAMPLE = 64  # examples to estimate from how many tokens other tokenizers make


@dataclass(frozen=True, kw_only=True, slots=True)
class StatesSize:
    """What hidden states take on disk.

    Args:
        num_bytes: In all.
        is_exact: False if tokens of other tokenizers were estimated from some examples.
    """

    num_bytes: int
    is_exact: bool


def cache_states(
    model: "ComposedForCausalLM",
    examples: Any,
    folder: str | os.PathLike[str],
    *,
    dtype: str = "auto",
    batch_size: int = 8,
    console: Console | None = None,
) -> StatesCache:
    """Compute the hidden states that training the bridges never changes, and keep them.

    These are the augmenting models' at every connected layer, and the anchor's at its first.
    What the folder holds already is not computed again. Under `torch.autocast` they are what
    training under the same autocast would compute.

    Args:
        model: The composed model; nothing in the frozen models may be trainable.
        examples: A dataset or list of `input_ids`, `labels` and perhaps `read_ids`.
        folder: Where to keep them.
        dtype: "auto" keeps the precision of the models; "bfloat16" halves that of float32.
        batch_size: Examples to run at once.
        console: Where to show progress; by default nowhere.

    Raises:
        ValueError: If the folder holds states of something else, the disk is too small, `dtype`
            cannot hold the states, the anchor has adapters to train, or the frozen models are
            spread over processes.
        OSError: If the disk is full before the end; what is complete is kept.
    """
    folder, console = Path(folder), console or Console(quiet=True)
    check_frozen_parts(model)
    if not len(examples):
        raise ValueError("there are no examples to compute hidden states of")
    layout, size = agree(*plan(model, examples, dtype), folder)
    missing = missing_parts(folder, layout)
    if missing and not is_whole(model):
        raise ValueError(
            "the frozen models are spread over processes, so that none can run them alone; compute "
            "their hidden states before, with graftlm cache in one process or more"
        )
    rank, num_processes = process()
    barrier()  # all have seen what is missing before anything is written
    check_disk(folder, size.num_bytes * len(missing) / layout.num_parts, size)
    ours = missing[rank::num_processes]
    total = sum(len(layout.part(number)) for number in ours)
    with Progress(console=console, disable=not console.is_terminal or not ours) as progress:
        task = progress.add_task("hidden states", total=total)
        for number in ours:
            states: dict[int, dict[str, Tensor]] = {}
            for rows in batches(examples, layout.part(number), batch_size):
                states |= zip(
                    rows, run_rows(model, [examples[k] for k in rows], dtype), strict=True
                )
                progress.advance(task, len(rows))
            lengths = {
                part: f"{part}.{at[0]}" for part, at in connected_layers(model.model).items()
            }
            examples_of = [states[k] for k in layout.part(number)]
            write_part(folder, layout, number, examples_of, lengths)
    barrier()
    return StatesCache(folder)


def plan(
    model: "ComposedForCausalLM", examples: Any, dtype: str
) -> tuple[Layout | None, StatesSize | None]:
    """What is to be computed; where one process alone has read the weights, it alone knows."""
    if process()[0] > 0 and not any(map(is_spread, model.parameters())):
        return None, None
    size = states_size(model, examples, dtype)
    part_size = max(1, round(PART_BYTES / size.num_bytes * len(examples)))
    layout = Layout(
        made_for=made_for(model, examples, dtype),
        num_examples=len(examples),
        part_size=min(part_size, len(examples)),
    )
    return layout, size


def check_frozen_parts(model: "ComposedForCausalLM") -> None:
    """Refuse a model whose hidden states training does change.

    Raises:
        ValueError: Naming a parameter, or what else stands in the way.
    """
    for name in model.augmenting:
        if not model.model.is_read(name):
            reason = "its scale is 0" if model.model.scale_of(name) == 0 else "within without"
            raise ValueError(
                f"augmenting model {name!r} is switched off ({reason}), so that it gives no "
                "hidden states; switch it on first"
            )
    if getattr(model.config.get_text_config(), "num_kv_shared_layers", 0):
        raise ValueError(
            f"{type(model.anchor).__name__} has layers that read the keys and values of lower "
            "ones, which a pass on given hidden states does not run; train without a states cache"
        )
    for part in (model.anchor, *model.augmenting.values()):
        for name, parameter in part.named_parameters():
            if parameter.requires_grad:
                raise ValueError(
                    f"{type(part).__name__} has parameters to train, such as {name}, so that its "
                    "hidden states change in training and cannot be kept; train without a states "
                    "cache"
                )


def is_whole(model: "ComposedForCausalLM") -> bool:
    """Whether every process holds all weights; with FSDP only the first reads them."""
    return not is_fsdp_enabled() and not any(map(is_spread, model.parameters()))


# ---- what the states depend on -----------------------------------------------------------


def made_for(model: "ComposedForCausalLM", examples: Any, dtype: str) -> dict[str, Any]:
    """All that the states depend on, in the words of a message, each with a hash or value."""
    bases = {"anchor": model.anchor, **model.augmenting}
    facts: dict[str, Any] = {"the data": data_hash(examples)}
    facts |= {role_of(name): hash_of(facts_of(base)) for name, base in bases.items()}
    facts["the connected layers"] = connected_layers(model.model)
    facts["what is read"] = model.config.reads
    # "prefix" ran more tokens once, so that older states would not fit.
    rules = model.config.alignments
    facts["the alignment"] = {n: "prefix, once" if r == "prefix" else r for n, r in rules.items()}
    facts["the tokenizers"] = hash_of(facts_of_tokenizers(model))
    facts["the precision"] = [dtype, autocast_dtype(model.device)]
    return json.loads(json.dumps(facts))


def facts_of(base: PreTrainedModel) -> list[Any]:
    """What the hidden states of a frozen model depend on, as the model is now.

    Weights that are offloaded are known by where they came from.
    """
    config = {k: v for k, v in base.config.to_dict().items() if k not in VOLATILE}
    computed = [base.config._attn_implementation, base.dtype, quantization_of(base)]
    adapters = [adapter.active_adapters for adapter in decoder.trainable_adapters(base)]
    weights = hashlib.sha256()
    for name, tensor in sorted(decoder.trunk(base).named_parameters()):
        for inner in inner_tensors(tensor):
            weights.update(f"{name} {inner.dtype} {whole_shape(inner)}\n".encode())
            if inner.is_meta:
                weights.update(str(reference(base)).encode())
            else:
                plain = whole(inner).cpu().contiguous().reshape(-1)
                weights.update(plain.view(torch.uint8).numpy().data)
    return [config, computed, adapters, weights.hexdigest()]


def facts_of_tokenizers(model: "ComposedForCausalLM") -> dict[str, Any]:
    """The tokenizers by which text is read, with added tokens and chat templates, if any is."""
    if set(model.config.alignments.values()) == {"identity"}:
        return {}
    assert model.processor is not None
    return {
        name: [tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template]
        for name, tokenizer in model.processor.all_tokenizers.items()
    }


def hash_of(value: Any) -> str:
    """SHA-256 of plain data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def autocast_dtype(device: torch.device) -> str | None:
    """The precision `torch.autocast` computes in here, or None where it is off."""
    if not torch.is_autocast_enabled(device.type):
        return None
    return str(torch.get_autocast_dtype(device.type)).removeprefix("torch.")


def agree(
    layout: Layout | None, size: StatesSize | None, folder: Path
) -> tuple[Layout, StatesSize]:
    """The layout of what is in the folder, or this one, which is written there.

    Args:
        layout, size: Of the first process, at least.
        folder: Of the cache.

    Raises:
        ValueError: If the folder holds the states of something else.
    """
    if process()[1] > 1:
        agreed: list[Any] = [layout, size]
        torch.distributed.broadcast_object_list(agreed)
        layout, size = agreed
    assert layout is not None
    assert size is not None
    there = read_layout(folder)
    barrier()  # all have looked before anything is written
    if there is None:
        if process()[0] == 0:
            write_layout(folder, layout)
        barrier()
        return layout, size
    differs = sorted(
        name
        for name in {**there.made_for, **layout.made_for}
        if there.made_for.get(name) != layout.made_for.get(name)
    )
    if differs:
        raise ValueError(
            f"{folder} holds hidden states that were computed for something else: "
            f"{' and '.join(differs)} changed since; delete the folder, or choose another one"
        )
    return there, size


# ---- what they take ----------------------------------------------------------------------


def states_size(model: "ComposedForCausalLM", examples: Any, dtype: str = "auto") -> StatesSize:
    """Bytes the hidden states of these examples take on disk."""
    num_tokens = sum(len(examples[index]["input_ids"]) for index in range(len(examples)))
    with_readers = [name for name in model.augmenting if has_reader(model.model, name)]
    sample = [examples[k] for k in range(0, len(examples), -(-len(examples) // SAMPLE))]
    sampled = sum(len(example["input_ids"]) for example in sample)
    num_bytes = 0.0
    for name, layers in connected_layers(model.model).items():
        base = model.anchor if name == "anchor" else model.augmenting[name]
        item = base.dtype.itemsize if dtype == "auto" else getattr(torch, dtype).itemsize
        tokens = float(num_tokens)
        if name in with_readers:
            read = sum(
                int(
                    (read_tokens(model.model, name, inputs_of(model, [row]))["ranks"] != HOLE).sum()
                )
                for row in sample
            )
            tokens = num_tokens * read / sampled
        num_bytes += tokens * len(layers) * decoder.hidden_size(base) * item
    return StatesSize(num_bytes=max(round(num_bytes), 1), is_exact=not with_readers)


def check_disk(folder: Path, needed: float, size: StatesSize) -> None:
    """Refuse to begin what the disk cannot hold.

    Raises:
        ValueError: With what is needed and what is free.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        about = "" if size.is_exact else "about "
        raise ValueError(
            f"the hidden states need {about}{readable_bytes(needed)} more in {folder}, but "
            f"{readable_bytes(free)} are free; make room, choose another folder, or use "
            "states_dtype bfloat16"
        )


# ---- computing them ----------------------------------------------------------------------


def batches(examples: Any, indices: range, batch_size: int) -> Iterator[list[int]]:
    """Examples of one part in batches of like length."""
    by_length = sorted(indices, key=lambda index: len(examples[index]["input_ids"]))
    for start in range(0, len(by_length), batch_size):
        yield by_length[start : start + batch_size]


def inputs_of(model: "ComposedForCausalLM", rows: Sequence[Mapping[str, Any]]) -> PassInputs:
    """Examples as one batch, padded on the right."""

    def stack(name: str, padding: int) -> Tensor:
        columns = [torch.as_tensor(row[name], dtype=torch.long) for row in rows]
        return pad_sequence(columns, batch_first=True, padding_value=padding).to(model.device)

    ids = [torch.as_tensor(row["input_ids"]) for row in rows]
    mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
    prompt_only = model.config.reads == "prompt" and "labels" in rows[0]
    return PassInputs(
        input_ids=stack("input_ids", 0),
        attention_mask=mask.to(model.device),
        prompt_mask=prompt_of(stack("labels", IGNORED)) if prompt_only else None,
        read_ids=None if rows[0].get("read_ids") is None else stack("read_ids", 0),
    )


def run_rows(
    model: "ComposedForCausalLM", rows: Sequence[Mapping[str, Any]], dtype: str
) -> list[dict[str, Tensor]]:
    """The states of some examples, each (tokens, d), on the CPU."""
    states, lengths = compute_states(model.model, inputs_of(model, rows))
    counts = {part: number.tolist() for part, number in lengths.items()}
    kept = {name: stored(name, tensor, dtype).cpu() for name, tensor in states.items()}
    return [
        {name: tensor[row, : counts[name.rpartition(".")[0]][row]] for name, tensor in kept.items()}
        for row in range(len(rows))
    ]


def stored(name: str, states: Tensor, dtype: str) -> Tensor:
    """Hidden states in the precision they are kept in.

    Raises:
        ValueError: If they are beyond its range.
    """
    kept = states if dtype == "auto" else states.to(getattr(torch, dtype))
    if not bool(kept.isfinite().all()):
        part, _, layer = name.rpartition(".")
        role = "the anchor" if part == "anchor" else f"augmenting model {part!r}"
        raise ValueError(
            f"hidden states of {role} at layer {layer} reach {float(states.abs().max()):.3g}, "
            f"beyond the range of {str(kept.dtype).removeprefix('torch.')}; use states_dtype "
            "bfloat16 or float32"
        )
    return kept


@torch.no_grad()
def compute_states(
    model: "ComposedModel", inputs: PassInputs
) -> tuple[dict[str, Float[Tensor, "batch tokens d"]], dict[str, Int[Tensor, " batch"]]]:
    """Run what is frozen, and nothing else.

    Args:
        model: The composed model.
        inputs: Rows padded on the right, without a cache.

    Returns:
        The hidden states by name, and how many tokens of each row every part has read; what
        lies behind them is padding.
    """
    input_ids, mask = inputs.input_ids, inputs.attention_mask
    assert input_ids is not None
    assert isinstance(mask, Tensor)
    with_readers = [name for name in model.augmenting if has_reader(model, name)]
    tokens = {name: read_tokens(model, name, inputs) for name in with_readers}
    if tokens:
        inputs = replace(inputs, augmenting_inputs=tokens)
    forward_pass = model.begin(inputs, None)
    record_anchor(model, forward_pass, input_ids, mask)
    lengths = {
        name: (tokens[name]["ranks"] != HOLE).sum(1) if name in tokens else mask.sum(1)
        for name in ("anchor", *model.augmenting)
    }
    states = {f"{name}.{layer}": state for (name, layer), state in forward_pass.states.items()}
    return states, lengths


# ---- several processes -------------------------------------------------------------------


def process() -> tuple[int, int]:
    """The number of this process, and how many there are."""
    group = torch.distributed
    if not (group.is_available() and group.is_initialized()):
        return 0, 1
    return group.get_rank(), group.get_world_size()


def barrier() -> None:
    """Wait for the other processes."""
    if process()[1] > 1:
        torch.distributed.barrier()
