"""Hand checkpoints of a run to Ray Train."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray.train
from ray.train import Checkpoint


def report_checkpoint(step: int, metrics: dict[str, Any], save: Callable[[Path], None]) -> None:
    """Save after ``step`` steps and hand it over. A barrier: every rank calls it equally.

    ``save`` is called on every rank, as parts of a model may have to be gathered; rank 0 brings the folder that counts.
    """
    name = f"step-{step:07d}"
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder))
        checkpoint = Checkpoint.from_directory(folder) if ray.train.get_context().get_world_rank() == 0 else None
        ray.train.report(metrics, checkpoint=checkpoint, checkpoint_dir_name=name)
