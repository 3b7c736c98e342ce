"""The stages on a real Ray Serve: same bits everywhere, slots that come back, errors that keep their names, metrics."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from instella_ray.errors import UserError
from instella_ray.models.text_encoder import TextEncoderConfig
from instella_ray.serving.images import read_metadata
from instella_ray.serving.runner import DeadlineExceeded

from ..kit.models import TEXT, make_generator, make_tokenizer
from ..kit.stages import EMPTY, FOREVER, OPTIONS, codes_alone, deployment, eventually, features, sampling

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("deployments")
    tokenizer = make_tokenizer(root / "bit")
    kinds = {kind: make_generator(root / kind, tokenizer, kind) for kind in ("diffusion", "ar")}
    return {**kinds, "bit": str(root / "bit"), "stranger": make_generator(root / "stranger", "another")}


@pytest.fixture(scope="module")
def serving(ray_session: None) -> Iterator[None]:
    from ray import serve

    serve.start(proxy_location="Disabled")
    yield
    serve.shutdown()


def generator(path: str, name: str, **options: Any) -> Any:
    return deployment(name, **options).bind(path, EMPTY, OPTIONS, 1, "cpu")


@pytest.fixture(scope="module")
def handles(serving: None, folders: dict[str, str]) -> dict[str, Any]:
    """Two replicas of a diffusion generator, one of an AR generator, a text encoder and a decoder."""
    from ray import serve

    from instella_ray.serving.deployments import DecoderStage, TextEncoderStage

    stage = {"ray_actor_options": {"num_cpus": 0.1}, "max_ongoing_requests": 64}
    apps = {
        "diffusion": generator(folders["diffusion"], "diffusion", num_replicas=2),
        "ar": generator(folders["ar"], "ar"),
        "text": serve.deployment(name="text", **stage)(TextEncoderStage).bind(TextEncoderConfig(**TEXT), 1, "cpu"),
        "decoder": serve.deployment(name="decoder", **stage)(DecoderStage).bind(folders["bit"], 1, "cpu"),
    }
    targets = [serve.RunTarget(target=app, name=name, route_prefix=None) for name, app in apps.items()]
    return dict(zip(apps, serve.run_many(targets), strict=True))


def active(handle: Any) -> list[int]:
    """Rows on their way, a number a replica."""
    return [status["active"] + status["waiting"] for status in handle.broadcast("status").results()]


@pytest.mark.parametrize("kind", ["diffusion", "ar"])
def test_the_same_bits_alone_in_company_and_on_every_replica(
    handles: dict[str, Any], folders: dict[str, str], kind: str
) -> None:
    handle, wanted = handles[kind], codes_alone(folders[kind], 7)
    replicas = handle.broadcast("generate", features(7), sampling(7)).results()
    assert len(replicas) == (2 if kind == "diffusion" else 1)
    assert all(np.array_equal(made.codes, wanted) for made in replicas)
    crowd = random.Random(0).sample(range(8, 200), 15)
    answers = {n: handle.generate.remote(features(n), sampling(n)) for n in (*crowd[:8], 7, *crowd[8:])}
    for number, answer in answers.items():
        assert np.array_equal(answer.result(timeout_s=60).codes, codes_alone(folders[kind], number)), number
    assert np.array_equal(answers[7].result().codes, wanted)


def test_the_same_bits_while_neighbours_join_leave_and_are_cancelled(
    handles: dict[str, Any], folders: dict[str, str]
) -> None:
    handle = handles["diffusion"]
    watched = [handle.generate.remote(features(n), sampling(n, num_inference_steps=400)) for n in range(4)]
    for number in range(20, 50):
        brief = handle.generate.remote(features(number), sampling(number))
        endless = handle.generate.remote(features(number), sampling(number, num_inference_steps=FOREVER))
        time.sleep(0.02)
        endless.cancel()
        assert brief.result(timeout_s=60).codes.shape == (4, 6)
    for number, answer in enumerate(watched):
        wanted = codes_alone(folders["diffusion"], number, num_inference_steps=400)
        assert np.array_equal(answer.result(timeout_s=60).codes, wanted)
    eventually(lambda: sum(active(handle)) == 0)


def test_cancelled_calls_and_abandoned_streams_free_their_slots(handles: dict[str, Any]) -> None:
    handle = handles["diffusion"]
    endless = sampling(1, num_inference_steps=FOREVER)
    call = handle.generate.remote(features(1), endless)
    stream = handle.options(stream=True).follow.remote(features(1), endless, 600.0, 1)
    told = [next(iter(stream)) for _ in range(3)]
    assert [event["step"] for event in told] == [1, 2, 3] and told[0]["codes"].shape == (4, 6)
    eventually(lambda: sum(active(handle)) == 2)
    call.cancel()
    eventually(lambda: sum(active(handle)) == 1, 10)
    stream.cancel()
    eventually(lambda: sum(active(handle)) == 0, 10)


def test_a_followed_picture_is_the_generated_one(handles: dict[str, Any], folders: dict[str, str]) -> None:
    stream = handles["ar"].options(stream=True).follow.remote(features(3), sampling(3), 60.0, 2)
    *previews, last = list(stream)
    assert [event["step"] for event in previews] == [2] and last["done"]
    assert np.array_equal(last["codes"], codes_alone(folders["ar"], 3))


def test_errors_arrive_as_what_they_are(handles: dict[str, Any]) -> None:
    handle = handles["diffusion"]
    with pytest.raises(UserError, match="temperature"):
        handle.generate.remote(features(1), sampling(1, temperature=-1.0)).result(timeout_s=60)
    with pytest.raises(UserError, match="50 tokens, the limit is 24"):
        handle.generate.remote(np.zeros((2, 50, 384), np.float32), sampling(1)).result(timeout_s=60)
    endless = sampling(1, num_inference_steps=FOREVER)
    with pytest.raises(DeadlineExceeded):
        handle.generate.remote(features(1), endless, 0.2).result(timeout_s=60)
    with pytest.raises(DeadlineExceeded):
        list(handle.options(stream=True).follow.remote(features(1), endless, 0.2, 0))
    eventually(lambda: sum(active(handle)) == 0, 10)


def test_features_reach_the_generator_without_passing_through_the_caller(handles: dict[str, Any]) -> None:
    text = handles["text"].encode.remote("a photo of a red circle")
    codes = handles["ar"].generate.remote(text, sampling(3)).result(timeout_s=60).codes
    metadata = {"model": "ar", "prompt": "a photo of a red circle", **sampling(3)}
    file = handles["decoder"].decode.remote(codes, 32, 64, "webp", metadata).result(timeout_s=60)
    assert read_metadata(file) == metadata


def test_metrics_reach_the_prometheus_endpoint(handles: dict[str, Any]) -> None:
    import ray
    from ray._common.test_utils import fetch_prometheus_metrics

    addresses = [f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}" for node in ray.nodes()]

    def value(name: str, **tags: str) -> float:
        samples = fetch_prometheus_metrics(addresses).get(f"ray_instella_{name}", [])
        return sum(s.value for s in samples if tags.items() <= s.labels.items())

    def level(name: str) -> float:
        return value(name, deployment="diffusion", application="diffusion")

    handle = handles["diffusion"]
    endless = [
        handle.generate.remote(features(1), sampling(1, num_inference_steps=FOREVER))
        for _ in range(2 * OPTIONS.slots + 3)
    ]
    try:
        eventually(lambda: level("active_rows") + level("waiting_rows") == 2 * OPTIONS.slots + 3)
        assert level("slots") == 2 * OPTIONS.slots and level("waiting_rows") >= 3
        before = level("steps_total")
        eventually(lambda: level("steps_total") > before > 0)
    finally:
        for answer in endless:
            answer.cancel()
    eventually(lambda: level("active_rows") == level("waiting_rows") == 0)
    assert level("pictures_total") > 0 and level("busy_seconds_total") > 0
    for stage in ("text", "generate", "decode", "encode_file"):
        assert value("stage_seconds_count", stage=stage) > 0, stage


def test_a_swap_that_does_not_fit_leaves_the_deployment_serving(
    handles: dict[str, Any], folders: dict[str, str]
) -> None:
    from ray import serve

    handle = handles["ar"]
    (before,) = handle.broadcast("status").results()
    app = generator(folders["ar"], "ar", user_config={"path": folders["stranger"]})
    serve.run(app, name="ar", route_prefix=None)
    (after,) = handle.broadcast("status").results()
    assert after["pid"] == before["pid"] and after["path"] == folders["ar"]
    assert "another tokenizer" in after["refused"]
    codes = handle.generate.remote(features(3), sampling(3)).result(timeout_s=60).codes
    assert np.array_equal(codes, codes_alone(folders["ar"], 3))


def running(app: str) -> int:
    from ray import serve

    states = serve.status().applications[app].deployments[app].replica_states
    return states.get("RUNNING", 0)  # type: ignore[call-overload]


def test_it_scales_with_the_rows_and_back_without_losing_one(serving: None, folders: dict[str, str]) -> None:
    from ray import serve

    from instella_ray.serving.scaling import generator_scaling

    delays = {"utilisation": 1.0, "upscale_delay_s": 0.5, "downscale_delay_s": 1.0, "look_back_s": 1.0}
    scaling = generator_scaling(1, 2, **delays)
    app = generator(folders["diffusion"], "scaled", autoscaling_config=scaling, graceful_shutdown_timeout_s=120)
    handle = serve.run(app, name="scaled", route_prefix=None)

    def ask(count: int, timeout_s: float) -> list[Any]:
        endless = sampling(1, num_inference_steps=FOREVER)
        return [handle.generate.remote(features(1), endless, timeout_s) for _ in range(count)]

    assert running("scaled") == 1
    crowd = ask(2 * OPTIONS.slots, 600)
    lasting: list[Any] = []
    try:
        eventually(lambda: running("scaled") == 2, 180)  # a replica imports torch first
        # These end by their deadline, if by nothing else. All of them fit one replica.
        lasting = ask(OPTIONS.slots - 1, 25)
        for answer in crowd:
            answer.cancel()
        eventually(lambda: sum(active(handle)) == len(lasting))
        eventually(lambda: running("scaled") == 1)
        for answer in lasting:
            with pytest.raises(DeadlineExceeded):
                answer.result(timeout_s=120)
    finally:
        for answer in [*crowd, *lasting]:
            answer.cancel()
        serve.delete("scaled")
