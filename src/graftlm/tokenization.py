"""Tokenizers found beside the models: are two the same, and has one changed?

Compared by what they do, not by name or by how a file spells them.
"""

import hashlib
import json
import os

from transformers import AutoTokenizer, PreTrainedTokenizerBase

PROBES = (
    "The quick brown fox, 12345 + 678 = 13023; naïve café.",
    "def f(x):\n    return [y ** 2 for y in x]  # 平方\n\n\tend",
    "Привет мир! नमस्ते สวัสดี 你好 こんにちは 👩‍🚀   <|im_start|>user",
)


def find_tokenizer(name_or_path: str | None) -> PreTrainedTokenizerBase | None:
    """The tokenizer that lies beside a model, or None; never asks the network."""
    if not name_or_path:
        return None
    if os.path.isdir(name_or_path) and not any(
        name.startswith(("tokenizer", "vocab", "spiece", "sentencepiece"))
        for name in os.listdir(name_or_path)
    ):
        return None
    try:
        return AutoTokenizer.from_pretrained(name_or_path, local_files_only=True)
    except (OSError, ValueError, KeyError):  # no tokenizer there, or not on this machine
        return None


def behaviour(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of a few telling texts, special tokens left out."""
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in PROBES]


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over the vocabulary, the special tokens and what the tokenizer does to `PROBES`."""
    facts = [
        sorted(tokenizer.get_vocab().items()),
        sorted((name, str(value)) for name, value in tokenizer.special_tokens_map.items()),
        behaviour(tokenizer),
    ]
    return hashlib.sha256(json.dumps(facts, ensure_ascii=True).encode()).hexdigest()
