"""Train a small Llama from text alone, to be an augmenting model.

Its tokenizer is its own: byte-level BPE, which can write any text. Texts are joined, cut into rows
and read in a drawn order; transformers' Trainer does the training. What is trained is known by the
texts, the settings and the model it starts from: it is trained once, and an interrupted training
goes on.
"""

import hashlib
import json
import math
import os
import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
)

from graftlm import optimizer_state
from graftlm.gguf import sha256
from graftlm.reproduce.files import alone, unfinished
from graftlm.reproduce.hardware import has_bf16, on_one_device
from graftlm.reproduce.kv_training import Watch
from graftlm.resuming import Interruption, last_checkpoint

FORMAT_VERSION = 1  # of what is trained; another one trains anew
RECORD = "language_model.json"
SCHEDULE = "schedule.json"
PAD, BOS, EOS = "<pad>", "<s>", "</s>"
PIECE = 500  # characters of a text that are read together when it is scored


@dataclass(frozen=True, kw_only=True, slots=True)
class LanguageModelSettings:
    """A model's size, and how it is trained; the learning rate falls along a cosine.

    Args:
        vocabulary: Tokens of its tokenizer, at most.
        size: Width of the residual stream.
        intermediate_size: Width of the feed-forward layers.
        tokens: To train on.
        most_passes: Over the texts; fewer tokens are trained on where they are too few. A model
            that has read 17,000 tokens of Xhosa 74 times knows them by heart and nothing else.
        row_length: Tokens of a row.
        batch_size: Rows of an update.
        max_length: Tokens a text may have later.
        num_texts: Of a language to train on, at most.
        bf16: Compute in bfloat16 (autocast), where that is fast.
    """

    vocabulary: int = 4096
    size: int = 256
    intermediate_size: int = 704
    num_layers: int = 6
    num_heads: int = 4
    max_length: int = 1024
    tokens: int = 1_250_000
    most_passes: int = 12
    row_length: int = 256
    batch_size: int = 8
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    warmup: float = 0.05
    num_texts: int | None = None
    bf16: bool = True

    def steps(self, num_rows: int) -> int:
        """Updates on texts of so many rows."""
        rows = min(self.tokens // self.row_length, self.most_passes * num_rows)
        return max(rows // self.batch_size, 1)


PRESETS = {
    "quick": LanguageModelSettings(
        vocabulary=1024,
        size=64,
        intermediate_size=176,
        tokens=40_000,
        row_length=128,
        num_texts=60,
    ),
    "small": LanguageModelSettings(),
    "paper": LanguageModelSettings(
        vocabulary=16_384,
        size=768,
        intermediate_size=2048,
        num_layers=12,
        num_heads=12,
        tokens=30_000_000,
        row_length=512,
        batch_size=32,
        learning_rate=6e-4,
    ),
}


# ---- tokenizer ---------------------------------------------------------------------------


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of some texts; it puts `<s>` before a text and can write any.

    Args:
        texts: What pieces of words are chosen by.
        vocabulary: Tokens at most, 256 bytes and 3 special ones included.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, core.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=PAD, bos_token=BOS, eos_token=EOS, padding_side="left"
    )


def find_tokenizer(
    texts: Sequence[str], vocabulary: int, output: str | os.PathLike[str]
) -> PreTrainedTokenizerFast:
    """The tokenizer of some texts, trained if it is not in a folder yet.

    Args:
        texts: What pieces of words are chosen by.
        vocabulary: Tokens at most.
        output: The folder it is kept in, under a name of its own.
    """
    folder = Path(output, f"tokenizer-{fingerprint(vocabulary, *texts)}")
    if folder.exists():
        return PreTrainedTokenizerFast.from_pretrained(folder)
    with alone(folder):
        if not folder.exists():  # another process made it meanwhile
            with unfinished(folder) as temporary:
                train_tokenizer(texts, vocabulary).save_pretrained(temporary)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def fingerprint(*values: Any) -> str:
    """Thirty-two digits by which values are known."""
    digest = hashlib.sha256()
    for value in (FORMAT_VERSION, *values):
        digest.update(json.dumps(value, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()[:32]


# ---- rows --------------------------------------------------------------------------------


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Rows of tokens in the order they are read: every pass over them in a new one."""

    def __init__(self, rows: Tensor, number: int, seed: int):
        self.rows = rows
        self.order: list[int] = []
        rng = random.Random(seed)
        while len(self.order) < number:
            self.order += rng.sample(range(len(rows)), len(rows))
        self.order = self.order[:number]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self.rows[self.order[index]]
        return {"input_ids": row, "labels": row}


def pack(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, row_length: int) -> Tensor:
    """Texts one after another, each between `<s>` and `</s>`, cut into rows.

    Raises:
        ValueError: If they do not fill one row.
    """
    ids: list[int] = []
    for encoded in tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else ():
        ids += [tokenizer.bos_token_id, *encoded, tokenizer.eos_token_id]
    if len(ids) < row_length:
        raise ValueError(
            f"texts have {len(ids)} tokens, but a row has {row_length}; give more text, or a "
            "smaller row_length"
        )
    whole = len(ids) - len(ids) % row_length
    return torch.tensor(ids[:whole]).view(-1, row_length)


# ---- training ----------------------------------------------------------------------------


class RowsTrainer(Trainer):
    """A Trainer whose checkpoints hold safetensors and JSON only; training draws no numbers."""

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        model: Any = self.model
        model.save_pretrained(output_dir, state_dict=state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        state = optimizer_state.gather(self.inner_optimizer, self.names(), keep=True)
        optimizer_state.write(state, Path(output_dir))
        schedule: Any = self.lr_scheduler
        content = {name: schedule.state_dict()[name] for name in ("last_epoch", "_last_lr")}
        Path(output_dir, SCHEDULE).write_text(json.dumps(content), encoding="utf-8")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        state = optimizer_state.read(Path(checkpoint))
        optimizer_state.restore(self.inner_optimizer, self.names(), state, checkpoint)
        schedule: Any = self.lr_scheduler
        content = json.loads(Path(checkpoint, SCHEDULE).read_text(encoding="utf-8"))
        schedule.load_state_dict(schedule.state_dict() | content)

    def _save_rng_state(self, output_dir: str) -> None:
        pass

    def _load_rng_state(self, checkpoint: str | None) -> None:
        pass

    @property
    def inner_optimizer(self) -> Any:
        """The optimizer without accelerate's wrapper."""
        optimizer: Any = self.optimizer
        return getattr(optimizer, "optimizer", optimizer)

    def names(self) -> dict[Tensor, str]:
        """The names of the parameters."""
        model: Any = self.model
        return {parameter: name for name, parameter in model.named_parameters()}


def train_language_model(
    texts: Sequence[str],
    *,
    settings: LanguageModelSettings,
    output: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerFast | None = None,
    start_from: str | os.PathLike[str] | None = None,
    held_out: Mapping[str, Sequence[str]] | None = None,
    seed: int = 0,
    device: str = "cpu",
    console: Console | None = None,
    title: str = "language model",
) -> Path:
    """Train a small Llama on texts, or go on with one; do nothing if it was done before.

    Ctrl-C, or a kill, leaves checkpoints; the same call then goes on, and ends with the weights
    an uninterrupted training ends with.

    Args:
        texts: What it learns to predict.
        settings: Its size and how to train it.
        output: The folder that the model's own folder is in, or is put into.
        tokenizer: By default one of these texts, or that of `start_from`.
        start_from: The folder of a model to go on with; its size counts, not that of `settings`.
        held_out: Texts by name; bits per byte on them are written into the model's folder, in
            `language_model.json`.
        seed: Of the first weights and of the order of the rows.
        device: Where to train.
        console: Where progress is shown.
        title: What is shown beside it.

    Returns:
        The model's folder, an ordinary one of transformers with its tokenizer.

    Raises:
        ValueError: If the texts are too short, or a tokenizer is given beside `start_from`.
        KeyboardInterrupt: If training was interrupted, after a checkpoint.
    """
    if start_from is not None and tokenizer is not None:
        raise ValueError(
            "tokenizer is given beside start_from, but a model keeps its own; leave one of them out"
        )
    if start_from is not None:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(start_from)
    if tokenizer is None:
        tokenizer = find_tokenizer(texts, settings.vocabulary, output)
    start = start_from and sha256(Path(start_from, "model.safetensors"))
    key = fingerprint(asdict(settings), seed, start, tokenizer.backend_tokenizer.to_str(), *texts)
    folder = Path(output, f"model-{key}")
    if (folder / RECORD).exists():
        return folder
    with alone(folder):
        if (folder / RECORD).exists():  # another process made it meanwhile
            return folder
        rows = pack(texts, tokenizer, settings.row_length)
        steps = settings.steps(len(rows))
        work = Path(output, f"model-{key}.partial")
        model = first_model(settings, tokenizer, start_from, seed)
        losses = fit(
            model,
            Rows(rows, steps * settings.batch_size, seed),
            settings,
            steps,
            work=work,
            device=device,
            console=console or Console(stderr=True),
            title=title,
        )
        record = {
            "settings": asdict(settings),
            "seed": seed,
            "parameters": sum(p.numel() for p in model.parameters()),
            "tokens of the texts": rows.numel(),
            "passes over them": steps * settings.batch_size / len(rows),
            "losses": losses,
            "bits per byte": {
                name: bits_per_byte(model, tokenizer, some)
                for name, some in (held_out or {}).items()
            },
        }
        keep(model, tokenizer, record, folder)
        shutil.rmtree(work)
    return folder


def first_model(
    settings: LanguageModelSettings,
    tokenizer: PreTrainedTokenizerBase,
    start_from: str | os.PathLike[str] | None,
    seed: int,
) -> PreTrainedModel:
    """A new model, or the one to go on with."""
    if start_from is not None:
        return AutoModelForCausalLM.from_pretrained(start_from, dtype=torch.float32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=settings.size,
                intermediate_size=settings.intermediate_size,
                num_hidden_layers=settings.num_layers,
                num_attention_heads=settings.num_heads,
                max_position_embeddings=settings.max_length,
                tie_word_embeddings=True,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )


def fit(
    model: PreTrainedModel,
    rows: Rows,
    settings: LanguageModelSettings,
    steps: int,
    *,
    work: Path,
    device: str,
    console: Console,
    title: str,
) -> list[tuple[int, float]]:
    """Train a model on rows, from the last checkpoint in a folder on.

    Returns:
        Step and mean loss since the last entry.

    Raises:
        KeyboardInterrupt: If it was interrupted, after a checkpoint.
    """
    watch, interruption = Watch(title, console, lambda step: None, steps), Interruption()
    trainer = RowsTrainer(
        model=model,
        args=on_one_device(
            output_dir=str(work),
            save_steps=math.ceil(steps / 10),
            save_total_limit=2,
            report_to=[],
            disable_tqdm=True,
            logging_steps=math.ceil(steps / 50),
            max_steps=steps,
            per_device_train_batch_size=settings.batch_size,
            train_sampling_strategy="sequential",
            remove_unused_columns=False,
            dataloader_pin_memory=device != "cpu",
            learning_rate=settings.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=math.ceil(steps * settings.warmup),
            weight_decay=settings.weight_decay,
            adam_beta2=0.95,
            bf16=settings.bf16 and has_bf16(device),
            use_cpu=device == "cpu",
        ),
        train_dataset=rows,
        callbacks=[watch, interruption],
    )
    trainer.remove_callback(PrinterCallback)  # the bar shows what it would print
    checkpoint = last_checkpoint(work)
    try:
        with interruption.caught():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        watch.bar.stop()
        # Undo the autocast that the Trainer put around `forward`.
        trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    if interruption.signal is not None:
        raise KeyboardInterrupt
    history = trainer.state.log_history
    model.eval()
    return [(int(entry["step"]), entry["loss"]) for entry in history if "loss" in entry]


def keep(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    record: dict[str, Any],
    folder: Path,
) -> None:
    """Write the model's folder, whole or not at all."""
    with unfinished(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        (temporary / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


# ---- scoring -----------------------------------------------------------------------------


@torch.no_grad()
def bits_per_byte(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    batch_size: int = 16,
) -> float:
    """How many bits a model needs for a byte of some texts; comparable between tokenizers.

    Each text is read in pieces of 500 characters, with the token that begins a text before each,
    so that every model sees as much of what came before.

    Args:
        model: In evaluation mode.
        tokenizer: Its own.
        texts: To score.
        batch_size: Pieces scored together.
    """
    pieces = [piece for text in texts for piece in cut(text)]
    first = tokenizer.bos_token_id
    first = tokenizer.eos_token_id if first is None else first
    nats = 0.0
    for start in range(0, len(pieces), batch_size):
        some = pieces[start : start + batch_size]
        encoded = tokenizer(some, add_special_tokens=False)["input_ids"]
        rows = [torch.tensor([first, *ids]) for ids in encoded]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=first)
        lengths = torch.tensor([len(row) for row in rows])
        mask = torch.arange(ids.shape[1]) < lengths[:, None]
        ids, mask = ids.to(model.device), mask.to(model.device)
        logits = model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits
        asked = mask[:, 1:]
        loss = F.cross_entropy(logits[:, :-1][asked].float(), ids[:, 1:][asked], reduction="sum")
        nats += loss.item()
    return nats / math.log(2) / sum(len(piece.encode()) for piece in pieces)


def cut(text: str) -> list[str]:
    """Pieces of a text of at most 500 characters, cut at spaces where there are some."""
    pieces = []
    while len(text) > PIECE:
        at = text.rfind(" ", 1, PIECE)
        at = PIECE if at < 0 else at
        pieces.append(text[:at])
        text = text[at:]
    return [*pieces, text] if text else pieces
