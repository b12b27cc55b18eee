"""What the two parents of the key-value experiment learn from.

m_A, the augmenting model, learns KV-SUBS over all keys, and pairs: in an expression such as
`(<ab>10+<xyz>-<qr>24` some keys are followed by their values. So its state at a key's closing
bracket holds the value, as a language model's does for what it may say next; with KV-SUBS alone
it may put off looking a key up until it writes the substitution. It meets few keys at first and
more and more later: with all of them from the start, 2,000 keys stayed unlearned for 500 steps.

A model that knows half of the keys meets others too, each time with another value: it learns that
it cannot know them. Without, it is nearly as sure of them as of its own, and a bridge can hardly
tell which of two models to believe.

m_B, the anchor, learns NUM-MATH and to copy, often with its numbers among letters and brackets
that mean nothing: `(<ab10+x22-<qrs24)->8`. So its arithmetic does not hang on fixed distances, as
that of a pretrained model does not.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from string import ascii_lowercase

from torch.utils.data import Dataset

from graftlm.reproduce.kv_data import (
    Expression,
    KVTask,
    draw_expression,
    draw_key,
    draw_values,
    numerals,
    numeric_evaluation,
)
from graftlm.reproduce.kv_training import END, Lesson

VERSION = 2  # of the lessons; parents that learned from others are trained anew
STRANGE = 0.3  # of the keys that a model meets which knows a half of them only


def augmenting_lesson(
    rng: random.Random,
    task: KVTask,
    keys: Sequence[str],
    values: Mapping[str, int],
    strange: float = 0.0,
) -> Lesson:
    """Draw a substitution, or a longer expression with the values of most keys beside them.

    Args:
        keys: Those it has met.
        strange: Share of the keys in whose place one stands that it cannot know.
    """
    is_short = rng.random() < 0.4
    terms = task.training_terms if is_short else (1, 2 * task.terms[1])
    expression = draw_expression(rng, keys, task.operators, terms)
    if strange:
        expression, values = with_strange_keys(rng, task, expression, values, strange)
    if is_short:
        return [(f"{expression}->", False), (f"{expression.substitute(values)}{END}", True)]
    lesson: Lesson = []
    for sign, term in zip("(" + expression.operators, expression.terms, strict=True):
        lesson.append((sign + term, False))
        if rng.random() < 0.8:
            lesson.append((str(values[term]), True))
    return lesson


def with_strange_keys(
    rng: random.Random,
    task: KVTask,
    expression: Expression,
    values: Mapping[str, int],
    share: float,
) -> tuple[Expression, Mapping[str, int]]:
    """Put keys without a value of their own into an expression; they get one for this time."""
    values, terms = dict(values), []
    for term in expression.terms:
        if rng.random() < share:
            term = draw_key(rng, task)
            values.setdefault(term, rng.randint(*task.values))
        terms.append(term)
    return Expression(tuple(terms), expression.operators), values


def introduced(progress: float, total: int, first: int = 150) -> int:
    """How many of the keys m_A has met after this share of its training.

    The first few for a tenth of it, then more and more, and all from half of it on.
    """
    growth = min(max((progress - 0.1) / 0.4, 0), 1)
    return round(min(total, first * (total / first) ** growth))


def clutter(rng: random.Random, number: str) -> str:
    """Put letters and brackets around a number."""
    before, after = ("".join(rng.choices(ascii_lowercase, k=rng.randint(0, 6))) for _ in "ab")
    style = rng.random()
    if style < 0.5:
        return f"<{before}{number}"
    if style < 0.7:
        return f"<{before}{number}>"
    return f"{before}{number}{after}{rng.choice(('', '>'))}"


def anchor_lesson(
    rng: random.Random, task: KVTask, exclude: set[Expression], progress: float
) -> Lesson:
    """Draw a sum to work out or, one time in eight, to copy.

    Half-way through training, two in three become cluttered; plain ones are a third as long, so
    the first half spends its time on learning to add.
    """
    numbers = numerals(task)
    least, greatest = task.training_terms
    # Few of the shortest: copying one number is learned at once.
    terms = task.training_terms if rng.random() < 0.15 else (min(least + 1, greatest), greatest)
    expression = draw_expression(rng, numbers, task.operators, terms)
    while expression in exclude:
        expression = draw_expression(rng, numbers, task.operators, terms)
    shown = expression
    if progress > 1 / 2 and rng.random() < 2 / 3:
        shown = Expression(tuple(clutter(rng, t) for t in expression.terms), expression.operators)
    if rng.random() < 1 / 8:
        return [(f"{shown}->(", False), (f"{str(expression)[1:]}{END}", True)]
    return [(f"{shown}->", False), (f"{expression.answer()}{END}", True)]


def worked_lesson(rng: random.Random, task: KVTask, exclude: set[Expression]) -> Lesson:
    """Draw a sum that comes second: after an expression over made-up keys, or after a copy.

    So m_B works out the bracket that was written last, whatever stands before it:
    `(<qx>+<abc>)->(10+22)->32`. The letters are drawn anew each time and tell nothing.
    """
    least, greatest = task.training_terms
    terms = task.training_terms if rng.random() < 0.15 else (min(least + 1, greatest), greatest)
    expression = draw_expression(rng, numerals(task), task.operators, terms)
    while expression in exclude:
        expression = draw_expression(rng, numerals(task), task.operators, terms)
    kind = rng.random()
    if kind < 0.6:
        keys = (
            "".join(rng.choices(ascii_lowercase, k=rng.randint(2, 6))) for _ in expression.terms
        )
        unknown = Expression(tuple(f"<{key}>" for key in keys), expression.operators)
        return [(f"{unknown}->{expression}", False), (f"->{expression.answer()}{END}", True)]
    shown = Expression(tuple(clutter(rng, t) for t in expression.terms), expression.operators)
    if kind < 0.7:
        copy = f"{str(expression)[1:]}->{expression.answer()}{END}"
        return [(f"{shown}->(", False), (copy, True)]
    shown = shown if rng.random() < 0.5 else expression
    return [(f"{shown}->", False), (f"{expression.answer()}{END}", True)]


class Lessons(Dataset):
    """As many lessons as asked for, each drawn when it is read, from a seed of its own."""

    def __init__(
        self,
        draw: Callable[[random.Random, float], Lesson],
        size: int,
        seed: int,
    ):
        self.draw, self.size, self.seed = draw, size, seed

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Lesson:
        return self.draw(random.Random(f"lesson {self.seed} {index}"), index / self.size)


def keys_of(name: str, keys: Sequence[str]) -> Sequence[str]:
    """The keys that a parent learns."""
    half = len(keys) // 2
    return {"first": keys[:half], "second": keys[half:]}.get(name, keys)


def lessons(name: str, task: KVTask, size: int, seed: int, worked: bool = False) -> Lessons:
    """What a parent learns from; `worked` is the second part of the anchor's lessons.

    Args:
        name: `anchor`; `augmenting`, which learns all keys; `first` and `second`, which learn a
            half each; `vanilla`, to which keys stand for something else each time.
    """
    if name == "vanilla":

        def draw(rng: random.Random, progress: float) -> Lesson:
            anew = {key: rng.randint(*task.values) for key in keys}
            return augmenting_lesson(rng, task, keys, anew)

        keys = list(draw_values(task))
    elif name != "anchor":
        known = draw_values(task)
        keys = keys_of(name, list(known))
        values = {key: known[key] for key in keys}
        strange = STRANGE if len(keys) < len(known) else 0.0

        def draw(rng: random.Random, progress: float) -> Lesson:
            met = keys[: introduced(progress, len(keys))]
            return augmenting_lesson(rng, task, met, values, strange)

    else:
        exclude = set(numeric_evaluation(task))

        def draw(rng: random.Random, progress: float) -> Lesson:
            if worked:
                return worked_lesson(rng, task, exclude)
            return anchor_lesson(rng, task, exclude, progress)

    return Lessons(draw, size, seed)
