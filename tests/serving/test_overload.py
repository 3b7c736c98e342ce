"""A small endpoint with keys that is asked for too much: limits, overload, deadlines, clients that leave.

In this process, behind a server on loopback; and on Serve, where its proxy, its queues and its way to cancel take part.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx
import pytest

from ..kit.endpoint import HEADERS, KEY, LONG, Endpoint, events, generate, local_endpoint, small_args


@pytest.fixture(scope="module")
def local(folders: dict[str, str]) -> Iterator[Endpoint]:
    with local_endpoint(small_args(folders), HEADERS) as endpoint:
        yield endpoint


@pytest.fixture(params=["local", pytest.param("real", marks=pytest.mark.ray)])
def endpoint(request: pytest.FixtureRequest) -> Iterator[Endpoint]:
    found: Endpoint = request.getfixturevalue(request.param)
    yield found
    found.wait_for_rows("diffusion", 0)


@contextmanager
def under_way(endpoint: Endpoint, count: int) -> Iterator[None]:
    """So many requests with an image that takes forever, until the block ends and their clients leave."""
    body = {"prompt": "x", "stream": True, "num_inference_steps": LONG}
    with ExitStack() as stack:
        for _ in range(count):
            http = stack.enter_context(endpoint.client())
            response = stack.enter_context(http.stream("POST", "/v1/images/generations", json=body))
            assert response.status_code == 200
        yield


def test_nothing_but_the_page_and_the_probe_answers_without_a_key(endpoint: Endpoint) -> None:
    with httpx.Client(base_url=endpoint.url, timeout=60) as stranger:
        assert generate(stranger).status_code == 401
        assert stranger.get("/v1/models", headers={"authorization": f"Bearer {KEY}x"}).status_code == 401
        assert stranger.get("/healthz").status_code == 200
        assert stranger.get("/").status_code in (200, 404)
        assert stranger.get("/v1/models", headers=HEADERS).status_code == 200


@pytest.mark.parametrize(
    ("body", "field", "words"),
    [
        ({"n": 4}, "n", "at most 3"),
        ({"n": 3, "prompt": ["a", "b"]}, "prompt", "6 images"),
        ({"prompt": "x" * 401}, "prompt", "401 characters"),
        ({"prompt": ["a", "word " * 30]}, "prompt", "32 tokens, expected at most 20"),
        ({"num_inference_steps": LONG + 1}, "num_inference_steps", "at most"),
        ({"timeout_s": 121}, "timeout_s", "at most 120"),
    ],
)
def test_each_limit_names_its_field(local: Endpoint, body: dict[str, Any], field: str, words: str) -> None:
    with local.client() as client:
        response = generate(client, **body)
    error = response.json()["error"]
    assert response.status_code == 400 and error["param"] == field
    assert error["message"].startswith(field) and words in error["message"]


def test_a_body_beyond_the_limit_is_413_whether_its_length_is_announced_or_not(endpoint: Endpoint) -> None:
    def chunks() -> Iterator[bytes]:
        yield b'{"prompt": "'
        for _ in range(30):
            yield b"x" * 1000

    with endpoint.client() as client:
        for content in (b"x" * 20_001, chunks()):
            headers = {"content-type": "application/json"}
            response = client.post("/v1/images/generations", content=content, headers=headers)
            assert response.status_code == 413 and response.json()["error"]["code"] == "body_too_large"


def test_overload_is_429_at_once_and_the_queue_does_not_grow(endpoint: Endpoint) -> None:
    """Images that never end take every place: whoever had to wait for one of those would have no answer at all."""
    with under_way(endpoint, 6), endpoint.client() as client:
        seconds = []
        for stream in [False, True] * 10:
            began = time.perf_counter()
            response = generate(client, stream=stream)
            seconds.append(time.perf_counter() - began)
            assert response.status_code == 429 and int(response.headers["retry-after"]) >= 1
            assert response.json()["error"]["code"] == "overloaded"
        print(f"429 after {1000 * statistics.median(seconds):.0f} ms (median), {1000 * max(seconds):.0f} ms (most)")
        # Only this model is full, and full is not unhealthy.
        assert generate(client, model="ar").status_code == 200
        assert client.get("/healthz").status_code == 200
    endpoint.wait_for_rows("diffusion", 0)
    with endpoint.client() as client:
        assert generate(client).status_code == 200


def test_what_is_admitted_waits_in_the_engine_and_not_on_the_way_to_it(endpoint: Endpoint) -> None:
    """Serve's router looks for a free place only from time to time. One place is left for the question."""
    with under_way(endpoint, 5):
        endpoint.wait_for_rows("diffusion", 5)


def test_a_request_gets_room_for_all_of_its_images_or_for_none(local: Endpoint) -> None:
    with under_way(local, 4), local.client() as client:
        assert generate(client, n=3, timeout_s=0.5).status_code == 429
        assert generate(client, n=2, timeout_s=0.5).status_code == 504
    local.wait_for_rows("diffusion", 0)


def test_a_deadline_gives_504_and_the_slots_back(endpoint: Endpoint) -> None:
    with endpoint.client() as client:
        response = generate(client, n=3, num_inference_steps=LONG, timeout_s=1.0)
        assert response.status_code == 504 and response.json()["error"]["param"] == "timeout_s"
        endpoint.wait_for_rows("diffusion", 0)
        seen = list(events(client, num_inference_steps=LONG, timeout_s=1.0))
        assert seen[-1]["error"]["code"] == "deadline_exceeded"
        endpoint.wait_for_rows("diffusion", 0)


def test_events_come_while_the_image_is_on_its_way(endpoint: Endpoint) -> None:
    body = {"prompt": "x", "stream": True, "num_inference_steps": 10_000}
    with endpoint.client() as client, client.stream("POST", "/v1/images/generations", json=body) as response:
        lines = response.iter_lines()  # the connection ends with it
        assert next(filter(None, lines)) == "event: image_generation.progress"
        assert endpoint.rows("diffusion") == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slots(endpoint: Endpoint, stream: bool) -> None:
    body = {"n": 3, "num_inference_steps": LONG, "stream": stream, "prompt": "x"}

    async def leave() -> None:
        async with httpx.AsyncClient(base_url=endpoint.url, timeout=60, headers=dict(endpoint.headers)) as client:
            request = asyncio.create_task(client.post("/v1/images/generations", json=body))
            await asyncio.to_thread(endpoint.wait_for_rows, "diffusion", 3)
            request.cancel()

    asyncio.run(leave())
    took = endpoint.wait_for_rows("diffusion", 0)
    print(f"slots free {1000 * took:.0f} ms after the client left (stream: {stream})")
    # The places in the queue are free too: as many images as there is room for get in.
    with under_way(endpoint, 6), endpoint.client() as client:
        assert generate(client).status_code == 429
