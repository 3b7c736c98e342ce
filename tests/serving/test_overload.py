"""A small endpoint with keys that is asked for too much: limits, overload, deadlines, clients that leave, lost replicas."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx
import numpy as np
import pytest

from instella_ray.serving.access import KEYS_VARIABLE
from instella_ray.serving.config import Limits

from ..kit.endpoint import events, generate, make_folders, opened, pictures, serve_args, serving, wait_for_rows

KEY = "correct-horse-battery"
HEADERS = {"authorization": f"Bearer {KEY}"}
LONG = 1_000_000
"""Steps that nobody waits for."""
LIMITS = Limits(prompt_characters=400, prompt_tokens=20, n=3, pictures=4, steps=LONG, body_bytes=20_000, timeout_s=120)


@pytest.fixture(scope="module")
def url(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    args = serve_args(make_folders(tmp_path_factory.mktemp("models")), limits=LIMITS, model={"slots": 2, "queue": 2})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(KEYS_VARIABLE, KEY)
        with serving(args) as url:
            yield url


@pytest.fixture
def client(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=150, headers=HEADERS) as client:
        yield client
    assert wait_for_rows("diffusion", 0) < 10, "the test has left pictures in the engine"


@contextmanager
def under_way(url: str, count: int) -> Iterator[None]:
    """So many requests with a picture that takes forever, until the block ends and their clients leave."""
    body = {"prompt": "x", "stream": True, "num_inference_steps": LONG}
    with ExitStack() as stack:
        for _ in range(count):
            http = stack.enter_context(httpx.Client(base_url=url, timeout=60, headers=HEADERS))
            response = stack.enter_context(http.stream("POST", "/v1/images/generations", json=body))
            assert response.status_code == 200
        yield


@pytest.mark.ray
def test_nothing_but_the_page_and_the_probe_answers_without_a_key(url: str) -> None:
    with httpx.Client(base_url=url, timeout=60) as stranger:
        assert generate(stranger).status_code == 401
        assert stranger.get("/v1/models", headers={"authorization": f"Bearer {KEY}x"}).status_code == 401
        assert stranger.get("/healthz").status_code == 200
        assert stranger.get("/").status_code in (200, 404)
        assert stranger.get("/v1/models", headers=HEADERS).status_code == 200


@pytest.mark.ray
@pytest.mark.parametrize(
    ("body", "field", "words"),
    [
        ({"n": 4}, "n", "at most 3"),
        ({"n": 3, "prompt": ["a", "b"]}, "prompt", "6 pictures"),
        ({"prompt": "x" * 401}, "prompt", "401 characters"),
        ({"prompt": ["a", "word " * 30]}, "prompt", "32 tokens, expected at most 20"),
        ({"num_inference_steps": LONG + 1}, "num_inference_steps", "at most"),
        ({"timeout_s": 121}, "timeout_s", "at most 120"),
    ],
)
def test_each_limit_names_its_field(client: httpx.Client, body: dict[str, Any], field: str, words: str) -> None:
    response = generate(client, **body)
    error = response.json()["error"]
    assert response.status_code == 400 and error["param"] == field
    assert error["message"].startswith(field) and words in error["message"]


@pytest.mark.ray
def test_a_body_beyond_the_limit_is_413_whether_its_length_is_announced_or_not(client: httpx.Client) -> None:
    def chunks() -> Iterator[bytes]:
        yield b'{"prompt": "'
        for _ in range(30):
            yield b"x" * 1000

    for content in (b"x" * 20_001, chunks()):
        response = client.post("/v1/images/generations", content=content, headers={"content-type": "application/json"})
        assert response.status_code == 413 and response.json()["error"]["code"] == "body_too_large"


@pytest.mark.ray
def test_overload_is_429_within_100_ms_and_the_queue_does_not_grow(client: httpx.Client, url: str) -> None:
    with under_way(url, 6):  # two slots, two beside them in the replica, two in the queue
        seconds = []
        for stream in [False, True] * 10:
            began = time.perf_counter()
            response = generate(client, stream=stream)
            seconds.append(time.perf_counter() - began)
            assert response.status_code == 429 and int(response.headers["retry-after"]) >= 1
            assert response.json()["error"]["code"] == "overloaded"
        print(f"429 after {1000 * statistics.median(seconds):.0f} ms (median), {1000 * max(seconds):.0f} ms (most)")
        assert statistics.median(seconds) < 0.1
        # Only this model is full, and full is not ill.
        assert generate(client, model="ar").status_code == 200
        assert client.get("/healthz").status_code == 200
    wait_for_rows("diffusion", 0)
    assert generate(client).status_code == 200


@pytest.mark.ray
def test_a_request_gets_room_for_all_of_its_pictures_or_for_none(client: httpx.Client, url: str) -> None:
    with under_way(url, 4):
        assert generate(client, n=3, timeout_s=0.5).status_code == 429
        assert generate(client, n=2, timeout_s=0.5).status_code == 504


@pytest.mark.ray
def test_a_deadline_gives_504_and_the_slots_back(client: httpx.Client) -> None:
    began = time.monotonic()
    response = generate(client, n=3, num_inference_steps=LONG, timeout_s=1.0)
    assert response.status_code == 504 and response.json()["error"]["param"] == "timeout_s"
    assert 1.0 <= time.monotonic() - began < 3
    assert wait_for_rows("diffusion", 0) < 2
    seen = list(events(client, num_inference_steps=LONG, timeout_s=1.0))
    assert seen[-1]["error"]["code"] == "deadline_exceeded"
    assert wait_for_rows("diffusion", 0) < 2


@pytest.mark.ray
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slots(client: httpx.Client, url: str, stream: bool) -> None:
    with ThreadPoolExecutor() as pool, httpx.Client(base_url=url, timeout=2, headers=HEADERS) as impatient:
        body = {"n": 3, "num_inference_steps": LONG, "stream": stream, "prompt": "x"}
        if stream:
            with impatient.stream("POST", "/v1/images/generations", json=body):
                wait_for_rows("diffusion", 3)
        else:
            leaves = pool.submit(generate, impatient, **body)
            wait_for_rows("diffusion", 3)
            assert isinstance(leaves.exception(), httpx.ReadTimeout)
    took = wait_for_rows("diffusion", 0)
    print(f"slots free {1000 * took:.0f} ms after the client left (stream: {stream})")
    # The places in the queue are free too: as many pictures as there is room for get in.
    with under_way(url, 6):
        assert generate(client).status_code == 429


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
def test_a_replica_that_dies_costs_time_and_nothing_else(client: httpx.Client, stream: bool) -> None:
    """The same picture, and in a stream no event twice."""
    import ray

    same = {"seed": 4, "num_inference_steps": 3000}
    (expected,) = pictures(client, **same)

    def ask() -> np.ndarray:
        if not stream:
            return pictures(client, **same)[0]
        seen = list(events(client, **same, response_format="codes", partial_images=4))
        steps = [event["step"] for event in seen if event["type"] == "image_generation.progress"]
        assert steps == sorted(set(steps)) and "error" not in seen[-1]
        body = {"codes": seen[-1]["codes"]}
        assert len([e for e in seen if e["type"] == "image_generation.partial_image"]) == 4
        answer = client.post("/v1/codes/decode", json=body).json()["data"][0]["b64_json"]
        return np.asarray(opened(answer))

    with ThreadPoolExecutor() as pool:
        answer = pool.submit(ask)
        wait_for_rows("diffusion", 1)
        (name,) = [
            actor["name"]
            for actor in ray.util.list_named_actors(all_namespaces=True)
            if "SERVE_REPLICA::test#Generator-diffusion#" in actor["name"]
        ]
        ray.kill(ray.get_actor(name, namespace="serve"))
        began = time.monotonic()
        while (health := client.get("/healthz")).status_code != 503:
            assert time.monotonic() - began < 15, "nobody noticed that a stage is gone"
        assert "diffusion" in health.json()["error"]["message"]
        assert np.array_equal(answer.result(timeout=150), expected)
        print(f"answered {time.monotonic() - began:.0f} s after its replica was killed (stream: {stream})")
    assert client.get("/healthz").status_code == 200


@pytest.mark.ray
@pytest.mark.slow
def test_serves_own_bound_reaches_the_endpoint_as_429(ray_session: None, url: str) -> None:
    """The bound behind the gate: a handle inside a deployment raises it for calls and streams, and both become 429."""
    from ray import serve

    from instella_ray.serving.failures import api_error
    from instella_ray.serving.graph import Graph, Picture

    @serve.deployment(num_replicas=1, max_ongoing_requests=1, max_queued_requests=1, ray_actor_options={"num_cpus": 0})
    class Busy:
        async def encode(self, prompt: str) -> str:
            return prompt

        async def generate(self, *_: Any) -> None:
            import asyncio

            await asyncio.sleep(5)

        async def follow(self, *_: Any) -> Any:
            yield await self.generate()

    @serve.deployment(ray_actor_options={"num_cpus": 0})
    class Text:
        async def encode(self, prompt: str) -> str:
            return prompt

    @serve.deployment(ray_actor_options={"num_cpus": 0})
    class Caller:
        def __init__(self, busy: Any, text: Any) -> None:
            self.graph = Graph(text, text, {"busy": busy}, "0" * 64)

        async def ask(self, stream: bool) -> tuple[int, float]:
            import asyncio

            began = time.monotonic()
            picture = Picture(0, "busy", "x", {}, 1, 1, "png")
            try:
                async with asyncio.timeout(3):
                    if stream:
                        await self.graph.follow(picture, began + 60, 1, print)
                    else:
                        await self.graph.codes(picture, began + 60)
            except Exception as error:
                return api_error(error).status, time.monotonic() - began
            return 200, 0.0

    caller = serve.run(Caller.bind(Busy.bind(), Text.bind()), name="busy", route_prefix=None)
    try:
        for stream in (False, True):
            taken = []
            for _ in range(2):  # one works, one waits
                taken.append(caller.ask.remote(stream))
                time.sleep(0.5)
            status, seconds = caller.ask.remote(stream).result()
            assert status == 429 and seconds < 0.5
            # Both gave up, and their calls were cancelled: the next one finds the queue empty.
            assert [answer.result()[0] for answer in taken] == [504, 504]
    finally:
        serve.delete("busy")
