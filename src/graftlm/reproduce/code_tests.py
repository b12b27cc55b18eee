"""Whether generated Python does what it should: its tests decide.

Two kinds of problem. HumanEval gives a signature and a docstring, and a text goes on with the
body. MBPP describes a function and shows its tests, and a text is the function. The example's
`facts` say which: `entry_point` and `test`, or `asserts` and `setup`.
"""

import ast
import math
import re
import warnings
from collections.abc import Iterable, Sequence

from graftlm.reproduce.example import Example
from graftlm.reproduce.sandbox import Outcome, run_programs

FENCE = re.compile(r"```[\w+-]*[ \t]*\n(.*?)(?:\n[ \t]*```|\Z)", re.DOTALL)
END_OF_ANSWER = "[DONE]"  # of MBPP's prompts


def passes(
    examples: Sequence[Example], texts: Sequence[str], *, allowed: bool, workers: int = 1
) -> list[bool]:
    """Whether each generated text passes the tests of its example.

    Args:
        examples: Problems with `facts`.
        texts: What a model said to each.
        allowed: Whether the user lets generated programs run (`--allow-code-execution`).
        workers: How many run at a time.

    Raises:
        ValueError: If they may not run, or there are not as many texts as examples.
        RuntimeError: If the machine cannot hold them in; see `sandbox`.
    """
    return [
        outcome.passed for outcome in outcomes(examples, texts, allowed=allowed, workers=workers)
    ]


def outcomes(
    examples: Sequence[Example], texts: Sequence[str], *, allowed: bool, workers: int = 1
) -> list[Outcome]:
    """As `passes`, with the reason why a text did not pass.

    Raises:
        ValueError: If they may not run, or there are not as many texts as examples.
        RuntimeError: If the machine cannot hold them in; see `sandbox`.
    """
    if not allowed:
        raise ValueError(
            "these tests run programs that a model wrote; allow it with --allow-code-execution "
            "(they are held in as graftlm.reproduce.sandbox says)"
        )
    if len(examples) != len(texts):
        raise ValueError(f"got {len(texts)} texts for {len(examples)} examples with tests")
    return run_programs([program(*both) for both in zip(examples, texts, strict=True)], workers)


def pass_at_k(num_samples: int, num_passed: int, k: int) -> float:
    """The chance that one of k samples passes: 1 - C(n - c, k) / C(n, k), without bias.

    Paper: Chen et al. 2021, "Evaluating Large Language Models Trained on Code", §2.1.

    Raises:
        ValueError: If there are fewer than k samples.
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@k of {num_samples} samples needs k from 1 to that, got {k}")
    return 1 - math.comb(num_samples - num_passed, k) / math.comb(num_samples, k)


# ---- programs ----------------------------------------------------------------------------


def program(example: Example, text: str) -> str:
    """The program that decides: what the model wrote, and the tests behind it."""
    facts = example.facts
    if "entry_point" in facts:
        written = completed(example.source, text, facts["entry_point"])
        return lines([written, facts["test"], f"check({facts['entry_point']})"])
    return lines([facts["setup"], answered(text), *facts["asserts"]])


def completed(prompt: str, text: str, name: str) -> str:
    """A function with the body that a text goes on with.

    A text that does not begin with an indented line is an answer rather than a body: code in a
    fence, or the whole function again; then that one counts, behind the prompt's imports.
    """
    if starts_at_margin(text) and (fenced := FENCE.search(text)):
        text = fenced[1]
    if starts_at_margin(text) and re.search(rf"^def {re.escape(name)}\b", text, re.MULTILINE):
        return lines([prompt, text])
    return prompt + body(prompt, text)


def is_over(example: Example, text: str) -> bool:
    """Whether whatever follows a text would leave its program as it is: the function has ended."""
    if "entry_point" not in example.facts or starts_at_margin(text):
        return False
    return body(example.source, text) != text


def starts_at_margin(text: str) -> bool:
    """Whether the first line that holds something is not indented."""
    return bool(text.lstrip("\n")[:1].strip())


def body(prompt: str, text: str) -> str:
    """A text up to the first statement that is no longer in the function."""
    kept = text.splitlines(keepends=True)
    for number, line in enumerate(kept):
        at_margin = line[:1].strip() and not line.startswith(("#", ")", "]", "}"))
        # A line in the midst of a string or of brackets stands at the margin too.
        if at_margin and is_whole(prompt + "".join(kept[:number])):
            return "".join(kept[:number])
    return text


def is_whole(source: str) -> bool:
    """Whether a program could end here."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of escapes such as "\\d"
            ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # too deep, the last two
        return False
    return True


def answered(text: str) -> str:
    """The code of an answer: up to its end mark, without fences."""
    text = text.split(END_OF_ANSWER)[0]
    fenced = FENCE.search(text)
    return fenced[1] if fenced else text.strip("\n")


def lines(parts: Iterable[str]) -> str:
    """A program of parts that each begin a line."""
    return "\n".join(part.rstrip("\n") for part in parts) + "\n"
