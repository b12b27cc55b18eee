"""Metrics as sums over examples, so that a bootstrap need not score anything again.

Each example gives a row of numbers; a score is worked out from the rows' sum. That holds for
corpus scores such as chrF too, which are no mean over sentences.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from graftlm.reproduce.example import Example


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What a system did with one example.

    Args:
        bits: What the target costs, without the end of the text; None if not asked.
        tokens: Of the target, by the system's tokenizer.
        text: What it answered; None if not asked.
        ended: Whether the answer came to its end within the tokens it had.
        passed: Whether it passed its tests as a program; None if it was not run.
    """

    bits: float | None = None
    tokens: int = 0
    text: str | None = None
    ended: bool = True
    passed: bool | None = None


Rows = np.ndarray  # (examples, numbers)
Sums = np.ndarray  # (..., numbers)
Scores = np.ndarray  # (...)
BETA = 2  # how much more recall counts than precision


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """A number over the examples of a test.

    Args:
        name: For tables.
        needs: What is looked at.
        rows: The numbers of each example.
        score: From their sums, of many resamples at once.
        lower_is_better: As for bits and perplexity.
        digits: Shown behind the point.
    """

    name: str
    needs: Literal["bits", "text", "tests"]
    rows: Callable[[Sequence[Example], Sequence[Answer]], Rows]
    score: Callable[[Sums], Scores]
    lower_is_better: bool = False
    digits: int = 1

    def of(self, examples: Sequence[Example], answers: Sequence[Answer]) -> float:
        """The score itself."""
        return float(self.score(self.rows(examples, answers).sum(0)))


def num_bytes(example: Example) -> int:
    """Bytes of the target."""
    return len(example.target.encode())


def ratio(sums: Sums) -> Scores:
    """The first number over the second."""
    return sums[..., 0] / sums[..., 1]


def percent(sums: Sums) -> Scores:
    """The first number over the second, in percent."""
    return 100 * ratio(sums)


def two_to_the_ratio(sums: Sums) -> Scores:
    """Perplexity from bits and tokens."""
    return 2 ** ratio(sums)


def bits_and_bytes(examples: Sequence[Example], answers: Sequence[Answer]) -> Rows:
    """Bits and bytes of the targets."""
    return np.array(
        [(a.bits, num_bytes(e)) for e, a in zip(examples, answers, strict=True)], dtype=float
    )


def bits_and_tokens(examples: Sequence[Example], answers: Sequence[Answer]) -> Rows:
    """Bits and tokens of the targets."""
    return np.array([(a.bits, a.tokens) for a in answers], dtype=float)


def counted_part(example: Example, text: str) -> str:
    """The part of an answer that counts, of those between arrows: all, the first or the last."""
    parts = text.split("->")
    return {"all": text, "first": parts[0], "last": parts[-1]}[example.facts.get("counts", "all")]


def matches(examples: Sequence[Example], answers: Sequence[Answer]) -> Rows:
    """Whether an answer ends, and says what counts of the target exactly."""
    return np.array(
        [
            (a.ended and counted_part(e, a.text or "") == counted_part(e, e.target), 1)
            for e, a in zip(examples, answers, strict=True)
        ],
        dtype=float,
    )


def chrf() -> Any:
    """Sacrebleu's chrF.

    Raises:
        ImportError: If sacrebleu is not installed.
    """
    try:
        from sacrebleu.metrics import CHRF
    except ImportError as error:
        raise ImportError(
            "sacrebleu is not installed, which scores texts; run: pip install 'graftlm[reproduce]'"
        ) from error
    return CHRF(beta=BETA)


def ngrams(examples: Sequence[Example], answers: Sequence[Answer]) -> Rows:
    """For each n: n-grams of the answer, of the reference, and shared ones."""
    texts = [answer.text or "" for answer in answers]
    references = [[example.target.strip() for example in examples]]
    # What sacrebleu's own paired tests sum up; its public functions give scores alone.
    return np.array(chrf()._extract_corpus_statistics(texts, references), dtype=float)


def chrf_score(sums: Sums) -> Scores:
    """ChrF from summed n-grams, as sacrebleu works it out: F2 of the mean precision and recall."""
    ours, theirs, shared = (sums[..., k::3] for k in range(3))
    counts = (ours > 0) & (theirs > 0)
    orders = np.maximum(counts.sum(-1), 1)
    precision = np.where(counts, shared / np.maximum(ours, 1), 0).sum(-1) / orders
    recall = np.where(counts, shared / np.maximum(theirs, 1), 0).sum(-1) / orders
    below = BETA**2 * precision + recall
    return 100 * (1 + BETA**2) * precision * recall / np.where(below > 0, below, 1)


def passes(examples: Sequence[Example], answers: Sequence[Answer]) -> Rows:
    """Whether each program passed its tests."""
    return np.array([(bool(answer.passed), 1) for answer in answers], dtype=float)


BITS_PER_BYTE = Metric(
    name="bits per byte",
    needs="bits",
    rows=bits_and_bytes,
    score=ratio,
    lower_is_better=True,
    digits=3,
)
PERPLEXITY = Metric(
    name="perplexity",
    needs="bits",
    rows=bits_and_tokens,
    score=two_to_the_ratio,
    lower_is_better=True,
    digits=2,
)
EXACT_MATCH = Metric(name="exact match", needs="text", rows=matches, score=percent)
CHRF = Metric(name="chrF", needs="text", rows=ngrams, score=chrf_score)
PASS_AT_1 = Metric(name="pass@1", needs="tests", rows=passes, score=percent)
METRICS = {
    metric.name: metric for metric in (BITS_PER_BYTE, PERPLEXITY, EXACT_MATCH, CHRF, PASS_AT_1)
}
