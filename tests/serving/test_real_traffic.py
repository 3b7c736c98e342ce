"""Random requests, sixteen in flight: images, streams, mistakes, clients that leave, deadlines that pass."""

from __future__ import annotations

import base64
import collections
import json
import random
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import httpx
import numpy as np
import pytest

from instella_ray.serving.config import ServeArgs

from ..kit.endpoint import (
    KINDS,
    Endpoint,
    deployed,
    events,
    generate,
    images,
    local_endpoint,
    opened,
    serve_args,
    serve_rows,
)

IN_FLIGHT = 16
APP = "random-requests"
GROWTH_MB = 60
"""What all replicas together may grow by over the second half of the requests; a leak of images would be more."""

BAD = [
    ({"n": 0}, "n"),
    ({"n": 99}, "n"),
    ({"num_inference_steps": 0}, "num_inference_steps"),
    ({"num_inference_steps": 2.5}, "num_inference_steps"),
    ({"temperature": -1}, "temperature"),
    ({"guidance_scale": "much"}, "guidance_scale"),
    ({"sampler": "ddim"}, "sampler"),
    ({"size": "33x33"}, "size"),
    ({"size": "-1x64"}, "size"),
    ({"seed": 2**63}, "seed"),
    ({"prompt": ["a"] * 99}, "prompt"),
    ({"prompt": {"text": "a"}}, "prompt"),
    ({"model": "dalle"}, "model"),
    ({"response_format": "url"}, "response_format"),
    ({"partial_images": 1}, "partial_images"),
    ({"no_such_field": 1}, "no_such_field"),
    ({"timeout_s": -1}, "timeout_s"),
]
PROMPTS = [
    "",
    "a photo of a red circle",
    "Ein Bär \N{BEAR FACE}",
    "\x00\x1b[31m",
    "word " * 300,
    "\N{RIGHT-TO-LEFT OVERRIDE}x",
]


def args(folders: dict[str, str]) -> ServeArgs:
    return serve_args(folders, model={"slots": 4, "queue": 64})


def drawn(rng: random.Random) -> dict[str, Any]:
    """Some request that is to be answered."""
    body: dict[str, Any] = {
        "prompt": rng.choice(PROMPTS) if rng.random() < 0.8 else rng.choices(PROMPTS, k=rng.randint(1, 3)),
        "model": rng.choice(KINDS),
        "size": rng.choice(["32x32", "64x32", "32x64", "64x64", "auto"]),
        "num_inference_steps": rng.randint(1, 50),
        "seed": rng.randrange(2**63),
    }
    optional = {
        "n": rng.randint(1, 3),
        "guidance_scale": rng.choice([0, 1.5, 100]),
        "temperature": rng.choice([0, 0.5, 10]),
        "rho": rng.choice([0.1, 1, 10]),
        "sampler": rng.choice(["posterior", "simplified"]),
        "final_draw": rng.random() < 0.5,
        "output_format": rng.choice(["png", "jpeg", "webp"]),
        "response_format": rng.choice(["b64_json", "codes"]),
    }
    return body | {key: value for key, value in optional.items() if rng.random() < 0.5}


def one(client: httpx.Client, number: int) -> str:
    """Sends request ``number`` and checks what comes back; says of which kind it was."""
    rng = random.Random(number)
    body = drawn(rng)
    kind = rng.choices(["image", "stream", "bad", "leaves", "late"], [45, 20, 15, 15, 5])[0]
    count = body.get("n", 1) * (len(body["prompt"]) if isinstance(body["prompt"], list) else 1)
    if kind == "image":
        response = generate(client, **body)
        assert response.status_code == 200, (body, response.text)
        check(response.json()["data"], body, count)
    elif kind == "stream":
        seen = list(events(client, **body, partial_images=rng.randint(0, 8)))
        assert all("error" not in event for event in seen), (body, seen[-1])
        done = sorted((e for e in seen if e["type"] == "image_generation.completed"), key=lambda e: e["index"])
        check(done, body, count)
    elif kind == "bad":
        changes, field = rng.choice(BAD)
        response = generate(client, **{**body, **changes})
        assert response.status_code in (400, 404) and response.json()["error"]["param"] == field, (body, changes)
    elif kind == "leaves":
        leave(client, {**body, "stream": rng.random() < 0.5, "num_inference_steps": 1000}, rng.random() * 0.3)
    else:
        response = generate(client, **{**body, "model": "diffusion", "num_inference_steps": 1000, "timeout_s": 0.05})
        assert response.status_code == 504, (body, response.text)
    return kind


