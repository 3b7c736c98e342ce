"""What a run logs while it trains: metrics.jsonl, preview pictures, and the same for other loggers."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import storage
from ..rendering import encode_png
from .effort import bf16_peak, effort, peak_memory
from .loggers import open_loggers
from .settings import TrainConfig

Summary = Callable[[int, dict[str, Tensor]], dict[str, Tensor]]
"""Single numbers of a step's means, as :meth:`.loop.Task.summary`."""


class MetricsLog:
    """Rank 0 appends one JSON object a logged step to ``metrics.jsonl``; values are means over ranks."""

    def __init__(self, cfg: TrainConfig, rank: int, summary: Summary, start: int, device: torch.device) -> None:
        self.cfg, self.rank, self.summary, self.device = cfg, rank, summary, device
        self.last: dict[str, Any] = {}
        self.seen = 0
        self.waited = 0.0
        self.work = 0.0
        self.peak = bf16_peak(device, cfg.precision)
        self.world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        self.loggers = open_loggers(cfg.loggers, cfg.run_dir, start) if rank == 0 else []
        self.since = time.perf_counter()

    def step(
        self, step: int, totals: dict[str, Tensor], rate: float, norm: Tensor, data_wait: float, flops: float
    ) -> None:
        self.seen += self.cfg.global_batch
        self.waited += data_wait
        self.work += flops
        if (step + 1) % self.cfg.log_every and step + 1 != self.cfg.steps:
            return
        values = torch.cat([value.flatten() for value in totals.values()])
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(values)
            values /= self.world
        parts = values.split([value.numel() for value in totals.values()])
        means = {name: part.view_as(value) for (name, value), part in zip(totals.items(), parts, strict=True)}
        elapsed = time.perf_counter() - self.since
        facts = {name: round(float(value), 6) for name, value in self.summary(step, means).items()}
        speed = {"images_per_second": round(self.seen / elapsed, 1), "data_wait": round(self.waited / elapsed, 4)}
        speed |= effort(self.work / elapsed, self.world, self.peak)
        speed["memory_gb"] = round(peak_memory(self.device) / 1e9, 3)
        self.last = {"step": step + 1, **facts, "lr": rate, "gradient_norm": round(float(norm), 5), **speed}
        self.seen, self.waited, self.work, self.since = 0, 0.0, 0.0, time.perf_counter()
        if self.rank == 0:
            path = Path(self.cfg.run_dir) / "metrics.jsonl"
            with path.open("a") as stream:
                stream.write(json.dumps(self.last) + "\n")
        figures = {name: value for name, value in self.last.items() if name != "step"}
        for logger in self.loggers:
            logger.scalars(step + 1, figures)

    def preview(self, step: int, picture: Any) -> None:
        if picture is not None:
            storage.write_bytes(storage.join(self.cfg.run_dir, "previews", f"step-{step:07d}.png"), encode_png(picture))
            for logger in self.loggers:
                logger.picture(step, picture)

    def close(self) -> None:
        for logger in self.loggers:
            logger.close()
