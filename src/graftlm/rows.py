"""Rows of training data: where they come from, and which of three kinds they are.

    {"prompt": ..., "completion": ...}    texts, or lists of messages
    {"messages": [{"role": ..., "content": ...}, ...]}
    {"text": ...}

The names are TRL's. Each row comes with its place, for messages about it.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from datasets import load_dataset, load_from_disk
from datasets.exceptions import DatasetsError

KINDS = (("messages",), ("prompt", "completion"), ("text",))
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
TEXT_SUFFIXES = (".txt", ".text", ".md")
TABLE_SUFFIXES = (".csv", ".tsv", ".parquet", ".arrow", ".xlsx", ".gz", ".zst", ".zip")

Row = dict[str, Any]


def read_rows(source: str) -> Iterator[tuple[str, Row]]:
    """The rows of a JSONL file, a folder or a `datasets` name, each with its place.

    Raises:
        ValueError: If it is a file of another kind.
    """
    path = Path(source)
    if path.suffix in TABLE_SUFFIXES:
        raise ValueError(
            f"data {source!r} is a {path.suffix} file, but must be JSONL or plain text; a folder "
            "of such files can be read as a data set"
        )
    return read_jsonl(path) if path.suffix in JSON_SUFFIXES else read_dataset(source)


def read_jsonl(path: Path) -> Iterator[tuple[str, Row]]:
    """The rows of a JSONL file, each with where it is."""
    check_exists(path)
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            place = f"{path}, line {number}"
            line = as_text(raw, place)
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as exc:
                raise ValueError(
                    f"{place}: not valid JSON: {exc.msg} at column {exc.colno}"
                ) from exc
            if not isinstance(row, dict):
                raise ValueError(f"{place}: must be a JSON object, but is {line.strip()[:40]!r}")
            yield place, row


def check_exists(path: Path) -> None:
    """Refuse a path where nothing is.

    Raises:
        ValueError: Naming it.
    """
    if not path.exists():
        raise ValueError(f"data {str(path)!r} does not exist")


def as_text(raw: bytes, place: str) -> str:
    """UTF-8 as text, without a byte order mark.

    Raises:
        ValueError: If it is not UTF-8.
    """
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        raise ValueError(f"{place}: not UTF-8 text: {exc.reason} at byte {exc.start}") from exc


def read_dataset(source: str) -> Iterator[tuple[str, Row]]:
    """The rows of a data set of the hub or of a folder, each with where it is.

    Raises:
        ValueError: If there is neither.
    """
    name, config, split = (*source.split(":", 2), "", "")[:3]
    if Path(name).suffix in TEXT_SUFFIXES or name.startswith((".", "/", "~")):
        check_exists(Path(name))  # a mistyped path is no name to ask the hub for
    found: Any
    try:
        if os.path.isdir(name) and any(
            os.path.exists(os.path.join(name, file)) for file in ("state.json", "dataset_dict.json")
        ):
            saved: Any = load_from_disk(name)
            found = saved[split or "train"] if isinstance(saved, dict) else saved
        else:
            found = load_dataset(name, config or None, split=split or "train")
    except (OSError, KeyError, ValueError, DatasetsError) as exc:
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


def described(kind: tuple[str, ...], is_chat: bool) -> str:
    """A kind of row in words."""
    words = " and ".join(map(repr, kind))
    return f"{words} as messages" if is_chat and kind != KINDS[0] else words
