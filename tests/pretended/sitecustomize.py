"""Pretends a processor with fast bfloat16 (``INSTELLA_TEST_BF16=yes``) or without (``no``), whichever is there.

tests/conftest.py runs this file, and names its folder in ``PYTHONPATH``: Python runs a module of this name at its start,
so that workers pretend the same. A process that a test starts with a ``PYTHONPATH`` of its own sees the real processor.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

FLAGS = {"yes": "amx_bf16", "no": ""}[os.environ["INSTELLA_TEST_BF16"]]


class Pretence(MetaPathFinder):
    """Waits for the module that looks the flags up: to import it here would load torch into every process."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "instella_ray.accelerator":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_patch(module: ModuleType) -> None:
            execute(module)
            real = module._cpu_info
            module._cpu_info = lambda key: FLAGS if key == "flags" else real(key)  # type: ignore[attr-defined]

        spec.loader.exec_module = execute_and_patch  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, Pretence())
