"""Evaluations without Ray: what its actors would do is done here, one row after another."""

from __future__ import annotations

import pytest

from ..kit.evaluation import without_actors


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    without_actors(monkeypatch)
