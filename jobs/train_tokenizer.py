"""Train a tokenizer: `python jobs/train_tokenizer.py --config configs/tokenizer/demo.yaml --set train.run_dir=DIR`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from instella_ray.config import parse_job
from instella_ray.errors import run_main
from instella_ray.training.stages import TokenizerStagesConfig, run_stages


def main(argv: Sequence[str] | None = None) -> int:
    about = "Train a tokenizer in one or several stages, on Ray Train or in this process."
    cfg = parse_job(TokenizerStagesConfig, argv, prog="train_tokenizer.py", description=about)
    print(f"model: {run_stages(cfg)}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
