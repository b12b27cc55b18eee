"""What a system takes: weights that train, operations, seconds, memory, tokens a second."""

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from graftlm.planning import flop_counter
from graftlm.reproduce.answering import to_device
from graftlm.reproduce.encoding import Features, padded_tokens
from graftlm.reproduce.fitting import target_loss
from graftlm.reproduce.hardware import machine
from graftlm.reproduce.runner import Runner


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """Of one system of one seed.

    Args:
        weights: That train.
        flops: Of all training: counted on one batch, in proportion to the tokens of all; 0 if
            nothing trains.
        training_seconds: From nothing loaded to trained.
        peak_bytes: Most memory held in training, or in answering if nothing trains: of the process,
            or on the GPU; None where the system does not tell.
        generated_per_second: Tokens, all batches of the tests together; None if none was.
        machine: What it ran on, and in which precision.
    """

    weights: int
    flops: int
    training_seconds: float
    peak_bytes: int | None
    generated_per_second: float | None
    machine: str


class Meter:
    """Starts when it is made."""

    def __init__(self, device: str):
        self.device = device
        self.peak: int | None = None
        self.seconds = 0.0
        if device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats()
        elif (forget := Path("/proc/self/clear_refs")).exists():
            forget.write_text("5")  # the high-water mark of what came before
        self.start = time.perf_counter()

    def trained(self) -> None:
        """Read time and memory: the system is trained."""
        self.seconds = time.perf_counter() - self.start
        self.read_peak()

    def read_peak(self) -> None:
        """Read the most memory that was held so far."""
        if self.device.startswith("cuda"):
            self.peak = torch.cuda.max_memory_allocated()
        elif (status := Path("/proc/self/status")).exists():
            lines = status.read_text().splitlines()
            found = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
            self.peak = int(found[0]) * 1024 if found else None

    def cost(
        self,
        runner: Runner,
        *,
        batch: Features,
        padded: int,
        weights: int,
        generated_per_second: float | None,
    ) -> Cost:
        """All of it.

        Args:
            batch: Of its training, whose operations are counted.
            padded: Tokens of all batches, padding included; 0 if it was not trained.
        """
        flops = 0
        if not padded:
            self.read_peak()
        else:
            inputs = to_device(runner.collate(batch), runner.model.device)
            with flop_counter() as counter:
                target_loss(runner.model, inputs, bf16=runner.bf16).backward()
            runner.model.zero_grad(set_to_none=True)
            flops = counter.get_total_flops() * padded // padded_tokens(batch, len(batch))
        return Cost(
            weights=weights,
            flops=flops,
            training_seconds=self.seconds if padded else 0.0,
            peak_bytes=self.peak,
            generated_per_second=generated_per_second,
            machine=machine(self.device, bf16=runner.bf16),
        )
