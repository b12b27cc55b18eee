"""Training data: from files and `datasets` names to token ids and labels.

One row of data is one of three kinds, named as in TRL:

    {"prompt": ..., "completion": ...}    texts, or lists of messages; loss on the completion
    {"messages": [{"role": ..., "content": ...}, ...]}    loss on the assistant's turns
    {"text": ...}                                         loss on everything

A plain text file is one document, cut into blocks of `max_length` tokens.
"""

import copy
import itertools
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets, load_dataset, load_from_disk
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase

IGNORED = -100
KINDS = (("messages",), ("prompt", "completion"), ("text",))
JSON_SUFFIXES = (".jsonl", ".ndjson")
BATCH = 1000

Row = dict[str, Any]
Tokens = tuple[list[int], list[int]]  # input_ids and labels


@dataclass(frozen=True, kw_only=True, slots=True)
class Examples:
    """Tokenised data, and what became of the rows.

    Args:
        dataset: With `input_ids` and `labels`, one row an example.
        num_tokens: In all examples, after cutting.
        num_labels: Of these, the ones with a loss.
        num_truncated: Examples that were longer than `max_length`.
        num_dropped: Examples without any label, which were left out.
    """

    dataset: Dataset
    num_tokens: int
    num_labels: int
    num_truncated: int
    num_dropped: int

    def split(self, fraction: float, seed: int) -> tuple["Examples", "Examples"]:
        """A part to train on, and a random `fraction` to evaluate on; the counts stay whole.

        Raises:
            ValueError: If one of the parts would be empty.
        """
        held_out = round(len(self.dataset) * fraction)
        if not 0 < held_out < len(self.dataset):
            raise ValueError(
                f"eval_fraction {fraction} of {len(self.dataset)} examples holds out {held_out}, "
                "but both parts need one at least"
            )
        parts = self.dataset.train_test_split(test_size=held_out, seed=seed)
        return replace(self, dataset=parts["train"]), replace(self, dataset=parts["test"])


def load_examples(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    completions_only: bool = True,
) -> Examples:
    """Read and tokenise training data.

    Args:
        source: A `.jsonl` file, any other text file, a folder, or a `datasets` name, the last
            two with `:config` and `:split` behind it where needed, as in `gsm8k:main:test`.
        tokenizer: The anchor's. Messages need its chat template.
        max_length: Tokens after which an example is cut.
        completions_only: No loss on prompts and on turns that are not the assistant's.

    Raises:
        ValueError: If a row is not what the module's first lines say; with file and line.
    """
    path = Path(source)
    if path.is_file() and path.suffix not in JSON_SUFFIXES:
        return collect(text_blocks(path, tokenizer, max_length), source, max_length)
    rows = read_jsonl(path) if path.suffix in JSON_SUFFIXES else read_dataset(source)
    if not tokenizer.eos_token_id and tokenizer.eos_token_id != 0:
        warnings.warn(
            "the tokenizer has no end-of-text token, so nothing teaches the model where to stop",
            stacklevel=2,
        )
    return collect(tokenised(rows, tokenizer, completions_only), source, max_length)


# ---- rows --------------------------------------------------------------------------------


def read_jsonl(path: Path) -> Iterator[tuple[str, Row]]:
    """The rows of a JSONL file, each with where it is."""
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as exc:
                raise ValueError(
                    f"{place}: not valid JSON: {exc.msg} at column {exc.colno}"
                ) from exc
            if not isinstance(row, dict):
                raise ValueError(f"{place}: must be a JSON object, but is {line.strip()[:40]!r}")
            yield place, row


def read_dataset(source: str) -> Iterator[tuple[str, Row]]:
    """The rows of a data set of the hub or of a folder, each with where it is.

    Raises:
        ValueError: If there is neither.
    """
    name, config, split = (*source.split(":", 2), "", "")[:3]
    if Path(name).suffix and not os.path.exists(name) and name.count("/") != 1:
        raise ValueError(f"data {name!r} does not exist")
    try:
        if os.path.isdir(name) and any(
            os.path.exists(os.path.join(name, file)) for file in ("state.json", "dataset_dict.json")
        ):
            found = load_from_disk(name)
            found = found[split or "train"] if isinstance(found, dict) else found
        else:
            found = load_dataset(name, config or None, split=split or "train")
    except (OSError, KeyError, ValueError) as exc:
        reason = " ".join(str(exc).split())
        raise ValueError(
            f"data {source!r} is no file and could not be loaded as a data set: {reason}"
        ) from exc
    for number, row in enumerate(found, start=1):
        yield f"{source}, row {number}", {k: v for k, v in row.items() if v is not None}


def kind_of(row: Row, place: str) -> tuple[str, ...]:
    """The keys that make this row one of the three kinds.

    Raises:
        ValueError: If it is none of them, or half of one.
    """
    for kind in KINDS:
        if kind[0] in row or kind[-1] in row:
            for key in kind:
                if key not in row:
                    other = next(name for name in kind if name in row)
                    raise ValueError(f"{place}: has {other!r}, but no {key!r}")
            return kind
    keys = ", ".join(map(repr, row)) or "no key"
    raise ValueError(
        f"{place}: has {keys}, but needs 'prompt' and 'completion', or 'messages', or 'text'"
    )


def check_values(row: Row, kind: tuple[str, ...], place: str) -> bool:
    """Whether the values are messages; refuse what is neither text nor messages.

    Raises:
        ValueError: Naming the key.
    """
    for key in kind:
        value = row[key]
        if isinstance(value, str) and key != "messages":
            continue
        if key == "text" or not isinstance(value, list):
            wanted = {"text": "a text", "messages": "a list of messages"}
            raise ValueError(
                f"{place}: {key!r} is of type {type(value).__name__}, but must be "
                f"{wanted.get(key, 'a text or a list of messages')}"
            )
        for number, message in enumerate(value, start=1):
            for field in ("role", "content"):
                if not isinstance(message, Mapping) or field not in message:
                    raise ValueError(f"{place}: message {number} of {key!r} has no {field!r}")
        if not value:
            raise ValueError(f"{place}: {key!r} holds no message")
    is_chat = {isinstance(row[key], list) for key in kind}
    if len(is_chat) == 2:
        raise ValueError(
            f"{place}: one of 'prompt' and 'completion' is a text and the other a list of "
            "messages, but both must be of one kind"
        )
    return is_chat.pop()


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
            except ValueError as exc:
                raise ValueError(f"{place}: {exc}") from exc
        else:
            yield text_tokens(row, kind, tokenizer, completions_only)


def described(kind: tuple[str, ...], is_chat: bool) -> str:
    """A kind of row in words."""
    words = " and ".join(map(repr, kind))
    return f"{words} as messages" if is_chat and kind != KINDS[0] else words


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
    if completions_only and kind == ("messages",) and "{% generation" in template.replace("-", " "):
        marked = tokenizer.apply_chat_template(
            messages, tools=tools, return_dict=True, return_assistant_tokens_mask=True
        )
        ids = list(marked["input_ids"])
        mask = marked["assistant_masks"]
        return ids, [i if m else IGNORED for i, m in zip(ids, mask, strict=True)]

    def rendered(count: int, opens_turn: bool = False) -> str:
        return tokenizer.apply_chat_template(
            messages[:count], tools=tools, tokenize=False, add_generation_prompt=opens_turn
        )

    ids = encode(tokenizer, rendered(len(messages)), add_special_tokens=False)
    if not completions_only:
        return ids, list(ids)
    labels = [IGNORED] * len(ids)
    for first, last in trained_turns(row, kind, messages):
        start = common_prefix_length(
            encode(tokenizer, rendered(first, opens_turn=True), add_special_tokens=False), ids
        )
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
    text = path.read_text(encoding="utf-8-sig")
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
        num_labels = sum(label != IGNORED for label in labels[1:])  # the first is never predicted
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


def collator(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[Row]], Mapping[str, Any]]:
    """What makes a batch of examples: padded on the right, no attention and no loss there."""
    padding = copy.deepcopy(tokenizer)  # a saved tokenizer should keep the side of generation
    padding.padding_side = "right"
    if padding.pad_token is None:
        # Any token will do: padding is neither attended to nor has a loss.
        padding.pad_token = padding.eos_token or padding.convert_ids_to_tokens(0)
    return DataCollatorForSeq2Seq(padding, label_pad_token_id=IGNORED)
