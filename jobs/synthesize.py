"""Synthesize: `python jobs/synthesize.py --config configs/data/synthesize.yaml --set prompts=FILE --set output=DIR`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from instella_ray.config import parse_job
from instella_ray.data.generation.synthesize import SynthesizeConfig, run_synthesize
from instella_ray.errors import run_main


def main(argv: Sequence[str] | None = None) -> int:
    about = "Synthesize a captioned set of images: one per prompt and model."
    cfg = parse_job(SynthesizeConfig, argv, prog="synthesize.py", description=about, switches={"local": "local"})
    ledger = run_synthesize(cfg)
    print(f"{cfg.output}: {ledger.summary()}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
