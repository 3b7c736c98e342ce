"""Sample in bulk, or samples of an evaluation again."""

from __future__ import annotations

from collections.abc import Sequence

from .. import logs
from ..bulk.decode import DecodeConfig, check_decode, run_decode
from ..bulk.plan import SampleConfig, own_size
from ..bulk.sample import run_sample
from ..config import ArgumentParser, Config, describe, load_config
from ..data.prompts import read_prompts
from ..errors import UserError
from ..evaluation.resample import ResampleConfig, run_resample
from ..job import Job


class SampleJobConfig(Config):
    """Configuration of sampling, and of decoding the samples."""

    sample: SampleConfig
    decode: DecodeConfig = DecodeConfig()


def run(cfg: SampleJobConfig) -> None:
    if cfg.decode.format is not None:
        prompts = read_prompts(cfg.sample.prompts, count=cfg.sample.count, seed=cfg.sample.seed)
        sizes = sorted({size for prompt in prompts if (size := own_size(prompt))})
        check_decode(cfg.decode, cfg.sample.model, sizes=sizes, local=cfg.sample.local)
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


def parser(prog: str | None = None) -> ArgumentParser:
    found = job.parser(prog)
    again = found.add_argument_group("samples of an evaluation again, larger and with their steps, on a page")
    again.add_argument("--from", dest="results", metavar="RESULTS", help="folder of an evaluation, or its results.json")
    again.add_argument("--worst", metavar="N", help="number of worst samples (20)")
    again.add_argument("--best", metavar="N", help="number of best samples (0)")
    again.add_argument("--metric", metavar="NAME", help="metric to choose by (the first that scores single samples)")
    again.add_argument("--output", metavar="FOLDER", help="folder for the images and index.html (beside the results)")
    keys = "\n".join(describe(ResampleConfig))
    found.epilog = f"{found.epilog}\n\nconfiguration keys with --from:\n{keys}"
    return found


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    args = parser(prog).parse_args(argv)
    given = {key: getattr(args, key) for key in ("results", "worst", "best", "metric", "output")}
    given = {key: value for key, value in given.items() if value is not None}
    if not given:
        return job.main(argv, prog)
    if args.results is None:
        raise UserError(f"--{next(iter(given))}: chooses samples of an evaluation, expected --from RESULTS too")
    if wrong := next((name for name in ("decode", "local") if getattr(args, name)), None):
        raise UserError(f"--{wrong}: expected without --from, which makes PNG files in this process")
    logs.begin_job("sample")
    print(f"page: {run_resample(load_config(ResampleConfig, args.config, args.overrides, flags=given))}")
    return 0
