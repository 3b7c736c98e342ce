"""Stages of the sampling graph: text encoder, generator and decoder, each deployed separately on Ray Serve.

A stage is a plain class that also runs without Serve; it imports Serve only for metrics, and only within a replica.
Outside of Serve, call ``close`` when done; in a replica the end of the process releases everything.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any

import numpy as np
import pydantic
import torch

from .. import logs
from ..accelerator import Precision, pick_device
from ..data.formats.images import OPTIONS, encode_image, to_pixels
from ..engine.events import Progress
from ..engine.slots import EngineOptions
from ..engine.weights import Identity, Weights, load_engine, serving_dtype
from ..errors import UserError
from ..memory import keep_freed_memory
from ..models.bit import BIT
from ..models.checkpoint import load_expected, weight_hash
from ..models.sampling import SamplingParams
from ..models.text_encoder import TextEncoder, TextEncoderConfig
from .batching import MicroBatcher
from .codes import Generated
from .metrics import EngineMetrics, StageTimes, in_replica
from .runner import EngineRunner
from .safety import SafetyConfig, load_checker
from .scaling import ACTIVE, SLOTS, WAITING

log = logging.getLogger(__name__)

ENCODE_BATCH = 32
"""Maximum number of prompts that are encoded at once if features may depend on the batch."""
DECODE_BATCH = 8
"""Maximum number of images that are decoded at once."""
REPORT_EVERY_S = 1.0
"""Seconds between two updates of the engine's metrics."""


class TextEncoderStage:
    """Text encoder stage: prompts to features of all layers, micro-batched."""

    def __init__(
        self,
        cfg: TextEncoderConfig,
        threads: int = 1,
        device: str = "auto",
        *,
        precision: Precision = "auto",
        batch_invariant: bool = True,
    ) -> None:
        """Load the text encoder.

        ``batch_invariant`` encodes each prompt separately: the features of a padded batch differ in the last digits, so
        an image would depend on concurrent requests.
        """
        torch.set_num_threads(threads)
        keep_freed_memory()
        logs.set_up({"job": "serve", "stage": "text"})
        where = pick_device(device)
        self.encoder = TextEncoder.from_config(cfg, device=where, dtype=serving_dtype(where, precision))
        self.times = StageTimes()
        self.batcher: MicroBatcher[str, np.ndarray] = MicroBatcher(
            self._encode, size=1 if batch_invariant else ENCODE_BATCH
        )

    async def encode(self, prompt: str) -> np.ndarray:
        """Encode ``prompt``; returns float32 ``[layers, T, width]`` without padding."""
        with self.times.measure("text"):
            return await self.batcher(prompt)

    async def check_health(self) -> None:
        """Return at once; the check times out only if the event loop is blocked."""

    async def close(self) -> None:
        """Stop the batcher. No calls may be in progress."""
        self.batcher.close()

    def _encode(self, prompts: Sequence[str]) -> list[np.ndarray]:
        features, mask = self.encoder.encode(prompts)
        return [features[:, i, mask[i]].float().cpu().numpy() for i in range(len(prompts))]


