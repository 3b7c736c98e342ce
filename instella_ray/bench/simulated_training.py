"""Predicted and measured throughput of tokenizer training from images with one worker and a loader thread."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..data.loading.image_data import DECODERS
from ..models.bit import BITConfig
from ..planning.simulation.training import ClusterConditions, Run, simulate_training
from ..training.losses import PerceptualConfig, TokenizerLossConfig
from ..training.run_dir import read_metrics
from ..training.settings import TrainConfig, WorkersConfig
from ..training.tokenizer import TokenizerConfig, TokenizerTask, run_tokenizer
from .stage_times import median_seconds

WARM_UP = 0.25
"""Share of a real run's steps that are not counted, until caches are filled and prefetched batches used."""
CHECKPOINTS = 4
UNLIMITED = 1e15


def training_config(sizes: BITConfig, data: str, run_dir: Path, steps: int, batch: int) -> TokenizerConfig:
    """Configure a tokenizer run of ``steps`` steps with :data:`CHECKPOINTS` checkpoints."""
    return TokenizerConfig(
        model=sizes,
        data=data,
        loss=TokenizerLossConfig(perceptual=PerceptualConfig(network="none")),
        train=TrainConfig(
            run_dir=str(run_dir),
            steps=steps,
            global_batch=batch,
            log_every=1,
            checkpoint_every=max(1, steps // CHECKPOINTS),
            preview_every=steps,
            loggers=(),
            workers=WorkersConfig(max_failures=0),
        ),
    )


class TrainingStages:
    """Measures a training worker's stages in isolation, in a process without Ray Train."""

    def __init__(self, cfg: TokenizerConfig) -> None:
        import torch

        from ..training.trainer import Trainer

        torch.set_num_threads(cfg.train.workers.threads)
        device = torch.device("cpu")
        self.trainer = Trainer(TokenizerTask(cfg), cfg.train, device, None)

    def measure(self, repeats: int) -> dict[str, float]:
        """Measure seconds of a ``step``, of loading a ``batch`` and of writing a checkpoint (``save``), and its ``bytes``."""
        numbers, steps = itertools.count(), itertools.count()
        batch = self.trainer.batch(0)
        found = {
            "batch": median_seconds(lambda: self.trainer.batch(next(numbers)), repeats),
            "step": median_seconds(lambda: self.trainer.step(next(steps) % self.trainer.cfg.steps, batch), repeats),
        }
        with tempfile.TemporaryDirectory() as name:
            folders = (Path(name, str(number)) for number in itertools.count())

            def save() -> None:
                folder = next(folders)
                folder.mkdir()
                self.trainer.save(folder, 1)

            found["save"] = median_seconds(save, max(1, repeats // 5))
            found["bytes"] = float(sum(path.stat().st_size for path in Path(name, "0").rglob("*") if path.is_file()))
        return found


def predicted_rate(cfg: TokenizerConfig, alone: Mapping[str, float], cores: int) -> float:
    """Predict images per second of the run of ``cfg`` on ``cores`` cores, from the times of :class:`TrainingStages`.

    While a batch is decoded, decoding threads and the training step share the cores evenly.
    """
    step_s = alone["step"] + alone["batch"] * (1 - min(1.0, cores / (DECODERS + 1)))
    train = cfg.train
    run = Run(
        gpus=1,
        steps=100 * train.checkpoint_every,
        step_s=step_s,
        sends_after=1.0,
        sent_bytes=0.0,
        batch_bytes=0.0,
        batch_s=alone["batch"],
        checkpoint_bytes=alone["bytes"],
        checkpoint_every=train.checkpoint_every,
    )
    machine = ClusterConditions(
        straggling=0.0,
        storage_bytes_per_s=UNLIMITED,
        disk_bytes_per_s=alone["bytes"] / alone["save"],
        upload_bytes_per_s=UNLIMITED,
        node_mtbf_days=1e6,
        restart_s=0.0,
        source="measured alone",
    )
    return run.steps * train.global_batch / simulate_training(run, machine).seconds


def real_rate(cfg: TokenizerConfig) -> float:
    """Run the training and return images per second after the warm-up."""
    run_tokenizer(cfg)
    rows: list[dict[str, Any]] = read_metrics(cfg.train.run_dir)
    rates = [row["images_per_second"] for row in rows[int(WARM_UP * len(rows)) :]]
    return len(rates) / sum(1 / rate for rate in rates)
