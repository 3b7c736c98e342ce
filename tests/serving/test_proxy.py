"""The middleware of Serve's proxies: which requests are made again, and how failures read."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import Receive, Scope, Send

from instella_ray.serving import proxy
from instella_ray.serving.proxy import KeepRequests

Try = Callable[[Scope, Receive, Send], Awaitable[None]]


@pytest.fixture(autouse=True, scope="module")
def no_waiting() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proxy, "WAIT_S", 0.0)
        yield


class Serve:
    """Answers each try of a request by the next of ``tries``, after it has read the body."""

    def __init__(self, *tries: Try) -> None:
        self.tries, self.bodies = list(tries), list[bytes]()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["path"], scope["headers"] = "/changed", []
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message["body"], message.get("more_body", False)
        self.bodies.append(body)
        await self.tries.pop(0)(scope, receive, send)


def answer(status: int, content: bytes, kind: str = "application/json", *, cut: bool = False) -> Try:
    async def run(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", kind.encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": content, "more_body": cut})

    return run


async def nothing(scope: Scope, receive: Receive, send: Send) -> None:
    """What Serve does when a replica dies before its response begins."""


def post(serve: Serve, content: Any = b'{"prompt": "x"}') -> httpx.Response:
    async def run() -> httpx.Response:
        body = content() if callable(content) else content
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(KeepRequests(serve)), base_url="http://here"
        ) as client:
            return await client.post("/v1/images/generations", content=body)

    return asyncio.run(run())


async def chunks() -> Any:
    for _ in range(4):
        yield b"12345"


DRAINING = answer(503, b"This node is being drained.", "text/plain; charset=utf-8")


@pytest.mark.parametrize("lost", [nothing, DRAINING])
@pytest.mark.parametrize("content", [b'{"prompt": "x"}', chunks])
def test_a_request_whose_replica_is_lost_is_made_again_with_its_whole_body(lost: Try, content: Any) -> None:
    serve = Serve(lost, lost, answer(200, b"{}"))
    assert post(serve, content).json() == {}
    assert len(serve.bodies) == 3 and len(set(serve.bodies)) == 1 and serve.bodies[0]


def test_when_no_try_is_answered_the_failure_has_openai_s_form() -> None:
    response = post(Serve(*[nothing] * proxy.TRIES))
    assert response.status_code == 503 and response.json()["error"]["code"] == "replica_failed"
    assert response.headers["retry-after"] == "1"


def test_a_body_too_large_to_keep_is_not_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy, "REPEATED_BYTES", 10)
    serve = Serve(nothing)
    assert post(serve).status_code == 503 and len(serve.bodies) == 1


@pytest.mark.parametrize("status", [400, 401, 429, 500, 503])
def test_the_endpoint_s_own_answers_pass_unchanged(status: int) -> None:
    response = post(Serve(answer(status, b'{"error": {"code": "mine"}}')))
    assert (response.status_code, response.json()) == (status, {"error": {"code": "mine"}})


@pytest.mark.parametrize(
    ("status", "expected", "code"),
    [(404, 404, "not_found"), (408, 504, "deadline_exceeded"), (429, 429, "overloaded"), (413, 413, None)],
)
def test_refusals_of_serve_itself_have_openai_s_form(status: int, expected: int, code: str | None) -> None:
    response = post(Serve(answer(status, b"no", "text/plain")))
    assert response.status_code == expected and response.json()["error"]["code"] == code


def part(name: str, index: int, **numbers: int) -> bytes:
    return f"event: image_generation.{name}\ndata: {json.dumps({'type': name, 'index': index, **numbers})}\n\n".encode()


EVENTS = [
    part("progress", 0, step=1),
    part("progress", 1, step=1),
    part("partial_image", 0, partial_image_index=0, step=1),
    part("progress", 0, step=2),
    part("completed", 0),
    b": still there\n\n",
    part("progress", 1, step=2),
    part("completed", 1),
    b"data: [DONE]\n\n",
]


def streamed(events: list[bytes], *, cut: bool = False, seed: bytes = b"7") -> Try:
    async def run(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-seed", seed)]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for event in events:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        if not cut:
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    return run


@given(st.integers(0, len(EVENTS)), st.integers(0, len(EVENTS)))
def test_a_stream_whose_replica_is_lost_goes_on_with_what_was_not_sent(first: int, second: int) -> None:
    cut = [streamed(EVENTS[:count], cut=True) for count in (first, second)]
    serve = Serve(*cut, streamed(EVENTS))
    events = [event for event in post(serve).content.split(b"\n\n") if b"still there" not in event]
    assert events == [event for event in b"".join(EVENTS).split(b"\n\n") if b"still there" not in event]
    # The seed that the first replica drew makes the same images.
    tries = 1 if first == len(EVENTS) else 2 if second == len(EVENTS) else 3
    assert [json.loads(body).get("seed") for body in serve.bodies] == [None, 7, 7][:tries]


def test_a_stream_that_no_replica_ends_gets_an_error_event() -> None:
    lost = streamed(EVENTS[:1], cut=True)
    full = answer(429, b'{"error": {}}')
    for tries, code in (([lost] * proxy.TRIES, "replica_failed"), ([lost, full], "overloaded")):
        progress, error, done, _ = post(Serve(*tries)).text.split("\n\n")
        assert f"{progress}\n\n".encode() == EVENTS[0] and done == "data: [DONE]"
        name, data = error.splitlines()
        assert name == "event: error" and json.loads(data.removeprefix("data: "))["error"]["code"] == code


def test_a_client_that_has_left_is_not_served_again() -> None:
    tries = []

    async def left(scope: Scope, receive: Receive, send: Send) -> None:
        tries.append(await receive())

    async def disconnected() -> dict[str, str]:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        """Nobody reads it."""

    asyncio.run(KeepRequests(left)({"type": "http", "headers": []}, disconnected, send))
    assert tries == [{"type": "http.disconnect"}]


@pytest.mark.process
def test_proxies_import_nothing_heavy() -> None:
    code = "import sys, instella_ray.serving.proxy; sys.exit(any(m in sys.modules for m in ('torch', 'ray', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
