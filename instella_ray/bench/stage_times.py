"""Isolated service times of the serving and data stages by batch size, in one process without Serve or Ray Data."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..data.formats.sources import read_blocks
from ..engine.buckets import bucket_sizes
from .serving import ServingBench

STEPS = 1000
"""Steps of a request: more than any measurement runs, so that its slot stays occupied."""


def median_seconds(run: Callable[[], object], repeats: int) -> float:
    """Measure the median seconds of ``repeats`` runs, after one warm-up run."""
    took = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        run()
        took.append(time.perf_counter() - began)
    return float(np.median(took[1:]))


class Stages:
    """Text encoder, engine and decoder of the serving suite in one process."""

    def __init__(self, cfg: ServingBench, models: dict[str, str], repeats: int) -> None:
        import torch

        from ..engine.slots import EngineOptions
        from ..engine.weights import load_engine
        from ..models.text_encoder import TextEncoder
        from ..serving.deployments import DecoderStage, TextEncoderStage

        self.cfg, self.repeats = cfg, repeats
        text = cfg.text.model_copy(update={"max_length": cfg.text_length})
        empty = TextEncoder.from_config(text).encode_prompt("")
        self.text = TextEncoderStage(text, cfg.threads, "cpu")
        self.decoder = DecoderStage(models["tokenizer"], cfg.threads, "cpu")
        options = EngineOptions(cfg.slots, cfg.text_length)
        self.engine = load_engine(models["generator"], empty, options, torch.device("cpu"), "auto")
        self.number = 0

    def measure(self) -> dict[str, Any]:
        """Measure all stages.

        Returns the engine's ``buckets``, and seconds: ``text``, ``admit``, ``step`` by rows, ``decode`` by image size and
        batch size, and ``file`` by image size.
        """
        prompt = "a photo of a red circle above a blue square"

        def encode() -> None:
            self.number += 1  # a new prompt, which is not cached
            self.text._encode([f"{prompt}, number {self.number}"])

        step = {rows: self.step(rows) for rows in bucket_sizes(self.cfg.slots)}

        def one_step_image() -> None:
            self._submit(1)
            self.engine.step()

        admit = max(0.0, median_seconds(one_step_image, self.repeats) - step[1])
        decode: dict[str, dict[int, float]] = {}
        file: dict[str, float] = {}
        for height in self.cfg.sizes:
            for width in self.cfg.sizes:
                name = f"{width}x{height}"
                decode[name] = {count: self._decode(count, height, width) for count in (1, 2, 4, 8)}
                image = self.decoder._decode(self._codes(1), height, width)[0]
                file[name] = median_seconds(partial(self.decoder._to_file, image, "png", {}), self.repeats)
        text = median_seconds(encode, self.repeats)
        return {
            "buckets": self.engine.slots.buckets[2],
            "text": text,
            "admit": admit,
            "step": step,
            "decode": decode,
            "file": file,
        }

    def step(self, rows: int) -> float:
        """Measure the seconds of a step with ``rows`` occupied slots."""
        names = [self._submit(STEPS) for _ in range(rows)]
        self.engine.step()
        seconds = median_seconds(self.engine.step, self.repeats)
        for name in names:
            self.engine.cancel(name)
        self.engine.step()
        return seconds

    def _submit(self, steps: int) -> str:
        from ..engine.engine import Request
        from ..models.sampling import SamplingParams

        self.number += 1
        import torch

        features = torch.randn(self.cfg.text_layers, 12, self.cfg.text_width)
        request = Request(str(self.number), features, SamplingParams.of(1, num_inference_steps=steps))
        self.engine.submit(request)
        return request.id

    def _codes(self, count: int) -> list[np.ndarray]:
        shape = (self.decoder.bit.cfg.num_tokens, self.decoder.bit.cfg.bits_per_token)
        return [np.random.default_rng(i).integers(0, 2, shape, np.uint8) for i in range(count)]

    def _decode(self, count: int, height: int, width: int) -> float:
        codes = self._codes(count)
        return median_seconds(lambda: self.decoder._decode(codes, height, width), self.repeats)


class DataStages:
    """Decoding and encoding stages of the encoding job in one process without Ray Data."""

    def __init__(self, tokenizer: str, shard: str, size: int) -> None:
        import torch

        from ..data.encode import CodesEncoder, EncodeConfig
        from ..data.views import ViewDecoder

        torch.set_num_threads(1)
        self.shard, self.decoder = shard, ViewDecoder(size, 1, False)
        self.encoder = CodesEncoder(EncodeConfig(input="", output="", tokenizer=tokenizer), size)

    def measure(self, repeats: int) -> dict[str, float]:
        """Measure seconds per image: ``decode`` from a tar to square pixels, ``encode`` to packed codes."""
        tables: list[Any] = []

        def decode() -> None:
            tables[:] = map(self.decoder, read_blocks(self.shard, Path(self.shard).name, 1000))

        decoding = median_seconds(decode, repeats)
        count = sum(table.num_rows for table in tables)
        encoding = median_seconds(lambda: [self.encoder(table) for table in tables], repeats)
        return {"decode": decoding / count, "encode": encoding / count}
