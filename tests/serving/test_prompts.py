"""Features of prompts: one call for all who ask at once, none for who asks again, within a bound."""

from __future__ import annotations

import asyncio
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from instella_ray.serving.prompts import PromptFeatures


class Encoder:
    """Counts its calls; each ends when it is told to."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.go = asyncio.Event()
        self.cancelled = 0

    async def encode(self, prompt: str) -> np.ndarray:
        self.calls[prompt] += 1
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if prompt == "fails":
            raise ConnectionError("lost")
        return np.full((1, 10, 1), len(prompt), dtype=np.float32)


async def asking(features: PromptFeatures, *prompts: str) -> list[asyncio.Task[np.ndarray]]:
    tasks = [asyncio.create_task(features(prompt)) for prompt in prompts]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    return tasks


def test_who_asks_at_once_shares_a_call_and_who_asks_again_needs_none() -> None:
    async def run() -> None:
        encoder = Encoder()
        features = PromptFeatures(encoder.encode)
        tasks = await asking(features, "a", "bb", "a", "a")
        encoder.go.set()
        assert [found[0, 0, 0] for found in await asyncio.gather(*tasks)] == [1, 2, 1, 1]
        assert (await features("a"))[0, 0, 0] == 1
        assert encoder.calls == {"a": 1, "bb": 1}

    asyncio.run(run())


def test_who_leaves_does_not_end_the_call_of_the_others_and_the_last_one_does() -> None:
    async def run() -> None:
        encoder = Encoder()
        features = PromptFeatures(encoder.encode)
        first, second = await asking(features, "a", "a")
        first.cancel()
        await asyncio.sleep(0.01)
        assert encoder.cancelled == 0 and not second.done()
        second.cancel()
        await asyncio.gather(first, second, return_exceptions=True)
        await asyncio.sleep(0.01)
        assert encoder.cancelled == 1
        encoder.go.set()
        assert (await features("a"))[0, 0, 0] == 1 and encoder.calls == {"a": 2}

    asyncio.run(run())


def test_a_failure_reaches_all_who_wait_and_is_not_remembered() -> None:
    async def run() -> None:
        encoder = Encoder()
        features = PromptFeatures(encoder.encode)
        tasks = await asking(features, "fails", "fails")
        encoder.go.set()
        assert [type(error) for error in await asyncio.gather(*tasks, return_exceptions=True)] == [ConnectionError] * 2
        with pytest.raises(ConnectionError):
            await features("fails")
        assert encoder.calls == {"fails": 2}

    asyncio.run(run())


@given(st.lists(st.sampled_from("abcdefgh"), max_size=40), st.integers(0, 200))
def test_the_bound_holds_and_the_least_recent_prompts_go_first(prompts: list[str], max_bytes: int) -> None:
    async def run() -> None:
        encoder = Encoder()
        encoder.go.set()
        features, recent = PromptFeatures(encoder.encode, max_bytes), list[str]()
        for prompt in prompts:
            before = encoder.calls[prompt]
            await features(prompt)
            assert (encoder.calls[prompt] == before) == (prompt in recent)
            recent = [other for other in recent if other != prompt] + [prompt]
            recent = recent[-max(1, max_bytes // 40) :]
            assert features.cache.used == 40 * len(recent)

    asyncio.run(run())
