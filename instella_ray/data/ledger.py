"""The account of a data job: every sample that went in is kept, dropped for a reason, or quarantined for one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

KEPT, DROPPED, QUARANTINED = "kept", "dropped", "quarantined"
DOWNLOAD = "download:"
"""Begins the problem of a sample whose picture could not be fetched. Links die: that is a drop, not damage."""
DOWNLOAD_REASON = "download_"
"""Begins the reason that such a sample is dropped for."""


def verdict_of(problem: str) -> str:
    """The verdict on a sample whose source reports ``problem``."""
    if problem.startswith(DOWNLOAD):
        return f"{DROPPED}:{DOWNLOAD_REASON}{problem.removeprefix(DOWNLOAD)}"
    return f"{QUARANTINED}:{problem}"


@dataclass
class Ledger:
    """``in = kept + dropped(reason) + quarantined(reason)``, by construction."""

    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    quarantined: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, entries: Iterable[Mapping[str, Any]]) -> Ledger:
        """The sum of several :meth:`to_json`."""
        ledger = cls()
        for entry in entries:
            ledger.add(entry)
        return ledger

    def count(self, verdicts: Iterable[str]) -> Ledger:
        """Add verdicts: ``kept``, ``dropped:REASON`` or ``quarantined:REASON``."""
        for verdict, number in Counter(verdicts).items():
            kind, _, reason = verdict.partition(":")
            if kind == KEPT:
                self.kept += number
            else:
                (self.dropped if kind == DROPPED else self.quarantined)[reason] += number
        return self

    def add(self, other: Mapping[str, Any]) -> Ledger:
        """Add another ledger's :meth:`to_json`."""
        self.kept += other["kept"]
        self.dropped.update(other["dropped"])
        self.quarantined.update(other["quarantined"])
        return self

    @property
    def total(self) -> int:
        return self.kept + self.dropped.total() + self.quarantined.total()

    @property
    def failed_downloads(self) -> int:
        """Samples dropped because their picture could not be fetched."""
        return sum(number for reason, number in self.dropped.items() if reason.startswith(DOWNLOAD_REASON))

    def to_json(self) -> dict[str, Any]:
        parts = {"dropped": dict(sorted(self.dropped.items())), "quarantined": dict(sorted(self.quarantined.items()))}
        return {"in": self.total, "kept": self.kept, **parts}

    def summary(self) -> str:
        """One line for people."""
        reasons = [f"{n} {r}" for r, n in (self.dropped + self.quarantined).most_common()]
        return f"{self.kept} of {self.total} kept" + (f" ({', '.join(reasons)})" if reasons else "")
