"""Stages of the demo, one function each, which return facts and write files to the demo's folder."""

from __future__ import annotations

import base64
import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Literal

import httpx
import numpy as np
import torch

from .. import logs, storage
from ..data.curation.job import run_curate
from ..data.encode import run_encode
from ..data.formats.images import decode_rgb, to_pixels, to_tensor
from ..data.formats.parts import Mode
from ..data.formats.patterns import Pattern
from ..data.formats.shards import write_webdataset
from ..data.icons.build import SET_TABLE, run_icons
from ..data.icons.splits import HELD_OUT
from ..data.scene_score import score_images
from ..data.scenes import parse_caption, scene_rows
from ..errors import UserError
from ..models.bit import BIT
from ..models.checkpoint import build_model, load_expected
from ..models.folders import checkpoint_step, finished_checkpoints
from ..rendering import encode_png
from ..serving.access import free_port
from ..training.generator import run_generator
from ..training.interrupts import stopping_on_signals
from ..training.run_dir import read_metrics
from ..training.tokenizer import evaluate_tokenizer, reconstruct, run_tokenizer
from .images import HeldOutImages, digest, image_shards, read_images
from .recipe import (
    KINDS,
    DemoConfig,
    curate_config,
    encode_config,
    generator_config,
    icons_config,
    serve_args,
    tokenizer_config,
)

IMAGES_PER_SHARD = 2000
PREVIEWS = 6
"""Number of preview prompts during generator training: for scenes, one per category."""
RECONSTRUCTIONS = "reconstructions.png"
"""Originals above their reconstructions, held out from training."""
Facts = dict[str, Any]
Prompts = list[tuple[str, str]]


def write_scenes(demo: DemoConfig) -> Facts:
    """Draw the scenes and write them as WebDataset tars; the last tar is held out."""
    samples = scene_rows(demo.scenes, demo.seed, demo.size)
    held_out = scene_rows(demo.held_out, demo.seed + 1_000_000, demo.size)
    with logs.progress_bar(total=demo.scenes + demo.held_out, desc="scenes", unit="image") as bar:
        for _, count in write_webdataset(samples, demo.path("shards"), IMAGES_PER_SHARD):
            bar.update(count)
        for _, count in write_webdataset(held_out, demo.path("shards", "held_out"), demo.held_out):
            bar.update(count)
    return {"images": demo.scenes, "held_out": demo.held_out}


def build_icons(demo: DemoConfig, mode: Mode) -> Facts:
    """Build the icons and return the facts of each set (``sets.json``); UserError if no single drawing is held out."""
    cfg = icons_config(demo).model_copy(update={"mode": mode})
    print(run_icons(cfg).summary())
    sets = storage.read_json(storage.join(cfg.output, SET_TABLE))
    if not any(about["splits"][HELD_OUT] for about in sets.values()):
        raise UserError(f"{cfg.output}: no single drawing is held out; expected more or larger sets in icons.sets")
    return {"sets": sets}


def write_images(demo: DemoConfig, boundary: str) -> Facts:
    """Write the samples of ``demo.images`` as WebDataset tars, held-out ones (:func:`.images.held_out_boundary`) apart.

    Samples without an image or caption, which no tar can hold, are counted by their problem.
    """
    facts: Facts = {}
    shards = image_shards(demo)
    for name, folder, held_out in (("images", "shards", False), ("held_out", "shards/held_out", True)):
        problems = Counter[str]()
        rows = _without_problem(read_images(demo, shards), problems)
        chosen = (row for row in rows if (digest(row) <= boundary) == held_out)
        samples = ((f"{i:08d}", row["image"], row["caption"], json.loads(row["meta"])) for i, row in enumerate(chosen))
        facts[name] = sum(count for _, count in write_webdataset(samples, demo.path(folder), IMAGES_PER_SHARD))
        facts["left_out"] = dict(problems)
    left_out = "".join(f", {count} {problem}" for problem, count in facts["left_out"].items())
    print(f"{facts['images']} images to train on, {facts['held_out']} held out{left_out}")
    return facts


