"""Train a generator: `python jobs/train_generator.py --config configs/generator/demo.yaml --set train.run_dir=DIR`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from instella_ray.config import parse_job
from instella_ray.errors import run_main
from instella_ray.training.generator import GeneratorRunConfig, run_generator


def main(argv: Sequence[str] | None = None) -> int:
    cfg = parse_job(
        GeneratorRunConfig,
        argv,
        prog="train_generator.py",
        description="Train a generator, on Ray Train or in this process.",
    )
    print(f"model: {run_generator(cfg)}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
