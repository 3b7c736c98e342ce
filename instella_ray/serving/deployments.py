"""The three stages of the sampling graph, each a Ray Serve deployment of its own."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..accelerator import pick_device
from ..data.decode import to_pixels
from ..models.bit import BIT
from ..models.checkpoint import load_expected, load_model
from ..models.text_encoder import TextEncoder, TextEncoderConfig, TextFeatureCache
from ..sampling import SamplingParams
from .batching import MicroBatcher
from .engine import EngineOptions, Progress, build_engine
from .runner import EngineRunner


class TextEncoderStage:
    """Prompts to features of every layer, micro-batched and cached."""

    def __init__(self, cfg: TextEncoderConfig, threads: int, device: str) -> None:
        torch.set_num_threads(threads)
        self.cache = TextFeatureCache(TextEncoder.from_config(cfg, device=pick_device(device)), 256 << 20)
        self.batcher: MicroBatcher[str, np.ndarray] = MicroBatcher(self._encode, size=32)

    async def encode(self, prompt: str) -> np.ndarray:
        """Float32 ``[layers, T, width]``, without padding."""
        return await self.batcher(prompt)

    async def check_health(self) -> None:
        """Answers while the event loop does."""

    def _encode(self, prompts: Sequence[str]) -> list[np.ndarray]:
        features, mask = self.cache.encode(prompts)
        return [features[:, i, mask[i]].cpu().numpy() for i in range(len(prompts))]


class GeneratorStage:
    """Features to codes, in the step engine."""

    def __init__(
        self,
        path: str,
        empty_prompt: np.ndarray,
        options: EngineOptions,
        threads: int,
        device: str,
        longest_step_s: float = 60.0,
    ) -> None:
        torch.set_num_threads(threads)
        model = load_model(path, device=pick_device(device))
        assert not isinstance(model, BIT)
        self.longest_step_s = longest_step_s
        self.runner = EngineRunner(build_engine(model, torch.tensor(empty_prompt), options))

    async def generate(
        self, features: np.ndarray, sampling: Mapping[str, Any], timeout_s: float = float("inf")
    ) -> np.ndarray:
        """Codes, uint8 0/1 ``[L, K]``; ``sampling`` holds the fields of :class:`SamplingParams`."""
        # A copy: arrays from the object store are read-only.
        params = SamplingParams.of(1, **sampling)
        return (await self.runner.generate(torch.tensor(features), params, timeout_s=timeout_s)).numpy()

    async def follow(
        self, features: np.ndarray, sampling: Mapping[str, Any], timeout_s: float, preview_every: int
    ) -> AsyncIterator[dict[str, Any]]:
        """``{"step", "steps", "codes"}`` every ``preview_every`` steps, then ``{"codes", "done": True}``."""
        params = SamplingParams.of(1, **sampling)
        events = self.runner.follow(torch.tensor(features), params, timeout_s=timeout_s, preview_every=preview_every)
        async for event in events:
            if isinstance(event, Progress):
                yield {"step": event.step, "steps": event.steps, "codes": event.estimate.numpy()}
            else:
                yield {"codes": event.codes.numpy(), "done": True}

    async def check_health(self) -> None:
        """Serve asks now and then."""
        self.runner.check(self.longest_step_s)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Rows waiting and active."""
        stats = self.runner.stats
        return {"waiting_rows": stats.waiting, "active_rows": stats.active, "slots": stats.slots}


class DecoderStage:
    """Codes to encoded pictures, micro-batched by size."""

    def __init__(self, path: str, threads: int, device: str) -> None:
        torch.set_num_threads(threads)
        self.device = pick_device(device)
        self.bit = load_expected(path, BIT, device=self.device)
        self.batchers: dict[tuple[int, int, str], MicroBatcher[np.ndarray, bytes]] = {}

    async def check_health(self) -> None:
        """Answers while the event loop does."""

    async def decode(
        self,
        codes: np.ndarray,
        height: int,
        width: int,
        output_format: str,
        metadata: Mapping[str, Any] | None = None,
    ) -> bytes:
        """The encoded file of a picture of ``height x width`` pixels."""
        key = (height, width, output_format)
        if key not in self.batchers:
            self.batchers[key] = MicroBatcher(lambda batch: self._decode(batch, *key), size=8)
        return await self.batchers[key](codes)

    def _decode(self, batch: Sequence[np.ndarray], height: int, width: int, output_format: str) -> list[bytes]:
        codes = torch.from_numpy(np.stack(batch)).to(self.device)
        return [encode_image(picture, output_format) for picture in to_pixels(self.bit.decode(codes, height, width))]


def encode_image(picture: np.ndarray, output_format: str) -> bytes:
    """File bytes of uint8 ``[H, W, 3]``."""
    buffer = io.BytesIO()
    options: dict[str, Any] = {"compress_level": 1} if output_format == "png" else {"quality": 92}
    Image.fromarray(picture).save(buffer, output_format.upper(), **options)
    return buffer.getvalue()
