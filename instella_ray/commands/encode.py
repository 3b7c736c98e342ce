"""Encode curated shards."""

from __future__ import annotations

from ..data.encode import EncodeConfig, run_encode
from ..job import Job


def run(cfg: EncodeConfig) -> None:
    manifest = run_encode(cfg)
    made = f"{manifest.rows} codes of tokenizer {manifest.tokenizer_hash[:12]}"
    print(f"{cfg.output}: {made} in {len(manifest.files)} files")


job = Job("encode", EncodeConfig, run, "Encode curated shards as packed BIT codes.", switches={"local": "local"})
parser, main = job.parser, job.main
