"""Generators that are killed, hang, or get new weights while they are at work."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from ..kit.models import make_generator, make_tokenizer
from ..kit.stages import EMPTY, FOREVER, OPTIONS, codes_alone, deployment, eventually, features, sampling

pytestmark = [pytest.mark.ray, pytest.mark.slow]
STEPS = 100


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("chaos")
    tokenizer = make_tokenizer(root / "bit")
    return {name: make_generator(root / name, tokenizer, seed=seed) for seed, name in enumerate(("old", "new"))}


@pytest.fixture(scope="module")
def serving(ray_session: None) -> Iterator[None]:
    from ray import serve

    serve.start(proxy_location="Disabled")
    yield
    serve.shutdown()


def run(
    path: str, name: str, *, new_code: bool = False, longest_step_s: float = 60.0, options: dict[str, Any] | None = None
) -> Any:
    from ray import serve

    health = {"health_check_period_s": 0.5, "health_check_timeout_s": 10}
    made = deployment(name, **health, **(options or {}))
    if new_code:
        made._version = "2"
    return serve.run(made.bind(path, EMPTY, OPTIONS, 1, "cpu", longest_step_s), name=name, route_prefix=None)


@pytest.fixture(autouse=True)
def nothing_left(serving: None) -> Iterator[None]:
    from ray import serve

    yield
    for name in serve.status().applications:
        serve.delete(name)


def pids(handle: Any) -> set[int]:
    """Processes of the replicas that answer; none while one is on its way out."""
    from ray.exceptions import RayActorError
    from ray.serve.exceptions import DeploymentUnavailableError

    try:
        return {status["pid"] for status in handle.broadcast("status").results(timeout_s=10)}
    except (RayActorError, DeploymentUnavailableError, TimeoutError):
        return set()


class Load:
    """Callers in threads, one request after the other, until told to stop; keeps what each call came to."""

    def __init__(self, call: Callable[[int], Any], callers: int) -> None:
        self.answers: list[tuple[float, int, np.ndarray]] = []
        self.errors: list[tuple[float, Exception]] = []
        self._call, self._end = call, threading.Event()
        self._threads = [threading.Thread(target=self._work, args=(n,)) for n in range(callers)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join()

    def _work(self, number: int) -> None:
        while not self._end.is_set():
            began = time.monotonic()
            try:
                self.answers.append((began, number, self._call(number)))
            except Exception as error:
                self.errors.append((time.monotonic() - began, error))


def test_a_killed_generator_is_told_at_once_and_replaced(serving: None, folders: dict[str, str]) -> None:
    """Calls that were on it end in an actor error, within moments; all others, and those made again, are right."""
    from ray.exceptions import RayActorError

    handle = run(folders["old"], "killed", options={"num_replicas": 2})
    before = pids(handle)
    assert len(before) == 2
    wanted = [codes_alone(folders["old"], n, num_inference_steps=STEPS) for n in range(8)]

    def call(number: int) -> np.ndarray:
        params = sampling(number, num_inference_steps=STEPS)
        codes: np.ndarray = handle.generate.remote(features(number), params).result(timeout_s=120).codes
        return codes

    with Load(call, 8) as load:
        eventually(lambda: len(load.answers) >= 16)
        os.kill(min(before), signal.SIGKILL)
        killed = time.monotonic()
        eventually(lambda: len({n for at, n, _ in load.answers if at > killed}) == 8)
        eventually(lambda: len(found := pids(handle)) == 2 and min(before) not in found)
    assert all(isinstance(error, RayActorError) for _, error in load.errors), load.errors
    # At most what was on the dead replica, and perhaps one more a caller before the router has heard.
    assert len(load.errors) <= 16
    assert max((seconds for seconds, _ in load.errors), default=0) < 20
    assert all(np.array_equal(codes, wanted[number]) for _, number, codes in load.answers)


def test_weights_are_swapped_under_load_and_nobody_is_dropped(serving: None, folders: dict[str, str]) -> None:
    old, new = ([codes_alone(folders[w], n, num_inference_steps=STEPS) for n in range(8)] for w in ("old", "new"))
    assert not any(np.array_equal(*pair) for pair in zip(old, new, strict=True))
    options = {"num_replicas": 2, "user_config": {"path": folders["old"]}}
    handle = run(folders["old"], "swapped", options=options)
    before = pids(handle)

    def call(number: int) -> np.ndarray:
        params = sampling(number, num_inference_steps=STEPS)
        codes: np.ndarray = handle.generate.remote(features(number), params).result(timeout_s=120).codes
        return codes

    with Load(call, 8) as load:
        eventually(lambda: len(load.answers) >= 16)
        run(folders["old"], "swapped", options={**options, "user_config": {"path": folders["new"]}})
        statuses = handle.broadcast("status").results()
        assert {status["path"] for status in statuses} == {folders["new"]}
        swapped = time.monotonic()
        eventually(lambda: len({n for at, n, _ in load.answers if at > swapped}) == 8)
    assert load.errors == []
    assert pids(handle) == before  # the very processes
    for began, number, codes in load.answers:
        expected = [new[number]] if began > swapped else [old[number], new[number]]
        assert any(np.array_equal(codes, choice) for choice in expected), number
    eventually(lambda: [s["engines"] for s in handle.broadcast("status").results()] == [1, 1])


def test_a_rolling_update_of_the_code_drops_nobody(serving: None, folders: dict[str, str]) -> None:
    """Replicas are replaced one after the other, and end what they have."""
    options = {"num_replicas": 2, "graceful_shutdown_timeout_s": 120}
    handle = run(folders["old"], "rolled", options=options)
    before = pids(handle)

    def call(number: int) -> np.ndarray:
        params = sampling(number, num_inference_steps=STEPS)
        codes: np.ndarray = handle.generate.remote(features(number), params).result(timeout_s=120).codes
        return codes

    with Load(call, 8) as load:
        eventually(lambda: len(load.answers) >= 16)
        run(folders["old"], "rolled", options=options, new_code=True)
        eventually(lambda: len(found := pids(handle)) == 2 and not found & before)
    assert load.errors == []
    wanted = [codes_alone(folders["old"], n, num_inference_steps=STEPS) for n in range(8)]
    assert all(np.array_equal(codes, wanted[number]) for _, number, codes in load.answers)


def test_a_generator_whose_steps_hang_is_replaced(serving: None, folders: dict[str, str]) -> None:
    """Its port answers all the while: a step that may take no time at all stands for one that takes too long."""
    handle = run(folders["old"], "hung", longest_step_s=1e-6, options={"graceful_shutdown_timeout_s": 1})
    (before,) = pids(handle)
    endless = handle.generate.remote(features(1), sampling(1, num_inference_steps=FOREVER))
    eventually(lambda: len(found := pids(handle)) == 1 and before not in found)
    with pytest.raises(Exception):  # noqa: B017 - whatever a stopped replica ends its calls with
        endless.result(timeout_s=30)
    codes = handle.generate.remote(features(1), sampling(1)).result(timeout_s=60).codes
    assert np.array_equal(codes, codes_alone(folders["old"], 1))
