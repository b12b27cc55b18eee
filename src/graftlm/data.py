"""Training data: from files and `datasets` names to token ids and labels.

Of a prompt and its completion, the completion has a loss; of a conversation, the assistant's
turns; of a text, everything. `graftlm.rows` says how they are written. A plain text file is one
document, cut into blocks of `max_length` tokens.
"""

import itertools
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from graftlm.collation import IGNORED
from graftlm.rows import (
    JSON_SUFFIXES,
    TABLE_SUFFIXES,
    Row,
    as_text,
    check_values,
    described,
    kind_of,
    read_rows,
)

BATCH = 1000
LONGEST_BY_DEFAULT = 1024
GENERATION_MARK = re.compile(r"\{%-?\s*generation\b")  # how transformers looks for it

Tokens = tuple[list[int], list[int]]  # input_ids and labels


@dataclass(frozen=True, kw_only=True, slots=True)
class Examples:
    """Tokenised data, and what became of the rows.

    Args:
        dataset: With `input_ids` and `labels`, one row an example.
        num_tokens: In all examples, after cutting.
        num_labels: Of these, the ones with a loss.
        num_truncated: Examples that were longer than `max_length`, of all that were read.
        num_dropped: Examples without any label, which were left out, of all that were read.
    """

    dataset: Dataset
    num_tokens: int
    num_labels: int
    num_truncated: int
    num_dropped: int

    def split(self, fraction: float, seed: int) -> tuple["Examples", "Examples"]:
        """A part to train on, and a random `fraction` to evaluate on.

        Raises:
            ValueError: If one of the parts would be empty.
        """
        held_out = round(len(self.dataset) * fraction)
        if not 0 < held_out < len(self.dataset):
            raise ValueError(
                f"eval_fraction {fraction} of {len(self.dataset)} examples holds out {held_out}, "
                "but both parts need one at least"
            )
        parts: Any = self.dataset.train_test_split(test_size=held_out, seed=seed)
        rows = parts["test"]["labels"]
        num_tokens, num_labels = sum(map(len, rows)), sum(map(count_labels, rows))
        rest = {
            "num_tokens": self.num_tokens - num_tokens,
            "num_labels": self.num_labels - num_labels,
        }
        return (
            replace(self, dataset=parts["train"], **rest),
            replace(self, dataset=parts["test"], num_tokens=num_tokens, num_labels=num_labels),
        )


def load_examples(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    completions_only: bool = True,
) -> Examples:
    """Read and tokenise training data.

    Args:
        source: A `.jsonl` or `.json` file of one object a line, any other text file, a folder, or
            a `datasets` name; the last two with `:config` and `:split` behind it where needed,
            as in `gsm8k:main:test`.
        tokenizer: The anchor's. Messages need its chat template.
        max_length: Tokens after which an example is cut.
        completions_only: No loss on prompts and on turns that are not the assistant's.

    Raises:
        ValueError: If a row is not one of the three kinds; with file and line.
    """
    path = Path(source)
    if path.is_file() and path.suffix not in (*JSON_SUFFIXES, *TABLE_SUFFIXES):
        return collect(text_blocks(path, tokenizer, max_length), source, max_length)
    rows = read_rows(source)
    if not tokenizer.eos_token_id and tokenizer.eos_token_id != 0:
        warnings.warn(
            "the tokenizer has no end-of-text token, so nothing teaches the model where to stop",
            stacklevel=2,
        )
    return collect(tokenised(rows, tokenizer, completions_only), source, max_length)


def contexts(configs: Mapping[str, Any]) -> dict[str, int]:
    """How many tokens each model can read, if that is limited; by its name in messages.

    Args:
        configs: Of "anchor" and the augmenting models.
    """
    found = {}
    for name, config in configs.items():
        size = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
        if isinstance(size, int) and size > 0:
            found["the anchor" if name == "anchor" else f"augmenting model {name!r}"] = size
    return found


