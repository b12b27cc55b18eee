"""Score systems on pairs: bits per byte of the reference, chrF and BLEU, and paired bootstraps."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerBase

from graftlm.reproduce.translate_data import IGNORED, Pair
from graftlm.reproduce.translate_training import Collate, pad, target_logits

NUM_RESAMPLES = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class System:
    """A model that translates, and how it is asked.

    Args:
        model: Its trunk and head predict the targets.
        tokenizer: Of the tokens of `encode`.
        encode: Tokens and labels of some pairs; the label of the last token is the end.
        collate: Pads them into a batch.
        bf16: Whether to run with autocast.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    encode: Callable[[Sequence[Pair]], list[dict[str, list[int]]]]
    collate: Collate = pad
    bf16: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """What one system did on one test: a number and a text for each pair."""

    bits: list[float]
    texts: list[str]


def by_length(features: Sequence[dict[str, list[int]]], batch_size: int) -> list[list[int]]:
    """Numbers of the features, longest first, in batches."""
    order = sorted(range(len(features)), key=lambda k: -len(features[k]["input_ids"]))
    return [order[k : k + batch_size] for k in range(0, len(order), batch_size)]


@torch.no_grad()
def bits(system: System, pairs: Sequence[Pair], batch_size: int = 16) -> list[float]:
    """Bits each target costs, without the end of the text."""
    features = system.encode(pairs)
    found = [0.0] * len(pairs)
    device = system.model.device
    for numbers in by_length(features, batch_size):
        batch = to_device(system.collate([features[k] for k in numbers]), device)
        with torch.autocast(device.type, torch.bfloat16, enabled=system.bf16):
            logits, labels, rows = target_logits(system.model, batch)
        losses = F.cross_entropy(logits, labels, reduction="none").tolist()
        owners = rows.tolist()
        for place, (row, loss) in enumerate(zip(owners, losses, strict=True)):
            is_end = place + 1 == len(owners) or owners[place + 1] != row
            found[numbers[row]] += 0.0 if is_end else loss / math.log(2)
    return found


@torch.no_grad()
def translate(
    system: System, pairs: Sequence[Pair], batch_size: int = 48, ratio: float = 1.3
) -> list[str]:
    """Greedy answers, up to the end of the line, or to a blank line if references have several.

    Args:
        ratio: Of the most tokens of an answer to those of the longest reference of its batch.
    """
    features = system.encode(pairs)
    texts = [""] * len(pairs)
    stop = "\n\n" if any("\n" in pair.target for pair in pairs) else "\n"
    for numbers in by_length(features, batch_size):
        batch = [features[k] for k in numbers]
        sizes = [sum(label == IGNORED for label in feature["labels"]) for feature in batch]
        prompts = [
            {name: ids[:size] for name, ids in feature.items() if name != "labels"}
            for feature, size in zip(batch, sizes, strict=True)
        ]
        longest = max(len(f["labels"]) - size for f, size in zip(batch, sizes, strict=True))
        answers = generate(system, prompts, math.ceil(longest * ratio), stop)
        decoded = system.tokenizer.batch_decode(answers, skip_special_tokens=True)
        for number, text in zip(numbers, decoded, strict=True):
            texts[number] = text.strip().split(stop)[0].strip()
    return texts


def generate(
    system: System, prompts: list[dict[str, list[int]]], length: int, stop: str
) -> torch.Tensor:
    """The tokens that continue prompts."""
    device = system.model.device
    inputs = to_device(pad(prompts, left=True), device)
    with torch.autocast(device.type, torch.bfloat16, enabled=system.bf16):
        output = system.model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=length,
            eos_token_id=ends(system.tokenizer, stop),
            pad_token_id=system.tokenizer.eos_token_id,
        )
    return output[:, inputs["input_ids"].shape[1] :]


def ends(tokenizer: PreTrainedTokenizerBase, stop: str) -> list[int]:
    """The tokens that end an answer: the end of the text, and those that begin with `stop`."""
    found = {tokenizer.eos_token_id}
    for text in (stop, stop + "\n"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        found |= set(ids) if len(ids) == 1 else set()
    return sorted(found)


def to_device(batch: Any, device: Any) -> Any:
    """A nested batch on a device."""
    if isinstance(batch, Mapping):
        return {name: to_device(value, device) for name, value in batch.items()}
    return batch.to(device) if isinstance(batch, torch.Tensor) else batch


# ---- numbers over a test -----------------------------------------------------------------


def num_bytes(pairs: Sequence[Pair]) -> list[int]:
    """Bytes of the completions."""
    return [len(pair.completion.encode()) for pair in pairs]


def bits_per_byte(found: Sequence[float], sizes: Sequence[int]) -> float:
    """Bits of all targets over their bytes."""
    return sum(found) / sum(sizes)


def bootstrap(
    ours: Sequence[float], theirs: Sequence[float], sizes: Sequence[int], seed: int = 0
) -> float:
    """How probable so large a difference of bits per byte is by chance; two-sided.

    Paired, over resampled sentences, with the p value that sacrebleu's paired bootstrap has: how
    often a resampled difference lies as far from the mean as the true one lies from zero.
    """
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(len(sizes), (NUM_RESAMPLES, len(sizes)), generator=generator)
    gains = torch.tensor(ours, dtype=torch.float64) - torch.tensor(theirs, dtype=torch.float64)
    num_bytes = torch.tensor(sizes, dtype=torch.float64)
    resampled = gains[draws].sum(1) / num_bytes[draws].sum(1)
    extreme = (resampled - resampled.mean()).abs() >= gains.sum().abs() / num_bytes.sum()
    return (int(extreme.sum()) + 1) / (NUM_RESAMPLES + 1)


def chrf_and_bleu(
    texts: Mapping[str, Sequence[str]], references: Sequence[str], baseline: str
) -> dict[str, dict[str, dict[str, float]]]:
    """Corpus scores of all systems, and sacrebleu's paired bootstrap against one of them.

    Returns:
        By system and by metric: `score`, and for all but the baseline `p`.

    Raises:
        ImportError: If sacrebleu is not installed.
    """
    try:
        from sacrebleu.metrics import BLEU, CHRF
        from sacrebleu.significance import PairedTest
    except ImportError as error:
        raise ImportError(
            "sacrebleu is not installed, which scores translations; "
            "run: pip install 'graftlm[reproduce]'"
        ) from error
    names = [baseline, *(name for name in texts if name != baseline)]
    wanted = [list(references)]
    _, columns = PairedTest(
        [(name, list(texts[name])) for name in names],
        {"chrF": CHRF(references=wanted), "BLEU": BLEU(references=wanted)},
        references=None,
        test_type="bs",
        n_samples=NUM_RESAMPLES,
    )()
    table: dict[str, dict[str, dict[str, float]]] = {name: {} for name in names}
    for metric in ("chrF", "BLEU"):
        key = next(k for k in columns if k.lower().startswith(metric.lower()))
        results: Any = columns[key]
        for name, result in zip(names, results, strict=True):
            table[name][metric] = {"score": float(result.score)}
            if result.p_value is not None:
                table[name][metric]["p"] = float(result.p_value)
    return table
