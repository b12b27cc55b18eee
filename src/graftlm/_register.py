"""Tell transformers' AutoConfig about composed models, without importing it ourselves.

Importing it takes seconds. Whoever uses it imports it anyway, so we wait for that: a finder on
`sys.meta_path` lets the import run as always and then imports `graftlm.config`, which registers
the configuration; the first configuration object imports, and so registers, the models.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

AWAITED = "transformers.models.auto.configuration_auto"


class Waiter(importlib.abc.MetaPathFinder):
    """Imports our configuration right after the awaited module."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The usual spec of the awaited module, its execution followed by ours."""
        if fullname != AWAITED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                importlib.import_module("graftlm.config")

            spec.loader.exec_module = exec_module
        return spec


def register_when_imported() -> None:
    """Register now if transformers' auto classes are imported, else as soon as they are."""
    if AWAITED in sys.modules:
        importlib.import_module("graftlm.config")
    else:
        sys.meta_path.insert(0, Waiter())
