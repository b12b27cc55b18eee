"""What experiments are made of: examples, and the data of one domain."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """What a model is given and what it is to say.

    Args:
        group: A language or a task; tables have a column for each.
        source: What the example is about; a control reads another example's in its place.
        target: What a model is to say; empty where only tests decide, as in code.
        opening: What stands before the source.
        closing: What stands between the source and the target.
        facts: What a metric needs beside the target, such as the tests of a function.
        ends: Whether nothing follows the target. Where something may, no end is learned.
    """

    group: str
    source: str
    target: str
    opening: str = ""
    closing: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)
    ends: bool = True

    @property
    def prompt(self) -> str:
        """What a model is given."""
        return f"{self.opening}{self.source}{self.closing}"


def plain(text: str, group: str = "text") -> Example:
    """A text that is predicted whole."""
    return Example(group=group, source="", target=text)


@dataclass(frozen=True, kw_only=True, slots=True)
class Data:
    """The examples of one domain.

    Args:
        composition: D_C, which bridges and LoRA are trained on.
        tests: By the name of the test and of the group; nothing is chosen by them.
        development: What settings were chosen by.
        shots: Examples for the prompt of a model that stands alone, by group.
        domain: What the augmenting model became a specialist by, in the order to learn it; for
            the controls that train the anchor on it. A plain text is an example of target alone.
        retention: What the anchor could do before: tests as above, or plain English texts under
            `text`, whose perplexity counts.
        notes: Counts and sources, for the report.
    """

    composition: Sequence[Example]
    tests: Mapping[str, Mapping[str, Sequence[Example]]]
    development: Sequence[Example] = ()
    shots: Mapping[str, Sequence[Example]] = field(default_factory=dict)
    domain: Sequence[Example] = ()
    retention: Mapping[str, Sequence[Example]] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)
