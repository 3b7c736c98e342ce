"""The HTTP API over a graph in this process: images, streams, codes, and errors that name the field."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from PIL import Image

from instella_ray.data.formats.images import read_metadata
from instella_ray.serving.api import PAGE
from instella_ray.serving.local import build_local

from ..kit.asgi import in_process
from ..kit.endpoint import KINDS, events, generate, images, local_rows, opened, serve_args


@pytest.fixture(scope="module")
def api(folders: dict[str, str]) -> FastAPI:
    return build_local(serve_args(folders))


@pytest.fixture(scope="module")
def client(api: FastAPI) -> Iterator[httpx.Client]:
    with in_process(api) as client:
        yield client


# --- images


def test_prompts_become_images_of_the_size_asked_for(client: httpx.Client) -> None:
    for model in KINDS:
        shown = images(client, model=model, prompt=["a circle", ""], n=2, size="64x32", num_inference_steps=3)
        assert [p.shape for p in shown] == [(32, 64, 3)] * 4
    assert generate(client, size="auto").json()["data"][0].keys() == {"b64_json", "seed", "prompt", "weights"}


@pytest.mark.parametrize("model", KINDS)
def test_a_seed_gives_the_same_image_alone_and_among_others(client: httpx.Client, model: str) -> None:
    many = images(client, model=model, n=6, seed=40)
    (alone,) = images(client, model=model, seed=43)
    assert np.array_equal(alone, many[3])
    assert not all(np.array_equal(many[0], other) for other in many[1:])


def test_the_last_step_draws_bits_where_a_request_asks_for_it(client: httpx.Client) -> None:
    asked = {"model": "diffusion", "seed": 3, "num_inference_steps": 2}
    (drawn,), (again,) = (images(client, final_draw=True, **asked) for _ in range(2))
    (cut,), (default,) = images(client, final_draw=False, **asked), images(client, **asked)
    assert np.array_equal(drawn, again) and np.array_equal(cut, default) and not np.array_equal(drawn, cut)


def test_answers_come_in_the_order_of_prompts_and_say_how_they_were_made(client: httpx.Client) -> None:
    answer = generate(client, prompt=["a", "b"], n=2, seed=2**63 - 2, output_format="webp").json()
    assert answer["model"] == "diffusion"
    assert [(d["prompt"], d["seed"]) for d in answer["data"]] == [
        ("a", 2**63 - 2),
        ("a", 2**63 - 1),
        ("b", 0),
        ("b", 1),
    ]
    assert opened(answer["data"][0]["b64_json"]).format == "WEBP"
    about = read_metadata(base64.b64decode(answer["data"][0]["b64_json"]))
    assert about is not None and about["weights"] == answer["data"][0]["weights"]
    assert {name: len(value) for name, value in about["weights"].items()} == {"generator": 64, "tokenizer": 64}
    drawn = {generate(client, num_inference_steps=1).json()["data"][0]["seed"] for _ in range(3)}
    assert len(drawn) == 3


def test_a_prompt_longer_than_a_slot_is_cut_not_refused(client: httpx.Client) -> None:
    assert images(client, prompt="word " * 300)[0].shape == (32, 32, 3)


def test_the_last_step_draws_where_asked_to(client: httpx.Client) -> None:
    same = {"n": 8, "seed": 1, "num_inference_steps": 2, "response_format": "codes", "guidance_scale": 0}
    drawn, sharp = (generate(client, **same, final_draw=final).json()["data"] for final in (True, False))
    assert drawn != sharp


# --- codes


@pytest.mark.parametrize("model", KINDS)
def test_codes_decoded_later_at_another_size_are_the_image_asked_for_there(client: httpx.Client, model: str) -> None:
    same = {"model": model, "seed": 9, "n": 2, "num_inference_steps": 4}
    kept = generate(client, **same, size="32x32", response_format="codes").json()["data"]
    assert [len(base64.b64decode(item["codes"])) for item in kept] == [3, 3]  # 4 tokens of 6 bits
    assert "b64_json" not in kept[0] and [item["seed"] for item in kept] == [9, 10]
    body = {"codes": [item["codes"] for item in kept], "size": "64x64"}
    later = client.post("/v1/codes/decode", json=body).json()["data"]
    direct = images(client, **same, size="64x64")
    assert len(later) == 2
    for item, image in zip(later, direct, strict=True):
        # As pixels, because the direct file also says how it was made.
        assert np.array_equal(np.asarray(opened(item["b64_json"])), image)


@pytest.mark.parametrize(
    ("body", "field", "words"),
    [
        ({"codes": "not base64!"}, "codes", "base64"),
        ({"codes": "AAAA\n"}, "codes", "base64"),
        ({"codes": []}, "codes", "non-empty"),
        ({"codes": ["AAAA", 3]}, "codes", "base64"),
        ({"codes": base64.b64encode(bytes(1024)).decode()}, "codes", "expected 3 bytes"),
        ({"codes": ["AAAA"] * 65}, "codes", "at most 64"),
        ({"codes": "AAAA", "size": "48x48"}, "size", "32, 64"),
        ({"codes": "AAAA", "path": "/etc/passwd"}, "path", "not permitted"),
    ],
)
def test_codes_that_are_none_are_refused(client: httpx.Client, body: dict[str, object], field: str, words: str) -> None:
    response = client.post("/v1/codes/decode", json=body)
    error = response.json()["error"]
    assert response.status_code == 400 and error["param"] == field
    assert words in error["message"]


# --- streams


@pytest.mark.parametrize("model", KINDS)
def test_a_stream_tells_progress_shows_previews_and_ends_with_the_image(client: httpx.Client, model: str) -> None:
    same = {"model": model, "seed": 5, "n": 3, "num_inference_steps": 12, "size": "64x32"}
    seen = list(events(client, **same, partial_images=2))
    steps = {"diffusion": 12, "ar": 4}[model]
    for index, direct in enumerate(images(client, **same)):
        mine = [event for event in seen if event["index"] == index]
        progress = [e["step"] for e in mine if e["type"] == "image_generation.progress"]
        assert progress == list(range(1, steps)) and all(e.get("steps", steps) == steps for e in mine)
        partial = [e for e in mine if e["type"] == "image_generation.partial_image"]
        assert [e["partial_image_index"] for e in partial] == [0, 1]
        assert [e["step"] for e in partial] == {"diffusion": [4, 8], "ar": [2, 3]}[model]
        assert all(opened(e["b64_json"]).size == (64, 32) for e in partial)
        last = mine[-1]
        assert last["type"] == "image_generation.completed" and last["seed"] == 5 + index
        assert np.array_equal(np.asarray(opened(last["b64_json"])), direct)
    assert len(seen) == 3 * (steps - 1 + 2 + 1)


def test_a_stream_of_codes_decodes_nothing(client: httpx.Client) -> None:
    same = {"seed": 3, "num_inference_steps": 6, "response_format": "codes"}
    seen = list(events(client, **same, partial_images=1))
    assert all("b64_json" not in event for event in seen)
    shown = [event["codes"] for event in seen if "codes" in event]
    assert len(shown) == 2 and shown[-1] == generate(client, **same).json()["data"][0]["codes"]


def test_a_stream_that_asks_for_too_much_is_refused_before_it_begins(client: httpx.Client) -> None:
    response = generate(client, stream=True, partial_images=9)
    assert response.status_code == 400 and response.json()["error"]["param"] == "partial_images"
    response = generate(client, partial_images=2)
    assert response.status_code == 400 and "stream: true" in response.json()["error"]["message"]


# --- what is wrong is named


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"prompt": "x" * 4001}, "prompt"),
        ({"prompt": ["x"] * 65}, "prompt"),
        ({"n": 0}, "n"),
        ({"n": 17}, "n"),
        ({"n": True}, "n"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"num_inference_steps": 1001}, "num_inference_steps"),
        ({"num_inference_steps": "20"}, "num_inference_steps"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"guidance_scale": float("inf")}, "guidance_scale"),
        ({"rho": 0}, "rho"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"sampler": "euler"}, "sampler"),
        ({"timeout_s": 0}, "timeout_s"),
        ({"timeout_s": 301}, "timeout_s"),
        ({"stepps": 3}, "stepps"),
        ({"size": "big"}, "size"),
        ({"size": "48x48"}, "size"),
        ({"response_format": "url"}, "response_format"),
        ({"output_format": "../../x"}, "output_format"),
    ],
)
def test_bad_requests_get_400_and_a_message_that_names_the_field(
    client: httpx.Client, body: dict[str, object], field: str
) -> None:
    # Python's own JSON, because httpx refuses to write what is not a number.
    content = json.dumps({"prompt": "x", **body})
    headers = {"content-type": "application/json"}
    response = client.post("/v1/images/generations", content=content, headers=headers)
    error = response.json()["error"]
    assert response.status_code == 400 and error["type"] == "invalid_request_error"
    assert error["message"].startswith(field) and error["param"] == field


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 50_000, b'{"seed": ' + b"9" * 5000 + b"}"])
def test_what_is_not_json_gets_400_in_the_same_form(client: httpx.Client, content: bytes) -> None:
    headers = {"content-type": "application/json"}
    response = client.post("/v1/images/generations", content=content, headers=headers)
    assert response.status_code == 400 and response.json()["error"]["type"] == "invalid_request_error"


def test_what_is_not_served_is_404_in_the_same_form(client: httpx.Client) -> None:
    response = generate(client, model="dalle")
    assert response.status_code == 404 and response.json()["error"]["code"] == "model_not_found"
    assert "expected one of diffusion, ar" in response.json()["error"]["message"]
    for method, path, status in [("GET", "/v2", 404), ("GET", "/v1/codes/decode", 405), ("GET", "/docs", 404)]:
        response = client.request(method, path)
        assert response.status_code == status and response.json()["error"]["message"]


def test_a_web_page_elsewhere_cannot_make_a_browser_ask(client: httpx.Client) -> None:
    """Without keys, what protects a loopback endpoint is that browsers ask first for anything but plain text."""
    content = json.dumps({"prompt": "x"})
    response = client.post("/v1/images/generations", content=content, headers={"content-type": "text/plain"})
    assert response.status_code == 400


# --- the other routes


def test_models_say_what_they_are_and_take(client: httpx.Client) -> None:
    diffusion, ar = client.get("/v1/models").json()["data"]
    assert (diffusion["id"], ar["id"], diffusion["object"]) == ("diffusion", "ar", "model")
    about = ar["instella_ray"]
    assert client.get("/v1/models/ar").json() == ar and client.get("/v1/models/dalle").status_code == 404
    assert about["kind"] == "ar" and about["sizes"] == [32, 64] and about["limits"]["n"] == 16
    assert (about["about"], about["prompts"]) == ("", [])
    assert about["defaults"]["num_inference_steps"] == 20 and about["tokens"] * about["bits"] == 24


def test_healthz_asks_every_stage(client: httpx.Client) -> None:
    assert client.get("/healthz").json() == {"status": "ok"}


def test_the_page_is_served_where_there_is_one(client: httpx.Client) -> None:
    response = client.get("/")
    if PAGE.is_file():
        assert response.status_code == 200 and response.headers["content-type"].startswith("text/html")
        assert "default-src 'none'" in response.headers["content-security-policy"]
    else:
        assert response.status_code == 404 and response.json()["error"]["code"] == "not_found"


def test_the_openai_client_works(client: httpx.Client) -> None:
    openai = pytest.importorskip("openai")
    api = openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0, http_client=client)
    same = {"prompt": "a circle", "size": "32x32", "extra_body": {"seed": 5}}
    answer = api.images.generate(model="ar", n=2, response_format="b64_json", **same)
    direct = [base64.b64decode(item.b64_json) for item in answer.data]
    assert [Image.open(io.BytesIO(file)).size for file in direct] == [(32, 32)] * 2
    with api.images.generate(model="ar", stream=True, partial_images=1, **same) as stream:
        seen = [event for event in stream if event.type != "image_generation.progress"]
    assert [event.type for event in seen] == ["image_generation.partial_image", "image_generation.completed"]
    assert base64.b64decode(seen[-1].b64_json) == direct[0]
    assert [model.id for model in api.models.list()] == list(KINDS)
    with pytest.raises(openai.BadRequestError, match="n: 17") as caught:
        api.images.generate(model="ar", n=17, prompt="x")
    assert caught.value.param == "n"
    with pytest.raises(openai.NotFoundError):
        api.images.generate(model="dalle", prompt="x")


def test_nothing_is_left_in_the_engines(client: httpx.Client, api: FastAPI) -> None:
    assert [local_rows(api, kind) for kind in KINDS] == [0, 0]
