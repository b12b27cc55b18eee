"""Prove the claims of exactness on the user's own pair of models."""

import os
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedConfig

from graftlm.bases import comparable, config_difference, weights_hash
from graftlm.causal_lm import ComposedForCausalLM
from graftlm.checkpoint import read_config
from graftlm.config import ComposedConfig
from graftlm.packing import computing_dtype, holds_plain_weights
from graftlm.tokenization import tokenizer_fingerprint


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One claim, put to the test.

    Args:
        claim: What should hold.
        measured: The largest difference found, or None where there is no number.
        allowed: The largest difference that passes.
        passed: Whether it holds.
        detail: What was compared.
    """

    claim: str
    passed: bool
    measured: float | None = None
    allowed: float | None = None
    detail: str = ""


def verify(
    model: ComposedForCausalLM,
    input_ids: Int[Tensor, "batch seq"] | None = None,
    seed: int = 0,
) -> list[Check]:
    """Check the base models' fingerprints and every claim of exactness.

    Args:
        model: A composed model.
        input_ids: Tokens to test with, at least 8 a row; by default two rows of 24 random ones.
        seed: For the random tokens.

    Returns:
        One `Check` a claim, all of which should have passed.

    Raises:
        ValueError: If the rows are shorter than 8 tokens.
    """
    if input_ids is None:
        generator = torch.Generator().manual_seed(seed)
        input_ids = torch.randint(shared_vocabulary(model.config), (2, 24), generator=generator)
    if input_ids.shape[1] < 8:
        raise ValueError(f"input_ids has {input_ids.shape[1]} tokens a row, but needs at least 8")
    was_training = model.training
    model.eval()
    input_ids = input_ids.to(model.device)
    try:
        checks = check_fingerprints(model)
        with torch.no_grad():
            checks += [
                check_anchor_only(model, input_ids),
                check_switched_off(model, input_ids),
                check_causality(model, input_ids),
                check_cache(model, input_ids),
                check_padding(model, input_ids),
            ]
        return [*checks, check_frozen(model, input_ids)]
    finally:
        model.train(was_training)


def shared_vocabulary(config: ComposedConfig) -> int:
    """Token ids that all models have which read the anchor's tokens."""
    sizes = [
        c.get_text_config().vocab_size
        for name, c in config.augmenting_configs.items()
        if config.alignments[name] == "identity"
    ]
    return min([config.vocab_size, *sizes])


def tolerance(model: ComposedForCausalLM, logits: Tensor) -> float:
    """What sums in another order may change: 100 roundings of the largest logit."""
    dtypes = map(computing_dtype, (model.anchor, *model.augmenting.values()))
    return 100 * max(torch.finfo(dtype).eps for dtype in dtypes) * float(logits.abs().max())


def largest_difference(a: Tensor, b: Tensor) -> float:
    """The largest absolute difference; NaN counts as infinite."""
    return float((a.float() - b.float()).abs().nan_to_num(nan=float("inf")).max())


def logits_of(model: ComposedForCausalLM, ids: Tensor) -> Float[Tensor, "batch seq vocab"]:
    """The composed logits of one uncached pass."""
    return model(input_ids=ids, use_cache=False).logits


def exact(claim: str, measured: float, detail: str, allowed: float = 0.0) -> Check:
    """A claim about a difference."""
    passed = measured <= allowed
    return Check(claim=claim, passed=passed, measured=measured, allowed=allowed, detail=detail)


def check_fingerprints(model: ComposedForCausalLM) -> list[Check]:
    """Each base model is the one the checkpoint was made for."""
    checks = []
    folder = model.config.name_or_path
    saved = read_config(folder) if folder and os.path.isdir(folder) else model.config
    configs = {"anchor": saved.anchor_config, **saved.augmenting_configs}
    for name, base in {"anchor": model.anchor, **model.augmenting}.items():
        different = config_difference(base.config, configs[name])
        checks.append(
            Check(
                claim=f"{name}: same configuration",
                passed=different is None,
                detail="" if different is None else f"{different} differs",
            )
        )
        known = saved.bases.get(name, {}).get("fingerprint") or {}
        found: dict[str, tuple[str, str]] = {}  # what is compared: here, in the checkpoint
        if known.get("weights") and holds_plain_weights(base):
            kind, dtype = comparable(base, known)
            here = weights_hash(base, with_head=name == "anchor", dtype=dtype)
            found["weights"] = here, known[kind]
        tokenizer = model.tokenizer_of(name)
        if tokenizer and known.get("tokenizer"):
            found["tokenizer"] = tokenizer_fingerprint(tokenizer), known["tokenizer"]
        checks += [
            Check(
                claim=f"{name}: same {what}",
                passed=here == there,
                detail=f"SHA-256 {here[:12]}...",
            )
            for what, (here, there) in found.items()
        ]
    return checks