def _without_problem(rows: Iterable[dict[str, Any]], problems: Counter[str]) -> Iterator[dict[str, Any]]:
    """Yield the rows without a problem, and count the problems of the others."""
    for row in rows:
        if row["problem"]:
            problems[row["problem"]] += 1
        else:
            yield row


def curate(demo: DemoConfig, shards: Pattern, mode: Mode) -> Facts:
    ledger = run_curate(curate_config(demo, shards).model_copy(update={"mode": mode}))
    print(ledger.summary())
    return {"ledger": ledger.to_json()}


def train_tokenizer(demo: DemoConfig, resume: bool) -> Facts:
    cfg = tokenizer_config(demo, demo.path("curated", "*.tar"))
    checkpoint = run_tokenizer(cfg.model_copy(update={"train": _resuming(cfg.train, resume)}))
    return {"checkpoint": str(checkpoint)}


def measure_tokenizer(demo: DemoConfig, held_out: HeldOutImages, checkpoint: str) -> Facts:
    """Measure PSNR on held-out images before and after training, and scene scores of originals and reconstructions."""
    images = to_tensor(held_out.pixels)
    bit = load_expected(checkpoint, BIT)
    torch.manual_seed(demo.seed)  # reproduces the initial weights of training
    untrained = build_model(bit.cfg.model_dump()).eval()
    assert isinstance(untrained, BIT)
    before = evaluate_tokenizer(untrained, images, title="before training")
    after = evaluate_tokenizer(bit, images, title="after training")
    facts: Facts = {"psnr_before": before.psnr, "psnr_after": after.psnr, "dead_bits": after.dead_bits}
    if demo.draws_scenes:
        batches = logs.progress_bar(images.split(64), desc="reconstructions", unit="batch")
        restored = np.concatenate([to_pixels(reconstruct(bit, part)) for part in batches])
        facts["score_true"] = _scores(held_out.captions, held_out.pixels, "scoring true images")
        facts["score_restored"] = _scores(held_out.captions, restored, "scoring reconstructions")
    shown = images[:16]
    rows = [np.concatenate(list(to_pixels(x)), axis=1) for x in (shown, reconstruct(bit, shown))]
    storage.write_bytes(demo.path(RECONSTRUCTIONS), encode_png(np.concatenate(rows, axis=0)))
    print(f"PSNR of {len(images)} held-out images {before.psnr:.1f} dB before training, {after.psnr:.2f} dB after")
    return {**facts, "images": len(images)}


def encode(demo: DemoConfig, tokenizer: str, mode: Mode) -> Facts:
    cfg = encode_config(demo, demo.path("curated", "*.tar"), tokenizer).model_copy(update={"mode": mode})
    manifest = run_encode(cfg)
    code_bytes = (manifest.num_tokens * manifest.bits_per_token + 7) // 8
    print(f"{manifest.rows} images as codes of {code_bytes} bytes")
    return {"rows": manifest.rows, "code_bytes": code_bytes}


def train_generators(demo: DemoConfig, prompts: Prompts, tokenizer: str, resume: bool) -> Facts:
    """Train all generators side by side; those of an interrupted demo that are trained are kept."""
    # Steps this small gain little from a second thread: two runs of one thread each end sooner than one after the other
    # with two.
    count = len(KINDS) if _fit_side_by_side(demo) else 1
    with stopping_on_signals() as stop, ThreadPoolExecutor(count) as pool:
        runs = {kind: pool.submit(_train_generator, demo, prompts, tokenizer, resume, kind) for kind in KINDS}
        try:
            for run in as_completed(runs.values()):
                run.result()
        except BaseException:
            stop.make()  # where one run fails, the other need not be waited for: it can be resumed
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        return {"checkpoints": {kind: run.result() for kind, run in runs.items()}}


def _fit_side_by_side(demo: DemoConfig) -> bool:
    """Return whether there are resources for all generators' runs at once; here they would share random numbers."""
    import ray

    from ..training.ray_train import resources

    workers, have = demo.workers, ray.cluster_resources()
    need = resources(workers, len(KINDS) * workers.count)
    return workers.count > 0 and all(amount <= have.get(name, 0) for name, amount in need.items())


