"""From examples to tokens and labels, and what an augmenting model reads in their place."""

import random
from collections import defaultdict
from collections.abc import Sequence
from itertools import chain
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from graftlm.reproduce.example import Example

IGNORED = -100
Features = list[dict[str, list[int]]]


def plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a text, nothing put before or behind."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def start_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before any text."""
    ids = list(tokenizer("")["input_ids"])
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def feature(
    example: Example, tokenizer: PreTrainedTokenizerBase, before: str = ""
) -> dict[str, list[int]]:
    """Tokens and labels: the loss is on the target and on the end of the text, if it ends.

    Args:
        before: Text before the prompt, such as other examples.
    """
    prompt = start_ids(tokenizer) + plain_ids(tokenizer, before + example.prompt)
    end: list[Any] = [tokenizer.eos_token_id] if example.ends else []
    target = plain_ids(tokenizer, example.target) + end
    return {"input_ids": prompt + target, "labels": [IGNORED] * len(prompt) + target}


def shown(shots: Sequence[Example]) -> str:
    """Examples for the prompt of a model that stands alone."""
    return "".join(f"{shot.prompt}{shot.target}\n\n" for shot in shots)


def wrong_feature(
    example: Example, donors: Sequence[Example], tokenizer: PreTrainedTokenizerBase
) -> dict[str, list[int]]:
    """The control's tokens: the augmenting model reads other sources, and the own target.

    The sources of `donors` fill the place of the example's own, token for token.
    """
    found = feature(example, tokenizer)
    size = sum(label == IGNORED for label in found["labels"])
    # "Opening: source" may go on with " source"; signs that stand close together stay close.
    space = " " if example.opening.endswith(" ") else ""
    opening = start_ids(tokenizer) + plain_ids(tokenizer, example.opening.removesuffix(space))
    closing = plain_ids(tokenizer, example.closing)
    room = max(size - len(opening) - len(closing), 0)
    filling: list[int] = []
    while len(filling) < room:
        for donor in donors:
            filling += plain_ids(tokenizer, space + donor.source)
    read = (opening + filling[:room] + closing)[-size:]
    return found | {"read_ids": read + found["input_ids"][size:]}


def donors_of(examples: Sequence[Example], number: int = 3) -> list[list[Example]]:
    """For each example the next ones of its group that are about something else, in a ring.

    Raises:
        ValueError: If a group has no other source.
    """
    groups: dict[str, list[Example]] = defaultdict(list)
    for example in examples:
        groups[example.group].append(example)
    seen: dict[str, int] = defaultdict(int)
    donors = []
    for example in examples:
        ring = groups[example.group]
        place = seen[example.group]
        seen[example.group] += 1
        found: list[Example] = []
        for k in range(1, len(ring)):
            other = ring[(place + k) % len(ring)]
            if other.source != example.source:
                found.append(other)
            if len(found) == number:
                break
        if not found:
            raise ValueError(
                f"{example.group} has no second source, which an augmenting model could read in "
                "the place of the first; give more examples"
            )
        donors.append(found)
    return donors


def training_order(
    examples: Sequence[Example], size: int, batch_size: int, seed: int, *, by_length: bool
) -> list[Example]:
    """Draw the training examples of a run, in whole batches.

    Every system of a seed sees these examples in this order.

    Args:
        by_length: Put examples of about equal length into a batch.
    """
    rng = random.Random(seed)
    drawn: list[Example] = []
    while len(drawn) < size:
        drawn += rng.sample(list(examples), len(examples))
    drawn = drawn[: max(size - size % batch_size, batch_size)]
    if not by_length:
        return drawn
    ordered: list[Example] = []
    window = 16 * batch_size
    for start in range(0, len(drawn), window):
        part = sorted(drawn[start : start + window], key=lambda e: len(e.source) + len(e.target))
        batches = [part[k : k + batch_size] for k in range(0, len(part), batch_size)]
        rng.shuffle(batches)
        ordered += [example for batch in batches for example in batch]
    return ordered


def spread(parts: Sequence[Sequence[Example]], batch_size: int) -> list[Example]:
    """All batches of several parts, each part in its order and spread evenly over the whole."""
    placed = [
        (start / len(part), part[start : start + batch_size])
        for part in parts
        for start in range(0, len(part), batch_size)
    ]
    batches = [batch for _, batch in sorted(placed, key=itemgetter(0))]
    return list(chain.from_iterable(batches))


def padded_tokens(features: Features, batch_size: int) -> int:
    """How many tokens batches have, padding included."""
    lengths = [len(feature["input_ids"]) for feature in features]
    batches = [lengths[k : k + batch_size] for k in range(0, len(lengths), batch_size)]
    return sum(len(batch) * max(batch) for batch in batches)


def pad(features: Sequence[dict[str, list[int]]], *, left: bool = False) -> dict[str, Tensor]:
    """A batch for a model that stands alone."""
    longest = max(len(feature["input_ids"]) for feature in features)
    columns: dict[str, list[list[int]]] = {name: [] for name in [*features[0], "attention_mask"]}
    for feature in features:
        for name, values in {**feature, "attention_mask": [1] * len(feature["input_ids"])}.items():
            blank = [IGNORED if name == "labels" else 0] * (longest - len(values))
            columns[name].append(blank + values if left else values + blank)
    return {name: torch.tensor(rows) for name, rows in columns.items()}
