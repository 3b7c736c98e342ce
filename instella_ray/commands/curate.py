"""Curate shards."""

from __future__ import annotations

from ..data.curation.job import CurateConfig, run_curate
from ..job import Job


def run(cfg: CurateConfig) -> None:
    print(f"{cfg.output}: {run_curate(cfg).summary()}")


job = Job("curate", CurateConfig, run, "Curate captioned WebDataset shards.", switches={"local": "local"})
parser, main = job.parser, job.main
