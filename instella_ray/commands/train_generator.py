"""Train a generator."""

from __future__ import annotations

from collections.abc import Sequence

from ..config import parse_job
from ..training.generator import GeneratorRunConfig, run_generator


def main(argv: Sequence[str] | None = None, prog: str = "train_generator.py") -> int:
    cfg = parse_job(
        GeneratorRunConfig,
        argv,
        prog=prog,
        description="Train a generator, on Ray Train or in this process.",
    )
    print(f"model: {run_generator(cfg)}")
    return 0
