"""AMD's GPUs for Ray, on a machine without any."""

from __future__ import annotations

from pathlib import Path

_DRIVER = """
import sys, types
fake = types.ModuleType("ray._private.thirdparty.pyamdsmi")
fake.smi_initialize = fake.smi_shutdown = fake.pyamdsmi_shutdown = lambda: None
fake.smi_get_device_count = lambda: 2
fake.smi_get_device_id = lambda number: 0x74A1
sys.modules[fake.__name__] = fake
"""


def pretend_two_mi300x(folder: Path) -> None:
    """Write a ``sitecustomize.py`` in place of the library that asks AMD's driver for its devices.

    It has an effect on processes with ``folder`` in their PYTHONPATH, such as a Ray's that starts.
    """
    (folder / "sitecustomize.py").write_text(_DRIVER)
