"""Tell transformers and lm-eval about composed models, without importing them ourselves.

Importing them takes seconds. Whoever uses them imports them anyway, so we wait for that: finders on
`sys.meta_path` let the import run as always. Then `graftlm.config` is imported, which registers
the configuration (the first configuration object imports, and so registers, the models); and
lm-eval's registry is told where its model class for ours is.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

TRANSFORMERS = "transformers.models.auto.configuration_auto"
LM_EVAL = "lm_eval.models"


def register_config() -> None:
    """Register the configuration with transformers."""
    importlib.import_module("graftlm.config")


def register_harness() -> None:
    """Register `GraftLM` with lm-eval, to be imported when it is used."""
    registry = importlib.import_module("lm_eval.api.registry").model_registry
    if "graftlm" not in registry:
        registry.register("graftlm", target="graftlm.harness:GraftLM")


class Waiter(importlib.abc.MetaPathFinder):
    """Registers right after the awaited module was imported.

    Args:
        awaited: Its name.
        register: What to do then.
    """

    def __init__(self, awaited: str, register: Callable[[], None]):
        self.awaited = awaited
        self.register = register

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The usual spec of the awaited module, its execution followed by ours."""
        if fullname != self.awaited:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                self.register()

            spec.loader.exec_module = exec_module
        return spec


def register_when_imported() -> None:
    """Register with what is imported now, with others as soon as they are."""
    for awaited, register in ((TRANSFORMERS, register_config), (LM_EVAL, register_harness)):
        if awaited in sys.modules:
            register()
        else:
            sys.meta_path.insert(0, Waiter(awaited, register))
