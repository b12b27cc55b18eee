"""How fast a run trains, and what memory it takes: counted, not estimated."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from accelerate import Accelerator


class Meter:
    """Counts examples, tokens and seconds of training between two logs, over all processes.

    Its clock runs from the first batch on, so that batches which a resumed run skips cost nothing,
    and stands still while something else than training is done.

    Args:
        accelerator: Of the trainer; knows the device and the other processes.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.started_s: float | None = None
        self.forget()

    def forget(self) -> None:
        """Begin to count anew."""
        self.num_examples, self.elapsed_s = 0, 0.0
        self.num_tokens = torch.zeros((), dtype=torch.int64, device=self.accelerator.device)

    def count(self, inputs: Mapping[str, Any]) -> None:
        """Take note of one batch of this process; padding is no token."""
        if self.started_s is None:
            self.started_s = time.perf_counter()
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        self.num_examples += len(ids)
        self.num_tokens += (
            ids.numel() if mask is None else mask.count_nonzero()
        )  # read when logging

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The clock stands still within this context."""
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize(self.accelerator.device)  # its queue is work done before
        if self.started_s is not None:
            self.elapsed_s += time.perf_counter() - self.started_s
        yield
        self.started_s = time.perf_counter()

    def read(self) -> dict[str, float]:
        """Speed since the last reading, and memory; every process must call this, paused.

        Memory is that of the process which takes most: the peak of tensors on a GPU, the resident
        set of the process elsewhere.
        """
        device = self.accelerator.device
        here = torch.tensor([self.num_examples, 0, memory_bytes(device)], device=device)
        here[1] = self.num_tokens
        everywhere: Any = self.accelerator.gather(here)
        everywhere = everywhere.reshape(-1, len(here))
        (num_examples, num_tokens, _), memory = everywhere.sum(0).tolist(), everywhere[:, 2].max()
        seconds = self.elapsed_s
        self.forget()
        return {
            "examples_per_second": num_examples / seconds,
            "tokens_per_second": num_tokens / seconds,
            "memory_bytes": int(memory),
        }


def memory_bytes(device: torch.device) -> int:
    """What this process takes where it computes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss
