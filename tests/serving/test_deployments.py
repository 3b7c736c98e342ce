"""The stages on a real Ray Serve: same bits everywhere, slots that come back, errors that keep their names, metrics."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from instella_ray.data.formats.images import read_metadata
from instella_ray.errors import UserError
from instella_ray.models.checkpoint import weight_hash
from instella_ray.serving.runner import DeadlineExceeded

from ..kit.endpoint import APP, Endpoint, generate
from ..kit.models import make_generator
from ..kit.stages import (
    EMPTY,
    FOREVER,
    OPTIONS,
    Load,
    codes_alone,
    deployment,
    eventually,
    features,
    pids,
    sampling,
)

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def generators(folders: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The diffusion generator, one that can take its place, and one of another tokenizer."""
    root, tokenizer = tmp_path_factory.mktemp("deployments"), weight_hash(folders["bit"])
    new = make_generator(root / "new", tokenizer, seed=2)
    return {"old": folders["diffusion"], "new": new, "stranger": make_generator(root / "stranger", "another")}


def run(path: str, **options: Any) -> Any:
    """The handle of two replicas that serve the weights of ``path``; those that run already swap theirs."""
    from ray import serve

    made = deployment("pair", num_replicas=2, user_config={"path": path}, **options)
    return serve.run(made.bind(path, EMPTY, OPTIONS, 1, "cpu"), name="pair", route_prefix=None)


@pytest.fixture(scope="module")
def pair(serve_url: str, generators: dict[str, str]) -> Iterator[Any]:
    from ray import serve

    yield run(generators["old"])
    serve.delete("pair")


def active(handle: Any) -> list[int]:
    """Rows on their way, a number a replica."""
    return [status["active"] + status["waiting"] for status in handle.broadcast("status").results()]


def test_the_same_bits_alone_in_company_and_on_every_replica(pair: Any, folders: dict[str, str]) -> None:
    path = folders["diffusion"]
    wanted = codes_alone(path, 7)
    replicas = pair.broadcast("generate", features(7), sampling(7)).results()
    assert len(replicas) == 2 and all(np.array_equal(made.codes, wanted) for made in replicas)
    crowd = random.Random(0).sample(range(8, 200), 15)
    answers = {n: pair.generate.remote(features(n), sampling(n)) for n in (*crowd[:8], 7, *crowd[8:])}
    for number, answer in answers.items():
        assert np.array_equal(answer.result(timeout_s=60).codes, codes_alone(path, number)), number


def test_the_same_bits_while_neighbours_join_leave_and_are_cancelled(pair: Any, folders: dict[str, str]) -> None:
    watched = [pair.generate.remote(features(n), sampling(n, num_inference_steps=400)) for n in range(4)]
    for number in range(20, 50):
        brief = pair.generate.remote(features(number), sampling(number))
        endless = pair.generate.remote(features(number), sampling(number, num_inference_steps=FOREVER))
        assert brief.result(timeout_s=60).codes.shape == (4, 6)
        endless.cancel()
    for number, answer in enumerate(watched):
        wanted = codes_alone(folders["diffusion"], number, num_inference_steps=400)
        assert np.array_equal(answer.result(timeout_s=60).codes, wanted)
    eventually(lambda: sum(active(pair)) == 0)


def test_cancelled_calls_and_abandoned_streams_free_their_slots(pair: Any) -> None:
    endless = sampling(1, num_inference_steps=FOREVER)
    call = pair.generate.remote(features(1), endless)
    stream = pair.options(stream=True).follow.remote(features(1), endless, 600.0, 1)
    told = [next(iter(stream)) for _ in range(3)]
    assert [event["step"] for event in told] == [1, 2, 3] and told[0]["codes"].shape == (4, 6)
    eventually(lambda: sum(active(pair)) == 2)
    call.cancel()
    eventually(lambda: sum(active(pair)) == 1)
    stream.cancel()
    eventually(lambda: sum(active(pair)) == 0)


def test_a_followed_image_is_the_generated_one(pair: Any, folders: dict[str, str]) -> None:
    request = features(3), sampling(3, num_inference_steps=5)
    *previews, last = list(pair.options(stream=True).follow.remote(*request, 60.0, 2))
    assert [event["step"] for event in previews] == [2, 4] and last["done"]
    assert np.array_equal(last["codes"], codes_alone(folders["diffusion"], 3, num_inference_steps=5))


def test_errors_arrive_as_what_they_are(pair: Any) -> None:
    with pytest.raises(UserError, match="temperature"):
        pair.generate.remote(features(1), sampling(1, temperature=-1.0)).result(timeout_s=60)
    with pytest.raises(UserError, match="50 tokens, the limit is 24"):
        pair.generate.remote(np.zeros((2, 50, 384), np.float32), sampling(1)).result(timeout_s=60)
    endless = sampling(1, num_inference_steps=FOREVER)
    with pytest.raises(DeadlineExceeded):
        pair.generate.remote(features(1), endless, 0.2).result(timeout_s=60)
    with pytest.raises(DeadlineExceeded):
        list(pair.options(stream=True).follow.remote(features(1), endless, 0.2, 0))
    eventually(lambda: sum(active(pair)) == 0)


def test_features_reach_the_generator_without_passing_through_the_caller(real: Endpoint) -> None:
    text, ar, decoder = (real_stage(name) for name in ("TextEncoder", "Generator-ar", "Decoder"))
    codes = ar.generate.remote(text.encode.remote("a photo of a red circle"), sampling(3)).result(timeout_s=60).codes
    metadata = {"model": "ar", "prompt": "a photo of a red circle", **sampling(3)}
    file = decoder.decode.remote(codes, 32, 64, "webp", metadata).result(timeout_s=60)
    assert read_metadata(file) == metadata


def real_stage(name: str) -> Any:
    """The handle of a stage of the endpoint that all tests share."""
    from ray import serve

    return serve.get_deployment_handle(name, APP)


@pytest.mark.nightly
def test_metrics_reach_the_prometheus_endpoint(pair: Any, real: Endpoint) -> None:
    import ray
    from ray._common.test_utils import fetch_prometheus_metrics

    addresses = [f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}" for node in ray.nodes()]

    def value(name: str, **tags: str) -> float:
        samples = fetch_prometheus_metrics(addresses).get(f"ray_instella_{name}", [])
        return sum(s.value for s in samples if tags.items() <= s.labels.items())

    def level(name: str) -> float:
        return value(name, deployment="pair", application="pair")

    assert pair.generate.remote(features(1), sampling(1)).result(timeout_s=60).codes.shape == (4, 6)
    endless = [
        pair.generate.remote(features(1), sampling(1, num_inference_steps=FOREVER))
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
    assert level("images_total") > 0 and level("busy_seconds_total") > 0
    with real.client() as client:
        assert generate(client).status_code == 200
    for stage in ("text", "generate", "decode", "encode_file"):
        eventually(lambda stage=stage: value("stage_seconds_count", stage=stage, application=APP) > 0)


def test_a_swap_that_does_not_fit_leaves_the_deployment_serving(pair: Any, generators: dict[str, str]) -> None:
    def by_process() -> dict[int, dict[str, Any]]:
        return {status["pid"]: status for status in pair.broadcast("status").results()}

    before = by_process()
    run(generators["stranger"])
    after = by_process()
    assert after.keys() == before.keys() and len(after) == 2
    for status in after.values():
        assert status["path"] == generators["old"] and "another tokenizer" in status["refused"]
    codes = pair.generate.remote(features(3), sampling(3)).result(timeout_s=60).codes
    assert np.array_equal(codes, codes_alone(generators["old"], 3))


def test_weights_are_swapped_under_load_and_nobody_is_dropped(pair: Any, generators: dict[str, str]) -> None:
    old, new = ([codes_alone(generators[w], n, num_inference_steps=100) for n in range(8)] for w in ("old", "new"))
    assert not any(np.array_equal(*both) for both in zip(old, new, strict=True))
    run(generators["old"])
    before = pids(pair)
    with Load(pair, callers=8, steps=100) as load:
        eventually(lambda: len(load.answers) >= 16)
        run(generators["new"])
        statuses = pair.broadcast("status").results()
        assert {status["path"] for status in statuses} == {generators["new"]}
        swapped = time.monotonic()
        eventually(lambda: len({n for at, n, _ in load.answers if at > swapped}) == 8)
    assert load.errors == []
    assert pids(pair) == before  # the very processes
    for began, number, codes in load.answers:
        expected = [new[number]] if began > swapped else [old[number], new[number]]
        assert any(np.array_equal(codes, choice) for choice in expected), number
    eventually(lambda: [s["engines"] for s in pair.broadcast("status").results()] == [1, 1])


def running(app: str) -> int:
    from ray import serve

    states = serve.status().applications[app].deployments[app].replica_states
    return states.get("RUNNING", 0)  # type: ignore[call-overload]


@pytest.mark.nightly
def test_it_scales_with_the_rows_and_back_without_losing_one(serve_url: str, folders: dict[str, str]) -> None:
    from ray import serve

    from instella_ray.serving.scaling import generator_scaling

    delays = {"utilisation": 1.0, "upscale_delay_s": 0.5, "downscale_delay_s": 1.0, "look_back_s": 1.0}
    scaling = generator_scaling(1, 2, **delays)
    made = deployment("scaled", autoscaling_config=scaling, graceful_shutdown_timeout_s=120)
    app = made.bind(folders["diffusion"], EMPTY, OPTIONS, 1, "cpu")
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
