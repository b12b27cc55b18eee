"""The key-value experiment: exact data, no leaks, parents as good as they claim, and it learns."""

import ast
import json
import operator
import random
import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from graftlm import Connection, compose
from graftlm.reproduce import (
    kv_data,
    kv_evaluation,
    kv_experiment,
    kv_lessons,
    kv_parents,
    kv_training,
)
from graftlm.reproduce.kv_data import TASKS, Expression

SMALL, PAPER = TASKS["small"], TASKS["paper"]
QUIET = Console(quiet=True)
MEANINGS: dict[type, Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
}


def work_out(text: str) -> int:
    """Python's own parser, so that precedence is Python's; shares nothing with the library."""

    def value(node: ast.expr) -> int:
        if isinstance(node, ast.BinOp):
            return MEANINGS[type(node.op)](value(node.left), value(node.right))
        assert isinstance(node, ast.Constant)
        assert isinstance(node.value, int)
        return node.value

    return value(ast.parse(text, mode="eval").body)


@pytest.mark.parametrize("task", [SMALL, PAPER], ids=["small", "paper"])
def test_answers_are_what_python_says(task: kv_data.KVTask) -> None:
    values = kv_data.draw_values(task)
    rng = random.Random(1)
    for _ in range(300):
        expression = kv_data.draw_expression(rng, list(values), task.operators, task.terms)
        example = kv_data.math_example(expression, values)
        text = re.sub("<[a-z]+>", lambda key: str(values[key.group()]), str(expression))
        assert example.prompt == f"{expression}->"
        assert example.completion == f"{text}->{work_out(text)}"
        substitution = kv_data.subs_example(expression, values)
        assert substitution.prompt + substitution.completion == f"{expression}->{text}"


def test_products_bind_first() -> None:
    expression = Expression(("2", "3", "4", "5"), "-*+")
    assert str(expression) == "(2-3*4+5)"
    assert expression.answer() == -5
    assert kv_data.numeric_example(expression).completion == "-5"


def test_paper_preset_is_the_papers() -> None:
    values = kv_data.draw_values(PAPER)
    assert sorted(values.values()) == list(range(1, 25_001))
    assert all(re.fullmatch("<[a-z]{2,6}>", key) for key in values)
    lengths = {len(expression.terms) for expression in kv_data.numeric_evaluation(PAPER, size=200)}
    assert lengths == {3, 4, 5, 6}


def test_composition_data_never_holds_what_is_scored() -> None:
    values = kv_data.draw_values(SMALL)
    held_in, held_out = kv_data.split_keys(SMALL, values, seed=3)
    assert len(held_in) == SMALL.num_keys // 5
    assert not set(held_in) & set(held_out)
    assert set(held_in) | set(held_out) == set(values)
    scored = kv_data.key_evaluation(SMALL, held_in, held_out, seed=3)
    exclude = {e for expressions in scored.values() for e in expressions}
    exclude |= set(kv_data.numeric_evaluation(SMALL))
    examples = kv_data.composition_examples(
        SMALL, values, held_in, dc="mix", size=20_000, seed=3, exclude=exclude
    )
    prompts = {example.prompt.split("->")[0] for example in examples}
    assert not prompts & {str(expression) for expression in exclude}
    used = {key for prompt in prompts for key in re.findall("<[a-z]+>", prompt)}
    assert used == set(held_in)
    brackets = {part for e in examples for part in e.completion.split("->")}
    assert not brackets & {str(e) for e in kv_data.numeric_evaluation(SMALL)}


def test_what_counts_of_an_answer() -> None:
    """KV-SUBS is what is written first, KV-MATH what is written last."""
    expression, values = Expression(("<ab>", "<q>"), "-"), {"<ab>": 3, "<q>": 17}
    subs, math, direct = (
        make(expression, values)
        for make in (kv_data.subs_example, kv_data.math_example, kv_data.direct_example)
    )
    assert {e.prompt for e in (subs, math, direct)} == {"(<ab>-<q>)->"}
    assert (subs.completion, math.completion, direct.completion) == (
        "(3-17)",
        "(3-17)->-14",
        "-14",
    )
    assert subs.part("(3-17)->99") == subs.part(subs.completion) == "(3-17)"
    assert math.part("(9-9)->-14") == math.part(math.completion) == "-14"
    assert math.part("(3-17)") != "-14"


