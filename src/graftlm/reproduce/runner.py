"""Makes the systems of an experiment: loads, composes, adapts, and says how each is asked."""

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.pytorch_utils import Conv1D

from graftlm import Connection, compose, decoder
from graftlm.processor import ComposedDataCollator
from graftlm.reproduce.encoding import Features, donors_of, feature, pad, shown, wrong_feature
from graftlm.reproduce.example import Example
from graftlm.reproduce.experiment import Composition, Experiment, Models
from graftlm.reproduce.few_shot import can_share
from graftlm.reproduce.hardware import has_bf16
from graftlm.reproduce.own_models import num_layers, same_height
from graftlm.reproduce.systems import System

Collate = Callable[[Features], dict[str, Any]]
Encode = Callable[[Sequence[Example]], Features]


@dataclass(frozen=True, kw_only=True, slots=True)
class Runner:
    """A model that answers, and how it is asked.

    Args:
        model: Its trunk and head predict the targets.
        tokenizer: Of the tokens of `encode`.
        encode: Tokens and labels of some examples; the label of the last token is the end.
        collate: Pads them into a batch.
        bf16: Whether to run with autocast.
        shares: Whether all prompts of a group begin with the same examples, to be read once.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    encode: Encode
    collate: Collate
    bf16: bool
    shares: bool = False


def make_runner(
    experiment: Experiment,
    models: Models,
    system: System,
    seed: int,
    *,
    shots: Mapping[str, Sequence[Example]],
    device: str,
) -> Runner:
    """A system before its training, the same for the same seed."""
    experiment = suited(experiment, device)
    set_seed(seed)
    if system.alone is not None:
        path = models.anchor
        if system.alone == "augmenting":
            path = next(iter(models.augmenting.values()))
        return alone(experiment, path, shots, device)
    if system.has_adapters:
        return adapted(
            experiment, models, device, with_embeddings=system.trains == "lora-embeddings"
        )
    if system.trains == "anchor":
        runner = alone(experiment, models.anchor, {}, device)
        for weight in runner.model.parameters():  # AdamW in bfloat16 would lose small steps
            weight.data = weight.data.float()
        return runner
    return composed(experiment, models, system, device)


def suited(experiment: Experiment, device: str) -> Experiment:
    """The experiment in float32 where bfloat16 would only be slow."""
    if has_bf16(device):
        return experiment
    return replace(experiment, in_bf16=False, training=replace(experiment.training, bf16=False))


def load(experiment: Experiment, path: Path, device: str) -> PreTrainedModel:
    """A model ready to run; on a CPU plain attention is faster for short texts."""
    model = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=torch.bfloat16 if experiment.in_bf16 else torch.float32,
        attn_implementation="eager" if device == "cpu" else "sdpa",
    ).to(device)
    head: Any = model.get_output_embeddings()
    head.register_forward_pre_hook(contiguous)
    return model


def contiguous(head: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The head's input in one piece.

    A prefill asks for the last token of each row, and for such a slice torch's CPU product in
    bfloat16 copies the head once a row: 8 seconds for 48 rows (pytorch issue 151934).
    """
    del head
    return tuple(states.contiguous() for states in inputs)


def alone(
    experiment: Experiment, path: Path, shots: Mapping[str, Sequence[Example]], device: str
) -> Runner:
    """A model by itself, with examples in its prompt if there are any."""
    tokenizer: Any = AutoTokenizer.from_pretrained(path)
    runner = Runner(
        model=load(experiment, path, device).eval(),
        tokenizer=tokenizer,
        encode=lambda examples: [feature(example, tokenizer) for example in examples],
        collate=pad,
        bf16=experiment.training.bf16,
    )
    return showing(runner, shots)


def showing(runner: Runner, shots: Mapping[str, Sequence[Example]]) -> Runner:
    """The same model with examples in its prompt, of the group that is asked."""

    def encode(examples: Sequence[Example]) -> Features:
        return [
            feature(example, runner.tokenizer, shown(shots.get(example.group, ())))
            for example in examples
        ]

    return replace(runner, encode=encode, shares=bool(shots) and can_share(runner.model))


