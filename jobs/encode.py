"""Encode curated shards: `python jobs/encode.py --config configs/data/encode.yaml --set input=DIR --set output=DIR`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from instella_ray.config import parse_job
from instella_ray.data.encode import EncodeConfig, run_encode
from instella_ray.errors import run_main


def main(argv: Sequence[str] | None = None) -> int:
    cfg = parse_job(
        EncodeConfig,
        argv,
        prog="encode.py",
        description="Encode curated shards as packed BIT codes.",
        switches={"local": "local"},
    )
    manifest = run_encode(cfg)
    made = f"{manifest.rows} codes of tokenizer {manifest.tokenizer_hash[:12]}"
    print(f"{cfg.output}: {made} in {len(manifest.files)} files")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
