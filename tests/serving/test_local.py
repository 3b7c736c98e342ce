"""The endpoint in one process: what its handles owe the graph, clients that leave, failures, and no Ray at all."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from instella_ray.errors import UserError
from instella_ray.serving.local import LocalHandle, build_local, unhealthy

from ..kit.asgi import in_process
from ..kit.endpoint import events, generate, serve_args

NO_RAY = """
import sys
from fastapi.testclient import TestClient
from instella_ray.serving.config import ServeArgs
from instella_ray.serving.local import build_local
with TestClient(build_local(ServeArgs.model_validate_json(sys.argv[1])), client=("127.0.0.1", 50000)) as client:
    for body in ({"n": 2}, {"model": "ar", "stream": True}):
        answer = client.post("/v1/images/generations", json={"prompt": "a red circle", **body})
        assert answer.status_code == 200, answer.text
    assert client.get("/healthz").json() == {"status": "ok"}
assert "ray" not in sys.modules
"""


class Stage:
    """Counts, and knows how each of its calls ended."""

    def __init__(self) -> None:
        self.ended: list[str] = []
        self.closed = False

    async def double(self, value: int) -> int:
        return 2 * value

    async def wait(self, value: Any = None) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            self.ended.append("wait")

    async def refuse(self) -> None:
        raise UserError("no")

    async def count(self, to: int, last: int | None = None) -> AsyncIterator[int]:
        try:
            for value in range(to):
                yield value
            if last is not None:
                raise UserError(f"no more than {last}")
            await asyncio.Event().wait()
        finally:
            self.ended.append("count")

    async def check_health(self) -> None:
        if self.ended:
            raise RuntimeError("something has ended")

    async def close(self) -> None:
        self.closed = True


async def until(condition: Any) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0)


def test_a_call_begins_at_once_and_gives_its_results_or_its_failure() -> None:
    async def run() -> None:
        handle = LocalHandle(Stage())
        call = handle.double.remote(3)
        await until(call.done)
        assert await call == 6
        with pytest.raises(UserError, match="no"):
            await handle.refuse.remote()
        parts = handle.options(stream=True).count.remote(2, 9)
        assert [await anext(parts), await anext(parts)] == [0, 1]
        with pytest.raises(UserError, match="no more than 9"):
            await anext(parts)
        assert handle.stage.ended == ["count"] and not handle.calls

    asyncio.run(run())


def test_a_cancelled_call_ends_and_so_does_a_stream() -> None:
    async def run() -> None:
        handle = LocalHandle(Stage())
        call, parts = handle.wait.remote(), handle.options(stream=True).count.remote(2)
        assert [await anext(parts), await anext(parts)] == [0, 1] and len(handle.calls) == 2
        call.cancel()
        parts.cancel()
        await until(lambda: not handle.calls)
        assert sorted(handle.stage.ended) == ["count", "wait"]
        with pytest.raises(asyncio.CancelledError):
            await anext(parts)

    asyncio.run(run())


def test_a_handle_is_closed_with_its_calls() -> None:
    async def run() -> None:
        handle = LocalHandle(Stage())
        call, parts = handle.wait.remote(), handle.options(stream=True).count.remote(2)
        await anext(parts)
        await handle.close()
        assert call.cancelled() and sorted(handle.stage.ended) == ["count", "wait"] and handle.stage.closed

    asyncio.run(run())


def test_stages_are_asked_how_they_are() -> None:
    well, ill = LocalHandle(Stage()), LocalHandle(Stage())
    ill.stage.ended.append("wait")
    assert asyncio.run(unhealthy({"well": well, "ill": ill})) == ["ill: RuntimeError"]


# --- the endpoint


@pytest.fixture
def api(folders: dict[str, str]) -> FastAPI:
    return build_local(serve_args(folders))


@pytest.fixture
def client(api: FastAPI) -> Iterator[httpx.Client]:
    with in_process(api) as client:
        yield client


def test_an_engine_that_breaks_is_told_and_makes_the_endpoint_ill(
    api: FastAPI, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    monkeypatch.setattr(api.state.graph.generators["ar"].stage.runner.engine, "step", lambda: 1 / 0)
    for answer in (generate(client, model="ar"), client.get("/healthz")):
        assert answer.status_code == 503
    assert client.get("/healthz").json()["error"]["message"] == "unhealthy: ar: EngineFailed"
    assert generate(client, model="ar").json()["error"]["code"] == "replica_failed"
    assert list(events(client, model="ar"))[-1]["error"]["code"] == "replica_failed"
    assert generate(client, model="diffusion").status_code == 200


def test_images_of_a_prompt_share_its_projection(api: FastAPI, client: httpx.Client) -> None:
    cached = api.state.graph.generators["ar"].stage.runner.engine.slots.project.cache.items
    assert generate(client, model="ar", prompt="one", n=2).status_code == 200 and list(cached) == ["one"]
    list(events(client, model="ar", prompt="two"))
    assert list(cached) == ["one", "two"]


def test_it_ends_with_its_threads(folders: dict[str, str]) -> None:
    before = set(threading.enumerate())
    with in_process(build_local(serve_args(folders))) as client:
        assert generate(client).status_code == 200
        begun = {thread.name for thread in set(threading.enumerate()) - before}
        assert {"step-engine", "image-files_0"} <= begun
    left = {thread.name for thread in set(threading.enumerate()) - before}
    assert not any(name.startswith(("step-engine", "image-files")) for name in left)


@pytest.mark.process
def test_it_needs_no_ray(folders: dict[str, str]) -> None:
    command = [sys.executable, "-c", NO_RAY, serve_args(folders).model_dump_json()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
