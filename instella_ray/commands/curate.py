"""Curate shards."""

from __future__ import annotations

from collections.abc import Sequence

from ..config import parse_job
from ..data.curation.job import CurateConfig, run_curate


def main(argv: Sequence[str] | None = None, prog: str = "curate.py") -> int:
    cfg = parse_job(
        CurateConfig,
        argv,
        prog=prog,
        description="Curate captioned WebDataset shards.",
        switches={"local": "local"},
    )
    ledger = run_curate(cfg)
    print(f"{cfg.output}: {ledger.summary()}")
    return 0
