"""What numbers of time and memory depend on."""

import os
import platform
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments


def hardware(device: str, jobs: int) -> dict[str, Any]:
    """The machine, and how it was shared out."""
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "jobs": jobs,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "device": device,
        "bfloat16": has_bf16(device),
        "gpu": torch.cuda.get_device_name() if device.startswith("cuda") else None,
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def machine(device: str, *, bf16: bool) -> str:
    """What was computed where, in short."""
    computed = "bfloat16" if bf16 else "float32"
    if device.startswith("cuda"):
        return f"{torch.cuda.get_device_name()}, {computed}"
    threads = torch.get_num_threads()
    return f"{cpu_model()}, {threads} {'thread' if threads == 1 else 'threads'}, {computed}"


def has_bf16(device: str) -> bool:
    """Whether products in bfloat16 are fast: without instructions for them, eight times slower."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported()


def on_one_device(**settings: Any) -> TrainingArguments:
    """Arguments of a Trainer, which would spread a batch over all GPUs it sees."""
    args = TrainingArguments(**settings)
    args._n_gpu = min(args.n_gpu, 1)
    return args


def cpu_model() -> str:
    """The processor's name, where the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
