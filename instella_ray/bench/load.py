"""A closed loop over HTTP: so many clients, each of which asks for the next picture as soon as it has one."""

from __future__ import annotations

import asyncio
import base64
import itertools
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np

from ..data.scenes import scene_prompts
from ..errors import UserError

PATH = "/v1/images/generations"


@dataclass(frozen=True)
class Load:
    """What a closed loop saw."""

    window_s: float
    answered: int
    """Pictures that came within the window."""
    latencies: list[float]
    """Seconds from question to answer, of every picture that was asked for within the window."""

    @property
    def rate(self) -> float:
        """Pictures a second."""
        return self.answered / self.window_s

    def percentile(self, share: float) -> float:
        """Seconds within which ``share`` per cent were answered."""
        return float(np.percentile(self.latencies, share)) if self.latencies else float("inf")

    @staticmethod
    def joined(parts: Sequence[Load]) -> Load:
        """Several windows as one."""
        latencies = [seconds for part in parts for seconds in part.latencies]
        return Load(sum(part.window_s for part in parts), sum(part.answered for part in parts), latencies)


def mixed_requests(count: int, sizes: Sequence[int], steps: tuple[int, int], seed: int = 0) -> list[dict[str, Any]]:
    """Bodies of requests that differ in everything a user may choose; the same ones for every contestant."""
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
            "sampler": str(rng.choice(["posterior", "simplified"])),
        }
        for _ in range(count)
    ]


def closed_loop(url: str, bodies: Iterable[dict[str, Any]], in_flight: int, seconds: float) -> Load:
    """Keep ``in_flight`` requests under way for ``seconds``; a refusal or an answer without a picture is an error.

    A quarter of that time goes before, uncounted, so that the window opens on a loop that is full.
    """
    return asyncio.run(_closed_loop(url, itertools.cycle(bodies), in_flight, seconds))


async def _closed_loop(url: str, bodies: Iterable[dict[str, Any]], in_flight: int, seconds: float) -> Load:
    source, answers = iter(bodies), []
    limits = httpx.Limits(max_connections=in_flight)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        start = time.perf_counter() + seconds / 4
        end = start + seconds

        async def one_client() -> None:
            while time.perf_counter() < end:
                asked = time.perf_counter()
                response = await client.post(PATH, json=next(source))
                now = time.perf_counter()
                if response.status_code != 200:
                    raise UserError(f"{url}{PATH}: status {response.status_code}: {response.text[:200]}")
                if not base64.b64decode(response.json()["data"][0]["b64_json"]).startswith(b"\x89PNG"):
                    raise UserError(f"{url}{PATH}: the answer holds no PNG")
                answers.append((asked, now))

        await asyncio.gather(*(one_client() for _ in range(in_flight)))
    within = sum(start <= now <= end for _, now in answers)
    return Load(end - start, within, [now - asked for asked, now in answers if asked >= start])
