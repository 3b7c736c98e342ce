"""HTTP load generators: a closed loop of clients that send the next request after each response, and an open loop with
Poisson arrivals."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
import numpy as np

from ..data.scenes import scene_prompts
from ..errors import UserError

PATH = "/v1/images/generations"


@dataclass(frozen=True)
class Load:
    """Client-side measurements of one or more windows."""

    window_s: float
    """Length of the window (s)."""
    answered: int
    """Number of images received in the window."""
    latencies: list[float]
    """Latencies (s) of all requests sent in the window."""
    short: list[float]
    """Latencies (s) of requests with few steps (:func:`few_steps`)."""
    total: int = 0
    """Number of images received before, in and after the window."""

    @property
    def rate(self) -> float:
        """Images per second."""
        return self.answered / self.window_s

    def percentile(self, share: float) -> float:
        """Return the ``share``-th percentile of latency in seconds."""
        return percentile(self.latencies, share)

    @staticmethod
    def joined(parts: Sequence[Load]) -> Load:
        """Combine several windows."""
        window, answered = sum(part.window_s for part in parts), sum(part.answered for part in parts)
        latencies, short = ([s for part in parts for s in getattr(part, name)] for name in ("latencies", "short"))
        return Load(window, answered, latencies, short, sum(part.total for part in parts))


def percentile(values: Sequence[float], share: float) -> float:
    """Compute the ``share``-th percentile; infinite without values."""
    return float(np.percentile(values, share)) if values else float("inf")


def few_steps(bodies: Sequence[dict[str, Any]]) -> int:
    """Return the 25th percentile of the requests' numbers of steps."""
    return int(np.percentile([body["num_inference_steps"] for body in bodies], 25))


def mixed_requests(count: int, sizes: Sequence[int], steps: tuple[int, int], seed: int = 0) -> list[dict[str, Any]]:
    """Create request bodies with random values of all user parameters, determined by ``seed``."""
    rng = np.random.default_rng(seed)
    prompts = [expectation.caption for expectation in scene_prompts(8, seed)]
    return [
        {
            "prompt": str(rng.choice(prompts)),
            "size": "x".join(map(str, rng.choice(sizes, 2))),
            "seed": int(rng.integers(2**31)),
            "num_inference_steps": int(rng.integers(steps[0], steps[1], endpoint=True)),
            "guidance_scale": float(rng.choice([0, 1, 2, 4, 7.5])),
            "temperature": float(rng.choice([0.5, 0.6, 1.0])),
            "sampler": str(rng.choice(["posterior_release", "simplified"])),
        }
        for _ in range(count)
    ]


def closed_loop(url: str, bodies: Sequence[dict[str, Any]], in_flight: int, seconds: float) -> Load:
    """Keep ``in_flight`` requests in flight for ``seconds``, after a warm-up of a quarter of that time.

    Raises UserError for a refused request or a response without an image.
    """
    return asyncio.run(_closed_loop(url, bodies, in_flight, seconds))


async def _closed_loop(url: str, bodies: Sequence[dict[str, Any]], in_flight: int, seconds: float) -> Load:
    source, answers = itertools.cycle(bodies), []
    async with _session(in_flight) as client:
        start = time.perf_counter() + seconds / 4
        end = start + seconds

        async def one_client() -> None:
            while time.perf_counter() < end:
                answers.append(await _ask(client, url, next(source)))

        await asyncio.gather(*(one_client() for _ in range(in_flight)))
    return _measured(answers, few_steps(bodies), start, end)


def open_loop(url: str, bodies: Sequence[dict[str, Any]], rate: float, seconds: float, seed: int = 0) -> Load:
    """Send ``rate`` requests per second with Poisson arrivals for ``seconds``, after a warm-up of a quarter of that time.

    ``seed`` determines the arrival times, so that they are the same for every contestant. Returns when all requests are
    answered. Raises UserError for a refused request or a response without an image.
    """
    return asyncio.run(_open_loop(url, bodies, rate, seconds, seed))


async def _open_loop(url: str, bodies: Sequence[dict[str, Any]], rate: float, seconds: float, seed: int) -> Load:
    rng, source, tasks = np.random.default_rng(seed), itertools.cycle(bodies), []
    async with _session(0) as client:
        began = time.perf_counter()
        start, end, due = began + seconds / 4, began + seconds * 1.25, began
        while (due := due + float(rng.exponential(1 / rate))) < end:
            await asyncio.sleep(due - time.perf_counter())
            tasks.append(asyncio.create_task(_ask(client, url, next(source))))
        answers = await asyncio.gather(*tasks)
    return _measured(answers, few_steps(bodies), start, end)


Answer = tuple[int, float, float]
"""Number of steps, and times of request and response (s)."""


def _session(connections: int) -> aiohttp.ClientSession:
    # Not httpx: at some hundred requests a second it would use a core of its own beside the contestants.
    connector = aiohttp.TCPConnector(limit=connections)
    return aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=600))


async def _ask(client: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> Answer:
    asked = time.perf_counter()
    async with client.post(url + PATH, json=body) as response:
        text = await response.text()
    now = time.perf_counter()
    if response.status != 200:
        raise UserError(f"{url}{PATH}: status {response.status}: {text[:200]}")
    if not base64.b64decode(json.loads(text)["data"][0]["b64_json"]).startswith(b"\x89PNG"):
        raise UserError(f"{url}{PATH}: the response contains no PNG")
    return body["num_inference_steps"], asked, now


def _measured(answers: Sequence[Answer], few: int, start: float, end: float) -> Load:
    within = sum(start <= now <= end for _, _, now in answers)
    took = [(steps, now - asked) for steps, asked, now in answers if asked >= start]
    return Load(end - start, within, [s for _, s in took], [s for steps, s in took if steps <= few], len(answers))
