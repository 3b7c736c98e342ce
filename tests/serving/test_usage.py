"""Who used what: limits of keys, audit lines and counters, over HTTP."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from instella_ray.logs import AUDIT
from instella_ray.serving.config import ModelArgs, RequestLimits

from ..kit.endpoint import KINDS, LONG, Endpoint, events, generate, local_endpoint, make_folders, serve_args
from ..kit.head import free_port
from ..kit.processes import wait_until
from ..kit.project import ROOT
from ..kit.serve_process import serve_process

SECRET = "a photo of a secret prompt"
SOME = 10_000
"""Steps of a stream that is left: its first event comes after a twentieth of them."""
FIELDS = {"request_id", "key", "path", "model", "images", "size", "steps", "status", "code", "seconds"}


def key_of(name: str) -> str:
    return f"the-key-of-{name}-is-long"


def headers(name: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key_of(name)}"}


def entries(**limits: dict[str, Any]) -> str:
    """The file of keys with these names and limits."""
    return yaml.safe_dump(
        [{"name": n, "sha256": hashlib.sha256(key_of(n).encode()).hexdigest(), **more} for n, more in limits.items()]
    )


KEYS = entries(
    all={},
    ar={"models": ["ar"]},
    slow={"requests_per_minute": 2},
    narrow={"concurrent_images": 2},
)


@pytest.fixture
def endpoint(folders: dict[str, str], tmp_path: Path) -> Iterator[Endpoint]:
    (tmp_path / "keys.yaml").write_text(KEYS)
    args = serve_args(folders, api_keys_file=str(tmp_path / "keys.yaml"), limits=RequestLimits(steps=LONG))
    with local_endpoint(args) as endpoint:
        yield endpoint


def client(endpoint: Endpoint, name: str) -> httpx.Client:
    return httpx.Client(base_url=endpoint.url, headers=headers(name), timeout=60)


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Iterator[list[dict[str, Any]]]:
    """The audit lines of requests, as they are printed."""
    found: list[dict[str, Any]] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            from instella_ray.logs import TextFormatter

            found.append(json.loads(TextFormatter().format(record)))

    keep, log = Keep(), logging.getLogger(AUDIT)
    log.addHandler(keep)
    with caplog.at_level(logging.INFO, AUDIT):
        yield found
    log.removeHandler(keep)


def test_a_key_sees_and_uses_its_models_only(endpoint: Endpoint) -> None:
    with client(endpoint, "ar") as ar, client(endpoint, "all") as every:
        assert [model["id"] for model in every.get("/v1/models").json()["data"]] == list(KINDS)
        assert [model["id"] for model in ar.get("/v1/models").json()["data"]] == ["ar"]
        assert ar.get("/v1/models/ar").status_code == 200
        assert generate(ar, response_format="codes").json()["model"] == "ar", "its default is its first"
        missing = [ar.get("/v1/models/diffusion"), generate(ar, model="diffusion")]
        missing.append(ar.post("/v1/codes/decode", json={"codes": "AAAA", "model": "diffusion"}))
        for answer in missing:
            assert answer.status_code == 404 and answer.json()["error"]["code"] == "model_not_found"
            assert "expected one of ar" in answer.json()["error"]["message"]
            assert "diffusion, " not in answer.json()["error"]["message"]


def test_a_request_over_the_rate_gets_429_with_the_wait(endpoint: Endpoint, lines: list[dict[str, Any]]) -> None:
    with client(endpoint, "slow") as slow:
        assert generate(slow, response_format="codes").status_code == 200
        assert generate(slow, n=0).status_code == 400, "counts as well"
        answer = generate(slow)
        assert answer.status_code == 429 and 50 < int(answer.headers["retry-after"]) <= 60
        error = answer.json()["error"]
        assert (error["type"], error["code"], error["param"]) == ("rate_limit_error", "rate_limit_exceeded", None)
        assert (lines[-1]["key"], lines[-1]["code"]) == ("slow", "rate_limit_exceeded")
        assert slow.get("/v1/models").status_code == 200, "only requests for images count"
    with client(endpoint, "all") as every:
        assert generate(every, response_format="codes").status_code == 200, "another key is not concerned"


def test_a_stream_holds_its_images_until_it_ends(endpoint: Endpoint) -> None:
    with client(endpoint, "narrow") as narrow:
        answer = generate(narrow, n=3)
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "n"
        assert "3 images in all, expected at most 2" in answer.json()["error"]["message"]
        stream = events(narrow, n=2, num_inference_steps=SOME)
        next(stream)
        answer = generate(narrow)
        assert answer.status_code == 429 and answer.json()["error"]["code"] == "rate_limit_exceeded"
        assert int(answer.headers["retry-after"]) >= 1
        stream.close()
        endpoint.wait_for_rows("diffusion", 0)
        assert wait_until(lambda: generate(narrow, n=2, response_format="codes").status_code == 200, 10)


def test_each_request_leaves_one_line_that_holds_neither_prompt_nor_key(
    endpoint: Endpoint, lines: list[dict[str, Any]]
) -> None:
    own_id = {"x-request-id": "from-the-client"}
    with client(endpoint, "all") as every:
        same = {"prompt": SECRET, "n": 2, "size": "64x32", "num_inference_steps": 3}
        answered = every.post("/v1/images/generations", json=same, headers=own_id)
        assert answered.status_code == 200 and "x-request-id" not in answered.headers
        assert len(list(events(every, **same, model="ar"))) > 2
        failed = list(events(every, prompt=SECRET, num_inference_steps=LONG, timeout_s=0.2))
        assert failed[-1]["error"]["code"] == "deadline_exceeded"
        begun = events(every, prompt=SECRET, num_inference_steps=SOME)
        next(begun)
        begun.close()
        assert wait_until(lambda: len(lines) == 4, 10)
        assert generate(every, prompt=SECRET, size="1x1").status_code == 400
        assert every.get(f"/v1/models/{key_of('all')}").status_code == 404
        every.get("/healthz")
        every.get("/")
    with httpx.Client(base_url=endpoint.url) as stranger:
        answered = generate(stranger, prompt=SECRET)
        assert answered.status_code == 401
    assert wait_until(lambda: len(lines) == 7, 10), lines
    here = "/v1/images/generations"
    shown = [
        tuple(line[name] for name in ("key", "path", "model", "images", "size", "steps", "status", "code"))
        for line in lines
    ]
    assert shown == [
        ("all", here, "diffusion", 2, "64x32", 3, 200, None),
        ("all", here, "ar", 2, "64x32", 4, 200, None),
        ("all", here, "diffusion", 1, "32x32", LONG, 504, "deadline_exceeded"),
        ("all", here, "diffusion", 1, "32x32", SOME, 499, None),
        ("all", here, None, None, None, None, 400, None),
        ("all", "/v1/models/{name}", None, None, None, None, 404, "model_not_found"),
        (None, None, None, None, None, None, 401, "invalid_api_key"),
    ]
    assert lines[0]["request_id"] == "from-the-client" and lines[-1]["request_id"] == answered.headers["x-request-id"]
    assert len({line["request_id"] for line in lines}) == 7
    for line in lines:
        assert line.keys() >= {"time", "logger"} | FIELDS and line["logger"] == AUDIT and line["seconds"] >= 0
    assert SECRET not in str(lines) and key_of("all") not in str(lines)


def test_without_keys_callers_are_anonymous(folders: dict[str, str], lines: list[dict[str, Any]]) -> None:
    with local_endpoint(serve_args(folders)) as endpoint, httpx.Client(base_url=endpoint.url) as here:
        assert here.get("/v1/models").status_code == 200
    assert [line["key"] for line in lines] == ["anonymous"]


@pytest.mark.process
def test_a_running_endpoint_takes_a_changed_file(tmp_path: Path) -> None:
    """A process of its own, as its user starts it, because it prints the lines; the client is OpenAI's."""
    openai = pytest.importorskip("openai")
    port, folders, file, log = free_port(), make_folders(tmp_path), tmp_path / "keys.yaml", tmp_path / "log.jsonl"
    file.write_text(entries(alice={"requests_per_minute": 2, "models": ["ar"]}))
    models = {kind: ModelArgs(path=folders[kind]) for kind in KINDS}
    args = serve_args(folders, api_keys_file=str(file), models=models)
    config = tmp_path / "serve.yaml"
    config.write_text(yaml.safe_dump({"app": args.model_dump(mode="json"), "port": port, "local": True}))
    env = {**os.environ, "PYTHONPATH": str(ROOT), "INSTELLA_RAY_LOG_FILE": str(log)}
    command = [sys.executable, "-m", "instella_ray", "serve", "--config", str(config)]
    with serve_process(command, env, tmp_path) as (_, said):
        assert said == f"listening on http://127.0.0.1:{port} (with API keys)\n"

        def api(name: str) -> Any:
            return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=key_of(name), max_retries=0)

        with api("alice") as alice, api("bob") as bob:
            assert [model.id for model in alice.models.list()] == ["ar"]
            with pytest.raises(openai.NotFoundError) as missing:
                alice.images.generate(model="diffusion", prompt="a circle")
            assert missing.value.code == "model_not_found"
            assert alice.images.generate(prompt="a circle", size="32x32", response_format="b64_json").data[0].b64_json
            with pytest.raises(openai.RateLimitError) as limited:
                alice.images.generate(prompt="a circle")
            assert (
                limited.value.code == "rate_limit_exceeded" and int(limited.value.response.headers["retry-after"]) > 30
            )
            with pytest.raises(openai.AuthenticationError):
                bob.models.list()
            file.write_text("- name: bob\n  sha256: none\n")
            assert wait_until(lambda: "line 1: sha256: expected" in log.read_text(), 20)
            assert [model.id for model in alice.models.list()] == ["ar"], "a broken file changes nothing"
            file.write_text(entries(bob={}))

            def exchanged() -> bool:
                time.sleep(0.2)
                try:
                    return {model.id for model in bob.models.list()} == set(KINDS)
                except openai.AuthenticationError:
                    return False

            assert wait_until(exchanged, 20)
            with pytest.raises(openai.AuthenticationError):
                alice.models.list()

        def audited() -> list[tuple[str | None, int]]:
            lines = [line for line in map(json.loads, log.read_text().splitlines()) if line["logger"] == AUDIT]
            return [(line["key"], line["status"]) for line in lines]

        # A line is written after its answer is sent.
        assert wait_until(lambda: audited()[-1] == (None, 401), 20)
    seen = audited()
    assert seen[:4] == [("alice", 200), ("alice", 404), ("alice", 200), ("alice", 429)]
    assert seen[-2:] == [("bob", 200), (None, 401)]
    assert "a circle" not in log.read_text() and key_of("alice") not in log.read_text()
