"""Sample in bulk."""

from __future__ import annotations

from ..bulk.decode import DecodeConfig, check_decode, run_decode
from ..bulk.plan import SampleConfig
from ..bulk.sample import run_sample
from ..config import Config
from ..job import Job


class SampleJobConfig(Config):
    """Configuration of sampling, and of decoding the samples."""

    sample: SampleConfig
    decode: DecodeConfig = DecodeConfig()


def run(cfg: SampleJobConfig) -> None:
    if cfg.decode.format is not None:
        check_decode(cfg.decode, cfg.sample.model, local=cfg.sample.local)
    for name, manifest in run_sample(cfg.sample).items():
        cost = f", cost {manifest.cost:.4f}" if manifest.cost is not None else ""
        made = f"{manifest.rows} samples of run {manifest.run_id} in {len(manifest.files)} files"
        print(f"{cfg.sample.output}{f'/{name}' if name else ''}: {made}, {manifest.seconds:.0f} actor seconds{cost}")
    if cfg.decode.format is not None:
        count = run_decode(cfg.decode, cfg.sample.output, local=cfg.sample.local)
        print(f"{cfg.sample.output}: {count} images as {cfg.decode.format}")


job = Job(
    "sample",
    SampleJobConfig,
    run,
    "Sample images in bulk, as codes; with --decode also as images. sample.mode=resume continues a run.",
    flags={"decode": "decode.format"},
    switches={"local": "sample.local"},
)
parser, main = job.parser, job.main
