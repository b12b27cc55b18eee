"""From examples to a batch: padded on the right, no attention and no loss there."""

import copy
from collections.abc import Callable
from typing import Any

from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase

IGNORED = -100  # the label of a token without a loss


def padding_collator(
    tokenizer: PreTrainedTokenizerBase,
) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    """What pads `input_ids` and `labels`."""
    padding = copy.deepcopy(tokenizer)  # a saved tokenizer should keep the side of generation
    padding.padding_side = "right"
    if padding.pad_token is None:
        # Any token will do: padding is neither attended to nor has a loss.
        padding.pad_token = padding.eos_token or padding.convert_ids_to_tokens(0)
    return DataCollatorForSeq2Seq(padding, label_pad_token_id=IGNORED)
