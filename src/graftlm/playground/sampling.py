"""Sampling with random numbers of one's own."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)


class Sampler(LogitsProcessor):
    """Adds noise to the scores so that their maximum is a sample of their softmax (Gumbel-max).

    transformers samples from torch's global generator, which all threads share: what one visitor
    draws would depend on what the others do.

    Args:
        seed: Of the random numbers.
        temperature: Above 0.
        top_k: How many of the likeliest tokens; 0 for all.
        top_p: The likeliest tokens of this sum; 1 for all.
    """

    def __init__(self, *, seed: int, temperature: float, top_k: int, top_p: float):
        self.generator = torch.Generator().manual_seed(seed)
        self.warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
        if top_k:
            self.warpers.append(TopKLogitsWarper(top_k))
        if top_p < 1:
            self.warpers.append(TopPLogitsWarper(top_p))

    def __call__(  # pyrefly: ignore[bad-override]
        self, input_ids: Int[Tensor, "batch seq"], scores: Float[Tensor, "batch vocab"]
    ) -> Float[Tensor, "batch vocab"]:
        """The scores with noise."""
        noise = torch.empty(scores.shape).exponential_(generator=self.generator).log()
        warped = self.warpers(input_ids, scores)  # pyrefly: ignore[bad-argument-type]
        return warped - noise.to(scores.device)
