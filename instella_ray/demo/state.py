"""State of the demo in ``state.json``, which makes it resumable."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Literal

from .. import storage
from ..config import validate
from ..errors import UserError
from .recipe import DemoConfig

Mode = Literal["new", "resume", "fresh"]
STATE = "state.json"
REPORT = "report.html"
LAST_STAGE = "score"


class DemoState:
    """Finished stages with their results and times; a folder belongs to one configuration.

    The constructor only reads. It raises UserError if the folder is not valid for this demo and mode.
    """

    def __init__(self, demo: DemoConfig, mode: Mode) -> None:
        self.folder, self.path, self.mode = demo.folder, demo.path(STATE), mode
        self.stages: dict[str, dict[str, Any]] = {}
        self._spent = 0.0
        """Seconds of the stages that this process has run."""
        self.settings = demo.model_dump(mode="json", exclude={"folder"})
        if not storage.is_empty(demo.folder):
            if not storage.exists(self.path):
                raise UserError(f"folder {demo.folder}: not empty and not written by the demo; expected another folder")
            if mode == "new":
                raise UserError(f"folder {demo.folder}: contains a demo; --resume continues it, --fresh starts over")
            if mode == "resume":
                saved = storage.read_json(self.path)
                if saved["settings"] != self.settings:
                    raise UserError(f"folder {demo.folder}: its demo has other settings; --fresh starts over")
                self.stages = saved["stages"]
        elif mode == "resume":
            raise UserError(f"folder {demo.folder}: contains no demo to resume")

    @property
    def finished(self) -> bool:
        """Whether all stages are finished and the report is written."""
        return LAST_STAGE in self.stages and storage.exists(storage.join(self.folder, REPORT))

    def begin(self) -> None:
        """Start writing to the folder; mode ``fresh`` deletes its contents first."""
        if self.mode == "fresh":
            storage.remove_tree(self.folder)
        self._save()

    def run(self, name: str, stage: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Run ``stage`` and save its result, or return the saved result of an earlier run."""
        if name not in self.stages:
            print(f"\n== {name}", flush=True)
            began = time.perf_counter()
            result = stage()
            seconds = time.perf_counter() - began
            self._spent += seconds
            self.stages[name] = {**result, "seconds": round(seconds, 1)}
            self._save()
        return self.stages[name]

    def add_rest(self, began: float) -> None:
        """Count what has passed since ``began`` (``time.perf_counter``) beside the stages of this process as ``rest``."""
        seconds = time.perf_counter() - began - self._spent
        earlier = self.stages.get("rest", {"seconds": 0.0})["seconds"]
        self.stages["rest"] = {"seconds": round(earlier + seconds, 1)}
        self._save()

    def _save(self) -> None:
        storage.write_json(self.path, {"settings": self.settings, "stages": self.stages})


def read_demo(folder: str) -> DemoConfig:
    """Read the configuration of the demo in ``folder``, finished or not; UserError if there is none."""
    path = storage.join(folder, STATE)
    saved = storage.read_json(path) if storage.exists(path) else {}
    if "settings" not in saved:
        raise UserError(f"{folder}: not the folder of a demo (no {STATE} with its settings)")
    return validate(DemoConfig, {**saved["settings"], "folder": folder.rstrip("/")}, path)
