"""Greedy search whose rows leave the batch as their answers end.

transformers' own search runs every row on until the last one ends: of 10,088 steps of rows in the
code experiment 3,635 were of answers that had not ended yet.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers.cache_utils import Cache

from graftlm.greedy import GREEDY

Ended = Callable[[int, list[int]], bool]  # a row's number and what it has said


def never(row: int, said: list[int]) -> bool:
    """An answer ends with a token, or is as long as it may be."""
    del row, said
    return False


def greedy_answers(
    model: Any,
    inputs: dict[str, Any],
    *,
    max_new_tokens: int,
    end_ids: Sequence[int],
    has_ended: Ended = never,
) -> list[list[int]]:
    """The likeliest tokens behind each prompt, the one that ends it included.

    Args:
        model: Any that generates with a cache whose rows can be told apart: of keys and values.
        inputs: Prompts padded on the left, as for `generate`, and perhaps a cache.
        end_ids: Tokens that end an answer.
        has_ended: Whether a row's answer has ended for another reason.
    """
    fresh = {} if "past_key_values" in inputs else {"cache_implementation": "dynamic"}
    return model.generate(
        **inputs,
        **GREEDY,
        **fresh,
        use_cache=True,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(end_ids),
        pad_token_id=end_ids[0],
        custom_generate=partial(search, has_ended=has_ended),
    )


def search(
    model: Any,
    input_ids: Int[Tensor, "batch seq"],
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    has_ended: Ended,
    **model_kwargs: Any,
) -> list[list[int]]:
    """The decoding loop, as transformers calls one of a user's (`custom_generate`)."""
    length = input_ids.shape[1]
    rows = list(range(len(input_ids)))
    answers: list[list[int]] = [[] for _ in rows]
    outputs = model._prefill(input_ids, generation_config, model_kwargs)
    while True:
        model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
        scores = logits_processor(input_ids, outputs.logits[:, -1].float())
        likeliest = scores.argmax(-1, keepdim=True).to(input_ids.device)
        input_ids = torch.cat([input_ids, likeliest], dim=-1)
        said = input_ids[:, length:].tolist()
        ended = [
            stopped or has_ended(row, ids)
            for row, ids, stopped in zip(
                rows, said, stopping_criteria(input_ids, scores).tolist(), strict=True
            )
        ]
        for row, ids, is_over in zip(rows, said, ended, strict=True):
            if is_over:
                answers[row] = ids
        if all(ended):
            return answers
        if any(ended):
            alive = ~torch.tensor(ended, device=input_ids.device)
            input_ids = input_ids[alive]
            model_kwargs = {name: of_rows(value, alive) for name, value in model_kwargs.items()}
            rows = [row for row, is_over in zip(rows, ended, strict=True) if not is_over]
        inputs = model.prepare_inputs_for_generation(
            input_ids, next_sequence_length=1, **model_kwargs
        )
        outputs = model(**inputs, return_dict=True)


def of_rows(value: Any, alive: Bool[Tensor, " batch"]) -> Any:
    """What a forward pass is given, for some of the rows: caches are changed in place."""
    if isinstance(value, Cache):
        value.batch_select_indices(alive.nonzero()[:, 0])
        return value
    has_rows = isinstance(value, Tensor) and value.dim() > 1 and len(value) == len(alive)
    return value[alive] if has_rows else value
