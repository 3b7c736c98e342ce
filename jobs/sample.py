"""Sample in bulk: `python jobs/sample.py --config configs/sample/scenes.yaml --set model=DIR --set output=DIR`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from instella_ray.bulk.decode import DecodeConfig, run_decode
from instella_ray.bulk.plan import SampleConfig
from instella_ray.bulk.sample import run_sample
from instella_ray.config import Config, parse_job
from instella_ray.errors import run_main


class SampleJobConfig(Config):
    """Configuration of sampling, and of decoding the samples."""

    sample: SampleConfig
    decode: DecodeConfig = DecodeConfig()


def main(argv: Sequence[str] | None = None) -> int:
    about = "Sample images in bulk, as codes; with --decode also as images. sample.mode=resume continues a run."
    own = {"flags": {"decode": "decode.format"}, "switches": {"local": "sample.local"}}
    cfg = parse_job(SampleJobConfig, argv, prog="sample.py", description=about, **own)
    for name, manifest in run_sample(cfg.sample).items():
        cost = f", cost {manifest.cost:.4f}" if manifest.cost is not None else ""
        made = f"{manifest.rows} samples of run {manifest.run_id} in {len(manifest.files)} files"
        print(f"{cfg.sample.output}{f'/{name}' if name else ''}: {made}, {manifest.seconds:.0f} actor seconds{cost}")
    if cfg.decode.format is not None:
        count = run_decode(cfg.decode, cfg.sample.output, local=cfg.sample.local)
        print(f"{cfg.sample.output}: {count} images as {cfg.decode.format}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
