"""Results of a benchmark suite: rows and goals, as text table and JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..accelerator import hardware_summary
from ..rendering import Cell, Goal, table
from ..storage import write_json


@dataclass(frozen=True)
class SuiteResult:
    """Measurements of one suite."""

    suite: str
    setting: dict[str, Any]
    """Sizes, threads and repeats needed to reproduce the measurement."""
    rows: list[dict[str, Cell]]
    goals: list[Goal] = field(default_factory=list)

    def text(self) -> str:
        """Format title, settings, table and goals."""
        plain = {name: value for name, value in self.setting.items() if not isinstance(value, dict)}
        lines = [f"## {self.suite}", ", ".join(f"{name} {value}" for name, value in plain.items()), ""]
        return "\n".join([*lines, table(self.rows), "", *(goal.text() for goal in self.goals)])


def write_results(path: str, results: Sequence[SuiteResult]) -> None:
    """Write all results and the machine's description as JSON."""
    entries = [
        {**dataclasses.asdict(result), "goals": [{**vars(goal), "met": goal.met} for goal in result.goals]}
        for result in results
    ]
    write_json(path, {"hardware": hardware_summary(), "results": entries})