def check_anchor_only(model: ComposedForCausalLM, ids: Tensor) -> Check:
    """Within `anchor_only` the logits are the anchor's."""
    with model.anchor_only():
        inside = logits_of(model, ids)
    alone = model.anchor(input_ids=ids, use_cache=False).logits
    return exact("anchor_only is the anchor", largest_difference(inside, alone), "all logits")


def check_switched_off(model: ComposedForCausalLM, ids: Tensor) -> Check:
    """With all augmenting models switched off the logits are the anchor's."""
    scales = dict(model.config.scales)
    try:
        for name in scales:
            model.set_scale(name, 0)
        off = logits_of(model, ids)
    finally:
        model.config.scales.update(scales)
    alone = model.anchor(input_ids=ids, use_cache=False).logits
    return exact("scale 0 is the anchor", largest_difference(off, alone), "all logits")


def check_causality(model: ComposedForCausalLM, ids: Tensor) -> Check:
    """Changing a token changes no logit before it.

    Mixture-of-experts layers group tokens by expert, which may round differently.
    """
    length = ids.shape[1]
    before = logits_of(model, ids)
    worst = 0.0
    for position in sorted({1, length // 2, length - 1}):
        changed = ids.clone()
        changed[:, position] = (changed[:, position] + 1) % shared_vocabulary(model.config)
        after = logits_of(model, changed)
        worst = max(worst, largest_difference(before[:, :position], after[:, :position]))
    configs = [model.config.get_text_config(), *model.config.augmenting_configs.values()]
    # Other text may have more tokens in another tokenizer, and longer sums round differently.
    rounds = any(map(has_experts, configs)) or bool(model.model.readers)
    allowed = tolerance(model, before) if rounds else 0.0
    return exact("no look into the future", worst, "tokens changed at 3 places", allowed)


def has_experts(config: PreTrainedConfig) -> bool:
    """Whether a model mixes experts: some `num_experts` under one of its names is above 1."""
    return any(
        "experts" in name and isinstance(value, int) and value > 1
        for name, value in vars(config).items()
    )


def check_cache(model: ComposedForCausalLM, ids: Tensor) -> Check:
    """Decoding token by token with the cache gives the logits of one uncached pass."""
    whole = logits_of(model, ids)
    split = ids.shape[1] // 2
    # The prompt is told apart from what follows, in case only prompts are read.
    prompt_mask = torch.ones_like(ids[:, :split])
    if model.config.reads == "prompt":
        whole = model(input_ids=ids, use_cache=False, prompt_mask=prompt_mask).logits
    output = model(input_ids=ids[:, :split], use_cache=True, prompt_mask=prompt_mask)
    pieces = [output.logits]
    for position in range(split, ids.shape[1]):
        output = model(
            input_ids=ids[:, position : position + 1],
            past_key_values=output.past_key_values,
            use_cache=True,
            prompt_mask=prompt_mask,
        )
        pieces.append(output.logits)
    difference = largest_difference(torch.cat(pieces, dim=1), whole)
    detail = f"{ids.shape[1] - split} decoding steps"
    return exact("cached equals uncached", difference, detail, tolerance(model, whole))


def check_padding(model: ComposedForCausalLM, ids: Tensor) -> Check:
    """Padding on the left changes no logit of a real token."""
    pad = 5
    filler = torch.zeros_like(ids[:, :pad])
    padded = torch.cat([filler, ids], dim=1)
    mask = torch.cat([filler, torch.ones_like(ids)], dim=1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    output = model(input_ids=padded, attention_mask=mask, position_ids=positions, use_cache=False)
    whole = logits_of(model, ids)
    difference = largest_difference(output.logits[:, pad:], whole)
    return exact(
        "padding changes nothing", difference, f"{pad} on the left", tolerance(model, whole)
    )


def check_frozen(model: ComposedForCausalLM, ids: Tensor) -> Check:
    """Only bridges receive gradients, and the base models stay in evaluation mode."""
    model.train()
    model.zero_grad(set_to_none=True)
    with model.scaled(dict.fromkeys(model.config.scales, 1)):  # what is off has no gradient
        model(input_ids=ids, labels=ids).loss.backward()
    bridges = {id(parameter) for parameter in model.bridges.parameters()}
    moved = [
        name for name, p in model.named_parameters() if p.grad is not None and id(p) not in bridges
    ]
    learning = sum(p.grad is not None for p in model.bridges.parameters())
    in_training = [
        type(base).__name__ for base in (model.anchor, *model.augmenting.values()) if base.training
    ]
    model.zero_grad(set_to_none=True)
    return Check(
        claim="only bridges train",
        passed=not moved and not in_training and learning > 0,
        detail=f"{learning} bridge tensors with a gradient, {len(moved)} others",
    )
