"""A composed model for the tests of the playground, and what they wait for."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from graftlm import compose
from graftlm.playground.runs import Limits, Run
from tiny import save_pair

LIMITS = Limits(max_characters=40, max_new_tokens=3000)


def composed(folder: Path) -> Any:
    """Two models of the same characters, with bridges that do something."""
    anchor, augmenting = save_pair(folder)
    torch.manual_seed(5)
    made = compose(anchor, {"code": augmenting}, every=2, bridge_dtype=torch.float32)
    for name, weight in made.bridges.named_parameters():
        if name.endswith("cross_o.weight"):
            nn.init.normal_(weight, std=2.0)
    return made


def written(run: Run) -> dict[str, str]:
    """All texts, once they are there."""
    run.wait()
    assert [column.error for column in run.columns.values()] == [""] * len(run.columns)
    return {name: column.text for name, column in run.columns.items()}


def wait_until(is_so: Any) -> None:
    """Give threads time; a hang fails."""
    for _ in range(2000):
        if is_so():
            return
        time.sleep(0.01)
    pytest.fail("waited for 20 seconds")
