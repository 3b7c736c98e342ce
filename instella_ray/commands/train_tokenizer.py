"""Train a tokenizer."""

from __future__ import annotations

from ..job import Job
from ..training.stages import TokenizerStagesConfig, run_stages


def run(cfg: TokenizerStagesConfig) -> None:
    print(f"model: {run_stages(cfg)}")


ABOUT = "Train a tokenizer in one or several stages, on Ray Train or in this process."
job = Job("train-tokenizer", TokenizerStagesConfig, run, ABOUT, resume="train.resume=true")
parser, main = job.parser, job.main