def test_splits_are_what_they_are_called() -> None:
    values = kv_data.draw_values(SMALL)
    held_in, held_out = kv_data.split_keys(SMALL, values, seed=0)
    known = set(held_in)
    scored = kv_data.key_evaluation(SMALL, held_in, held_out, seed=0)
    shares = {"held-in": {1.0}, "all-held-out": {0.0}}
    for split, expressions in scored.items():
        assert len(set(expressions)) == 1000
        found = {sum(t in known for t in e.terms) / len(e.terms) for e in expressions}
        assert found == shares.get(split, {1 / 3, 1 / 2, 2 / 3})


def test_anchor_never_learns_from_a_scored_sum() -> None:
    scored = {str(expression) for expression in kv_data.numeric_evaluation(SMALL)}
    for worked in (False, True):
        lessons = kv_lessons.lessons("anchor", SMALL, size=5000, seed=0, worked=worked)
        texts = ["".join(piece for piece, _ in lessons[i]) for i in range(len(lessons))]
        assert not scored & {part for text in texts for part in text.split("->")}


def test_equal_seeds_give_equal_data_and_others_do_not() -> None:
    values = kv_data.draw_values(SMALL)
    random.seed(17)  # the global generator plays no part
    assert kv_data.draw_values(SMALL) == values
    assert kv_data.draw_values(replace(SMALL, seed=1)) != values
    assert kv_data.split_keys(SMALL, values, 0) == kv_data.split_keys(SMALL, values, 0)
    assert kv_data.split_keys(SMALL, values, 0) != kv_data.split_keys(SMALL, values, 1)
    first, second = (kv_lessons.lessons("augmenting", SMALL, size=50, seed=s) for s in (0, 1))
    assert [first[i] for i in range(50)] == [first[i] for i in range(50)]
    assert [first[i] for i in range(50)] != [second[i] for i in range(50)]


@pytest.mark.parametrize(
    ("task", "text", "tokens"),
    [
        (SMALL, "(<ab>+<q>-17)->-3", "( < a b > + < q > - 17 ) -> - 3"),
        (PAPER, "(12*<xyz>)->-340", "( 1 2 * < x y z > ) -> - 3 4 0"),
    ],
)
def test_tokenizer_round_trip(task: kv_data.KVTask, text: str, tokens: str) -> None:
    tokenizer = kv_data.build_tokenizer(task)
    assert tokenizer.tokenize(text) == tokens.split()
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_every_number_has_a_token() -> None:
    tokenizer = kv_data.build_tokenizer(SMALL)
    greatest = SMALL.values[1] * SMALL.terms[1]
    ids = tokenizer("".join(f"{n}+" for n in range(greatest + 1)))["input_ids"]
    assert tokenizer.pad_token_id not in ids
    assert len(ids) == 2 * (greatest + 1) + 1


