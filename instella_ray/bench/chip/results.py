"""Results of the benchmark of one GPU: a JSON file with the rows of all parts, and their table."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ... import __version__, storage
from ...accelerator import device_label, hardware_summary
from ...config import check_output_file
from ...errors import UserError
from ...rendering import Cell, Goal, table
from .rows import ChipRow, cells
from .settings import GpuBenchConfig, Part

WHOLE, RUNNING, CUT, FAILED = "whole", "running", "cut", "failed"
"""States of a part."""
FREE = {"parts", "output", "part_limit_s", "limit_s"}
"""Settings that may differ between the runs of one file."""
DRIVERS = ("/proc/driver/nvidia/version", "/sys/module/amdgpu/version")


def machine(device: torch.device) -> dict[str, Any]:
    """Return the device, its driver, and the versions that measurements depend on."""
    drivers = [path.read_text().partition("\n")[0] for path in map(Path, DRIVERS) if path.exists()]
    return {
        "device": device_label(device),
        "driver": "; ".join(drivers),
        "cuda": torch.version.cuda or "",
        "hip": torch.version.hip or "",
        "instella_ray": __version__,
        **hardware_summary(),
    }


class GpuBenchResults:
    """The file ``cfg.output``, written after each change."""

    def __init__(self, cfg: GpuBenchConfig, device: torch.device) -> None:
        """Read the file, if there is one.

        Raises UserError if it has measurements of another device, with other versions or settings, or if it is not local
        or cannot be written.
        """
        self.path = cfg.output
        if not storage.is_local(self.path):
            raise UserError(f"output {self.path}: expected a local file")
        check_output_file(self.path)
        settings = cfg.model_dump(mode="json")
        self.content: dict[str, Any] = {"machine": machine(device), "settings": settings, "parts": {}}
        if not storage.exists(self.path):
            return
        found = storage.read_json(self.path)
        for section in ("machine", "settings"):
            self._same(found[section], self.content[section])
        self.content["parts"] = found["parts"]

    def _same(self, found: dict[str, Any], here: dict[str, Any], prefix: str = "") -> None:
        for key in dict.fromkeys([*found, *here]):
            old, new = found.get(key), here.get(key)
            if isinstance(old, dict) and isinstance(new, dict):
                self._same(old, new, f"{prefix}{key}.")
            elif key not in FREE and old != new:
                raise UserError(
                    f"{self.path}: has measurements with {prefix}{key} = {old!r}, here it is {new!r}; "
                    f"expected another output"
                )

    @property
    def parts(self) -> dict[Part, dict[str, Any]]:
        """Parts that were begun: ``state``, ``seconds``, ``rows``, and the ``reason`` if they are not whole."""
        return self.content["parts"]  # type: ignore[no-any-return]

    def is_whole(self, part: Part) -> bool:
        """Return whether all of a part was measured."""
        return part in self.parts and self.parts[part]["state"] == WHOLE

    def begin(self, part: Part) -> None:
        """Discard the rows of a part, which is measured anew."""
        self.parts[part] = {"state": RUNNING, "rows": []}
        self._write()

    def add(self, part: Part, row: dict[str, Any]) -> None:
        """Add a measured row, from :meth:`.rows.ChipRow.as_dict`."""
        self.parts[part]["rows"].append(row)
        self._write()

    def end(self, part: Part, state: str, seconds: float, reason: str = "") -> None:
        """Set the state of a part."""
        self.parts[part] |= {"state": state, "seconds": round(seconds, 1)} | ({"reason": reason} if reason else {})
        self._write()

    def _write(self) -> None:
        storage.write_json(self.path, self.content)

    def text(self, cfg: GpuBenchConfig) -> str:
        """Format the machine, the table of all rows of the configured parts, and the goals."""
        about = ", ".join(f"{name} {value}" for name, value in self.content["machine"].items() if value)
        return "\n".join([about, "", table(list(self._table(cfg))), "", *(goal.text() for goal in self.goals())])

    def _table(self, cfg: GpuBenchConfig) -> Iterator[dict[str, Cell]]:
        for part in cfg.parts:
            found = self.parts.get(part, {"state": "", "rows": []})
            for row in found["rows"]:
                yield {"part": part, **cells(row)}
            if found["state"] != WHOLE:
                reason = found.get("reason") or "not measured yet"
                yield {
                    "part": part,
                    **cells(ChipRow("(the rest)" if found["rows"] else "(all)", note=reason).as_dict()),
                }

    def goals(self) -> list[Goal]:
        """Return the goals of all rows."""
        names = [field.name for field in dataclasses.fields(Goal)]
        rows = [row for found in self.parts.values() for row in found["rows"] if "goal" in row]
        return [Goal(**{name: row["goal"][name] for name in names}) for row in rows]
