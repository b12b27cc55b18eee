"""A pair of tiny tokenizers that split text differently, and models that use them."""

import functools
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from families import tiny, tiny_llama
from graftlm import compose

TEXT = """The quick brown fox jumps over the lazy dog, and the dog sleeps on.
There was once a town where nobody counted further than 12; 345 was the sea.
def add(first, second):
    return first + second  # the sum
Быстрая лиса прыгает через ленивую собаку. 敏捷的棕色狐狸跳过懒狗。 คนไทยพูดภาษาไทย
"""
PROMPTS = ["The quick brown fox", "There was once", "def add(fi", "狐狸跳过 the dog sl"]


@functools.cache
def byte_tokenizer(size: int = 320) -> PreTrainedTokenizerFast:
    """Byte-level BPE with a chat template, as the anchor's; nothing is put before a text."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "</s>", "<|im_start|>", "<|im_end|>"]
    core.train_from_iterator(
        [TEXT] * 3,
        trainers.BpeTrainer(
            vocab_size=size, special_tokens=special, initial_alphabet=sorted(alphabet)
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", padding_side="left"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return tokenizer


@functools.cache
def word_tokenizer(size: int = 420) -> PreTrainedTokenizerFast:
    """Metaspace BPE that falls back to bytes and puts <s> before a text, as Llama's."""
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    latin = "\n".join(line for line in TEXT.splitlines() if line.isascii())
    core.train_from_iterator(
        [latin] * 3, trainers.BpeTrainer(vocab_size=size, special_tokens=special)
    )
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def compose_pair(anchor: str = "llama", augmenting: str | None = None, **options: Any) -> Any:
    """An anchor of byte tokens, and an augmenting model of word tokens (a llama by default)."""
    ours, theirs = byte_tokenizer(), word_tokenizer()
    sizes = {"vocab_size": len(theirs), "max_position_embeddings": 120}
    if augmenting == "gemma4_text":
        sizes["vocab_size_per_layer_input"] = len(theirs)
    return compose(
        tiny(anchor, seed=1, vocab_size=len(ours), max_position_embeddings=120),
        tiny_llama(**sizes) if augmenting is None else tiny(augmenting, seed=2, **sizes),
        every=1,
        tokenizer=ours,
        augmenting_tokenizers=theirs,
        **options,
    )


def batch_of(*texts: str) -> dict[str, torch.Tensor]:
    """Texts as the anchor's tokens, padded on the left."""
    encoded = byte_tokenizer()(list(texts), padding=True, return_tensors="pt")
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}
