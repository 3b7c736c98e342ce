"""What the bench predicts of a training run from the times of its parts."""

from __future__ import annotations

from pathlib import Path

import pytest

from instella_ray.bench.simulated_training import predicted_rate, training_config

from ..kit.models import TINY_BIT


@pytest.mark.parametrize(
    ("step", "batch", "cores", "seconds"),
    [
        (0.1, 0.01, 64, 0.1 + 0.02 / 10),  # decoding is hidden, and every tenth step waits for a checkpoint
        (0.1, 0.01, 1, 0.1 + 0.01 * 4 / 5 + 0.02 / 10),  # one core for four decoding threads and the step
        (0.1, 0.5, 64, 0.5),  # the step waits for data, and a checkpoint is written meanwhile
    ],
)
def test_a_run_is_as_fast_as_its_slowest_part(
    tmp_path: Path, step: float, batch: float, cores: int, seconds: float
) -> None:
    cfg = training_config(TINY_BIT, "a.tar", tmp_path / "run", 40, 8)
    alone = {"step": step, "batch": batch, "save": 0.02, "bytes": 1e6}
    assert predicted_rate(cfg, alone, cores) == pytest.approx(8 / seconds, rel=0.01)
