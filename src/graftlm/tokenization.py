"""Tokenizers found beside the models: are two the same, and has one changed?

Compared by what they do, not by name or by how a file spells them.
"""

import hashlib
import json
import os
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from graftlm import gguf

PROBES = (
    "The quick brown fox, 12345 + 678 = 13023; naïve café.",
    "def f(x):\n    return [y ** 2 for y in x]  # 平方\n\n\tend",
    "Привет мир! नमस्ते สวัสดี 你好 こんにちは 👩‍🚀   <|im_start|>user",
)

# More of them, to tell tokenizers apart that differ in few places only.
MORE_PROBES = (
    "it's they'll I'VE 1 12 123 1234 12345678 3.14 1,000,000 https://example.org/a_b?c=d&e=f",
    "\n\n\n\t\t  \r\n                                        if x:\n        pass  ",
    "Ünïcödé İstanbul Ångström ﬁne Straße ½ ² e\u0301 한국어 ภาษาไทย العربية עברית বাংলা தமிழ்",
    '𝔘𝔫𝔦 👨‍👩‍👧‍👦🇸🇪 «»“”…—–•→≠≤∑∫ \u200b\ufeff\u00a0 <b>bold</b> {"a": [1, 2]}',
)


def find_tokenizer(name_or_path: str | None, subfolder: str = "") -> PreTrainedTokenizerBase | None:
    """The tokenizer that lies beside a model, or None; never asks the network."""
    if not name_or_path:
        return None
    try:
        name_or_path = gguf.resolve(name_or_path)
    except ValueError:  # the file is gone, or cannot be read
        return None
    if os.path.isdir(name_or_path):
        name_or_path, subfolder = os.path.join(name_or_path, subfolder), ""
        if not any(
            name.startswith(("tokenizer", "vocab", "spiece", "sentencepiece"))
            for name in os.listdir(name_or_path)
        ):
            return None
    try:
        return AutoTokenizer.from_pretrained(
            name_or_path, subfolder=subfolder, local_files_only=True
        )
    except (OSError, ValueError, KeyError):  # no tokenizer there, or not on this machine
        return None


def load_tokenizer(name_or_path: str, **options: Any) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a model that is loaded by name: from a folder, or from the hub as the model.

    Args:
        name_or_path: A path or a hub id.
        options: As in transformers, such as `trust_remote_code`.
    """
    path = gguf.resolve(name_or_path)
    if os.path.isdir(path):
        return find_tokenizer(path)
    try:
        return AutoTokenizer.from_pretrained(path, **options)
    except (OSError, ValueError, KeyError):  # the model has none, or none we can read
        return None


def behaviour(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of a few telling texts, special tokens left out."""
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in PROBES]


def tokenizes_alike(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers do the same to telling texts, whatever they are called."""

    def ids(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
        return behaviour(tokenizer) + [
            tokenizer(text, add_special_tokens=False)["input_ids"] for text in MORE_PROBES
        ]

    return one is other or ids(one) == ids(other)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over the vocabulary and what the tokenizer does to `PROBES`.

    Added tokens, and which of them pads or ends a text, do not count: trainers set these.
    """
    added = set(tokenizer.added_tokens_encoder)
    vocabulary = {token: i for token, i in tokenizer.get_vocab().items() if token not in added}
    facts = [sorted(vocabulary.items()), behaviour(tokenizer)]
    return hashlib.sha256(json.dumps(facts, ensure_ascii=True).encode()).hexdigest()
