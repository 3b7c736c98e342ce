"""Encode curated shards."""

from __future__ import annotations

from collections.abc import Sequence

from ..config import parse_job
from ..data.encode import EncodeConfig, run_encode


def main(argv: Sequence[str] | None = None, prog: str = "encode.py") -> int:
    cfg = parse_job(
        EncodeConfig,
        argv,
        prog=prog,
        description="Encode curated shards as packed BIT codes.",
        switches={"local": "local"},
    )
    manifest = run_encode(cfg)
    made = f"{manifest.rows} codes of tokenizer {manifest.tokenizer_hash[:12]}"
    print(f"{cfg.output}: {made} in {len(manifest.files)} files")
    return 0
