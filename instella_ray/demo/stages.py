"""The demo's stages, one function each: facts in, facts out, files in the demo's folder in between."""

from __future__ import annotations

import base64
import socket
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import httpx
import numpy as np
from PIL import Image
from ray import serve
from torch import Tensor
from tqdm import tqdm

from .. import storage
from ..data.curate import run_curate
from ..data.decode import decode_rgb, encode_png, fit_square, to_pixels, to_tensor
from ..data.encode import run_encode
from ..data.parts import Mode
from ..data.scene_score import score, score_table
from ..data.scenes import Expectation, parse_caption, scene_prompts, scene_rows
from ..data.shards import find_shards, write_webdataset
from ..data.tar_source import read_samples
from ..errors import UserError
from ..models.bit import BIT
from ..models.checkpoint import build_model, load_expected
from ..serving.app import build
from ..training.generator import run_generator
from ..training.launch import read_metrics
from ..training.tokenizer import evaluate_tokenizer, reconstruct, run_tokenizer
from .recipe import (
    KINDS,
    DemoConfig,
    curate_config,
    encode_config,
    generator_config,
    serve_args,
    tokenizer_config,
)

SCENES_PER_SHARD = 2000
Facts = dict[str, Any]


def write_scenes(demo: DemoConfig) -> Facts:
    """Draw the scenes and write them as WebDataset tars; the last tar is held out."""
    samples = scene_rows(demo.scenes, demo.seed, demo.size)
    held_out = scene_rows(demo.held_out, demo.seed + 1_000_000, demo.size)
    with tqdm(total=demo.scenes + demo.held_out, desc="scenes", unit="picture") as bar:
        for _, count in write_webdataset(samples, demo.path("shards"), SCENES_PER_SHARD):
            bar.update(count)
        for _, count in write_webdataset(held_out, demo.path("shards", "held_out"), demo.held_out):
            bar.update(count)
    return {"pictures": demo.scenes, "held_out": demo.held_out}


def input_shards(demo: DemoConfig) -> tuple[str, str]:
    """Patterns of the shards to train on and of those held out."""
    if demo.shards is None:
        return demo.path("shards", "*.tar"), demo.path("shards", "held_out", "*.tar")
    found = list(find_shards(demo.shards))
    if len(found) < 2:
        raise UserError(f"shards {demo.shards}: expected at least two tars, one of them to measure on")
    return ",".join(found[:-1]), found[-1]


def curate(demo: DemoConfig, mode: Mode) -> Facts:
    cfg = curate_config(demo, input_shards(demo)[0]).model_copy(update={"mode": mode})
    ledger = run_curate(cfg)
    print(ledger.summary())
    return {"ledger": ledger.to_json()}


def train_tokenizer(demo: DemoConfig, resume: bool) -> Facts:
    cfg = tokenizer_config(demo, demo.path("curated", "*.tar"))
    checkpoint = run_tokenizer(cfg.model_copy(update={"train": _resuming(cfg.train, resume)}))
    return {"checkpoint": str(checkpoint)}


def measure_tokenizer(demo: DemoConfig, checkpoint: str) -> Facts:
    """PSNR on held-out pictures before and after training, and the scene score of true and restored pictures."""
    images = held_out_images(demo)
    bit = load_expected(checkpoint, BIT)
    untrained = build_model(bit.cfg.model_dump()).eval()
    assert isinstance(untrained, BIT)
    before, after = evaluate_tokenizer(untrained, images), evaluate_tokenizer(bit, images)
    facts: Facts = {"psnr_before": before.psnr, "psnr_after": after.psnr, "dead_bits": after.dead_bits}
    if demo.shards is None:
        captions = [row["caption"] for row in held_out_rows(demo)[: len(images)]]
        restored = np.concatenate([to_pixels(reconstruct(bit, part)) for part in images.split(64)])
        facts["score_true"] = _scores(captions, to_pixels(images))
        facts["score_restored"] = _scores(captions, restored)
    shown = images[:16]
    rows = [np.concatenate(list(to_pixels(x)), axis=1) for x in (shown, reconstruct(bit, shown))]
    storage.write_bytes(demo.path("reconstructions.png"), encode_png(np.concatenate(rows, axis=0)))
    print(f"held-out PSNR {before.psnr:.1f} dB before training, {after.psnr:.2f} dB after")
    return facts


def encode(demo: DemoConfig, tokenizer: str, mode: Mode) -> Facts:
    cfg = encode_config(demo, demo.path("curated", "*.tar"), tokenizer).model_copy(update={"mode": mode})
    manifest = run_encode(cfg)
    code_bytes = (manifest.num_tokens * manifest.bits_per_token + 7) // 8
    print(f"{manifest.rows} pictures as codes of {code_bytes} bytes")
    return {"rows": manifest.rows, "code_bytes": code_bytes}