def check(data: list[dict[str, Any]], body: dict[str, Any], count: int) -> None:
    assert [item["seed"] for item in data] == [(body["seed"] + i) % 2**63 for i in range(count)]
    for item in data:
        if body.get("response_format") == "codes":
            assert len(base64.b64decode(item["codes"])) == 3
            continue
        image, size = opened(item["b64_json"]), body["size"].replace("auto", "32x32")
        assert "{}x{}".format(*image.size) == size
        assert image.format == body.get("output_format", "png").upper()
        image.load()


def leave(client: httpx.Client, body: dict[str, Any], after_s: float) -> None:
    """Ask, and go away before the answer is there."""
    with httpx.Client(base_url=client.base_url, timeout=httpx.Timeout(60, read=after_s)) as impatient:
        try:
            with impatient.stream("POST", "/v1/images/generations", json=body) as response:
                assert response.status_code == 200
                next(response.iter_lines(), None)
        except httpx.ReadTimeout:
            return


def memory_mb() -> float:
    """Resident memory of the endpoint's replicas."""
    listed = subprocess.run(["ps", "-eo", "rss,args"], capture_output=True, text=True, check=True).stdout
    lines = [line.split(maxsplit=1) for line in listed.splitlines()]
    found = [int(kib) / 1024 for kib, args in lines if args.startswith(f"ray::ServeReplica:{APP}:")]
    assert len(found) == 5, listed
    return sum(found)


@pytest.mark.process
def test_a_hundred_random_requests_to_one_process(folders: dict[str, str]) -> None:
    with local_endpoint(args(folders)) as endpoint:
        many(endpoint, 100)


@pytest.mark.ray
@pytest.mark.nightly
def test_five_hundred_random_requests_to_serve(serve_url: str, folders: dict[str, str]) -> None:
    with deployed(args(folders), APP, route_prefix=f"/{APP}"):
        endpoint = Endpoint(f"{serve_url}/{APP}", partial(serve_rows, APP))
        memory = many(endpoint, 500, memory_mb)
    assert memory[-1] - memory[1] < GROWTH_MB


def many(endpoint: Endpoint, requests: int, measure: Callable[[], float] = lambda: 0.0) -> list[float]:
    """Sends ``requests``, after which all must be as before; returns what ``measure`` gave after each quarter of them."""
    asked = {"model": "diffusion", "seed": 3, "num_inference_steps": 50}
    kinds: collections.Counter[str] = collections.Counter()
    measured = []
    with endpoint.client() as client:
        (before,) = images(client, **asked)
        with ThreadPoolExecutor(IN_FLIGHT) as pool:
            for quarter in range(4):
                kinds.update(pool.map(lambda number: one(client, number), range(quarter, requests, 4)))
                measured.append(measure())
        print(json.dumps(kinds), "measured", [f"{value:.0f}" for value in measured])
        assert sum(kinds.values()) == requests and min(kinds.values()) > requests // 50 and len(kinds) == 5
        for kind in KINDS:
            endpoint.wait_for_rows(kind, 0)
        # Nothing was left in the gate either: it lets in as many images at once as it ever did.
        assert len(images(client, prompt=["x"] * 4, n=16, num_inference_steps=1)) == 64
        assert client.get("/healthz").status_code == 200
        (after,) = images(client, **asked)
    assert np.array_equal(before, after)
    return measured
