"""Sample in bulk."""

from __future__ import annotations

from collections.abc import Sequence

from ..bulk.decode import DecodeConfig, run_decode
from ..bulk.plan import SampleConfig
from ..bulk.sample import run_sample
from ..config import Config, parse_job


class SampleJobConfig(Config):
    """Configuration of sampling, and of decoding the samples."""

    sample: SampleConfig
    decode: DecodeConfig = DecodeConfig()


def main(argv: Sequence[str] | None = None, prog: str = "sample.py") -> int:
    about = "Sample images in bulk, as codes; with --decode also as images. sample.mode=resume continues a run."
    flags, switches = {"decode": "decode.format"}, {"local": "sample.local"}
    cfg = parse_job(SampleJobConfig, argv, prog=prog, description=about, flags=flags, switches=switches)
    for name, manifest in run_sample(cfg.sample).items():
        cost = f", cost {manifest.cost:.4f}" if manifest.cost is not None else ""
        made = f"{manifest.rows} samples of run {manifest.run_id} in {len(manifest.files)} files"
        print(f"{cfg.sample.output}{f'/{name}' if name else ''}: {made}, {manifest.seconds:.0f} actor seconds{cost}")
    if cfg.decode.format is not None:
        count = run_decode(cfg.decode, cfg.sample.output, local=cfg.sample.local)
        print(f"{cfg.sample.output}: {count} images as {cfg.decode.format}")
    return 0
