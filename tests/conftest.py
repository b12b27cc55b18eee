"""What every test shares: no network, one thread, fixed seeds, and no use of deprecated calls."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "")

import logging
import signal

import pytest
import torch

torch.set_num_threads(1)

# A shell that starts us in the background has Ctrl-C ignored; some tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)


class NoDeprecation(logging.Handler):
    """Fails the test in which transformers says that something we call is deprecated."""

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        # Its own assisted decoding passes `min_new_tokens` beside a generation config.
        if "deprecated" in message.lower() and "'min_new_tokens'" not in message:
            pytest.fail(f"transformers logged a deprecation: {message}", pytrace=True)


logging.getLogger("transformers").addHandler(NoDeprecation(logging.WARNING))


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Every test draws the same random numbers, whatever ran before it."""
    # Not for every device: torch.manual_seed would note where it was called for each.
    torch.default_generator.manual_seed(0)


@pytest.fixture
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws no curves.png: that takes longer than a tiny run."""
    monkeypatch.setattr("graftlm.curves.draw_curves", lambda log, path: None)
