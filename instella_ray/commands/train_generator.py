"""Train a generator."""

from __future__ import annotations

from ..job import Job
from ..training.generator import GeneratorRunConfig, run_generator


def run(cfg: GeneratorRunConfig) -> None:
    print(f"model: {run_generator(cfg)}")


ABOUT = "Train a generator, on Ray Train or in this process."
job = Job("train-generator", GeneratorRunConfig, run, ABOUT, resume="train.resume=true")
parser, main = job.parser, job.main
