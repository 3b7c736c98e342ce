"""Bulk sampling suite: the job's throughput relative to the bare batched sampler, and its memory growth."""

from __future__ import annotations

import json
import tempfile
import time
from itertools import islice
from pathlib import Path

import torch
from pydantic import Field

from ..bulk.plan import SampleConfig, plan_samples
from ..bulk.sample import run_sample
from ..config import Config
from ..data.prompts import Prompt, read_prompts
from ..models.bit import BIT
from ..models.checkpoint import load_model, read_checkpoint_config
from ..models.sampling import SamplingConfig, SamplingParams, generate
from ..models.text_encoder import TextEncoder, TextEncoderConfig
from ..rendering import Cell, Goal
from .report import SuiteResult
from .serving import ServingBench, save_models
from .usage import peak_memory

RATE_GOAL, MEMORY_GOAL = 0.9, 1.2


class BulkBench(Config):
    """Configuration of the measured jobs, with demo-size models of random weights."""

    models: ServingBench = ServingBench()
    samples: int = Field(1536, ge=2)
    images_per_prompt: int = Field(4, ge=1)
    batch_size: int = 16
    sampling: SamplingConfig = SamplingConfig(guidance_scale=2.0, temperature=0.5)
    samples_per_file: int = 128
    memory_samples: tuple[int, int] = (1000, 10_000)
    """Samples of a small and a large job, whose peak memory is compared."""


def run_bulk(cfg: BulkBench) -> SuiteResult:
    """Measure the bare sampler and the job with one and two threads or actors; one row per contestant."""
    rows: list[dict[str, Cell]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = save_models(cfg.models, folder)["generator"]
        prompts = _prompts(folder, cfg.samples // cfg.images_per_prompt)
        rates = {f"bare sampler, {n} threads": _bare(cfg, model, prompts, n) for n in (1, 2)}
        rates |= {f"job, {n} actors of one thread": _job(cfg, model, prompts, folder / f"{n}", n) for n in (1, 2)}
        peaks = [_peak(cfg, model, folder / f"memory-{count}", count) for count in cfg.memory_samples]
    one, two, job_one, job_two = rates.values()
    rows += [{"contestant": name, "images/s": rate} for name, rate in rates.items()]
    for count, peak in zip(cfg.memory_samples, peaks, strict=True):
        rows.append({"contestant": f"job of {count} samples", "peak private MB": peak})
    few, many = cfg.memory_samples
    goals = [
        Goal("one actor against the bare sampler", job_one / one, RATE_GOAL, ">="),
        Goal("two actors against the bare sampler with two threads", job_two / two, RATE_GOAL, ">="),
        Goal(f"peak memory, {many} samples against {few}", peaks[1] / peaks[0], MEMORY_GOAL, "<="),
    ]
    return SuiteResult("Bulk sampling", cfg.model_dump(mode="json"), rows, goals)


def _prompts(folder: Path, count: int) -> list[Prompt]:
    """Create ``count`` different prompts and write them to the job's input file."""
    captions = dict.fromkeys(p.text for p in read_prompts("scenes", count=3 * count))
    texts = [f"{text}, number {i}" for i, text in enumerate(list(captions) * (1 + count // len(captions)))][:count]
    (folder / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": text}) for text in texts))
    return read_prompts(str(folder / "prompts.jsonl"))


@torch.no_grad()
def _bare(cfg: BulkBench, path: str, prompts: list[Prompt], threads: int) -> float:
    """Measure images per second of the plain sampling loop, with the prompts of each batch encoded together."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    model = load_model(path)
    assert not isinstance(model, BIT)
    encoder = TextEncoder.from_config(TextEncoderConfig.model_validate(read_checkpoint_config(path)["text_encoder"]))
    empty = model.text_kv(*encoder.encode([""]))
    samples = plan_samples(prompts, cfg.images_per_prompt, 0)
    began, done = time.perf_counter(), -cfg.batch_size
    while batch := list(islice(samples, cfg.batch_size)):
        unique = list(dict.fromkeys(s.prompt.text for s in batch))
        features, mask = encoder.encode(unique)
        rows = [unique.index(s.prompt.text) for s in batch]
        params = SamplingParams.of(len(batch), seed=[s.seed for s in batch], **cfg.sampling.model_dump())
        generate(model, model.text_kv(features[:, rows], mask[rows]), empty, params)
        done += len(batch)
        if done == 0:  # the first batch is warm-up
            began = time.perf_counter()
    torch.set_num_threads(before)
    return done / (time.perf_counter() - began)


def _job(cfg: BulkBench, model: str, prompts: list[Prompt], output: Path, actors: int) -> float:
    """Measure images per second between a job's first and last file, which excludes the start of Ray and its actors."""
    run_sample(_config(cfg, model, output, str(output.parent / "prompts.jsonl"), actors=actors, sampling=cfg.sampling))
    made = sorted(path.stat().st_mtime for path in output.glob("samples-*.parquet"))
    # Each actor had one file in progress when the first was finished.
    return (len(made) - actors) * cfg.samples_per_file / (made[-1] - made[actors - 1])


def _config(cfg: BulkBench, model: str, output: Path, prompts: str, **more: object) -> SampleConfig:
    given = {
        "model": model,
        "prompts": prompts,
        "output": str(output),
        "images_per_prompt": cfg.images_per_prompt,
        "batch_size": cfg.batch_size,
        "samples_per_file": cfg.samples_per_file,
        "text_length": cfg.models.text_length,
    }
    return SampleConfig.model_validate({**given, **more})


def _peak(cfg: BulkBench, model: str, output: Path, count: int) -> float:
    """Measure the peak private memory (MB) of all processes while sampling ``count`` images with one step each."""
    output.mkdir()
    _prompts(output, count // cfg.images_per_prompt)
    one_step = cfg.sampling.model_copy(update={"num_inference_steps": 1})
    while _actors():  # actors of the previous job are still exiting
        time.sleep(0.1)
    with peak_memory() as peak:
        run_sample(_config(cfg, model, output / "out", str(output / "prompts.jsonl"), actors=1, sampling=one_step))
    return peak[0]


def _actors() -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes().startswith((b"ray::MapWorker", b"ray::_MapWorker")):
                found.append(path.parent.name)
        except OSError:
            continue  # the process has exited
    return found
