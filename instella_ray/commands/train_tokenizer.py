"""Train a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence

from ..config import parse_job
from ..training.stages import TokenizerStagesConfig, run_stages


def main(argv: Sequence[str] | None = None, prog: str = "train_tokenizer.py") -> int:
    about = "Train a tokenizer in one or several stages, on Ray Train or in this process."
    cfg = parse_job(TokenizerStagesConfig, argv, prog=prog, description=about)
    print(f"model: {run_stages(cfg)}")
    return 0