def _train_generator(
    demo: DemoConfig, prompts: Prompts, tokenizer: str, resume: bool, kind: Literal["diffusion", "ar"]
) -> str:
    shown = prompts[:: -(-len(prompts) // PREVIEWS)]
    cfg = generator_config(demo, kind, tokenizer, tuple(prompt for prompt, _ in shown))
    done = finished_checkpoints(cfg.train.run_dir) if resume else []
    if done and checkpoint_step(done[-1]) == cfg.train.steps:
        return str(done[-1])
    return str(run_generator(cfg.model_copy(update={"train": _resuming(cfg.train, resume)})))


def sample_over_http(demo: DemoConfig, prompts: Prompts, tokenizer: str, generators: dict[str, str]) -> Facts:
    """Deploy the endpoint, request every prompt from both generators, and save the PNG files."""
    # Not earlier: Serve reads its settings, which the demo sets before it starts Ray, when it is imported.
    from ray import serve

    from ..serving.app import build
    from ..serving.shutdown import shut_down_serve

    port = free_port()
    url = f"http://127.0.0.1:{port}"
    facts: Facts = {}
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    try:
        serve.run(build(serve_args(demo, tokenizer, generators)), name="demo", route_prefix="/")
        print(f"endpoint: {url}/v1/images/generations")
        for kind in KINDS:
            began = time.perf_counter()
            with (
                httpx.Client(base_url=url, timeout=300) as client,
                ThreadPoolExecutor(16) as pool,
                logs.progress_bar(total=len(prompts), desc=f"sampling {kind}", unit="image") as bar,
            ):
                jobs = [pool.submit(_request, client, kind, prompt, i, demo) for i, (prompt, _) in enumerate(prompts)]
                for i, job in enumerate(jobs):
                    storage.write_bytes(demo.path("samples", kind, f"{i:04d}.png"), job.result())
                    bar.update()
            seconds = time.perf_counter() - began
            facts[kind] = {"images": len(prompts), "images_per_second": round(len(prompts) / seconds, 2)}
    finally:
        shut_down_serve()
    return facts


def score_samples(demo: DemoConfig, prompts: Prompts) -> Facts:
    """Compute the scene scores of both generators by category; empty for images that are not scenes."""
    if not demo.draws_scenes:
        return {}
    captions = [prompt for prompt, _ in prompts]
    return {kind: _scores(captions, sample_images(demo, kind), f"scoring {kind}") for kind in KINDS}


def sample_images(demo: DemoConfig, kind: str) -> list[np.ndarray]:
    """Read the generated images, uint8 ``[size, size, 3]`` each, in the order of the prompts."""
    files = sorted(Path(demo.path("samples", kind)).glob("*.png"))
    return [np.asarray(decode_rgb(file.read_bytes())) for file in files]


def curves(demo: DemoConfig) -> dict[str, list[dict[str, Any]]]:
    """Read the logged metrics of each training run."""
    return {name: read_metrics(demo.path("runs", name)) for name in ("tokenizer", *KINDS)}


def _request(client: httpx.Client, kind: str, prompt: str, seed: int, demo: DemoConfig) -> bytes:
    body = {"prompt": prompt, "model": kind, "seed": seed, "size": f"{demo.size}x{demo.size}"}
    response = client.post("/v1/images/generations", json=body)
    if response.status_code != 200:
        raise RuntimeError(f"endpoint returned status {response.status_code}: {response.text[:300]}")
    return base64.b64decode(response.json()["data"][0]["b64_json"])


def _scores(captions: Sequence[str], images: Sequence[np.ndarray] | np.ndarray, title: str) -> dict[str, float]:
    claims = [parse_caption(caption) for caption in captions]
    return score_images(claims, logs.progress_bar(images, desc=title, unit="image", total=len(claims)))


def _resuming(train: Any, resume: bool) -> Any:
    """Set ``resume`` if requested and if the run has been started."""
    return train.model_copy(update={"resume": resume and Path(train.run_dir, "config.yaml").exists()})
