"""Parts: text encoding, decoding and image files, each alone; and all stages together on mixed requests."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from ...data.formats.images import OPTIONS, encode_image
from ...data.scenes import render, scene_at
from ...engine.slots import EngineOptions
from ...engine.weights import serving_dtype
from ...flops import DeviceWork, TextEncoderSizes, bit_decode, generator_pass, text_encoder_forward
from ...models.bit import BIT
from ...models.checkpoint import save_model
from ...models.sampling import SamplingParams
from ...rendering import Goal
from ...serving.deployments import DecoderStage
from ...serving.runner import EngineRunner
from ..measure import Spread
from .rows import Bench, ChipRow
from .sampling import engine_of, fastest

MIXED_GOAL = 25.0
"""Images per second of mixed sizes and steps."""
PROMPTS = 16
"""Different prompts of the mixed requests."""


def decoder_of(bench: Bench) -> DecoderStage:
    """Build the decoder of serving, with random weights."""
    cfg, folder = bench.cfg, bench.folder / "decoder"
    torch.manual_seed(0)
    with bench.device:
        bit = BIT(cfg.bit)
    folder.mkdir()
    save_model(folder, bit)
    return DecoderStage(str(folder), cfg.threads, str(bench.device), batch=cfg.decode_batch, file_threads=cfg.threads)


def measure_stages(bench: Bench) -> None:
    """Measure decoding by size, encoding of prompts, and image files by format."""
    _decoding(bench)
    _text(bench)
    _files(bench)


def _decoding(bench: Bench) -> None:
    cfg = bench.cfg
    bench.fresh()
    stage = decoder_of(bench)
    weights = sum(p.numel() for p in stage.bit.decoder.parameters()) * 4
    first: float | None = None
    for size in cfg.image_sizes:
        for count in (1, cfg.decode_batch):
            codes = _codes(bench, count)
            seconds = bench.time(lambda codes=codes, size=size: stage._decode(codes, size, size))  # type: ignore[misc]
            first = first or seconds.median
            work = DeviceWork(count * bit_decode(cfg.bit, size, size).forward, weights)
            bench.add(f"decoding, {size} px, {count} together", seconds, work, images=count, launches=first)


def _codes(bench: Bench, count: int) -> list[np.ndarray]:
    shape = (count, bench.cfg.bit.num_tokens, bench.cfg.bit.bits_per_token)
    return list(np.random.default_rng(0).integers(0, 2, shape, np.uint8))


def _text(bench: Bench) -> None:
    cfg = bench.cfg
    bench.fresh()
    encoder = cfg.text.encoder(bench.device, serving_dtype(bench.device, "auto"))
    sizes = TextEncoderSizes.of(encoder.model)
    prompt = " ".join(["1"] * cfg.text_length)
    first: float | None = None
    for count in (1, cfg.text_batch):
        seconds = bench.time(lambda count=count: encoder.encode([prompt] * count))  # type: ignore[misc]
        first = first or seconds.median
        flop = count * text_encoder_forward(sizes, cfg.text_length)
        work = DeviceWork(flop, sizes.matrix_weights * next(encoder.model.parameters()).element_size())
        bench.add(f"text encoding, {count} together", seconds, work, images=count, launches=first)


def _files(bench: Bench) -> None:
    """Measure files of a drawn scene with noise: without, its flat colours would be compressed too fast."""
    cfg, rng = bench.cfg, np.random.default_rng(0)
    with ThreadPoolExecutor(cfg.threads) as pool:
        for size in cfg.image_sizes:
            scene = render(scene_at(0, 0), size)
            image = np.clip(scene + rng.normal(0, 4, scene.shape), 0, 255).astype(np.uint8)
            for name in OPTIONS:
                alone = bench.time(lambda image=image, name=name: encode_image(image, name))  # type: ignore[misc]
                many = [image] * (2 * cfg.threads)
                pooled = bench.time(lambda many=many, name=name: list(pool.map(encode_image, many, [name] * len(many))))  # type: ignore[misc]
                rate = len(many) / pooled.median
                note = f"images/s of {cfg.threads} threads; {len(encode_image(image, name)) / 1e3:.0f} kB"
                bench.emit(ChipRow(f"{name.upper()} file, {size} px", alone, rate, note=note))


def measure_mixed(bench: Bench) -> None:
    """Measure images per second of mixed sizes, steps and formats, from features of prompts to image files.

    Twice as many requests as slots are in progress. The rate is that of the middle half of the images, when all slots are
    occupied.
    """
    cfg = bench.cfg
    compilation = fastest(bench.device)
    engine = engine_of(bench, "diffusion", EngineOptions(cfg.slots, cfg.text_length, compilation))
    runner = EngineRunner(engine)
    latencies, ended = asyncio.run(_MixedRequests(bench, runner, decoder_of(bench)).run(cfg.mixed_images))
    quarter = len(ended) // 4
    rate = 2 * quarter / (ended[3 * quarter] - ended[quarter])
    each = generator_pass(engine.slots.model.cfg, 2 * cfg.slots, cfg.text_length, engine.slots.z.element_size())
    steps = sum(cfg.mixed_steps) / 2
    decoded = sum(bit_decode(cfg.bit, size, size).forward for size in cfg.image_sizes) / len(cfg.image_sizes)
    work = DeviceWork(steps * each.flop / cfg.slots + decoded, steps * each.bytes / cfg.slots)
    low, high = cfg.mixed_steps
    what = f"diffusion, {compilation}, {low} to {high} steps, {' '.join(map(str, cfg.image_sizes))} px, with files"
    latency = Spread.of(latencies)
    note = f"ms of one image at this rate; latency {latency.text(1000, 0)} ms with {2 * cfg.slots} in progress"
    goal = Goal("diffusion, images/s at mixed sizes", rate, MIXED_GOAL, ">=")
    bench.add(what, Spread(1 / rate, 1 / rate, 1 / rate), work, note=note, goal=goal)


class _MixedRequests:
    """Closed loop of requests over engine and decoder."""

    def __init__(self, bench: Bench, runner: EngineRunner, decoder: DecoderStage) -> None:
        self.bench, self.runner, self.decoder = bench, runner, decoder
        cfg = bench.cfg
        shape = (PROMPTS, cfg.text.layers, cfg.text_length, cfg.text.width)
        self.features = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        self.formats = list(OPTIONS)

    async def run(self, count: int) -> tuple[list[float], list[float]]:
        """Generate ``count`` images; returns their latencies and the times at which they ended, in seconds, ascending."""
        for size in self.bench.cfg.image_sizes:  # warm-up
            await asyncio.gather(*(self.decoder.decode(code, size, size) for code in _codes(self.bench, 1)))
        places = asyncio.Semaphore(2 * self.bench.cfg.slots)
        latencies: list[float] = []
        ended: list[float] = []

        async def one(number: int) -> None:
            async with places:
                began = time.perf_counter()
                await self._image(number)
                ended.append(time.perf_counter())
                latencies.append(ended[-1] - began)

        await asyncio.gather(*(one(number) for number in range(count)))
        await self.decoder.close()
        await self.runner.drain()
        return latencies, ended

    async def _image(self, number: int) -> bytes:
        cfg, rng = self.bench.cfg, np.random.default_rng(number)
        low, high = cfg.mixed_steps
        prompt = number % PROMPTS
        params = SamplingParams.of(1, seed=number, num_inference_steps=int(rng.integers(low, high + 1)))
        codes = await self.runner.generate(self.features[prompt], params, prompt=str(prompt))
        size, name = int(rng.choice(cfg.image_sizes)), self.formats[number % len(self.formats)]
        return await self.decoder.decode(codes.numpy(), size, size, name)
