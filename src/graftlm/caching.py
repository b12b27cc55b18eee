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
from accelerate.utils import broadcast_object_list
from jaxtyping import Float, Int
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from graftlm import decoder
from graftlm.augmenting_tokens import HOLE
from graftlm.bases import VOLATILE
from graftlm.collation import IGNORED
from graftlm.frozen_states import connected_layers, record_anchor
from graftlm.own_tokens import has_reader, read_tokens
from graftlm.passes import PassInputs, prompt_of
from graftlm.sharding import is_spread
from graftlm.sizes import readable_bytes
from graftlm.states_cache import (
    Layout,
    StatesCache,
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
    size = states_size(model, examples, dtype)
    part_size = max(1, round(PART_BYTES / size.num_bytes * len(examples)))
    layout = Layout(
        made_for=made_for(model, examples, dtype),
        num_examples=len(examples),
        part_size=min(part_size, len(examples)),
    )
    layout = agree(folder, layout)
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
            write_part(folder, number, [states[k] for k in layout.part(number)], lengths)
    barrier()
    return StatesCache(folder)


def check_frozen_parts(model: "ComposedForCausalLM") -> None:
    """Refuse a model whose hidden states training does change.

    Raises:
        ValueError: Naming a parameter.
    """
    for part in (model.anchor, *model.augmenting.values()):
        for name, parameter in part.named_parameters():
            if parameter.requires_grad:
                raise ValueError(
                    f"{type(part).__name__} has parameters to train, such as {name}, so that its "
                    "hidden states change in training and cannot be kept; train without a states "
                    "cache"
                )


def is_whole(model: "ComposedForCausalLM") -> bool:
    """Whether this process holds all weights, or can fetch them where they are offloaded to."""
    bases = (model.anchor, *model.augmenting.values())
    is_here = all(decoder.device_of(base).type != "meta" for base in bases)
    return is_here and not any(map(is_spread, model.parameters()))


# ---- what the states depend on -----------------------------------------------------------


def made_for(model: "ComposedForCausalLM", examples: Any, dtype: str) -> dict[str, Any]:
    """All that the states depend on, in the words of a message, each with a hash or value."""
    take_fingerprints(model)
    facts: dict[str, Any] = {"the data": data_hash(examples)}
    for name, base in {"anchor": model.anchor, **model.augmenting}.items():
        known: Any = model.config.bases[name]["fingerprint"]
        config = {k: v for k, v in base.config.to_dict().items() if k not in VOLATILE}
        facts_of_base: list[Any] = [config, known["dtype"], known["weights"]]
        if known["weights"] is None:  # packed or offloaded
            facts_of_base += [
                base.config.name_or_path,
                base.config.to_dict().get("quantization_config"),
            ]
        if name != "anchor" and model.config.alignments[name] != "identity":
            facts_of_base += [known["tokenizer"], model.config.alignments[name]]
        role = "the anchor" if name == "anchor" else f"augmenting model {name!r}"
        facts[role] = hash_of(facts_of_base)
    facts["the connected layers"] = connected_layers(model.model)
    facts["what is read"] = model.config.reads
    facts["the precision"] = [dtype, autocast_dtype(model.device)]
    return json.loads(json.dumps(facts))


def take_fingerprints(model: "ComposedForCausalLM") -> None:
    """Know the frozen models; of several processes only the first may have read their weights."""
    rank, num_processes = process()
    if rank == 0 or any(map(is_spread, model.parameters())):
        model.take_fingerprints()
    if num_processes > 1:
        model.config.bases = broadcast_object_list([model.config.bases])[0]


def hash_of(value: Any) -> str:
    """SHA-256 of plain data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def data_hash(examples: Any) -> str:
    """SHA-256 over the tokens and labels of all examples."""
    digest = hashlib.sha256()
    for index in range(len(examples)):
        example = examples[index]
        for name in ("input_ids", "labels", "read_ids"):
            values = torch.as_tensor(example.get(name) or [], dtype=torch.long)
            digest.update(f"{name} {len(values)}\n".encode())
            digest.update(values.numpy().tobytes())
    return digest.hexdigest()


def autocast_dtype(device: torch.device) -> str | None:
    """The precision `torch.autocast` computes in here, or None where it is off."""
    if not torch.is_autocast_enabled(device.type):
        return None
    return str(torch.get_autocast_dtype(device.type)).removeprefix("torch.")


def agree(folder: Path, layout: Layout) -> Layout:
    """The layout of what is in the folder, or this one, which is written there.

    Raises:
        ValueError: If the folder holds the states of something else.
    """
    there = read_layout(folder)
    if there is not None:
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
        return there
    barrier()
    if process()[0] == 0:
        write_layout(folder, layout)
    barrier()
    return layout


# ---- what they take ----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class StatesSize:
    """What hidden states take on disk.

    Args:
        num_bytes: In all.
        is_exact: False if tokens of other tokenizers were estimated from some examples.
    """

    num_bytes: int
    is_exact: bool


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
        read_ids=stack("read_ids", 0) if rows[0].get("read_ids") else None,
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
