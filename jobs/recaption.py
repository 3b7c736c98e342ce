"""Recaption: `python jobs/recaption.py --config configs/data/recaption.yaml --set input=DIR --set output=DIR`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from instella_ray.config import parse_job
from instella_ray.data.generation.recaption import RecaptionConfig, run_recaption
from instella_ray.errors import run_main


def main(argv: Sequence[str] | None = None) -> int:
    about = "Recaption the images of curated shards: one long and one short caption each."
    cfg = parse_job(RecaptionConfig, argv, prog="recaption.py", description=about, switches={"local": "local"})
    ledger = run_recaption(cfg)
    print(f"{cfg.output}: {ledger.summary()}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
