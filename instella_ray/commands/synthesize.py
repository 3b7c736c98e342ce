"""Synthesize."""

from __future__ import annotations

from collections.abc import Sequence

from ..config import parse_job
from ..data.generation.synthesize import SynthesizeConfig, run_synthesize


def main(argv: Sequence[str] | None = None, prog: str = "synthesize.py") -> int:
    about = "Synthesize a captioned set of images: one per prompt and model."
    cfg = parse_job(SynthesizeConfig, argv, prog=prog, description=about, switches={"local": "local"})
    ledger = run_synthesize(cfg)
    print(f"{cfg.output}: {ledger.summary()}")
    return 0