def test_labels_are_on_completions_only() -> None:
    tokenizer = kv_data.build_tokenizer(SMALL)
    lessons = [
        kv_training.lesson_of(kv_data.Example("(1+2)->", "3")),
        kv_training.lesson_of(kv_data.Example("(7)->(", "7)")),
    ]
    batch = kv_training.collate(tokenizer, lessons)
    assert batch["attention_mask"].sum(1).tolist() == [9, 9]
    shown = [tokenizer.decode(row[row >= 0]) for row in batch["labels"]]
    assert shown == ["3[EOS]", "7)[EOS]"]
    labelled = batch["labels"] != -100
    assert torch.equal(batch["labels"][labelled], batch["input_ids"][labelled])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"values": (5, 1)}, r"values must be .*\(5, 1\)"),
        ({"unique_values": True}, r"2500 keys cannot have unique values in \(1, 20\)"),
        ({"operators": "+/"}, r"operators must be .*'\+/'"),
        ({"terms": (3, 2)}, r"terms must be .*\(3, 2\)"),
        ({"held_in": 1.0}, r"held_in must lie between 0 and 1, got 1.0"),
        ({"operators": "*"}, r"products need numbers='digits'"),
    ],
)
def test_impossible_tasks_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **changes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preset": "huge"}, "preset must be one of .*'huge'"),
        ({"dc": "both"}, "dc must be one of math, subs, mix, direct, got 'both'"),
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
    ],
)
def test_impossible_runs_are_refused(arguments: dict, message: str, tmp_path) -> None:
    with pytest.raises(ValueError, match=message):
        kv_experiment.run(**arguments, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_shipped_parents_can_do_what_they_were_trained_for() -> None:
    augmenting, anchor, tokenizer = kv_parents.load_parents()
    values = kv_data.draw_values(SMALL)
    sets = kv_evaluation.evaluation_examples(SMALL, values, seed=0, size=100)

    def score(model: object, name: str) -> float:
        return kv_evaluation.percent(kv_evaluation.exact_matches(model, tokenizer, sets[name]))

    assert score(augmenting, "KV-SUBS all-held-out") >= 97
    assert score(augmenting, "KV-MATH all-held-out") <= 1
    assert score(anchor, "NUM-MATH numbers") >= 95
    assert score(anchor, "KV-MATH all-held-out") <= 10
    assert score(anchor, "KV-SUBS all-held-out") <= 1


def test_shipped_parents_fit_the_package() -> None:
    files = [path for path in kv_parents.SHIPPED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 8e6


def test_bridges_learn_in_seconds() -> None:
    """In miniature: substitutions of held-out keys, of which the anchor alone gets none."""
    augmenting, anchor, tokenizer = kv_parents.load_parents()
    values = kv_data.draw_values(SMALL)
    held_in, held_out = kv_data.split_keys(SMALL, values, seed=0)
    rng = random.Random(0)

    def substitutions(keys: list[str], count: int) -> list[kv_data.Example]:
        drawn = [kv_data.draw_expression(rng, keys, "+-", (1, 2)) for _ in range(count)]
        return [kv_data.subs_example(expression, values) for expression in drawn]

    composed = compose(
        anchor, augmenting, connections=[Connection(augmenting_layer=3, anchor_layer=3)]
    )
    unseen = substitutions(held_out, 60)

    def score() -> float:
        composed.eval()
        return kv_evaluation.percent(kv_evaluation.exact_matches(composed, tokenizer, unseen))

    assert score() == 0
    settings = kv_training.FitSettings(
        steps=100, batch_size=32, learning_rate=3e-3, weight_decay=0.0, warmup_steps=10, bf16=False
    )
    losses = kv_training.fit(
        composed,
        tokenizer,
        [kv_training.lesson_of(example) for example in substitutions(held_in, 32 * 100)],
        settings,
        seed=0,
        title="miniature",
        console=QUIET,
        use_cpu=True,
    )
    assert losses[-1][1] < losses[0][1] / 3
    assert score() >= 60


def test_a_whole_run_leaves_its_report(tmp_path, monkeypatch) -> None:
    """Few steps and expressions; every file is there, and the numbers agree with each other."""
    monkeypatch.setattr(kv_experiment, "NUM_EXPRESSIONS", 12)
    results = kv_experiment.run(steps=3, seeds=2, output=tmp_path / "out", console=QUIET)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"report.md", "results.json", "accuracy.png", "curves.png", "attention.png"}
    saved = json.loads((tmp_path / "out" / "results.json").read_text())
    assert saved["accuracy"] == results["accuracy"]
    assert saved["accuracy"]["m_B"]["NUM-MATH numbers"]["mean"] >= 90
    assert saved["accuracy"]["m_A"]["KV-MATH all-held-out"]["mean"] == 0
    assert saved["parameters"]["bridges"] == 164_352
    report = (tmp_path / "out" / "report.md").read_text()
    assert "| KV-MATH | all-held-out | 0.7 | 0.0 | 84.3 |" in report


def test_attention_is_that_of_the_bridges() -> None:
    """Worked out again from what the bridges were given: causal, and its rows add up to one."""
    augmenting, anchor, tokenizer = kv_parents.load_parents()
    composed = compose(anchor, augmenting)
    ids = tokenizer("(<ab>+<q>)->", return_tensors="pt")["input_ids"]
    (weights,) = kv_evaluation.bridge_attention(composed, ids)
    assert weights.shape == (4, ids.shape[1], ids.shape[1])
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:2]))
    assert weights.triu(1).abs().max() == 0