class GeneratorStage:
    """Generator stage: text features to codes, in the step engine.

    ``generate`` and ``follow`` raise UserError, :class:`.runner.DeadlineExceeded` or :class:`.runner.EngineFailed`.
    The slot of a cancelled call is released at the next step.
    """

    def __init__(
        self,
        path: str,
        empty_prompt: np.ndarray,
        options: EngineOptions | None = None,
        threads: int = 1,
        device: str = "auto",
        longest_step_s: float = 60.0,
        *,
        precision: Precision = "auto",
    ) -> None:
        """Load the model folder ``path`` and start its engine.

        ``empty_prompt [layers, T, width]``: features of the unconditional prompt. If a step takes longer than
        ``longest_step_s`` seconds, the health check fails and Serve replaces the replica.
        """
        torch.set_num_threads(threads)
        keep_freed_memory()
        logs.set_up({"job": "serve", "stage": "generator"})
        self.options = options or EngineOptions()
        self.longest_step_s = longest_step_s
        self._empty, self._device, self._precision = torch.tensor(empty_prompt), pick_device(device), precision
        self.weights, self.identity = Weights(path=path), Identity.of(path)
        self.refused: str | None = None
        """Reason why the last swap of weights was refused; None if the served weights are the configured ones."""
        self.times, self.metrics = StageTimes(), EngineMetrics() if in_replica() else None
        self._runners: dict[int, EngineRunner] = {0: EngineRunner(self._load(path))}
        """Runners by number; the last one receives new requests, earlier ones finish theirs."""
        self._hash = weight_hash(path)
        """Hash of the weights of the current runner."""
        self._swap, self._retiring = asyncio.Lock(), set[asyncio.Task[None]]()
        self._reporter: asyncio.Task[None] | None = None
        self._in_service = False

    @property
    def runner(self) -> EngineRunner:
        """The current runner, which receives new requests."""
        return next(reversed(self._runners.values()))

    async def generate(
        self,
        features: np.ndarray,
        sampling: Mapping[str, Any],
        timeout_s: float = float("inf"),
        prompt: str | None = None,
    ) -> Generated:
        """Generate codes for ``features [layers, T, width]``; returns them with the hash of the weights.

        ``sampling`` holds the fields of :class:`SamplingParams`; ``timeout_s`` is the deadline in seconds from now.
        Calls with the same ``prompt`` must have the same features, which are then projected once.
        """
        # torch.tensor copies: arrays from the object store are read-only.
        text, params = torch.tensor(features), _params(sampling)
        runner, weights = self.runner, self._hash  # read together: a swap may replace them during the call
        with self.times.measure("generate"):
            codes = await runner.generate(text, params, timeout_s=timeout_s, prompt=prompt)
        return Generated(codes.numpy(), weights)

    async def follow(
        self,
        features: np.ndarray,
        sampling: Mapping[str, Any],
        timeout_s: float = float("inf"),
        preview_every: int = 1,
        prompt: str | None = None,
    ) -> AsyncIterator[dict[str, Any]]:
        """Generate codes as :meth:`generate` and yield the progress.

        Yields ``{"step", "steps", "codes", "weights"}`` every ``preview_every`` steps, where codes are the current most
        likely bits, and ``{"codes", "weights", "done": True}`` at the end. With ``preview_every`` 0 only the latter.
        """
        text, params = torch.tensor(features), _params(sampling)
        weights = self._hash
        events = self.runner.follow(text, params, timeout_s=timeout_s, preview_every=preview_every, prompt=prompt)
        with self.times.measure("generate"):
            # Closed immediately if the caller disconnects, not at garbage collection, to release the slot.
            async with aclosing(events):
                async for event in events:
                    if isinstance(event, Progress):
                        about = {"step": event.step, "steps": event.steps, "weights": weights}
                        yield {**about, "codes": event.estimate.numpy()}
                    else:
                        yield {"codes": event.codes.numpy(), "weights": weights, "done": True}

    async def check_health(self) -> None:
        """Raise :class:`.runner.EngineFailed` if an engine has failed or hangs. Called periodically by Serve."""
        for runner in self._runners.values():
            runner.check(self.longest_step_s)
        if self.metrics is not None and (self._reporter is None or self._reporter.done()):
            self._reporter = asyncio.create_task(self._keep_reporting())
        # Serve runs the first health check after the replica has been created and configured.
        self._in_service = True

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Return the load of the replica, the input of :class:`.scaling.RowsPolicy`."""
        stats = [runner.stats for runner in self._runners.values()]
        waiting, active = (float(sum(getattr(s, name) for s in stats)) for name in ("waiting", "active"))
        return {WAITING: waiting, ACTIVE: active, SLOTS: float(self.options.slots)}

    async def status(self) -> dict[str, Any]:
        """Return process id, weights, last refused swap, and counts of the engines."""
        stats = [runner.stats for runner in self._runners.values()]
        return {
            "pid": os.getpid(),
            **self.weights.model_dump(),
            "refused": self.refused,
            "engines": len(stats),
            "waiting": sum(s.waiting for s in stats),
            "active": sum(s.active for s in stats),
            "slots": self.options.slots,
            "steps": stats[-1].steps,
            "images": stats[-1].images,
        }

    async def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """Swap weights (:class:`..engine.weights.Weights`): new requests use the new weights, running ones keep the old.

        If the swap fails, a replica in service logs the reason, reports it in :meth:`status` and continues with its
        current weights, because Serve would stop it on an exception. A starting replica raises, because it must not
        serve other weights than the other replicas.
        """
        async with self._swap:
            try:
                weights = _weights(user_config)
                if weights != self.weights:
                    await self._swap_to(weights)
                self.refused = None
            except Exception as error:
                if not self._in_service:
                    raise
                self.refused = str(error) or type(error).__name__
                log.error("weights not swapped, still serving %s: %s", self.weights.path, self.refused)

    async def close(self) -> None:
        """Stop the engines and their threads after their requests have finished."""
        await asyncio.gather(*self._retiring)
        await self.runner.drain()
        if self._reporter is not None:
            self._reporter.cancel()

    async def _swap_to(self, weights: Weights) -> None:
        self.identity.check(Identity.of(weights.path), weights.path)
        # In a thread, because loading takes seconds and must not block events of the old engine's callers.
        engine = await asyncio.to_thread(self._load, weights.path)
        new_hash = await asyncio.to_thread(weight_hash, weights.path)
        old = next(reversed(self._runners))
        self._runners[old + 1] = EngineRunner(engine)
        self.weights, self._hash = weights, new_hash
        task = asyncio.create_task(self._retire(old))
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)

    def _load(self, path: str) -> Any:
        return load_engine(path, self._empty, self.options, self._device, self._precision)

    async def _retire(self, number: int) -> None:
        await self._runners[number].drain()
        self._report()
        del self._runners[number]
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    async def _keep_reporting(self) -> None:
        while True:
            self._report()
            await asyncio.sleep(REPORT_EVERY_S)

    def _report(self) -> None:
        if self.metrics is not None:
            self.metrics.report({number: runner.stats for number, runner in self._runners.items()})


class DecoderStage:
    """Decoder stage: codes to image files, micro-batched by size.

    Files are safety-checked and encoded in threads while the next batch is decoded.
    """

    def __init__(
        self,
        path: str,
        threads: int = 1,
        device: str = "auto",
        *,
        precision: Precision = "auto",
        batch: int = DECODE_BATCH,
        file_threads: int = 2,
        safety: SafetyConfig | None = None,
    ) -> None:
        """Load the tokenizer in the folder ``path``.

        With a ``batch`` above 1, pixels may differ in the last digit from those of an image decoded alone.
        ``file_threads``: threads that check and write image files.
        """
        torch.set_num_threads(threads)
        keep_freed_memory()
        logs.set_up({"job": "serve", "stage": "decoder"})
        self.device = pick_device(device)
        self.bit = load_expected(path, BIT, device=self.device)
        self.dtype = serving_dtype(self.device, precision)
        self.batch = batch
        self.checker = load_checker(safety) if safety is not None else None
        self.times = StageTimes()
        self._batchers: dict[tuple[int, int], MicroBatcher[np.ndarray, np.ndarray]] = {}
        # Only one batch is decoded at a time, so that a replica does not exceed its CPU threads.
        self._turn = threading.Lock()
        self._files = ThreadPoolExecutor(file_threads, thread_name_prefix="image-files")

    async def decode(
        self,
        codes: np.ndarray,
        height: int,
        width: int,
        output_format: str = "png",
        metadata: Mapping[str, Any] | None = None,
    ) -> bytes:
        """Decode uint8 0/1 ``codes [L, K]`` to an image file of ``height x width`` pixels that contains ``metadata``.

        Raises UserError for invalid codes, sizes or formats, and :class:`.safety.Flagged` if the safety checker
        withholds the image.
        """
        self._check(codes, output_format)
        with self.times.measure("decode"):
            image = await self._batcher(height, width)(codes)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._files, self._to_file, image, output_format, metadata)

    async def check_health(self) -> None:
        """Return at once; the check times out only if the event loop is blocked."""

    async def close(self) -> None:
        """Stop the batchers and threads. No calls may be in progress."""
        for batcher in self._batchers.values():
            batcher.close()
        self._files.shutdown()

    def _check(self, codes: np.ndarray, output_format: str) -> None:
        # Checked before batching: an error in a batch would be raised to all of its callers.
        expected = (self.bit.cfg.num_tokens, self.bit.cfg.bits_per_token)
        if codes.shape != expected or codes.dtype != np.uint8 or codes.max(initial=0) > 1:
            raise UserError(
                f"codes: expected uint8 0/1 of shape {expected}, got {codes.dtype} of shape {codes.shape}"
                f" up to {codes.max(initial=0)}"
            )
        if output_format not in OPTIONS:
            raise UserError(f"output_format '{output_format}': expected one of {', '.join(OPTIONS)}")

    def _batcher(self, height: int, width: int) -> MicroBatcher[np.ndarray, np.ndarray]:
        key = (height, width)
        if key not in self._batchers:
            self._batchers[key] = MicroBatcher(lambda batch: self._decode(batch, height, width), size=self.batch)
        return self._batchers[key]

    def _decode(self, batch: Sequence[np.ndarray], height: int, width: int) -> list[np.ndarray]:
        codes = torch.from_numpy(np.stack(batch)).to(self.device)
        # autocast keeps positions and the quantizer's embedding in float32; only matrix products use bfloat16.
        half = torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)
        with self._turn, half:
            return list(to_pixels(self.bit.decode(codes, height, width)))

    def _to_file(self, image: np.ndarray, output_format: str, metadata: Mapping[str, Any] | None) -> bytes:
        with self.times.measure("encode_file"):
            if self.checker is not None:
                self.checker(image)
            return encode_image(image, output_format, metadata)


def _params(sampling: Mapping[str, Any]) -> SamplingParams:
    try:
        return SamplingParams.of(1, **sampling)
    except TypeError as error:
        raise UserError(f"sampling: {error}") from None


def _weights(user_config: Mapping[str, Any]) -> Weights:
    try:
        return Weights.model_validate(user_config)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "user_config"
        raise UserError(f"{where}: {first['msg']}, expected path and, optionally, version") from None
