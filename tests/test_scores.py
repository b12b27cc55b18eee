"""Metrics, statistics and goals of the experiments."""

from typing import Any

import numpy as np
import pytest
from sacrebleu.metrics import CHRF as SACREBLEU
from scipy.stats import ttest_1samp

import tiny_experiment
from graftlm.reproduce import (
    comparison,
    kv_arithmetic,
    metrics,
    report,
    statistics,
)
from graftlm.reproduce.example import Example
from graftlm.reproduce.experiment import Goal
from graftlm.reproduce.metrics import Answer

# ---- metrics -----------------------------------------------------------------------------


def test_chrf_is_sacrebleus() -> None:
    some = tiny_experiment.made_up("Up", 8)
    texts = ["", "sand", "rain 1", "land 3", "x", "song", "bird 6", "wand 7"]
    answers = [Answer(text=text) for text in texts]
    wanted = SACREBLEU().corpus_score(texts, [[e.target.strip() for e in some]]).score
    assert metrics.CHRF.of(some, answers) == pytest.approx(wanted, abs=1e-9)
    assert metrics.CHRF.of(some[:1], answers[:1]) == 0


def test_bits_and_perplexity() -> None:
    some = [Example(group="g", source="", target="abcd")]
    answers = [Answer(bits=8.0, tokens=2)]
    assert metrics.BITS_PER_BYTE.of(some, answers) == 2
    assert metrics.PERPLEXITY.of(some, answers) == 16


@pytest.mark.parametrize(
    ("counts", "text", "ended", "met"),
    [
        ("last", "(1+2)->3", True, True),
        ("last", "(2+2)->3", True, True),
        ("last", "(1+2)->3", False, False),
        ("first", "(1+2)->9", True, True),
        ("first", "(2+2)->3", True, False),
        ("all", "(1+2)->3", True, True),
        ("all", "3", True, False),
    ],
)
def test_what_counts_of_an_answer(counts: str, text: str, ended: bool, met: bool) -> None:
    example = Example(group="", source="", target="(1+2)->3", facts={"counts": counts})
    answers = [Answer(text=text, ended=ended)]
    assert metrics.EXACT_MATCH.of([example], answers) == 100 * met


def test_passed_programs_count() -> None:
    answers = [Answer(passed=True), Answer(passed=False), Answer(passed=None), Answer(passed=True)]
    assert metrics.PASS_AT_1.of(tiny_experiment.made_up("Up", 4), answers) == 50


# ---- statistics --------------------------------------------------------------------------


def column(values: list[float]) -> np.ndarray:
    return np.array([(value, 1.0) for value in values])


def test_the_bootstrap_knows_a_difference_from_chance() -> None:
    rng = np.random.default_rng(1)
    theirs = rng.normal(size=100)
    noise = rng.normal(size=100)

    def p(shift: float) -> float:
        ours = column(list(theirs + shift + 0.3 * noise))
        return statistics.bootstrap(metrics.EXACT_MATCH, [ours], [column(list(theirs))], 2000).p

    assert p(0.3) < 0.01 < 0.1 < p(-0.3 * float(noise.mean()))


def test_the_interval_holds_the_difference_and_seeds_widen_it() -> None:
    rng = np.random.default_rng(0)
    theirs = [column(list(rng.normal(size=50))) for _ in range(4)]
    shifts = (0.0, 1.0, 2.0, 3.0)
    ours = [found + np.array([shift, 0.0]) for found, shift in zip(theirs, shifts, strict=True)]
    found = statistics.bootstrap(metrics.EXACT_MATCH, ours, theirs, 4000)
    assert found.difference == pytest.approx(150)
    assert found.low < 100 < 200 < found.high  # the seeds differ, the examples do not
    assert found.seeds == 4
    assert found.p == pytest.approx(ttest_1samp([0.0, 100.0, 200.0, 300.0], 0.0).pvalue)


def test_only_common_seeds_are_compared() -> None:
    ours = [column([1.0] * 10), column([0.0] * 10)]
    found = statistics.bootstrap(metrics.EXACT_MATCH, ours, [column([0.0] * 10)], 100)
    assert (found.seeds, found.difference) == (1, 100)


def test_holm_is_holms() -> None:
    corrected = statistics.holm({"a": 0.01, "b": 0.04, "c": 0.03})
    assert corrected == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})


def test_the_share_of_the_gain() -> None:
    cells = {
        name: statistics.Cell(mean=mean, deviation=0.0, seeds=[mean])
        for name, mean in {"anchor": 10.0, "composed": 20.0, "lora": 15.0}.items()
    }
    assert statistics.share_of_gain(cells, "lora", "composed", "anchor") == 0.5
    assert statistics.share_of_gain({"lora": cells["lora"]}, "lora", "composed", "anchor") is None


# ---- goals -------------------------------------------------------------------------------


def cell(mean: float, difference: float | None = None, p: float = 0.001) -> statistics.Cell:
    against = None
    if difference is not None:
        against = statistics.Comparison(
            difference=difference, low=0, high=0, p=p, p_corrected=p, seeds=1
        )
    return statistics.Cell(mean=mean, deviation=0.0, seeds=[mean], against=against)


@pytest.mark.parametrize(
    ("goal", "met"),
    [
        ({"at_least": 90}, True),
        ({"at_least": 96}, False),
        ({"beats": ("lora",), "margin": 10, "level": 0.01}, True),
        ({"beats": ("lora",), "margin": 50}, False),
        ({"beats": ("lora", "random")}, None),
        ({"beats": ("lora", "random"), "margin": 50}, False),  # lost, whatever random does
        ({"beats": ("lora",), "level": 0.0001}, False),
        ({"at_least_ratio": 0.98}, True),
        ({"at_most_ratio": 1.01}, False),
        ({"at_least": 90, "group": "elsewhere"}, None),
    ],
)
def test_goals_are_judged(goal: Any, met: bool | None) -> None:
    experiment = kv_arithmetic.experiment("quick")
    cells = {"composed": cell(95), "lora": cell(70, 25), "anchor": cell(50, 45)}
    table = {"KV-MATH": {"mixed": {"exact match": cells}}}
    found = comparison.judge(experiment, Goal(says="", test="KV-MATH", **goal), table)
    assert found["met"] is met


def test_marks_say_who_is_ahead() -> None:
    shown = [
        report.cell_text(
            {"mean": 1.0, "seeds": [1.0], "deviation": 0.0, "against": against}, lower, 1
        )
        for against, lower in [
            (None, False),
            ({"difference": 1.0, "p_corrected": 0.01}, False),
            ({"difference": 1.0, "p_corrected": 0.01}, True),
            ({"difference": 1.0, "p_corrected": 0.2}, True),
        ]
    ]
    assert shown == ["1.0", "1.0 *", "1.0 †", "1.0"]


def test_a_worse_number_is_no_gain() -> None:
    def groups(difference: float) -> Any:
        against = {"difference": difference, "p_corrected": 0.01}
        return {"text": {"bits": {"anchor": {"against": against}}}}

    assert report.gained(groups(-1.0), "bits", True)
    assert not report.gained(groups(1.0), "bits", True)
    assert report.gained(groups(1.0), "bits", False)
    assert not report.gained({"text": {"bits": {}}}, "bits", False)
