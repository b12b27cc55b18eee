"""The systems that are compared: the composed model, what it is made of, and the controls."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from graftlm import Connection, compose
from graftlm.processor import ComposedDataCollator
from graftlm.reproduce.translate_data import (
    IGNORED,
    Pair,
    donors_of,
    feature,
    plain_ids,
    wrong_reading,
)
from graftlm.reproduce.translate_evaluation import System
from graftlm.reproduce.translate_training import Features

# What each is, in the words of the report. The first two are not trained.
SYSTEMS = {
    "anchor": "anchor alone, few-shot",
    "augmenting": "augmenting model alone, few-shot",
    "composed": "**composed**",
    "wrong-test": "composed, tested with another sentence's states",
    "lora": "LoRA on the anchor, as many parameters",
    "wrong": "composed, trained and tested with another sentence's states",
    "random": "composed with a randomly initialised augmenting model",
    "prompt": "composed, augmenting model reads the prompt only",
}
UNTRAINED = ("anchor", "augmenting")
TRAINED = ("composed", "lora", "wrong", "random", "prompt")  # "wrong-test" is "composed" again
CONTROLS = ("wrong-test", "lora", "wrong", "random", "prompt")


@dataclass(frozen=True, kw_only=True, slots=True)
class Composition:
    """How the two models are connected, and how fast what is new learns.

    Args:
        anchor, augmenting: Names that `real_models.find_model` knows.
        connections: Layers, (augmenting, anchor).
        width, num_heads, position, distance_unit, alignment: As for `compose`.
        learning_rate: Of the bridges.
        lora_learning_rate: Of LoRA.
    """

    anchor: str
    augmenting: str
    connections: tuple[tuple[int, int], ...]
    learning_rate: float
    lora_learning_rate: float
    position: Literal["none", "distance", "rotary"] = "distance"
    distance_unit: Literal["characters", "tokens"] = "characters"
    width: int | None = None
    num_heads: int | None = None
    alignment: str = "prefix"  # no lag: the augmenting model's guess of the next word is seen


@dataclass(kw_only=True, slots=True)
class Workshop:
    """Makes systems of one composition.

    Args:
        anchor_path, augmenting_path: Folders with model and tokenizer.
        shots: Examples for the prompts of models that are not trained, by language.
        device: Where models run.
        bf16: Whether models are kept, and run, in bfloat16.
    """

    composition: Composition
    anchor_path: str
    augmenting_path: str
    shots: dict[str, list[Pair]]
    device: str = "cpu"
    bf16: bool = True
    parameters: dict[str, int] = field(default_factory=dict)

    def load(self, path: str) -> PreTrainedModel:
        """A model ready to run; on a CPU plain attention is faster for short texts."""
        model = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=torch.bfloat16 if self.bf16 else torch.float32,
            attn_implementation="eager" if self.device == "cpu" else "sdpa",
        ).to(self.device)
        head: Any = model.get_output_embeddings()
        head.register_forward_pre_hook(contiguous)
        return model

    def make(self, name: str, seed: int) -> System:
        """One system before its training, the same for the same seed."""
        if name == "lora":
            self.num_bridge_parameters()  # may compose, which draws random numbers
        set_seed(seed)
        if name in UNTRAINED:
            return self.few_shot(self.anchor_path if name == "anchor" else self.augmenting_path)
        return self.lora() if name == "lora" else self.composed(name)

    def few_shot(self, path: str) -> System:
        """A model alone, with a few examples in its prompt."""
        tokenizer: Any = AutoTokenizer.from_pretrained(path)
        start = list(tokenizer("")["input_ids"])  # what the model expects before any text

        def encode(pairs: Sequence[Pair]) -> Features:
            features = []
            for pair in pairs:
                shots = self.shots[pair.language]
                text = "".join(f"{shot.prompt}{shot.completion}\n\n" for shot in shots)
                before = start + plain_ids(tokenizer, text)
                own = feature(pair, tokenizer)
                labels = [IGNORED] * len(before) + own["labels"]
                features.append({"input_ids": before + own["input_ids"], "labels": labels})
            return features

        model = self.load(path).eval()
        return System(model=model, tokenizer=tokenizer, encode=encode, bf16=self.bf16)

    def composed(self, name: str) -> System:
        """The composition, or one of its controls."""
        anchor, augmenting = self.load(self.anchor_path), self.load(self.augmenting_path)
        if name == "random":
            augmenting = fresh(augmenting)
        choice = self.composition
        model = compose(
            anchor,
            augmenting,
            connections=[
                Connection(augmenting_layer=i, anchor_layer=j) for i, j in choice.connections
            ],
            position=choice.position,
            width=choice.width,
            num_heads=choice.num_heads,
            distance_unit=choice.distance_unit,
            alignment=choice.alignment,
            reads="prompt" if name == "prompt" else "sequence",
            tokenizer=self.anchor_path,
            augmenting_tokenizers=self.augmenting_path,
        )
        self.parameters["bridges"] = trainable(model)
        self.parameters["anchor"] = anchor.num_parameters()
        self.parameters["augmenting"] = augmenting.num_parameters()
        processor = model.processor
        assert processor is not None
        encode = encode_wrong if name == "wrong" else encode_right
        return System(
            model=model,
            tokenizer=processor.tokenizer,
            encode=lambda pairs: encode(pairs, processor.tokenizer),
            collate=ComposedDataCollator(processor),
            bf16=self.bf16,
        )

    def lora(self) -> System:
        """The anchor with low-rank adapters, about as many parameters as the bridges have.

        Raises:
            ImportError: If peft is not installed.
        """
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError as error:
            raise ImportError(
                "peft is not installed, which the LoRA control needs; "
                "run: pip install 'graftlm[reproduce]'"
            ) from error
        anchor = self.load(self.anchor_path)
        sizes = linear_sizes(anchor)
        rank = max(1, round(self.num_bridge_parameters() / sum(sizes.values())))
        choice = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=sorted(sizes))
        with warnings.catch_warnings():
            # peft asks transformers for a property by its old name.
            warnings.simplefilter("ignore", FutureWarning)
            model = get_peft_model(anchor, choice).get_base_model()
        for weight in model.parameters():
            if weight.requires_grad:
                weight.data = weight.data.float()
        self.parameters["lora"], self.parameters["lora_rank"] = trainable(model), rank
        tokenizer: Any = AutoTokenizer.from_pretrained(self.anchor_path)
        return System(
            model=model,
            tokenizer=tokenizer,
            encode=lambda pairs: encode_right(pairs, tokenizer),
            bf16=self.bf16,
        )

    def num_bridge_parameters(self) -> int:
        """Parameters of the bridges; composes once if that was not done yet."""
        if "bridges" not in self.parameters:
            self.composed("composed")
        return self.parameters["bridges"]


def contiguous(head: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The head's input in one piece.

    A prefill asks for the last token of each row, and for such a slice torch's CPU product in
    bfloat16 copies the head once a row: 8 seconds for 48 rows (pytorch issue 151934).
    """
    del head
    return tuple(states.contiguous() for states in inputs)


def encode_right(pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase) -> Features:
    """Every model reads the pair itself."""
    return [feature(pair, tokenizer) for pair in pairs]


def encode_wrong(pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase) -> Features:
    """The augmenting models read another sentence, and the pair's own target."""
    return [
        feature(pair, tokenizer)
        | {"read_ids": wrong_reading(pair, donors, tokenizer, with_target=True)}
        for pair, donors in zip(pairs, donors_of(pairs), strict=True)
    ]


def fresh(model: PreTrainedModel) -> PreTrainedModel:
    """A randomly initialised model of the same shape."""
    made = AutoModelForCausalLM.from_config(
        model.config, dtype=model.dtype, attn_implementation=model.config._attn_implementation
    )
    return made.to(model.device)


def trainable(model: nn.Module) -> int:
    """Parameters that train."""
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad)


def linear_sizes(model: Any) -> dict[str, int]:
    """For each kind of linear map but the head: parameters of its adapters of rank 1, in all."""
    head = model.get_output_embeddings()
    sizes: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            kind = name.rsplit(".", 1)[-1]
            sizes[kind] = sizes.get(kind, 0) + module.in_features + module.out_features
    return sizes
