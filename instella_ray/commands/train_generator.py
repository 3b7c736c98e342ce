"""Train a generator."""

from __future__ import annotations

from ..job import Job
from ..training.generator import GeneratorRunConfig, run_generator


def run(cfg: GeneratorRunConfig) -> None:
    print(f"model: {run_generator(cfg)}")


job = Job("train-generator", GeneratorRunConfig, run, "Train a generator, on Ray Train or in this process.")
parser, main = job.parser, job.main
