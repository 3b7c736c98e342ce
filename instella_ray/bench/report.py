"""What a suite hands back: rows of numbers and goals, as a table to read and as JSON to compare."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ..accelerator import hardware_summary
from ..rendering import Cell, table
from ..storage import write_json


@dataclass(frozen=True)
class Goal:
    """A number that was promised."""

    name: str
    value: float
    target: float
    kind: Literal[">=", "<="]

    @property
    def met(self) -> bool:
        """Whether the promise holds in this run."""
        return (operator.ge if self.kind == ">=" else operator.le)(self.value, self.target)

    def text(self) -> str:
        """One line."""
        return f"{'met   ' if self.met else 'MISSED'} {self.name}: {self.value:.3g} (goal {self.kind} {self.target:g})"


@dataclass(frozen=True)
class SuiteResult:
    """One suite's measurements."""

    suite: str
    setting: dict[str, Any]
    """Sizes, threads, repeats: what a reader needs to repeat it."""
    rows: list[dict[str, Cell]]
    goals: list[Goal] = field(default_factory=list)

    def text(self) -> str:
        """Title, table and goals."""
        plain = {name: value for name, value in self.setting.items() if not isinstance(value, dict)}
        lines = [f"## {self.suite}", ", ".join(f"{name} {value}" for name, value in plain.items()), ""]
        return "\n".join([*lines, table(self.rows), "", *(goal.text() for goal in self.goals)])


def write_results(path: str, results: Sequence[SuiteResult]) -> None:
    """All results with the machine's description, as JSON."""
    entries = [
        {**dataclasses.asdict(result), "goals": [{**vars(goal), "met": goal.met} for goal in result.goals]}
        for result in results
    ]
    write_json(path, {"hardware": hardware_summary(), "results": entries})
