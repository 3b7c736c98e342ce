"""Evaluations without Ray: what its actors would do is done here, one row after another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    without_actors(monkeypatch)
