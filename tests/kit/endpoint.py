"""Tiny endpoints, on a real Serve and in this process, for the tests that talk to them over HTTP."""

from __future__ import annotations

import base64
import io
import json
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from fastapi import FastAPI
from PIL import Image

from instella_ray.serving.config import ModelArgs, RequestLimits, ServeArgs
from instella_ray.serving.local import build_local

from .asgi import listening
from .models import make_generator, make_tokenizer

KINDS = ("diffusion", "ar")
APP = "test"
"""Name of the endpoint's application on Serve."""
KEY = "correct-horse-battery"
HEADERS = {"authorization": f"Bearer {KEY}"}
LONG = 1_000_000
"""Steps that nobody waits for."""
LIMITS = RequestLimits(
    prompt_characters=400, prompt_tokens=20, n=3, images=4, steps=LONG, body_bytes=20_000, timeout_s=120
)


def make_folders(root: Path) -> dict[str, str]:
    """A random tokenizer, one random generator of each kind, and a file with an API key."""
    tokenizer = make_tokenizer(root / "bit")
    (root / "keys").write_text(KEY)
    kinds = {kind: make_generator(root / kind, tokenizer, kind) for kind in KINDS}
    return {"bit": str(root / "bit"), "keys": str(root / "keys"), **kinds}


def serve_args(folders: dict[str, str], **changes: Any) -> ServeArgs:
    """Both kinds over one tokenizer; ``model`` are further settings of each."""
    given = changes.pop("model", {})
    models = {kind: ModelArgs(path=folders[kind], **given) for kind in KINDS}
    defaults = {"tokenizer": folders["bit"], "models": models, "sizes": (32, 64), "num_cpus": 0.1, "text_length": 24}
    return ServeArgs(**{**defaults, **changes})


def small_args(folders: dict[str, str]) -> ServeArgs:
    """An endpoint with keys that six images fill: two slots, two beside them in the replica, two in the queue."""
    one = {"ingress_replicas": 1, "api_keys_file": folders["keys"]}
    return serve_args(folders, limits=LIMITS, model={"slots": 2, "queue": 2}, **one)


@contextmanager
def serve_started() -> Iterator[str]:
    """The address of a Serve that is there within the block, without applications."""
    from ray import serve

    _until_serve_is_gone()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # One proxy: those of several nodes on one machine would share the port, and take connections with them when they go.
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()


@contextmanager
def deployed(args: ServeArgs, name: str, route_prefix: str = "/") -> Iterator[None]:
    """An endpoint on the Serve that is there."""
    from ray import serve

    deploy(args, name, route_prefix)
    try:
        yield
    finally:
        serve.delete(name)


def deploy(args: ServeArgs, name: str, route_prefix: str) -> None:
    from ray import serve

    from instella_ray.serving.app import build

    serve.run(build(args), name=name, route_prefix=route_prefix)


@contextmanager
def serving(args: ServeArgs) -> Iterator[str]:
    """The address of an endpoint on a Serve of its own."""
    with serve_started() as url:
        deploy(args, APP, "/")
        yield url


def _until_serve_is_gone(seconds: float = 120) -> None:
    """Serve's shutdown gives up waiting after a while; who starts it then gets the one that is on its way out."""
    import ray

    began = time.monotonic()
    while any(actor["name"] == "SERVE_CONTROLLER_ACTOR" for actor in ray.util.list_named_actors(all_namespaces=True)):
        assert time.monotonic() - began < seconds, "the Serve of an earlier test does not end"
        time.sleep(0.5)


def generate(client: httpx.Client, **body: Any) -> httpx.Response:
    return client.post("/v1/images/generations", json={"prompt": "a photo of a red circle", **body})


def opened(b64_json: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(b64_json)))


def images(client: httpx.Client, **body: Any) -> list[np.ndarray]:
    response = generate(client, **body)
    assert response.status_code == 200, response.text
    return [np.asarray(opened(item["b64_json"])) for item in response.json()["data"]]


def events(client: httpx.Client, **body: Any) -> Iterator[dict[str, Any]]:
    """Data of each server-sent event of a request, checked against the event's name; [DONE] must come last."""
    body = {"prompt": "a photo of a red circle", "stream": True, **body}
    with client.stream("POST", "/v1/images/generations", json=body) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        name, done = None, False
        for line in response.iter_lines():
            assert not done or not line, "nothing comes after [DONE]"
            if line.startswith("event: "):
                name = line.removeprefix("event: ")
            elif line == "data: [DONE]":
                done = True
            elif line.startswith("data: "):
                data = json.loads(line.removeprefix("data: "))
                assert data.get("type", "error") == name
                yield data
        assert done


@dataclass(frozen=True)
class Endpoint:
    """An endpoint that listens, and a look into its engines."""

    url: str
    rows: Callable[[str], float]
    """Rows that a generator has waiting or active, by model."""
    headers: Mapping[str, str] = field(default_factory=dict)

    def client(self, **options: Any) -> httpx.Client:
        """A new client with the endpoint's key."""
        return httpx.Client(base_url=self.url, headers=dict(self.headers), **{"timeout": 150, **options})

    def wait_for_rows(self, model: str, expected: float, seconds: float = 10) -> float:
        """Wait until a generator has so many rows; returns how long it took."""
        began = time.monotonic()
        while (found := self.rows(model)) != expected:
            assert time.monotonic() - began < seconds, f"{found} rows after {seconds} s, expected {expected}"
            time.sleep(0.02)
        return time.monotonic() - began


def serve_rows(app: str, model: str) -> float:
    """Rows of a generator's replicas on Serve. Waits where a replica is full."""
    from ray import serve

    handle = serve.get_deployment_handle(f"Generator-{model}", app)
    stats = handle.broadcast("record_autoscaling_stats").results()
    return sum(value for replica in stats for key, value in replica.items() if key != "slots")


def local_rows(api: FastAPI, model: str) -> float:
    """Rows of a generator of this process."""
    stats = api.state.graph.generators[model].stage.runner.stats
    return float(stats.waiting + stats.active)


@contextmanager
def local_endpoint(args: ServeArgs, headers: Mapping[str, str] | None = None) -> Iterator[Endpoint]:
    """An endpoint of this process that listens on loopback."""
    api = build_local(args)
    with listening(api) as url:
        yield Endpoint(url, partial(local_rows, api), headers or {})