def train_generator(demo: DemoConfig, kind: Literal["diffusion", "ar"], tokenizer: str, resume: bool) -> Facts:
    prompts = tuple(prompt for prompt, _ in demo_prompts(demo)[:: max(1, demo.prompts_per_category)])[:6]
    cfg = generator_config(demo, kind, tokenizer, prompts)
    checkpoint = run_generator(cfg.model_copy(update={"train": _resuming(cfg.train, resume)}))
    return {"checkpoint": str(checkpoint)}


def sample_over_http(demo: DemoConfig, tokenizer: str, generators: dict[str, str]) -> Facts:
    """Deploy the endpoint, ask it for every prompt with both generators, and keep the PNG files."""
    prompts = demo_prompts(demo)
    port = _free_port()
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
                tqdm(total=len(prompts), desc=f"sampling {kind}", unit="picture") as bar,
            ):
                jobs = [pool.submit(_request, client, kind, prompt, i, demo) for i, (prompt, _) in enumerate(prompts)]
                for i, job in enumerate(jobs):
                    storage.write_bytes(demo.path("samples", kind, f"{i:04d}.png"), job.result())
                    bar.update()
            seconds = time.perf_counter() - began
            facts[kind] = {"pictures": len(prompts), "pictures_per_second": round(len(prompts) / seconds, 2)}
    finally:
        serve.shutdown()
    return facts


def score_samples(demo: DemoConfig) -> Facts:
    """The six-category table of both generators; nothing for pictures that are not scenes."""
    if demo.shards is not None:
        return {}
    prompts = [prompt for prompt, _ in demo_prompts(demo)]
    return {kind: _scores(prompts, sample_pictures(demo, kind)) for kind in KINDS}


def demo_prompts(demo: DemoConfig) -> list[tuple[str, str]]:
    """(prompt, category) of every picture to generate. With shards of one's own: captions of the held-out one."""
    if demo.shards is None:
        return [(e.caption, e.category) for e in scene_prompts(demo.prompts_per_category, demo.seed)]
    captions = list(dict.fromkeys(row["caption"] for row in held_out_rows(demo)))
    return [(caption, "captions") for caption in captions[: demo.prompts_per_category]]


def held_out_rows(demo: DemoConfig) -> list[dict[str, Any]]:
    rows = []
    for path in find_shards(input_shards(demo)[1]):
        with storage.open_file(path) as stream:
            rows += [row for row in read_samples(stream, path) if not row["problem"]]
    return rows


def held_out_images(demo: DemoConfig) -> Tensor:
    """Float ``[N, 3, size, size]`` of the held-out shards, centre crops."""
    rows = held_out_rows(demo)[: demo.held_out]
    return to_tensor(np.stack([fit_square(decode_rgb(row["image"]), demo.size) for row in rows]))


def sample_pictures(demo: DemoConfig, kind: str) -> list[np.ndarray]:
    """The generated pictures, uint8 ``[size, size, 3]`` each, in the order of the prompts."""
    files = sorted(Path(demo.path("samples", kind)).glob("*.png"))
    return [np.asarray(Image.open(file).convert("RGB")) for file in files]


def curves(demo: DemoConfig) -> dict[str, list[dict[str, Any]]]:
    """The logged metrics of each training run."""
    return {name: read_metrics(demo.path("runs", name)) for name in ("tokenizer", *KINDS)}


def _request(client: httpx.Client, kind: str, prompt: str, seed: int, demo: DemoConfig) -> bytes:
    body = {"prompt": prompt, "model": kind, "seed": seed, "size": f"{demo.size}x{demo.size}"}
    response = client.post("/v1/images/generations", json=body)
    if response.status_code != 200:
        raise RuntimeError(f"endpoint answered {response.status_code}: {response.text[:300]}")
    return base64.b64decode(response.json()["data"][0]["b64_json"])


def _scores(captions: Iterable[str], pictures: Iterable[np.ndarray]) -> dict[str, float]:
    claims: list[Expectation] = [parse_caption(caption) for caption in captions]
    verdicts = [
        (claim.category, score(picture, claim).correct) for claim, picture in zip(claims, pictures, strict=True)
    ]
    return score_table(verdicts)


def _resuming(train: Any, resume: bool) -> Any:
    """Go on with the run only where it has begun."""
    return train.model_copy(update={"resume": resume and Path(train.run_dir, "config.yaml").exists()})


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
