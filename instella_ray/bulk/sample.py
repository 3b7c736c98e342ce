"""Bulk sampling job: prompts to files of packed codes, on any number of actors, resumable with identical results."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa

from .. import logs, storage
from ..accelerator import hardware_summary, precision_of_actors
from ..data.formats.parts import QUARANTINE, open_output
from ..data.model_provenance import model_provenance
from ..data.pipeline import pool_size, run_rows
from ..data.prompts import prompts_hash, read_prompts
from ..data.stages import Pool, Stage
from ..engine.slots import EngineOptions
from ..engine.weights import Identity
from ..errors import UserError
from ..models.checkpoint import check_weights, read_checkpoint_config, weight_hash
from ..models.folders import find_model
from ..models.text_encoder import TextEncoderConfig
from ..runs import Provenance, recorded
from .plan import Planned, SampleConfig, plan_samples, settings_by_prompt, settings_of
from .sample_set import (
    MANIFEST,
    SWEEP,
    BadFile,
    SampleBlock,
    SampleFile,
    SampleManifest,
    SampleRun,
    check_file,
    library_versions,
    sample_id,
    write_block,
)
from .sampler import Sampler, SamplerOptions

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SampleJob:
    """Definition of a sampling job, sent to every actor."""

    folder: str
    samples: tuple[Planned, ...]
    samples_per_file: int
    runs: Mapping[str, SampleRun]
    """Runs by the name of their setting."""
    sampler: SamplerOptions

    @property
    def units(self) -> int:
        """Number of files per setting."""
        return -(-len(self.samples) // self.samples_per_file)

    def unit(self, number: int) -> tuple[Planned, ...]:
        """Return the samples of file ``number``."""
        return self.samples[number * self.samples_per_file : (number + 1) * self.samples_per_file]

    def setting_folder(self, name: str) -> str:
        return storage.join(self.folder, name) if name else self.folder

    def url(self, name: str, number: int) -> str:
        """Return the URL of file ``number`` of the setting ``name``."""
        return storage.join(self.setting_folder(name), f"samples-{number:05d}.parquet")

    def ids(self, number: int) -> list[str]:
        return [sample_id(s.prompt.id, s.index) for s in self.unit(number)]


class SampleWorker:
    """Ray Data actor that samples and writes the files of a unit, all settings in one batch; returns their number."""

    def __init__(self, job: SampleJob) -> None:
        self.job, self.sampler = job, Sampler(job.sampler)

    def __call__(self, table: pa.Table) -> pa.Table:
        (row,) = table.to_pylist()
        number, names = row["unit"], row["settings"]
        samples, began = self.job.unit(number), time.perf_counter()
        made = self.sampler.run(samples, {name: self.job.runs[name].sampling for name in names})
        seconds = (time.perf_counter() - began) / len(made)
        for name, codes in made.items():
            write_block(self.job.url(name, number), _block(samples, codes), self.job.runs[name], seconds)
        return pa.table({"samples": [len(samples) * len(made)]})


def run_sample(cfg: SampleConfig) -> dict[str, SampleManifest]:
    """Sample into ``cfg.output``; returns the manifests, which are also written there, by setting.

    Raises UserError for an invalid model folder, no prompts, settings that the model lacks, and an output that
    exists in mode ``new`` or was made with other settings.
    """
    job = plan_job(cfg)
    resuming = open_output(job.folder, cfg.mode, _settings(cfg, job))
    with recorded(job.folder, "sample", cfg, _inputs(cfg, job)):
        done = _check_files(job) if resuming else {}
        if set(job.runs) != {""}:
            storage.write_json(storage.join(job.folder, SWEEP), {"settings": list(job.runs)})
        todo = [(n, [name for name in job.runs if (name, n) not in done]) for n in range(job.units)]
        if todo := [(number, names) for number, names in todo if names]:
            _sample(cfg, job, todo)
        return {name: _close(cfg, job, name, done) for name in job.runs}


def _inputs(cfg: SampleConfig, job: SampleJob) -> tuple[Provenance, ...]:
    run = next(iter(job.runs.values()))
    prompts = Provenance(role="prompts", kind="name", path=cfg.prompts, identity=run.prompts_hash)
    return (model_provenance("generator", run.model, run.model_hash), prompts)


def plan_job(cfg: SampleConfig) -> SampleJob:
    """Read the model and prompts of ``cfg`` and plan the job; raises UserError if they are invalid."""
    model = find_model(cfg.model)
    identity, section = Identity.of(model), read_checkpoint_config(model)["model"]
    if identity.text_encoder is None:
        raise UserError(f"{model}: no text encoder in config.yaml; expected the one it was trained with")
    check_weights(model)
    prompts = read_prompts(cfg.prompts, count=cfg.count, seed=cfg.seed)
    precision = precision_of_actors(cfg.precision, cfg.gpus_per_actor)
    encoder = _cut(identity.text_encoder, cfg.text_length)
    about: dict[str, Any] = {
        "model": model,
        "model_hash": weight_hash(model),
        "kind": section["kind"],
        "tokenizer_hash": identity.tokenizer_hash,
        "text_encoder": identity.text_encoder.model_dump(mode="json"),
        "text_length": encoder.max_length,
        "precision": precision,
        "quantization": cfg.quantization,
        "num_tokens": identity.num_tokens,
        "bits_per_token": identity.bits_per_token,
        "seed": cfg.seed,
        "prompts": cfg.prompts,
        "prompts_hash": prompts_hash(prompts),
        "images_per_prompt": cfg.images_per_prompt,
        "by_prompt": settings_by_prompt(cfg, section["kind"], prompts),
    }
    return SampleJob(
        folder=storage.absolute(cfg.output),
        samples=tuple(plan_samples(prompts, cfg.images_per_prompt, cfg.seed)),
        samples_per_file=cfg.samples_per_file,
        runs={n: SampleRun(**about, sampling=s) for n, s in settings_of(cfg, section["kind"]).items()},
        sampler=SamplerOptions(
            model,
            encoder,
            EngineOptions(cfg.batch_size, encoder.max_length, cfg.compilation, quantization=cfg.quantization),
            precision,
            cfg.threads,
            "auto" if cfg.gpus_per_actor else "cpu",
        ),
    )


def _cut(encoder: TextEncoderConfig, text_length: int) -> TextEncoderConfig:
    return encoder.model_copy(update={"max_length": min(encoder.max_length, text_length)})


def _settings(cfg: SampleConfig, job: SampleJob) -> dict[str, Any]:
    """Return the settings that must be equal for a job to be resumed."""
    run = next(iter(job.runs.values()))
    about = run.model_dump(mode="json", exclude={"model", "prompts", "sampling", "by_prompt"})
    sampling = {f"sampling.{k}": v for k, v in cfg.sampling.model_dump(mode="json").items()}
    sweep = {f"sweep.{k}": v for k, v in cfg.sweep.model_dump(mode="json").items()}
    return {**about, **sampling, **sweep, "samples_per_file": cfg.samples_per_file}


def _check_files(job: SampleJob) -> dict[tuple[str, int], SampleFile]:
    """Return the intact files by setting and number; moves all others to quarantine and logs them."""
    done = {}
    for name in job.runs:
        folder = job.setting_folder(name)
        for number in range(job.units):
            url = job.url(name, number)
            if storage.exists(url):
                try:
                    done[name, number] = check_file(url, job.runs[name], job.ids(number))
                except BadFile as error:
                    _quarantine(url, str(error))
        expected = {job.url(name, number) for number in range(job.units)}
        for url in storage.glob(storage.join(folder, "samples-*.parquet")):
            if url not in expected:
                _quarantine(url, f"{url}: not a file of this job")
    return done


def _quarantine(url: str, reason: str) -> None:
    folder, _, name = url.rpartition("/")
    to = storage.join(folder, QUARANTINE, name)
    log.warning("%s: moved to %s/, will be sampled again", reason, QUARANTINE)
    storage.move(url, to)


def _sample(cfg: SampleConfig, job: SampleJob, todo: Sequence[tuple[int, list[str]]]) -> None:
    rows = [{"unit": number, "settings": names} for number, names in todo]
    pool = Pool(cfg.actors, cfg.gpus_per_actor)
    actors = pool_size(pool, len(rows), local=cfg.local) if cfg.price_per_hour is not None else 0
    reports = run_rows(rows, Stage(partial(SampleWorker, job), pool), local=cfg.local)
    total = len(job.samples) * len(job.runs)
    left = sum(len(job.unit(number)) * len(names) for number, names in todo)
    with logs.progress_bar(total=total, initial=total - left, desc="sample", unit="image", smoothing=0.1) as bar:
        began = time.perf_counter()
        for report in reports:
            if cfg.price_per_hour is not None:
                cost = (time.perf_counter() - began) / 3600 * actors * cfg.price_per_hour
                bar.set_postfix_str(f"cost {cost:.4f}", refresh=False)
            bar.update(report["samples"])


def _close(cfg: SampleConfig, job: SampleJob, name: str, done: Mapping[tuple[str, int], SampleFile]) -> SampleManifest:
    run = job.runs[name]
    files = [
        done.get((name, number)) or check_file(job.url(name, number), run, job.ids(number))
        for number in range(job.units)
    ]
    hardware = hardware_summary()
    manifest = SampleManifest(
        run_id=run.id,
        run=run,
        rows=sum(file.rows for file in files),
        files=tuple(files),
        hardware=f"{hardware['processor']}, {hardware['cores']} cores, GPUs: {', '.join(hardware['gpus']) or 'none'}",
        price_per_hour=cfg.price_per_hour,
        versions=library_versions(),
    )
    # Written last, so that a folder with a manifest is complete.
    storage.write_json(storage.join(job.setting_folder(name), MANIFEST), manifest.model_dump(mode="json"))
    return manifest


def _block(samples: Sequence[Planned], codes: Any) -> SampleBlock:
    prompts = [s.prompt for s in samples]
    return SampleBlock(
        ids=[sample_id(s.prompt.id, s.index) for s in samples],
        prompt_ids=[p.id for p in prompts],
        indices=[s.index for s in samples],
        prompts=[p.text for p in prompts],
        categories=[p.category for p in prompts],
        meta=[dict(p.meta) for p in prompts],
        seeds=[s.seed for s in samples],
        codes=codes,
    )
