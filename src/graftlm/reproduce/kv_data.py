"""The key-value arithmetic of CALM, section 4.1: keys, expressions, answers, splits, tokenizer.

Three tasks over one grammar:

    KV-SUBS   (<ab>+<xyz>-<qr>)->(10+22-24)        m_A, the augmenting model, learns it, all keys
    NUM-MATH  (10+22-24)->8                        m_B, the anchor, learns it; it knows no key
    KV-MATH   (<ab>+<xyz>-<qr>)->(10+22-24)->8     neither can do it; the composed model should

The composed model works KV-MATH out: it writes the substitution and then the answer, and what
stands after the last arrow is scored. The paper does not say whether its models do. The other
way, `(<ab>+<xyz>-<qr>)->8` at once, is the composition data `direct`; see docs/log.md for how
far it came.

Everything is drawn from a `random.Random` of its own, so equal arguments give equal data.
"""

import random
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from string import ascii_lowercase
from typing import Literal

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPLITS = ("held-in", "mixed", "all-held-out")
Composition = Literal["math", "subs", "mix", "direct"]
# Shares of KV-MATH, KV-SUBS, KV-MATH answered at once, and NUM-MATH in each kind of composition
# data. The paper's section 4.1 says "subs", its section 3.2 "math"; the numeric part of "mix"
# keeps NUM-MATH alive.
COMPOSITIONS: dict[str, tuple[float, float, float, float]] = {
    "math": (1.0, 0.0, 0.0, 0.0),
    "subs": (0.0, 1.0, 0.0, 0.0),
    "mix": (0.75, 0.0, 0.0, 0.25),
    "direct": (0.0, 0.0, 0.75, 0.25),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class KVTask:
    """What the paper's section 4.1 fixes, and what it leaves open.

    The paper gives 25,000 keys, 3 to 6 keys an expression and `+ - x`. It does not say how large
    values are in the arithmetic it scores, which operator binds first, or how large an answer may
    be. Here `*` binds before `+` and `-`, which go from left to right, as in Python; an answer is
    any integer, negative ones included, and nothing is thrown away for its size.

    Args:
        num_keys: Keys in all, of 2 to 6 lower-case letters, no two alike.
        values: Least and greatest value of a key, both included.
        unique_values: Whether no two keys share a value, as in the paper.
        operators: Drawn from, one between each two terms.
        terms: Least and greatest number of terms in an expression that is scored.
        least_training_terms: Training data also holds shorter expressions, down to this many.
        held_in: Share of the keys that the composition data may use.
        numbers: `whole` gives each number a token of its own, `digits` each digit.
        seed: Of the keys, their values and the NUM-MATH set; splits have their own.
    """

    num_keys: int
    key_letters: tuple[int, int] = (2, 6)
    values: tuple[int, int]
    unique_values: bool
    operators: str
    terms: tuple[int, int]
    least_training_terms: int
    held_in: float = 0.2
    numbers: Literal["whole", "digits"]
    seed: int = 0

    def __post_init__(self) -> None:
        least, greatest = self.values
        if not 0 <= least <= greatest:
            raise ValueError(f"values must be a range of natural numbers, got {self.values}")
        if self.unique_values and greatest - least + 1 < self.num_keys:
            raise ValueError(f"{self.num_keys} keys cannot have unique values in {self.values}")
        if not self.operators or set(self.operators) - set("+-*"):
            raise ValueError(f"operators must be some of '+-*', got {self.operators!r}")
        if not 1 <= self.least_training_terms <= self.terms[0] <= self.terms[1]:
            raise ValueError(f"terms must be a range of positive numbers, got {self.terms}")
        if not 0 < self.held_in < 1:
            raise ValueError(f"held_in must lie between 0 and 1, got {self.held_in}")
        if self.numbers == "whole" and "*" in self.operators:
            raise ValueError("products need numbers='digits', got numbers='whole' and '*'")

    @property
    def training_terms(self) -> tuple[int, int]:
        """Least and greatest number of terms in an expression to learn from."""
        return self.least_training_terms, self.terms[1]


TASKS = {
    "small": KVTask(
        num_keys=2500,
        values=(1, 20),
        unique_values=False,
        operators="+-",
        terms=(2, 3),
        least_training_terms=1,
        numbers="whole",
    ),
    "paper": KVTask(
        num_keys=25_000,
        values=(1, 25_000),
        unique_values=True,
        operators="+-*",
        terms=(3, 6),
        least_training_terms=1,
        numbers="digits",
    ),
}


@dataclass(frozen=True, slots=True)
class Expression:
    """Terms (`<ab>` or `10`) with one operator between each two; prints as `(<ab>+<xyz>)`."""

    terms: tuple[str, ...]
    operators: str

    def __str__(self) -> str:
        """Write the expression as the models read it."""
        rest = zip(self.operators, self.terms[1:], strict=True)
        return "(" + self.terms[0] + "".join(o + term for o, term in rest) + ")"

    def substitute(self, values: Mapping[str, int]) -> "Expression":
        """Put each key's value in the key's place."""
        return Expression(tuple(str(values[term]) for term in self.terms), self.operators)

    def answer(self) -> int:
        """Work out a numeric expression: products first, then from left to right."""
        sums = [int(self.terms[0])]  # signed summands; a product grows the last of them
        for operator, term in zip(self.operators, self.terms[1:], strict=True):
            if operator == "*":
                sums[-1] *= int(term)
            else:
                sums.append(int(term) if operator == "+" else -int(term))
        return sum(sums)


@dataclass(frozen=True, slots=True)
class Example:
    """What a model is given, and what it should say next, up to the end of the text.

    Args:
        prompt: What it is given.
        completion: What it should say.
        scored: Which part counts, of those between the arrows: the `first` or the `last`.
    """

    prompt: str
    completion: str
    scored: Literal["first", "last"] = "last"

    def part(self, text: str) -> str:
        """The part of an answer that counts."""
        parts = text.split("->")
        return parts[0] if self.scored == "first" else parts[-1]


def subs_example(expression: Expression, values: Mapping[str, int]) -> Example:
    """KV-SUBS: replace each key by its value; what a model says after it does not count."""
    return Example(f"{expression}->", str(expression.substitute(values)), scored="first")


def math_example(expression: Expression, values: Mapping[str, int]) -> Example:
    """KV-MATH: the substitution, and then the answer, which alone counts."""
    substituted = expression.substitute(values)
    return Example(f"{expression}->", f"{substituted}->{substituted.answer()}")


def direct_example(expression: Expression, values: Mapping[str, int]) -> Example:
    """KV-MATH, answered at once."""
    return Example(f"{expression}->", str(expression.substitute(values).answer()))


def numeric_example(expression: Expression) -> Example:
    """NUM-MATH: the answer of an expression over numbers."""
    return Example(f"{expression}->", str(expression.answer()))


def draw_key(rng: random.Random, task: KVTask) -> str:
    """Draw letters that may be a key, written `<ab>`."""
    return f"<{''.join(rng.choices(ascii_lowercase, k=rng.randint(*task.key_letters)))}>"


def draw_values(task: KVTask) -> dict[str, int]:
    """Draw the task's keys, written `<ab>`, and the value of each."""
    rng = random.Random(f"keys {task.seed}")
    keys: dict[str, None] = {}  # a set that remembers its order
    while len(keys) < task.num_keys:
        keys[draw_key(rng, task)] = None
    least, greatest = task.values
    if task.unique_values:
        numbers: Sequence[int] = rng.sample(range(least, greatest + 1), task.num_keys)
    else:
        numbers = [rng.randint(least, greatest) for _ in keys]
    return dict(zip(keys, numbers, strict=True))


def split_keys(task: KVTask, keys: Iterable[str], seed: int) -> tuple[list[str], list[str]]:
    """Share the keys out at random: held-in ones, which composition may use, and held-out ones."""
    shuffled = list(keys)
    random.Random(f"split {task.seed} {seed}").shuffle(shuffled)
    num_held_in = max(1, round(task.held_in * len(shuffled)))
    return shuffled[:num_held_in], shuffled[num_held_in:]


def draw_expression(
    rng: random.Random, operands: Sequence[str], operators: str, terms: tuple[int, int]
) -> Expression:
    """Draw a number of terms, then each term and each operator."""
    num_terms = rng.randint(*terms)
    return Expression(
        tuple(rng.choices(operands, k=num_terms)),
        "".join(rng.choices(operators, k=num_terms - 1)),
    )


def numerals(task: KVTask) -> list[str]:
    """Write out every number that a key may stand for."""
    least, greatest = task.values
    return [str(number) for number in range(least, greatest + 1)]


def numeric_evaluation(task: KVTask, size: int = 1000) -> list[Expression]:
    """Draw the NUM-MATH set: no two alike, and kept out of all training data.

    It takes a tenth at most of all the expressions of one length, or little would be left to
    learn the short ones from: there are only 800 with two numbers up to 20.
    """
    rng = random.Random(f"numeric evaluation {task.seed}")
    numbers = numerals(task)
    left = {
        terms: len(numbers) ** terms * len(task.operators) ** (terms - 1) // 10
        for terms in range(task.terms[0], task.terms[1] + 1)
    }
    if sum(left.values()) < size:
        raise ValueError(f"values {task.values} give too few expressions to hold out {size}")
    drawn: dict[Expression, None] = {}
    while len(drawn) < size:
        expression = draw_expression(rng, numbers, task.operators, task.terms)
        if expression not in drawn and left[len(expression.terms)] > 0:
            drawn[expression] = None
            left[len(expression.terms)] -= 1
    return list(drawn)


def key_evaluation(
    task: KVTask, held_in: Sequence[str], held_out: Sequence[str], seed: int, size: int = 1000
) -> dict[str, list[Expression]]:
    """Draw the expressions over keys of each split, no two alike.

    Returns:
        `held-in`: keys of the composition data only, in expressions that it lacks; `mixed`: at
        least one key of either kind; `all-held-out`: no key of the composition data.
    """
    rng = random.Random(f"key evaluation {task.seed} {seed}")
    known = set(held_in)
    operands = {"held-in": held_in, "mixed": [*held_in, *held_out], "all-held-out": held_out}
    drawn: dict[str, dict[Expression, None]] = {split: {} for split in SPLITS}
    for split, expressions in drawn.items():
        while len(expressions) < size:
            # The held-in fifth is drawn from as often as the rest, or few expressions would mix.
            pools = (held_in, held_out) if split == "mixed" else (operands[split],)
            num_terms = rng.randint(*task.terms)
            expression = Expression(
                tuple(rng.choice(rng.choice(pools)) for _ in range(num_terms)),
                "".join(rng.choices(task.operators, k=num_terms - 1)),
            )
            if split != "mixed" or 0 < sum(term in known for term in expression.terms) < num_terms:
                expressions[expression] = None
    return {split: list(expressions) for split, expressions in drawn.items()}


def composition_examples(
    task: KVTask,
    values: Mapping[str, int],
    held_in: Sequence[str],
    *,
    dc: str,
    size: int,
    seed: int,
    exclude: Container[Expression],
) -> list[Example]:
    """Draw the composition data D_C, over held-in keys and numbers only.

    Args:
        dc: `math`, `subs`, `mix` or `direct`; see `COMPOSITIONS`.
        exclude: Expressions that evaluation asks for.
    """
    if dc not in COMPOSITIONS:
        raise ValueError(f"dc must be one of {', '.join(COMPOSITIONS)}, got {dc!r}")
    rng = random.Random(f"composition {task.seed} {seed}")
    makers = (math_example, subs_example, direct_example, None)  # None: a sum of numbers
    numbers = numerals(task)
    examples: list[Example] = []
    while len(examples) < size:
        (make,) = rng.choices(makers, COMPOSITIONS[dc])
        operands = held_in if make else numbers
        expression = draw_expression(rng, operands, task.operators, task.training_terms)
        numeric = expression.substitute(values) if make else expression
        if expression not in exclude and numeric not in exclude:
            examples.append(make(expression, values) if make else numeric_example(expression))
    return examples


def build_tokenizer(task: KVTask) -> PreTrainedTokenizerFast:
    """Make the tokenizer both models share: letters, signs, and numbers or their digits."""
    greatest = task.values[1] * task.terms[1] if task.numbers == "whole" else 9
    symbols = ["[PAD]", "[BOS]", "[EOS]", "->", *"()<>+-*", *ascii_lowercase]
    vocabulary = {symbol: i for i, symbol in enumerate(symbols)}
    vocabulary |= {str(n): len(symbols) + n for n in range(greatest + 1)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[PAD]"))
    number = r"\d+" if task.numbers == "whole" else r"\d"
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(f"->|{number}|."), behavior="isolated")
    backend.decoder = decoders.Fuse()
    backend.post_processor = processors.TemplateProcessing(
        single="[BOS] $A", special_tokens=[("[BOS]", vocabulary["[BOS]"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="[BOS]",
        eos_token="[EOS]",
        pad_token="[PAD]",
        padding_side="left",
    )
