"""What the demo has done so far, in ``state.json``, so that it can be interrupted and gone on with."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Literal

from .. import storage
from ..errors import UserError
from .recipe import DemoConfig

Mode = Literal["new", "resume", "fresh"]
STATE = "state.json"


class DemoState:
    """Finished stages with their results and times. The folder belongs to one configuration."""

    def __init__(self, demo: DemoConfig, mode: Mode) -> None:
        self.path = demo.path(STATE)
        self.stages: dict[str, dict[str, Any]] = {}
        settings = demo.model_dump(mode="json", exclude={"folder"})
        if not storage.is_empty(demo.folder):
            if not storage.exists(self.path):
                raise UserError(f"folder {demo.folder}: is not empty and no demo wrote it; choose another one")
            if mode == "new":
                raise UserError(f"folder {demo.folder}: holds a demo already; --resume goes on, --fresh starts over")
            if mode == "fresh":
                storage.remove_tree(demo.folder)
            else:
                saved = storage.read_json(self.path)
                if saved["settings"] != settings:
                    raise UserError(f"folder {demo.folder}: its demo has other settings; --fresh starts over")
                self.stages = saved["stages"]
        elif mode == "resume":
            raise UserError(f"folder {demo.folder}: no demo to resume there")
        self.settings = settings
        self._save()

    def run(self, name: str, stage: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result of ``stage()``, or the saved one where it ran to its end before."""
        if name not in self.stages:
            print(f"\n== {name}", flush=True)
            began = time.perf_counter()
            result = stage()
            self.stages[name] = {**result, "seconds": round(time.perf_counter() - began, 1)}
            self._save()
        return self.stages[name]

    def _save(self) -> None:
        storage.write_json(self.path, {"settings": self.settings, "stages": self.stages})
