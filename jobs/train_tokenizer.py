"""`python jobs/train_tokenizer.py --config configs/tokenizer/demo.yaml --set train.run_dir=DIR`"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from instella_ray.config import parse_job
from instella_ray.errors import run_main
from instella_ray.training.tokenizer import TokenizerConfig, run_tokenizer


def main(argv: Sequence[str] | None = None) -> int:
    cfg = parse_job(TokenizerConfig, argv, prog="train_tokenizer.py", description="Train a tokenizer on Ray Train.")
    print(f"model: {run_tokenizer(cfg)}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
