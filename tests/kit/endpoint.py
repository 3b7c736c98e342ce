"""A tiny endpoint on a real Serve, for the tests that talk to it over HTTP."""

from __future__ import annotations

import base64
import io
import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

from instella_ray.serving.app import ModelArgs, ServeArgs, build

from .models import make_generator, make_tokenizer

KINDS = ("diffusion", "ar")


def make_folders(root: Path) -> dict[str, str]:
    """A random tokenizer and one random generator of each kind."""
    tokenizer = make_tokenizer(root / "bit")
    return {"bit": str(root / "bit"), **{kind: make_generator(root / kind, tokenizer, kind) for kind in KINDS}}


def serve_args(folders: dict[str, str], **changes: Any) -> ServeArgs:
    """Both kinds over one tokenizer; ``model`` are further settings of each."""
    given = changes.pop("model", {})
    models = {kind: ModelArgs(path=folders[kind], **given) for kind in KINDS}
    defaults = {"tokenizer": folders["bit"], "models": models, "sizes": (32, 64), "num_cpus": 0.1, "text_length": 24}
    return ServeArgs(**{**defaults, **changes})


@contextmanager
def serving(args: ServeArgs, name: str = "test") -> Iterator[str]:
    """The address of an endpoint that is there within the block."""
    from ray import serve

    _until_serve_is_gone()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # One proxy: those of several nodes on one machine would share the port, and take connections with them when they go.
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    try:
        serve.run(build(args), name=name, route_prefix="/")
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()


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


def pictures(client: httpx.Client, **body: Any) -> list[np.ndarray]:
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


def rows(model: str, app: str = "test") -> float:
    """Rows that a generator's replicas have waiting or active. Waits where a replica is full."""
    from ray import serve

    handle = serve.get_deployment_handle(f"Generator-{model}", app)
    stats = handle.broadcast("record_autoscaling_stats").results()
    return sum(value for replica in stats for key, value in replica.items() if key != "slots")


def wait_for_rows(model: str, expected: float, app: str = "test", seconds: float = 10) -> float:
    """Wait until a generator has so many rows; returns how long it took."""
    began = time.monotonic()
    while (found := rows(model, app)) != expected:
        assert time.monotonic() - began < seconds, f"{found} rows after {seconds} s, expected {expected}"
        time.sleep(0.02)
    return time.monotonic() - began
