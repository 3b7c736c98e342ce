"""The gauges that a training run tells Ray, with what Ray would be told written down instead."""

from __future__ import annotations

import math

import numpy as np
import pytest
from ray.util.metrics import Gauge

from instella_ray.training.loggers import PrometheusLogger

RUN = "gs://bucket/runs/a"


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Value of each gauge by its name."""
    values: dict[str, float] = {}

    def remember(self: Gauge, value: float, tags: dict[str, str]) -> None:
        assert tags == {"run": RUN}
        values[self.info["name"].removeprefix("instella_training_")] = value

    monkeypatch.setattr(Gauge, "set", remember)
    return values


def test_a_runs_figures_become_gauges_until_it_ends(told: dict[str, float]) -> None:
    logger = PrometheusLogger(RUN, 40)
    assert told == {"step": 40, "running": 1}
    logger.scalars(60, {"loss": 0.25, "lr": 1e-4, "images_per_second": 120.0})
    logger.image(60, np.zeros((8, 8, 3), np.uint8))
    assert told == {"step": 60, "running": 1, "finite": 1, "loss": 0.25, "images_per_second": 120.0}
    logger.close()
    assert told["running"] == 0


def test_a_figure_that_is_no_number_keeps_its_last_value_and_says_so(told: dict[str, float]) -> None:
    logger = PrometheusLogger(RUN, 0)
    logger.scalars(20, {"loss": 0.5})
    logger.scalars(40, {"loss": math.nan})
    assert (told["step"], told["loss"], told["finite"]) == (40, 0.5, 0)
