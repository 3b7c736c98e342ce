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
    """Finished stages with their results and times. The folder belongs to one configuration.

    Made, it has only looked at the folder: UserError when that is not for this demo in this mode.
    """

    def __init__(self, demo: DemoConfig, mode: Mode) -> None:
        self.folder, self.path, self.mode = demo.folder, demo.path(STATE), mode
        self.stages: dict[str, dict[str, Any]] = {}
        self.settings = demo.model_dump(mode="json", exclude={"folder"})
        if not storage.is_empty(demo.folder):
            if not storage.exists(self.path):
                raise UserError(f"folder {demo.folder}: is not empty and no demo wrote it; choose another one")
            if mode == "new":
                raise UserError(f"folder {demo.folder}: holds a demo already; --resume goes on, --fresh starts over")
            if mode == "resume":
                saved = storage.read_json(self.path)
                if saved["settings"] != self.settings:
                    raise UserError(f"folder {demo.folder}: its demo has other settings; --fresh starts over")
                self.stages = saved["stages"]
        elif mode == "resume":
            raise UserError(f"folder {demo.folder}: no demo to resume there")

    def begin(self) -> None:
        """Take the folder over, which deletes the demo in it where a fresh one was asked for."""
        if self.mode == "fresh":
            storage.remove_tree(self.folder)
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
