"""Score models on the key-value tasks, and look at what the bridges read."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from graftlm import Bridge, ComposedForCausalLM
from graftlm.reproduce.kv_data import (
    SPLITS,
    Example,
    KVTask,
    key_evaluation,
    math_example,
    numeric_evaluation,
    numeric_example,
    split_keys,
    subs_example,
)


def evaluation_examples(
    task: KVTask, values: Mapping[str, int], seed: int, size: int
) -> dict[str, list[Example]]:
    """The seven evaluation sets of one split of the keys, by task and split."""
    held_in, held_out = split_keys(task, values, seed)
    expressions = key_evaluation(task, held_in, held_out, seed, size)
    sets = {
        f"{name} {split}": [make(expression, values) for expression in expressions[split]]
        for name, make in (("KV-SUBS", subs_example), ("KV-MATH", math_example))
        for split in SPLITS
    }
    numeric = numeric_evaluation(task, size)
    return sets | {"NUM-MATH numbers": [numeric_example(expression) for expression in numeric]}


@torch.no_grad()
def continue_greedily(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    input_ids: Int[Tensor, "batch seq"],
    attention_mask: Int[Tensor, "batch seq"],
    length: int,
) -> Int[Tensor, "batch new_seq"]:
    """Greedy continuations of so many tokens, and room for the end of the text."""
    output = model.generate(
        input_ids=input_ids,
        attention_mask=attention_mask,
        do_sample=False,
        max_new_tokens=length + 1,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return output[:, input_ids.shape[1] :]


def exact_matches(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    batch_size: int = 250,
) -> list[bool]:
    """Whether greedy decoding ends, and says what counts of each completion exactly."""
    matches: list[bool] = []
    for start in range(0, len(examples), batch_size):
        batch = examples[start : start + batch_size]
        prompts = tokenizer(
            [example.prompt for example in batch], padding=True, return_tensors="pt"
        ).to(model.device)
        wanted = tokenizer([e.completion for e in batch], add_special_tokens=False)["input_ids"]
        # Room to go on after what counts: an arrow and an answer with its sign.
        length = max(map(len, wanted)) + 4
        answers = continue_greedily(
            model, tokenizer, prompts["input_ids"], prompts["attention_mask"], length
        )
        ended = (answers == tokenizer.eos_token_id).any(1).tolist()
        texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
        matches += [
            end and example.part(text) == example.part(example.completion)
            for example, text, end in zip(batch, texts, ended, strict=True)
        ]
    return matches


def percent(matches: Sequence[bool]) -> float:
    """The share of matches."""
    return 100 * sum(matches) / len(matches)


def scores_by_terms(
    sets: Mapping[str, Sequence[Example]], matches: Mapping[tuple[str, str], Sequence[bool]]
) -> dict[str, float]:
    """KV-MATH on held-out keys, composed, for each number of keys."""
    name = "KV-MATH all-held-out"
    by_terms: dict[str, list[bool]] = {}
    for example, match in zip(sets[name], matches["composed", name], strict=True):
        by_terms.setdefault(str(example.prompt.count("<")), []).append(match)
    return {terms: percent(found) for terms, found in sorted(by_terms.items())}


def look_inside(
    composed: ComposedForCausalLM, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]
) -> dict[str, Any]:
    """What the bridges look at over the first long expression, and what the model answers."""
    example = max(examples[:20], key=lambda example: example.prompt.count("<"))
    input_ids = tokenizer(example.prompt, return_tensors="pt")["input_ids"].to(composed.device)
    answer = continue_greedily(composed, tokenizer, input_ids, torch.ones_like(input_ids), 16)
    ends = (answer[0] == tokenizer.eos_token_id).nonzero()
    answer = answer[:, : int(ends[0])] if len(ends) else answer
    text = torch.cat([input_ids, answer], dim=1)
    names = [
        f"m_A layer {c.augmenting_layer} to m_B layer {c.anchor_layer}"
        for c in composed.config.connections
    ]
    maps = [weights.float().cpu().tolist() for weights in bridge_attention(composed, text)]
    return {
        "maps": list(zip(names, maps, strict=True)),
        "tokens": tokenizer.convert_ids_to_tokens(text[0].tolist()),
        "prompt_length": input_ids.shape[1],
    }


@torch.no_grad()
def bridge_attention(
    model: ComposedForCausalLM, input_ids: Int[Tensor, "1 seq"]
) -> list[Float[Tensor, "heads seq seq"]]:
    """Attention of every bridge over an unpadded prompt, in the order of `model.bridges`.

    The bridges use a fused attention, which keeps no weights; so hooks listen to what each is
    given, and the weights are worked out again from that.
    """
    given: dict[int, tuple[Any, Any]] = {}
    hooks = [
        bridge.register_forward_pre_hook(
            lambda _, args, kwargs, i=i: given.__setitem__(i, (args, kwargs)), with_kwargs=True
        )
        for i, bridge in enumerate(model.bridges)
    ]
    try:
        model(input_ids=input_ids)
    finally:
        for hook in hooks:
            hook.remove()
    maps = []
    for i, bridge in enumerate(model.bridges):
        assert isinstance(bridge, Bridge)
        (hidden_states, augmenting_states), kwargs = given[i]
        query = bridge.heads(bridge.cross_q(bridge.query_norm(hidden_states)))
        keys, _ = bridge.read(augmenting_states, kwargs["key_positions"])
        scores = query @ keys.transpose(-1, -2) * bridge.head_dim**-0.5
        mask = kwargs["cross_mask"]
        if mask is None:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, -torch.inf)
        else:
            scores = scores + mask
        maps.append(scores.softmax(-1)[0])
    return maps
