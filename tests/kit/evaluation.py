"""Evaluations without actors, and the numbers that they come to."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from instella_ray.evaluation import evaluate, gallery, measure


def without_actors(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same classes on the same rows in this process; tests marked ``ray`` run them on real actors."""

    def here(work: type, arguments: tuple[Any, ...], rows: Sequence[Any], **spread: Any) -> Iterator[dict[str, Any]]:
        worker = work(*arguments)
        for row in rows:
            yield from worker(pa.Table.from_pylist([row])).to_pylist()

    monkeypatch.setattr(measure, "on_actors", here)
    monkeypatch.setattr(gallery, "on_actors", here)
    monkeypatch.setattr(evaluate, "init_ray", lambda: None)


def numbers(output: Path | str) -> dict[str, Any]:
    """Every metric of every setting."""
    results = json.loads((Path(output) / "results.json").read_text())
    return {setting["name"]: setting["metrics"] for setting in results["settings"]}
