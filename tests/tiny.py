"""Tiny models, tokenizers and data in a folder, for the tests of training and the command line."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<|user|>", "<|assistant|>", "<|end|>")
CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MARKED_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}<|end|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def character_tokenizer(
    merges: Sequence[tuple[str, str]] = (),
    chat_template: str | None = CHAT_TEMPLATE,
    **special: Any,
) -> PreTrainedTokenizerFast:
    """One token a character, and one for each merge; no special token is added by itself."""
    words = [*SPECIAL, *CHARACTERS, *("".join(pair) for pair in merges)]
    vocabulary = {word: index for index, word in enumerate(words)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges), unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n"), "isolated")
    core.decoder = decoders.Fuse()
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"} | special
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        additional_special_tokens=["<|user|>", "<|assistant|>", "<|end|>"],
        **{name: token for name, token in names.items() if token is not None},
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def save_model(folder: Path, seed: int = 0, **changes: Any) -> str:
    """A random llama with the character tokenizer; returns its path."""
    tokenizer = character_tokenizer()
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 96,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
    }
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **shape | changes))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def save_pair(folder: Path) -> tuple[str, str]:
    """An anchor and a smaller, shallower augmenting model."""
    anchor = save_model(folder / "anchor", seed=1)
    smaller = {"hidden_size": 16, "intermediate_size": 28, "num_hidden_layers": 3}
    return anchor, save_model(folder / "augmenting", seed=2, **smaller)


def meddling(**more: Any) -> GenerationConfig:
    """Settings as in some models' files, each of which changes what is written."""
    settings: dict[str, Any] = {
        "repetition_penalty": 7.0,
        "no_repeat_ngram_size": 1,
        "num_beams": 3,
        "num_return_sequences": 2,
        "min_new_tokens": 2,
        "suppress_tokens": list(range(30, 60)),
        "begin_suppress_tokens": list(range(60, 90)),
        "bad_words_ids": [[90], [91]],
        "sequence_bias": [[[token], 9.0] for token in range(10, 20)],
        "forced_eos_token_id": 2,
        "exponential_decay_length_penalty": (1, 2.0),
        "guidance_scale": 1.5,
        "stop_strings": ["a", "e"],
        "return_dict_in_generate": True,
    }
    ends = {"eos_token_id": 2, "pad_token_id": 0}
    return GenerationConfig(**settings | ends | more)


def write_lines(path: Path, *rows: Any) -> str:
    """A JSONL file of these rows; texts are written as they are."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return str(path)


def sums(count: int) -> list[dict[str, str]]:
    """Rows with a prompt and a completion."""
    return [{"prompt": f"{i}+{i + 1}=", "completion": str(2 * i + 1)} for i in range(count)]


def quick_recipe(models: tuple[str, str], folder: Path, **training: Any) -> dict[str, Any]:
    """A recipe of 12 quick steps that tells when anything is done in another order."""
    steps = {"max_steps": 12, "per_device_train_batch_size": 3, "save_steps": 4}
    return {
        "anchor": models[0],
        "augmenting": models[1],
        "data": write_lines(folder / "data.jsonl", *sums(20)),
        "output_dir": str(folder / "out"),
        "every": 2,
        "training": steps | {"learning_rate": 0.01, "report_to": "none"} | training,
    }
