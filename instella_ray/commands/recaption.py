"""Recaption."""

from __future__ import annotations

from ..data.generation.recaption import RecaptionConfig, run_recaption
from ..job import Job


def run(cfg: RecaptionConfig) -> None:
    print(f"{cfg.output}: {run_recaption(cfg).summary()}")


ABOUT = "Recaption the images of curated shards: one long and one short caption each."
job = Job("recaption", RecaptionConfig, run, ABOUT, switches={"local": "local"})
parser, main = job.parser, job.main
