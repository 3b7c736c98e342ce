"""Synthesize."""

from __future__ import annotations

from ..data.generation.synthesize import SynthesizeConfig, run_synthesize
from ..job import Job


def run(cfg: SynthesizeConfig) -> None:
    print(f"{cfg.output}: {run_synthesize(cfg).summary()}")


ABOUT = "Synthesize a captioned set of images: one per prompt and model."
job = Job("synthesize", SynthesizeConfig, run, ABOUT, switches={"local": "local"})
parser, main = job.parser, job.main
