"""Curate shards: `python jobs/curate.py --config configs/data/curate.yaml --set input='SHARDS' --set output=DIR`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from instella_ray.config import parse_job
from instella_ray.data.curation.job import CurateConfig, run_curate
from instella_ray.errors import run_main


def main(argv: Sequence[str] | None = None) -> int:
    cfg = parse_job(
        CurateConfig,
        argv,
        prog="curate.py",
        description="Curate captioned WebDataset shards.",
        switches={"local": "local"},
    )
    ledger = run_curate(cfg)
    print(f"{cfg.output}: {ledger.summary()}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
