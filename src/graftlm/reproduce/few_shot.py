"""Read what all prompts of a batch begin with once: the examples of a few-shot prompt."""

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from graftlm import decoder
from graftlm.masks import skips_holes
from graftlm.reproduce.encoding import IGNORED, pad


def can_share(model: PreTrainedModel) -> bool:
    """Whether padding may stand between the shared tokens and the rest: no layer counts slots."""
    layers = DynamicCache(config=model.config).layers
    return skips_holes(model) and {type(layer) for layer in layers} == {DynamicLayer}


@torch.no_grad()
def batch_of(
    model: PreTrainedModel, features: Sequence[dict[str, list[int]]], *, left: bool
) -> dict[str, Any]:
    """A batch whose rows' common beginning is in a cache of keys and values.

    Args:
        features: Tokens and, perhaps, labels. The last token that no label stands on is left to
            be read: it predicts the first label.
        left: For `generate`, which wants the tokens in the cache too, and padding before the rest.

    Returns:
        What the model's trunk takes, or `generate`, and the rest's labels.
    """
    prompts = [prompt_of(feature)[:-1] for feature in features]
    same = takewhile(lambda column: len(set(column)) == 1, zip(*prompts, strict=False))
    shared = [column[0] for column in same]
    rest = pad([{n: ids[len(shared) :] for n, ids in f.items()} for f in features], left=left)
    ids = torch.tensor([shared], dtype=torch.long, device=model.device)
    batch: dict[str, Any] = {name: value.to(model.device) for name, value in rest.items()}
    batch["attention_mask"] = behind(torch.ones_like(ids), batch["attention_mask"])
    if left:
        batch["input_ids"] = behind(ids, batch["input_ids"])
    cache = DynamicCache(config=model.config)
    if shared:
        decoder.trunk(model)(input_ids=ids, past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(len(features))
    return batch | {"past_key_values": cache}


def prompt_of(feature: dict[str, list[int]]) -> list[int]:
    """The tokens before the first label."""
    labels = feature.get("labels", [IGNORED] * len(feature["input_ids"]))
    return feature["input_ids"][: sum(label == IGNORED for label in labels)]


def behind(shared: Tensor, rest: Tensor) -> Tensor:
    """What all rows have, and then what each has."""
    return torch.cat([shared.expand(len(rest), -1), rest], dim=-1)
