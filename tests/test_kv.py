"""The key-value experiment: exact data, no leaks, parents as good as they claim, and it learns."""

import ast
import operator
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from graftlm import Connection, compose
from graftlm.reproduce import (
    answering,
    encoding,
    kv_arithmetic,
    kv_data,
    kv_lessons,
    kv_parents,
    kv_training,
    kv_two_models,
    runner,
)
from graftlm.reproduce.example import Example
from graftlm.reproduce.experiment import Test
from graftlm.reproduce.kv_data import TASKS, Expression
from graftlm.reproduce.metrics import EXACT_MATCH, Answer

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


def score(model: Any, tokenizer: Any, some: Sequence[Example]) -> float:
    """Percent of exact matches, as the experiment scores them."""
    asked = runner.Runner(
        model=model,
        tokenizer=tokenizer,
        encode=lambda examples: [encoding.feature(e, tokenizer) for e in examples],
        collate=encoding.pad,
        bf16=False,
    )
    answers = answering.ask(
        asked, some, Test(metrics=(EXACT_MATCH,)), batch_size=100, run_code=False
    )
    return EXACT_MATCH.of(some, answers)


@pytest.mark.slow
def test_shipped_parents_can_do_what_they_were_trained_for() -> None:
    augmenting, anchor, tokenizer = kv_parents.load_parents()
    tests = kv_arithmetic.data(0, task=SMALL, dc="mix", size=10, number=100).tests
    substitutions = tests["KV-SUBS"]["all-held-out"]
    sums, worked_out = tests["NUM-MATH"]["numbers"], tests["KV-MATH"]["all-held-out"]
    assert score(augmenting, tokenizer, substitutions) >= 97
    assert score(augmenting, tokenizer, worked_out) <= 1
    assert score(anchor, tokenizer, sums) >= 95
    assert score(anchor, tokenizer, worked_out) <= 10
    assert score(anchor, tokenizer, substitutions) <= 1


@pytest.mark.parametrize("preset", kv_arithmetic.SETTINGS)
def test_no_lesson_of_the_domain_comes_twice(preset: str) -> None:
    """The course from a few keys to all began anew 31 times in the paper's preset."""
    experiment = kv_arithmetic.experiment(preset)
    keywords: Any = experiment.data.keywords  # pyrefly: ignore
    assert keywords["domain_size"] >= experiment.training.domain_examples


def test_shipped_parents_fit_the_package() -> None:
    files = [path for path in kv_parents.SHIPPED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 8e6


@pytest.mark.slow
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
    unseen = [kv_arithmetic.example_of(e) for e in substitutions(held_out, 60)]
    assert score(composed.eval(), tokenizer, unseen) == 0
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
    assert score(composed.eval(), tokenizer, unseen) >= 60


def test_the_pipeline_lets_the_anchor_add_what_the_other_wrote() -> None:
    example = kv_arithmetic.example_of(kv_data.Example("(<ab>+<q>)->", "(17+3)->20"))
    given, beginning = kv_arithmetic.pipeline(example, "(17+3)->99")
    assert given.prompt == "(17+3)->"
    answer = Answer(text=f"{beginning}20")
    assert EXACT_MATCH.of([example], [answer]) == 100


@pytest.mark.slow
def test_missing_parents_are_trained_and_kept(tmp_path: Path) -> None:
    made = kv_parents.ensure(tmp_path, ("vanilla", "first"), "quick", "cpu")
    assert sorted(tmp_path.iterdir()) == sorted(made.values())
    before = (made["first"] / "model.safetensors").stat().st_mtime_ns
    assert kv_parents.ensure(tmp_path, ("first",), "quick", "cpu") == {"first": made["first"]}
    assert (made["first"] / "model.safetensors").stat().st_mtime_ns == before


def test_parents_of_another_recipe_are_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They were, by their name alone, when the lessons of `first` and `second` changed."""
    place = kv_parents.parent_folder(tmp_path, "first", "small")
    assert place == kv_parents.parent_folder(tmp_path, "first", "small")
    assert place != kv_parents.parent_folder(tmp_path, "first", "quick")  # fewer steps
    monkeypatch.setattr(kv_lessons, "VERSION", kv_lessons.VERSION + 1)
    assert place != kv_parents.parent_folder(tmp_path, "first", "small")


class Unsaved:
    """A parent that costs nothing to train."""

    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir(parents=True)


def test_parents_of_one_preset_are_not_taken_for_anothers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_parents, "train_parent", lambda *args, **kwargs: Unsaved())
    for module in (kv_arithmetic, kv_two_models):
        places = [
            module.models(tmp_path, {"vanilla"}, "cpu", preset=preset)
            for preset in ("quick", "small", "paper")
        ]
        made = [(found.vanilla or found.augmenting).values() for found in places]
        assert len({path for paths in made for path in paths}) == 3 * len(made[0])


def test_vanilla_keys_stand_for_something_else_each_time() -> None:
    drawn = kv_lessons.lessons("vanilla", SMALL, 400, seed=0)
    values: dict[str, set[str]] = {}
    for lesson in (drawn[k] for k in range(400)):
        for (key, _), (value, _) in pairwise(lesson):
            if key.endswith(">") and value.isdigit():
                values.setdefault(key[1:], set()).add(value)
    assert any(len(found) > 1 for found in values.values())


def test_each_half_learns_its_own_keys() -> None:
    keys = list(kv_data.draw_values(SMALL))
    first, second = (kv_lessons.keys_of(name, keys) for name in ("first", "second"))
    assert not set(first) & set(second)
    assert [*first, *second] == keys


def test_a_half_meets_keys_that_it_cannot_know() -> None:
    """Its own keys always stand for the same, the others for something else each time."""
    values = kv_data.draw_values(SMALL)
    own = set(kv_lessons.keys_of("first", list(values)))
    drawn = kv_lessons.lessons("first", SMALL, 4000, seed=0)
    found: dict[str, set[str]] = {}
    for lesson in (drawn[k] for k in range(len(drawn))):
        for (key, _), (value, _) in pairwise(lesson):
            if key.endswith(">") and value.isdigit():
                found.setdefault(key[1:], set()).add(value)
    assert all(found[key] == {str(values[key])} for key in own & set(found))
    strange = [seen for key, seen in found.items() if key not in own]
    assert any(len(seen) > 1 for seen in strange)
    whole = kv_lessons.lessons("augmenting", SMALL, 400, seed=0)
    texts = "".join(piece for k in range(len(whole)) for piece, _ in whole[k])
    assert set(re.findall("<[a-z]+>", texts)) <= set(values)