def composed(experiment: Experiment, models: Models, system: System, device: str) -> Runner:
    """The composition, or one of its controls."""
    choice = replace(experiment.composition, **system.composition)
    paths = augmenting_paths(models, system)
    bases = {name: load(experiment, path, device) for name, path in paths.items()}
    if system.reads_model == "random":
        bases = {name: fresh(model) for name, model in bases.items()}
    model = compose(
        load(experiment, models.anchor, device),
        bases,
        connections=connections(choice, bases, models, system),
        width=choice.width,
        num_heads=choice.num_heads,
        position=choice.position,
        variant=choice.variant,
        gate=choice.gate,
        alignment=choice.alignment,
        distance_unit=choice.distance_unit,
        reads=system.reads,
        tokenizer=str(models.anchor),
        augmenting_tokenizers={name: str(path) for name, path in paths.items()},
    )
    processor = model.processor
    assert processor is not None
    runner = Runner(
        model=model,
        tokenizer=processor.tokenizer,
        encode=lambda examples: [feature(example, processor.tokenizer) for example in examples],
        collate=ComposedDataCollator(processor),
        bf16=experiment.training.bf16,
    )
    return misread(runner) if "training" in system.wrong else runner


def misread(runner: Runner) -> Runner:
    """The same system, whose augmenting models read another example.

    A plain text has no source that could be another's; it is read as it is.
    """

    def encode(examples: Sequence[Example]) -> Features:
        donors = iter(donors_of([example for example in examples if example.source]))
        features = []
        for example in examples:
            found = feature(example, runner.tokenizer)
            found["read_ids"] = found["input_ids"]
            if example.source:
                found = wrong_feature(example, next(donors), runner.tokenizer)
            features.append(found)
        return features

    return replace(runner, encode=encode)


def augmenting_paths(models: Models, system: System) -> Mapping[str, Path]:
    """Where the models that the bridges read are."""
    paths = models.augmenting
    if system.reads_model == "anchor":
        paths = dict.fromkeys(models.augmenting, models.anchor)
    if system.reads_model == "vanilla":
        assert models.vanilla is not None
        paths = models.vanilla
    return {name: path for name, path in paths.items() if name in (system.only or paths)}


def connections(
    choice: Composition, bases: Mapping[str, Any], models: Models, system: System
) -> list[Connection]:
    """Of each augmenting model; a copy of the anchor is read at the same relative heights."""
    made = []
    for name, base in bases.items():
        layers = meant = decoder.num_layers(base)
        if system.reads_model == "anchor":
            meant = num_layers(models.augmenting[name])
        made += [
            Connection(
                augmenting=name,
                augmenting_layer=same_height(i, meant, layers),
                anchor_layer=j,
            )
            for i, j in choice.connections
        ]
    return made


def fresh(model: PreTrainedModel) -> PreTrainedModel:
    """A randomly initialised model of the same shape."""
    made = AutoModelForCausalLM.from_config(
        model.config, dtype=model.dtype, attn_implementation=model.config._attn_implementation
    )
    return made.to(model.device)


def adapted(
    experiment: Experiment, models: Models, device: str, *, with_embeddings: bool
) -> Runner:
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
    runner = alone(experiment, models.anchor, {}, device)
    sizes = linear_sizes(runner.model)
    if with_embeddings:
        sizes |= embedding_sizes(runner.model)
    rank = max(1, round(num_bridge_weights(experiment, models) / sum(sizes.values())))
    choice = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=sorted(sizes))
    with warnings.catch_warnings():
        # peft asks transformers for a property by its old name.
        warnings.simplefilter("ignore", FutureWarning)
        # A head that shares the embeddings' weights stays as it was; nothing is merged here.
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")
        model = get_peft_model(runner.model, choice).get_base_model()
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
    return replace(runner, model=model)


def num_bridge_weights(experiment: Experiment, models: Models) -> int:
    """How many weights the bridges of the experiment have: composed without weights."""
    with torch.random.fork_rng(), torch.device("meta"):
        from transformers import AutoConfig

        def shape(path: Path) -> PreTrainedModel:
            return AutoModelForCausalLM.from_config(copy.deepcopy(AutoConfig.from_pretrained(path)))

        bases = {name: shape(path) for name, path in models.augmenting.items()}
        choice = experiment.composition
        system = System(title="")
        model = compose(
            shape(models.anchor),
            bases,
            connections=connections(choice, bases, models, system),
            width=choice.width,
            num_heads=choice.num_heads,
            position=choice.position,
            variant=choice.variant,
            gate=choice.gate,
        )
    return trainable(model)


def trainable(model: nn.Module) -> int:
    """Weights that train."""
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad)


def linear_sizes(model: Any) -> dict[str, int]:
    """For each kind of linear map but the head: weights of its adapters of rank 1, in all."""
    head = model.get_output_embeddings()
    sizes: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head:
            kind = name.rsplit(".", 1)[-1]
            sizes[kind] = sizes.get(kind, 0) + sum(module.weight.shape)
    return sizes


def embedding_sizes(model: Any) -> dict[str, int]:
    """The name of the input embeddings: weights of their adapter of rank 1."""
    embeddings = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embeddings)
    return {name.rsplit(".", 1)[-1]: embeddings.num_embeddings + embeddings.embedding_dim}
