"""Pairs that say again what another one says: by the three-word runs they have in common."""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar

SIMILAR = 0.6  # share of three-word runs a test pair may not have in common with a training pair


class TwoSided(Protocol):
    """A source and what a model is to say about it."""

    @property
    def source(self) -> str:
        """One side."""
        ...

    @property
    def target(self) -> str:
        """The other."""
        ...


Some = TypeVar("Some", bound=TwoSided)


def unlike(pairs: Iterable[Some], training: Sequence[TwoSided]) -> list[Some]:
    """The pairs whose source and target are both new: like no one of the training pairs'."""
    sources = index_runs(pair.source for pair in training)
    targets = index_runs(pair.target for pair in training)
    return [
        pair
        for pair in pairs
        if overlap(pair.source, sources) < SIMILAR and overlap(pair.target, targets) < SIMILAR
    ]


def index_runs(texts: Iterable[str]) -> dict[tuple[str, ...], list[int]]:
    """Which texts each run is in."""
    index: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for number, text in enumerate(texts):
        for run in runs(text):
            index[run].append(number)
    return index


def runs(text: str, length: int = 3) -> set[tuple[str, ...]]:
    """All runs of three words, or the whole of a shorter text; case and marks do not count."""
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[k : k + length]) for k in range(max(len(words) - length + 1, 1))}


def overlap(text: str, index: dict[tuple[str, ...], list[int]]) -> float:
    """The largest share of a text's runs that one training text has."""
    own = runs(text)
    shared: dict[int, int] = defaultdict(int)
    for run in own:
        for number in index.get(run, ()):
            shared[number] += 1
    return max(shared.values(), default=0) / len(own)
