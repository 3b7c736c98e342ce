"""What only the endpoint on a real Serve can show: the process's own answers over its proxy, real clients, lost replicas."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from instella_ray.serving.local import build_local

from ..kit.asgi import in_process
from ..kit.browser import CONTROL, Browser
from ..kit.endpoint import APP, HEADERS, KEY, KINDS, Endpoint, events, generate, images, opened, small_args
from ..kit.playground import SHOWN, ask, complaint, shown, wait_for_images
from ..kit.stages import eventually

pytestmark = pytest.mark.ray

REQUESTS: list[dict[str, Any]] = [
    {"model": "diffusion", "n": 3, "seed": 5, "num_inference_steps": 12, "guidance_scale": 4.0, "size": "64x32"},
    {"model": "diffusion", "prompt": ["a", ""], "n": 2, "seed": 2**63 - 2, "sampler": "posterior", "final_draw": True},
    {"model": "diffusion", "seed": 7, "num_inference_steps": 30, "temperature": 0.5, "response_format": "codes"},
    {"model": "ar", "n": 3, "seed": 40, "temperature": 0.7, "output_format": "webp"},
    {"model": "ar", "prompt": "word " * 10, "seed": 1, "guidance_scale": 0, "output_format": "jpeg"},
]


@pytest.fixture
def client(real: Endpoint) -> Iterator[httpx.Client]:
    with real.client() as client:
        yield client
    real.wait_for_rows("diffusion", 0)


@pytest.fixture(scope="module")
def local(folders: dict[str, str]) -> Iterator[httpx.Client]:
    """The same endpoint in this process."""
    with in_process(build_local(small_args(folders))) as client:
        client.headers.update(HEADERS)
        yield client


def test_answers_are_those_of_one_process_bit_for_bit(client: httpx.Client, local: httpx.Client) -> None:
    for path in ("/v1/models", "/healthz"):
        assert client.get(path).json() == local.get(path).json()
    for body in REQUESTS:
        here, there = (generate(each, **body) for each in (local, client))
        assert here.status_code == there.status_code == 200, (here.text, there.text)
        assert here.json()["data"] == there.json()["data"], body
    body = {"codes": ["AAAA", "////"], "size": "64x64"}
    here, there = (each.post("/v1/codes/decode", json=body) for each in (local, client))
    assert there.status_code == 200 and here.json()["data"] == there.json()["data"]


@pytest.mark.parametrize("kind", KINDS)
def test_streams_are_those_of_one_process(client: httpx.Client, local: httpx.Client, kind: str) -> None:
    def told(by: httpx.Client) -> list[str]:
        body = {"model": kind, "seed": 3, "n": 2, "num_inference_steps": 12, "partial_images": 2}
        return sorted(json.dumps({**event, "created_at": 0}, sort_keys=True) for event in events(by, **body))

    assert told(client) == told(local)


def test_the_openai_client_works(real: Endpoint) -> None:
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{real.url}/v1", api_key=KEY, max_retries=0) as api:
        same = {"model": "ar", "prompt": "a circle", "size": "32x32", "extra_body": {"seed": 5}}
        answer = api.images.generate(n=2, response_format="b64_json", **same)
        direct = [base64.b64decode(item.b64_json) for item in answer.data]
        assert [Image.open(io.BytesIO(file)).size for file in direct] == [(32, 32)] * 2
        with api.images.generate(stream=True, partial_images=1, **same) as stream:
            seen = [event for event in stream if event.type != "image_generation.progress"]
        assert [event.type for event in seen] == ["image_generation.partial_image", "image_generation.completed"]
        assert base64.b64decode(seen[-1].b64_json) == direct[0]
        with pytest.raises(openai.BadRequestError, match="n: 4") as caught:
            api.images.generate(model="ar", n=4, prompt="x")
        assert caught.value.param == "n"
    with openai.OpenAI(base_url=f"{real.url}/v1", api_key=f"{KEY}x", max_retries=0) as api:
        with pytest.raises(openai.AuthenticationError):
            api.models.list()


def test_usage_is_counted_by_key(real: Endpoint, client: httpx.Client) -> None:
    import ray
    from ray._common.test_utils import fetch_prometheus_metrics

    addresses = [f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}" for node in ray.nodes()]

    def value(name: str, **tags: str) -> float:
        samples = fetch_prometheus_metrics(addresses).get(f"ray_instella_{name}", [])
        return sum(s.value for s in samples if tags.items() <= s.labels.items())

    def counted() -> list[float]:
        of_model = {"key": "unnamed", "model": "diffusion", "application": APP}
        return [
            value("requests_total", key="unnamed", status="200", code=""),
            value("requests_total", key="none", status="401", code="invalid_api_key"),
            value("key_images_total", **of_model),
            value("key_steps_total", **of_model),
            value("request_seconds_count", application=APP),
            value("request_seconds_bucket", application=APP, le="10.0"),
        ]

    before = counted()
    answer = generate(client, n=2, num_inference_steps=501, response_format="codes")
    assert answer.status_code == 200 and len(answer.headers.get_list("x-request-id")) == 1
    with httpx.Client(base_url=real.url) as stranger:
        assert generate(stranger).status_code == 401
    # At least: what earlier requests counted may come late. So many steps only this one takes.
    expected = [was + new for was, new in zip(before, [1, 1, 2, 1002, 1, 1], strict=True)]
    eventually(lambda: all(now >= then for now, then in zip(counted(), expected, strict=True)))


def test_the_page_works_with_the_endpoint(browser: Browser, real: Endpoint, client: httpx.Client) -> None:
    with browser.page() as page:
        page.look()
        page.goto(real.url)
        page.wait(SHOWN)
        page.fill("#key", KEY)
        page.press("Tab")
        page.wait("document.querySelector('[name=size] option')")
        ask(page, "a photo of a red circle", seed=5)
        wait_for_images(page)
        first = shown(page)
        assert pixels(first).shape == (32, 32, 3)
        (answer,) = images(client, prompt="a photo of a red circle", seed=5)
        assert np.array_equal(answer, pixels(first))
        page.choose("article select", "64x32")
        page.wait("document.querySelector('.facts').textContent.startsWith('64 × 32')")
        assert pixels(shown(page)).shape == (32, 64, 3)
        page.fill("[name=num_inference_steps]", "0")
        page.press("Enter", CONTROL)
        assert "num_inference_steps" in complaint(page)
        assert page.complaints == []


def pixels(file: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(file)))


@pytest.mark.parametrize("stream", [pytest.param(False, marks=pytest.mark.nightly), True])
def test_a_replica_that_dies_costs_time_and_nothing_else(real: Endpoint, client: httpx.Client, stream: bool) -> None:
    """The same image, and in a stream no event twice."""
    same = {"seed": 4, "num_inference_steps": 3000}
    (expected,) = images(client, **same)

    def asked() -> np.ndarray:
        if not stream:
            return images(client, **same)[0]
        seen = list(events(client, **same, response_format="codes", partial_images=4))
        steps = [event["step"] for event in seen if event["type"] == "image_generation.progress"]
        assert steps == sorted(set(steps)) and "error" not in seen[-1]
        body = {"codes": seen[-1]["codes"]}
        assert len([e for e in seen if e["type"] == "image_generation.partial_image"]) == 4
        answer = client.post("/v1/codes/decode", json=body).json()["data"][0]["b64_json"]
        return np.asarray(opened(answer))

    with ThreadPoolExecutor() as pool, real.client() as probe:
        answer = pool.submit(asked)
        real.wait_for_rows("diffusion", 1)
        kill_the_replica(f"{APP}#Generator-diffusion")
        eventually(lambda: probe.get("/healthz").status_code == 503)
        assert "diffusion" in probe.get("/healthz").json()["error"]["message"]
        assert np.array_equal(answer.result(timeout=150), expected)
        assert probe.get("/healthz").status_code == 200


def kill_the_replica(deployment: str) -> None:
    import ray

    names = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]
    (name,) = [name for name in names if f"SERVE_REPLICA::{deployment}#" in name]
    ray.kill(ray.get_actor(name, namespace="serve"))


@pytest.mark.nightly
def test_serves_own_bound_becomes_429(serve_url: str, tmp_path: Path) -> None:
    """The bound behind the gate: a handle inside a deployment raises it for calls and streams, and both become 429."""
    from ray import serve

    caller = serve.run(full_graph(), name="full", route_prefix=None)
    try:
        for stream in (False, True):
            status, hold = caller.overflow.remote(stream, str(tmp_path / f"working-{stream}")).result()
            assert status == 429 and hold >= 2
    finally:
        serve.delete("full")


def full_graph() -> Any:
    """A graph whose generator works on one call, without an end, and lets one wait; and who asks it for too much."""
    import asyncio
    import time

    from ray import serve

    from instella_ray.serving.failures import api_error
    from instella_ray.serving.graph import GeneratedImage, Graph
    from instella_ray.serving.health import unhealthy

    options: dict[str, Any] = {"ray_actor_options": {"num_cpus": 0}}

    @serve.deployment(max_ongoing_requests=1, max_queued_requests=1, **options)
    class Busy:
        async def generate(self, *arguments: Any) -> None:
            Path(arguments[-1]).touch()  # the prompt
            await asyncio.Event().wait()

        async def follow(self, *arguments: Any) -> Any:
            yield await self.generate(*arguments)

    @serve.deployment(**options)
    class Text:
        async def encode(self, prompt: str) -> np.ndarray:
            return np.zeros((1, 1, 1), dtype=np.float32)

    @serve.deployment(**options)
    class Caller:
        def __init__(self, busy: Any, text: Any) -> None:
            self.graph = Graph(text, text, {"busy": busy}, "0" * 64, unhealthy)

        async def overflow(self, stream: bool, working: str) -> tuple[int, int]:
            """Calls until one is refused: its status, and how many were not. Those are cancelled."""
            calls = [asyncio.create_task(self.ask(stream, working))]
            while not Path(working).exists():
                await asyncio.sleep(0.01)
            refused: set[asyncio.Task[None]] = set()
            while not refused and len(calls) < 60:
                calls.append(asyncio.create_task(self.ask(stream, working)))
                # Serve counts who waits when the arguments are there: the next call must not come before.
                refused, _ = await asyncio.wait(calls, timeout=1, return_when=asyncio.FIRST_COMPLETED)
            for call in calls:
                call.cancel()
            return api_error(refused.pop().exception()).status, len(calls) - 1

        async def ask(self, stream: bool, working: str) -> None:
            image, deadline = GeneratedImage(0, "busy", working, {}, 1, 1, "png"), time.monotonic() + 60
            await (self.graph.follow(image, deadline, 1, print) if stream else self.graph.codes(image, deadline))

    return Caller.bind(Busy.bind(), Text.bind())
