"""Recaption."""

from __future__ import annotations

from collections.abc import Sequence

from ..config import parse_job
from ..data.generation.recaption import RecaptionConfig, run_recaption


def main(argv: Sequence[str] | None = None, prog: str = "recaption.py") -> int:
    about = "Recaption the images of curated shards: one long and one short caption each."
    cfg = parse_job(RecaptionConfig, argv, prog=prog, description=about, switches={"local": "local"})
    ledger = run_recaption(cfg)
    print(f"{cfg.output}: {ledger.summary()}")
    return 0
