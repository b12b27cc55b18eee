"""The two parents of the key-value experiment: train them from nothing, save them, load them.

What they learn from is in `kv_lessons`. Both are Llamas of less than a million weights.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from rich.console import Console
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    set_seed,
)

from graftlm.reproduce import kv_lessons
from graftlm.reproduce.kv_data import TASKS, KVTask, build_tokenizer
from graftlm.reproduce.kv_lessons import lessons
from graftlm.reproduce.kv_training import FitSettings, fit

SHIPPED = Path(__file__).parent / "parents"


@dataclass(frozen=True, kw_only=True, slots=True)
class ParentSettings:
    """The shape of a parent, and how it is trained.

    Args:
        fit: How it is trained.
        fit_worked: The anchor's second part: sums that follow other text. None leaves it out.
    """

    num_layers: int
    size: int
    intermediate_size: int
    num_heads: int = 4
    fit: FitSettings
    fit_worked: FitSettings | None = None
    seed: int = 0


PARENTS = {
    "small": {
        "augmenting": ParentSettings(
            num_layers=4,
            size=128,
            intermediate_size=256,
            fit=FitSettings(
                steps=1300, batch_size=128, learning_rate=2e-3, weight_decay=0.05, warmup_steps=100
            ),
        ),
        "anchor": ParentSettings(
            num_layers=4,
            size=128,
            intermediate_size=256,
            fit=FitSettings(
                steps=2400, batch_size=256, learning_rate=2e-3, weight_decay=0.05, warmup_steps=100
            ),
            fit_worked=FitSettings(
                steps=900, batch_size=256, learning_rate=1e-3, weight_decay=0.05
            ),
        ),
    },
    # Sized by hand for one GPU and never run: products of five numbers up to 25,000 are beyond
    # models of this size, so expect the anchor, and with it the composed model, to fail on them.
    "paper": {
        "augmenting": ParentSettings(
            num_layers=6,
            size=384,
            intermediate_size=1024,
            num_heads=6,
            fit=FitSettings(steps=20_000, batch_size=256, learning_rate=1e-3, weight_decay=0.05),
        ),
        "anchor": ParentSettings(
            num_layers=8,
            size=512,
            intermediate_size=1408,
            num_heads=8,
            fit=FitSettings(steps=60_000, batch_size=256, learning_rate=6e-4, weight_decay=0.05),
            fit_worked=FitSettings(
                steps=20_000, batch_size=256, learning_rate=3e-4, weight_decay=0.05
            ),
        ),
    },
}

# A quick run composes the parents that ship with the package, so its others are made quickly.
_SMALL, _PAPER = PARENTS["small"], PARENTS["paper"]
_FORMAT_ONLY = replace(_SMALL["augmenting"].fit, steps=400)  # there is nothing to memorise
_INSTANT = replace(_SMALL["augmenting"].fit, steps=5)
PARENTS["small"] |= {
    "vanilla": replace(_SMALL["augmenting"], fit=_FORMAT_ONLY),
    "first": _SMALL["augmenting"],
    "second": _SMALL["augmenting"],
}
PARENTS["paper"] |= dict.fromkeys(("vanilla", "first", "second"), _PAPER["augmenting"])
PARENTS["quick"] = _SMALL | {
    name: replace(_SMALL["augmenting"], fit=_INSTANT) for name in ("vanilla", "first", "second")
}


def new_model(tokenizer: PreTrainedTokenizerBase, settings: ParentSettings) -> LlamaForCausalLM:
    """Make a small Llama with random weights."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_heads,
        num_key_value_heads=settings.num_heads,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    # On a CPU the plain attention is faster than the fused one at these sizes.
    return LlamaForCausalLM._from_config(config, attn_implementation="eager")


def train_parent(
    name: str, task: KVTask, settings: ParentSettings, *, console: Console, use_cpu: bool
) -> LlamaForCausalLM:
    """Train `augmenting` or `anchor` from random weights."""
    set_seed(settings.seed)
    tokenizer = build_tokenizer(task)
    model = new_model(tokenizer, settings)
    train = partial(fit, tokenizer=tokenizer, seed=settings.seed, console=console, use_cpu=use_cpu)
    size = settings.fit.steps * settings.fit.batch_size
    drawn = lessons(name, task, size, settings.seed)
    train(model, lessons=drawn, settings=settings.fit, title=f"parent {name}")
    if settings.fit_worked:
        train_worked(model, name, task, settings, console=console, use_cpu=use_cpu)
    return model.eval()


def train_worked(
    model: LlamaForCausalLM,
    name: str,
    task: KVTask,
    settings: ParentSettings,
    *,
    console: Console,
    use_cpu: bool,
) -> None:
    """Train an anchor that can add to work out the bracket that was written last."""
    assert settings.fit_worked is not None
    set_seed(settings.seed)
    size = settings.fit_worked.steps * settings.fit_worked.batch_size
    fit(
        model,
        build_tokenizer(task),
        lessons(name, task, size, settings.seed + 1, worked=True),
        settings.fit_worked,
        seed=settings.seed,
        title=f"parent {name}, second part",
        console=console,
        use_cpu=use_cpu,
    )


def parent_folder(folder: Path, name: str, preset: str) -> Path:
    """Where a parent is kept; another recipe has another place, those that ship have their own."""
    if folder == SHIPPED:
        return folder / name
    told = [kv_lessons.VERSION, name, asdict(PARENTS[preset][name]), asdict(task_of(preset))]
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
    return folder / f"{name}-{digest[:12]}"


def task_of(preset: str) -> KVTask:
    """The keys of a preset."""
    return TASKS["paper" if preset == "paper" else "small"]


def ensure(folder: Path, names: Sequence[str], preset: str, device: str) -> dict[str, Path]:
    """Train those parents that are not in a folder yet.

    Args:
        folder: What is there was trained by the same recipe, or has another name.
        names: Of `augmenting`, `anchor`, and of those in `kv_lessons.lessons`.
        device: Where to train, cpu or cuda.

    Returns:
        The folder of each.
    """
    task, use_cpu = task_of(preset), device == "cpu"
    found = {name: parent_folder(folder, name, preset) for name in names}
    for name, target in found.items():
        if target.exists():
            continue
        model = train_parent(name, task, PARENTS[preset][name], console=Console(), use_cpu=use_cpu)
        unfinished = target.with_name(f"{target.name}.part")
        model.save_pretrained(unfinished)
        build_tokenizer(task).save_pretrained(unfinished)
        unfinished.rename(target)
    return found


def load_parents() -> tuple[LlamaForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Load the augmenting model and the anchor that ship, and their tokenizer."""
    augmenting, anchor = (
        LlamaForCausalLM.from_pretrained(SHIPPED / name, attn_implementation="eager").eval()
        for name in ("augmenting", "anchor")
    )
    return augmenting, anchor, PreTrainedTokenizerFast.from_pretrained(SHIPPED / "anchor")
