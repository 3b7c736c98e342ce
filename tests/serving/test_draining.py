"""The graceful end: who is counted, who is refused, and how long it is waited for."""

from __future__ import annotations

import asyncio

import httpx
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import Receive, Scope, Send

from instella_ray.serving.draining import Drain, InProgress, wait_until_drained


def test_requests_in_progress_end_and_new_ones_are_refused() -> None:
    requests, entered, release = InProgress(), asyncio.Event(), asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        entered.set()
        await release.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"done"})

    async def run() -> None:
        transport = httpx.ASGITransport(Drain(app, requests))
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            first = asyncio.create_task(client.get("/v1/models"))
            await entered.wait()
            requests.draining = True
            second = await client.get("/healthz")
            assert (second.status_code, second.json()["error"]["code"]) == (503, "shutting_down")
            assert second.headers["retry-after"] == "5" and requests.count == 1
            release.set()
            assert (await first).text == "done" and requests.count == 0

    asyncio.run(run())


@given(st.lists(st.lists(st.integers(0, 3), max_size=4), max_size=5))
def test_it_waits_until_no_process_has_any_request(answers: list[list[int]]) -> None:
    asked = iter([*answers, []])
    assert wait_until_drained(lambda: next(asked), grace_s=60, poll_s=0) == 0
    rest = list(asked)
    ended = answers[: len(answers) + 1 - len(rest)]
    assert all(any(counts) for counts in ended[:-1])


def test_after_the_grace_period_the_rest_is_counted() -> None:
    assert wait_until_drained(lambda: [3, 0, 1], grace_s=0) == 4
