"""What tests of training share: its inputs, and who trains."""

from __future__ import annotations

import pytest

from instella_ray.training.settings import WorkersConfig

from ..kit.training_inputs import codes, shards, tokenizer

__all__ = ["codes", "shards", "tokenizer"]


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever starts Ray fails."""

    def init(*args: object, **options: object) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr("ray.init", init)


@pytest.fixture(params=[0, pytest.param(1, marks=[pytest.mark.ray, pytest.mark.nightly])], ids=["in_process", "on_ray"])
def workers(request: pytest.FixtureRequest) -> WorkersConfig:
    """Who trains: the test's own process, and by night a worker of Ray Train."""
    if request.param:
        request.getfixturevalue("ray_session")
    return WorkersConfig(count=request.param, cpus=0.5)
