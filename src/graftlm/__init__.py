"""Compose frozen language models with CALM bridges (arXiv 2401.02412).

Importing this package loads no model code: names are looked up when they are first used, and
`AutoConfig` and `AutoModelForCausalLM` learn about composed models once they are imported.
"""

import importlib
from typing import TYPE_CHECKING, Any

from graftlm._register import register_when_imported
from graftlm._version import __version__

if TYPE_CHECKING:
    from graftlm.bridge import Bridge
    from graftlm.cache import ComposedCache
    from graftlm.caching import cache_states
    from graftlm.causal_lm import ComposedForCausalLM
    from graftlm.composed import ComposedModel
    from graftlm.config import BridgeConfig, ComposedConfig, Connection
    from graftlm.errors import CheckpointMismatchError, GraftlmError, UnsupportedModelError
    from graftlm.evaluation import evaluate
    from graftlm.explain import Explanation
    from graftlm.loading import compose
    from graftlm.processor import ComposedDataCollator, ComposedProcessor
    from graftlm.pruning import prune
    from graftlm.states_cache import StatesCache
    from graftlm.trainer import ComposedTrainer
    from graftlm.usefulness import rank_connections
    from graftlm.verification import verify

_HOME = {
    "Bridge": "bridge",
    "BridgeConfig": "config",
    "CheckpointMismatchError": "errors",
    "ComposedCache": "cache",
    "ComposedConfig": "config",
    "ComposedDataCollator": "processor",
    "ComposedForCausalLM": "causal_lm",
    "ComposedModel": "composed",
    "ComposedProcessor": "processor",
    "ComposedTrainer": "trainer",
    "Connection": "config",
    "Explanation": "explain",
    "GraftlmError": "errors",
    "UnsupportedModelError": "errors",
    "StatesCache": "states_cache",
    "cache_states": "caching",
    "compose": "loading",
    "evaluate": "evaluation",
    "prune": "pruning",
    "rank_connections": "usefulness",
    "verify": "verification",
}

__all__ = [
    "Bridge",
    "BridgeConfig",
    "CheckpointMismatchError",
    "ComposedCache",
    "ComposedConfig",
    "ComposedDataCollator",
    "ComposedForCausalLM",
    "ComposedModel",
    "ComposedProcessor",
    "ComposedTrainer",
    "Connection",
    "Explanation",
    "GraftlmError",
    "StatesCache",
    "UnsupportedModelError",
    "__version__",
    "cache_states",
    "compose",
    "evaluate",
    "prune",
    "rank_connections",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'graftlm' has no attribute {name!r}")
    return getattr(importlib.import_module(f"graftlm.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)


register_when_imported()
