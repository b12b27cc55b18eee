"""Sentences of FLORES-200 in one language beside the English ones, for lm-eval's tasks.

From the official files if `GRAFTLM_FLORES200` names their folder (`dev/lij_Latn.dev`,
`devtest/lij_Latn.devtest`, ... a sentence a line), else from the hub, where access must be asked
for.
"""

import os
from pathlib import Path
from typing import Any

import datasets

HUB = "openlanguagedata/flores_plus"
NAMES = {
    "lij_Latn": "Ligurian",
    "mar_Deva": "Marathi",
    "taq_Latn": "Tamasheq",
    "nno_Latn": "Norwegian Nynorsk",
    "sun_Latn": "Sundanese",
    "ban_Latn": "Balinese",
    "pol_Latn": "Polish",
    "tha_Thai": "Thai",
    "min_Latn": "Minangkabau",
    "acm_Arab": "Mesopotamian Arabic",
}
ENGLISH = "eng_Latn"


def load(language: str, **metadata: Any) -> dict[str, datasets.Dataset]:
    """The splits dev and devtest, with `language`, `source` and `english` in each row.

    Args:
        language: Its code in FLORES-200, such as "lij_Latn".
        metadata: What lm-eval knows of the task.
    """
    del metadata
    splits = {}
    for split in ("dev", "devtest"):
        source, english = sentences(language, split), sentences(ENGLISH, split)
        check_same(language, split, len(source), len(english))
        name = NAMES.get(language, language)
        columns = {"language": [name] * len(source), "source": source, "english": english}
        splits[split] = datasets.Dataset.from_dict(columns)
    return splits


def sentences(language: str, split: str) -> list[str]:
    """All sentences of a split, in the order that all languages share."""
    folder = os.environ.get("GRAFTLM_FLORES200")
    if folder:
        path = Path(folder, split, f"{language}.{split}")
        return path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    rows: Any = datasets.load_dataset(HUB, language, split=split)
    return [row["text"] for row in sorted(rows, key=lambda row: row["id"])]


def check_same(language: str, split: str, ours: int, theirs: int) -> None:
    """Refuse languages of different lengths, whose lines cannot be translations.

    Raises:
        ValueError: Naming both lengths.
    """
    if ours != theirs:
        raise ValueError(
            f"FLORES-200 has {ours} sentences of {language} in {split}, but {theirs} of {ENGLISH}; "
            "are the files complete?"
        )
