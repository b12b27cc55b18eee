"""Ask a system: what its targets cost in bits, and what it answers."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerBase

from graftlm.reproduce.decoding import greedy_answers, never
from graftlm.reproduce.encoding import IGNORED, Features, pad
from graftlm.reproduce.example import Example
from graftlm.reproduce.experiment import Test
from graftlm.reproduce.few_shot import batch_of
from graftlm.reproduce.fitting import target_logits
from graftlm.reproduce.metrics import Answer
from graftlm.reproduce.runner import Runner

ROOM = 1.34  # of the most tokens of an answer to those of the longest reference of its batch


@dataclass(kw_only=True, slots=True)
class Generated:
    """Tokens that were generated, the ends of answers included, and the seconds it took."""

    tokens: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float | None:
        """All batches together; None if nothing was generated."""
        return self.tokens / self.seconds if self.seconds else None


def ask(
    runner: Runner,
    examples: Sequence[Example],
    test: Test,
    *,
    batch_size: int,
    run_code: bool | None,
    generated: Generated | None = None,
) -> list[Answer]:
    """Everything that the metrics of a test need.

    Args:
        run_code: Whether programs that models wrote may be run; None leaves them to be judged.
        generated: What is generated is added to it.
    """
    needs = {metric.needs for metric in test.metrics}
    answers = [Answer() for _ in examples]
    if "bits" in needs:
        answers = costs(runner, examples)
    if needs & {"text", "tests"}:
        asked = examples[: test.answered]
        said = say(runner, asked, test, batch_size, generated)
        for number, (text, ended) in enumerate(said):
            answers[number] = replace(answers[number], text=text, ended=ended)
    if "tests" in needs and run_code is not None:
        asked = examples[: test.answered]
        answers[: len(asked)] = judged(asked, answers[: len(asked)], run_code)
    return answers


def judged(examples: Sequence[Example], answers: Sequence[Answer], allowed: bool) -> list[Answer]:
    """Run the answers as programs."""
    from graftlm.reproduce.code_tests import passes

    texts = [answer.text or "" for answer in answers]
    return [
        replace(answer, passed=ok)
        for answer, ok in zip(answers, passes(examples, texts, allowed=allowed), strict=True)
    ]


def by_length(features: Features, batch_size: int) -> list[list[int]]:
    """Numbers of the features, longest first, in batches."""
    order = sorted(range(len(features)), key=lambda k: -len(features[k]["input_ids"]))
    return [order[k : k + batch_size] for k in range(0, len(order), batch_size)]


@torch.no_grad()
def costs(runner: Runner, examples: Sequence[Example], batch_size: int = 16) -> list[Answer]:
    """Bits each target costs, without the end of the text."""
    features = runner.encode(examples)
    bits, tokens = [0.0] * len(examples), [0] * len(examples)
    device = runner.model.device
    for numbers in by_length(features, batch_size):
        some = [features[k] for k in numbers]
        with torch.autocast(device.type, torch.bfloat16, enabled=runner.bf16):
            if runner.shares:
                batch = batch_of(runner.model, some, left=False)
            else:
                batch = to_device(runner.collate(some), device)
            logits, labels, rows = target_logits(runner.model, batch)
        losses = F.cross_entropy(logits, labels, reduction="none").tolist()
        owners = rows.tolist()
        for place, (row, loss) in enumerate(zip(owners, losses, strict=True)):
            is_end = place + 1 == len(owners) or owners[place + 1] != row
            bits[numbers[row]] += 0.0 if is_end else loss / math.log(2)
            tokens[numbers[row]] += not is_end
    return [Answer(bits=b, tokens=n) for b, n in zip(bits, tokens, strict=True)]


@torch.no_grad()
def say(
    runner: Runner,
    examples: Sequence[Example],
    test: Test,
    batch_size: int,
    generated: Generated | None = None,
) -> list[tuple[str, bool]]:
    """Greedy answers, up to `test.stop`, and whether each came to its end."""
    features = runner.encode(examples)
    generated = generated or Generated()
    said = [("", False)] * len(examples)
    end_ids, device = ends(runner.tokenizer, test.stop, runner.model), runner.model.device
    for numbers in by_length(features, batch_size):
        batch = [features[k] for k in numbers]
        sizes = [sum(label == IGNORED for label in feature["labels"]) for feature in batch]
        prompts = [
            {name: ids[:size] for name, ids in feature.items() if name != "labels"}
            for feature, size in zip(batch, sizes, strict=True)
        ]
        longest = max(len(f["labels"]) - size for f, size in zip(batch, sizes, strict=True))
        needs_no_more = never
        if test.needs_no_more is not None:
            needs_no_more = partial(looked_at, runner, test, [examples[k] for k in numbers])
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=runner.bf16):
            if runner.shares:
                inputs = batch_of(runner.model, prompts, left=True)
            else:
                inputs = to_device(pad(prompts, left=True), device)
            answers = greedy_answers(
                runner.model,
                inputs,
                max_new_tokens=test.most_tokens or math.ceil(longest * ROOM) + 4,
                end_ids=end_ids,
                has_ended=needs_no_more,
            )
        generated.seconds += time.perf_counter() - start
        generated.tokens += sum(map(len, answers))
        texts = runner.tokenizer.batch_decode(answers, skip_special_tokens=True)
        for place, (number, ids, text) in enumerate(zip(numbers, answers, texts, strict=True)):
            stopped = test.stop is not None and test.stop in text.lstrip("\n")
            ended = ids[-1] in end_ids or needs_no_more(place, ids)
            said[number] = (cut(text, test.stop), ended or stopped)
    return said


def looked_at(
    runner: Runner, test: Test, examples: Sequence[Example], row: int, said: list[int]
) -> bool:
    """Whether the answer to a row's example needs no more tokens."""
    assert test.needs_no_more is not None
    text = str(runner.tokenizer.decode(said, skip_special_tokens=True))
    is_whole = not text.endswith("\ufffd")  # else more tokens make another character of it
    return is_whole and test.needs_no_more(examples[row], text)


def cut(text: str, stop: str | None) -> str:
    """An answer up to its end."""
    return text if stop is None else text.strip().split(stop)[0].strip()


def ends(tokenizer: PreTrainedTokenizerBase, stop: str | None, model: Any) -> list[int]:
    """The tokens that end an answer: those that end a text of the model's, and `stop`."""
    found: set[Any] = {tokenizer.eos_token_id}
    # Chat models name several. Gone on behind one, the text would be joined where it ended.
    of_model = model.generation_config.eos_token_id
    found |= {*of_model} if isinstance(of_model, (list, tuple)) else {of_model}
    found.discard(None)
    for text in () if stop is None else (stop, stop + "\n"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        found |= set(ids) if len(ids) == 1 else set()
    return sorted(found)


def to_device(batch: Any, device: Any) -> Any:
    """A nested batch on a device."""
    if isinstance(batch, Mapping):
        return {name: to_device(value, device) for name, value in batch.items()}
    return batch.to(device) if isinstance(batch, torch.Tensor) else batch