def fitting_length(configs: Mapping[str, Any], max_length: int | None) -> int:
    """Tokens an example may have.

    Args:
        configs: Of "anchor" and the augmenting models.
        max_length: What was asked for; by default 1024, or what all the models can read.

    Raises:
        ValueError: If it is beyond the context of one of the models.
    """
    limits = contexts(configs)
    if max_length is None:
        return min((LONGEST_BY_DEFAULT, *limits.values()))
    for model, size in limits.items():
        if max_length > size:
            raise ValueError(
                f"max_length is {max_length}, but the context of {model} is {size} tokens"
            )
    return max_length


# ---- tokens ------------------------------------------------------------------------------


def tokenised(
    rows: Iterable[tuple[str, Row]], tokenizer: PreTrainedTokenizerBase, completions_only: bool
) -> Iterator[Tokens]:
    """Tokens and labels of each row.

    Raises:
        ValueError: If a row is of another kind than the first, or messages lack a chat template.
    """
    first: tuple[tuple[str, ...], bool] | None = None
    for place, row in rows:
        kind = kind_of(row, place)
        shape = kind, check_values(row, kind, place)
        first = first or shape
        if shape != first:
            raise ValueError(
                f"{place}: holds {described(*shape)}, but the rows before hold {described(*first)}"
            )
        if shape[1]:
            if not tokenizer.chat_template:
                raise ValueError(
                    f"{place}: holds messages, but the tokenizer has no chat template; use texts, "
                    "or the tokenizer of a chat model"
                )
            try:
                yield chat_tokens(row, kind, tokenizer, completions_only)
            except (ValueError, TemplateError) as exc:
                raise ValueError(f"{place}: {exc}") from exc
        else:
            yield text_tokens(row, kind, tokenizer, completions_only)


def text_tokens(
    row: Row, kind: tuple[str, ...], tokenizer: PreTrainedTokenizerBase, completions_only: bool
) -> Tokens:
    """Tokens of a plain text or of prompt + completion, and of the end of the text."""
    ids = encode(tokenizer, "".join(row[key] for key in kind))
    if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
        ids = [*ids, tokenizer.eos_token_id]
    if kind == ("text",) or not completions_only:
        return ids, list(ids)
    start = common_prefix_length(encode(tokenizer, row["prompt"]), ids)
    return ids, [IGNORED] * start + ids[start:]


def chat_tokens(
    row: Row, kind: tuple[str, ...], tokenizer: PreTrainedTokenizerBase, completions_only: bool
) -> Tokens:
    """Tokens of a conversation as the chat template writes it, special tokens included."""
    tools = row.get("tools")
    messages = list(itertools.chain.from_iterable(row[key] for key in kind))
    template = chat_template(tokenizer)
    if completions_only and kind == ("messages",) and GENERATION_MARK.search(template):
        marked: Any = tokenizer.apply_chat_template(
            messages, tools=tools, return_dict=True, return_assistant_tokens_mask=True
        )
        ids = list(marked["input_ids"])
        mask = marked["assistant_masks"]
        return ids, [i if m else IGNORED for i, m in zip(ids, mask, strict=True)]

    def rendered(count: int, opens_turn: bool = False) -> str:
        text = tokenizer.apply_chat_template(
            messages[:count], tools=tools, tokenize=False, add_generation_prompt=opens_turn
        )
        assert isinstance(text, str)
        return text

    ids = encode(tokenizer, rendered(len(messages)), add_special_tokens=False)
    if not completions_only:
        return ids, list(ids)
    labels = [IGNORED] * len(ids)
    for first, last in trained_turns(row, kind, messages):
        # Templates write no conversation without messages.
        opened = rendered(first, opens_turn=True) if first else ""
        start = common_prefix_length(encode(tokenizer, opened, add_special_tokens=False), ids)
        before = rendered(last)
        if not rendered(len(messages)).startswith(before):
            raise ValueError(
                f"the chat template writes message {last} differently once more messages follow, "
                "so its place cannot be found; use a template with {% generation %} marks, or "
                "set completions_only to false"
            )
        end = common_prefix_length(encode(tokenizer, before, add_special_tokens=False), ids)
        labels[start:end] = ids[start:end]
    return ids, labels


def chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The template's text; a tokenizer may hold several by name."""
    template = tokenizer.chat_template
    return template["default"] if isinstance(template, dict) else str(template)


def trained_turns(
    row: Row, kind: tuple[str, ...], messages: list[Mapping[str, Any]]
) -> list[tuple[int, int]]:
    """From which message to which (exclusive) there is loss: the completion, or each answer."""
    if kind != ("messages",):
        return [(len(row["prompt"]), len(messages))]
    return [(i, i + 1) for i, message in enumerate(messages) if message["role"] == "assistant"]


def encode(tokenizer: PreTrainedTokenizerBase, text: str, **options: Any) -> list[int]:
    """Token ids of a text, of any length (the tokenizer's warning about it is not wanted here)."""
    return list(tokenizer(text, verbose=False, **options)["input_ids"])


def common_prefix_length(ids: list[int], other: list[int]) -> int:
    """How many first tokens two sequences share.

    A prompt tokenised alone may end in another token than the same prompt with its completion
    behind it; the token that straddles the border belongs to the completion.
    """
    pairs = zip(ids, other, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def text_blocks(
    path: Path, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Iterator[Tokens]:
    """One document cut into blocks of `max_length` tokens; nothing of it is lost."""
    text = as_text(path.read_bytes(), str(path))
    if not text.strip():
        return
    ids, _ = text_tokens({"text": text}, ("text",), tokenizer, completions_only=False)
    for start in range(0, len(ids), max_length):
        block = ids[start : start + max_length]
        if len(block) > 1:  # a single token predicts nothing
            yield block, list(block)


# ---- examples ----------------------------------------------------------------------------


def collect(tokens: Iterable[Tokens], source: str, max_length: int) -> Examples:
    """Cut, count and keep the examples that have a label.

    Raises:
        ValueError: If there are none.
    """
    parts, batch = [], {"input_ids": [], "labels": []}
    counts = {"num_tokens": 0, "num_labels": 0, "num_truncated": 0, "num_dropped": 0}
    for ids, labels in tokens:
        counts["num_truncated"] += len(ids) > max_length
        ids, labels = ids[:max_length], labels[:max_length]
        num_labels = count_labels(labels)
        if not num_labels:
            counts["num_dropped"] += 1
            continue
        counts["num_tokens"] += len(ids)
        counts["num_labels"] += num_labels
        batch["input_ids"].append(ids)
        batch["labels"].append(labels)
        if len(batch["labels"]) == BATCH:
            parts.append(Dataset.from_dict(batch))
            batch = {"input_ids": [], "labels": []}
    if batch["labels"]:
        parts.append(Dataset.from_dict(batch))
    if not parts:
        lost = f"all {counts['num_dropped']} examples" if counts["num_dropped"] else "it"
        reason = "lack a token with a loss" if counts["num_dropped"] else "is empty"
        raise ValueError(f"data {source!r} leaves nothing to train on: {lost} {reason}")
    examples = Examples(dataset=concatenate_datasets(parts), **counts)
    warn_of_losses(examples, source, max_length)
    return examples


def count_labels(labels: list[int]) -> int:
    """How many tokens of an example have a loss; the first is never predicted."""
    return sum(label != IGNORED for label in labels[1:])


def warn_of_losses(examples: Examples, source: str, max_length: int) -> None:
    """Say how many examples were cut or left out."""
    whole = len(examples.dataset) + examples.num_dropped
    if examples.num_truncated:
        warnings.warn(
            f"{examples.num_truncated} of {whole} examples of {source} are longer than max_length "
            f"{max_length} and were cut",
            stacklevel=4,
        )
    if examples.num_dropped:
        warnings.warn(
            f"{examples.num_dropped} of {whole} examples of {source} have no token with a loss "
            f"within max_length {max_length} and were left out",
            stacklevel=4,
        )
