"""Metrics suite: throughput of each evaluation metric on one batch."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from pydantic import Field

from ..config import Config
from ..data.scenes import render, scene_at
from ..evaluation.metric_settings import LPIPS, PSNR, SSIM, BitDiversity, Bits, Maker, MetricsConfig, SceneScore, Tools
from ..evaluation.metrics.base import Batch
from .measure import Spread, race
from .report import Cell, SuiteResult

FREE = MetricsConfig(
    scene_score=SceneScore(),
    psnr=PSNR(),
    ssim=SSIM(),
    lpips=LPIPS(net="alex"),
    bit_usage=Bits(),
    diversity_bits=BitDiversity(),
)


class MetricsBench(Config):
    """Batch and metrics to measure."""

    images: int = Field(32, ge=4, multiple_of=4)
    """Images in the batch, four per prompt."""
    size: int = Field(256, ge=16)
    num_tokens: int = 128
    bits_per_token: int = 64
    metrics: MetricsConfig = FREE
    """Metrics, as in jobs/evaluate.py; lpips without weights is as fast as with them."""


def run_metrics(cfg: MetricsBench, repeats: int) -> SuiteResult:
    """Measure each metric; one row per metric with images per second and implementation."""
    rng, count = np.random.default_rng(0), cfg.images
    scenes = [scene_at(0, i // 4) for i in range(count)]
    images = np.stack([render(scene, cfg.size) for scene in scenes])
    batch = Batch(
        ids=[f"{i}" for i in range(count)],
        images=images,
        references=np.roll(images, 1, 0),
        prompts=[scene.caption for scene in scenes],
        codes=rng.integers(0, 2, (count, cfg.num_tokens, cfg.bits_per_token), np.uint8),
        groups=[f"{i // 4}" for i in range(count)],
    )
    makers = {name: section.load(Tools()) for name, section in cfg.metrics.sections().items()}
    timings = race({name: partial(_measure, make, batch) for name, make in makers.items()}, repeats=repeats)
    rates = {name: Spread.of([count / seconds for seconds in timing.wall]) for name, timing in timings.items()}
    rows: list[dict[str, Cell]] = [
        {"metric": make().info.name, "images/s": rates[name].text(digits=1), "by": make().info.implementation}
        for name, make in makers.items()
    ]
    about = {**cfg.model_dump(exclude={"metrics"}), "threads": torch.get_num_threads(), "repeats": repeats}
    return SuiteResult("Metrics", about, rows)


def _measure(make: Maker, batch: Batch) -> None:
    make().update(batch)
