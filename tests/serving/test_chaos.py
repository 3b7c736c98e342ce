"""Generators that are killed, hang, or get new code while they are at work."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from ..kit.stages import EMPTY, FOREVER, OPTIONS, Load, codes_alone, deployment, eventually, features, pids, sampling

pytestmark = [pytest.mark.ray, pytest.mark.nightly]
STEPS = 100


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
def nothing_left(serve_url: str) -> Iterator[None]:
    from ray import serve

    yield
    for name in serve.status().applications:
        serve.delete(name)


def test_a_killed_generator_is_told_at_once_and_replaced(serve_url: str, folders: dict[str, str]) -> None:
    """Calls that were on it end in an actor error, within moments; all others, and those made again, are right."""
    from ray.exceptions import RayActorError

    handle = run(folders["diffusion"], "killed", options={"num_replicas": 2})
    before = pids(handle)
    assert len(before) == 2
    wanted = [codes_alone(folders["diffusion"], n, num_inference_steps=STEPS) for n in range(8)]

    with Load(handle, callers=8, steps=STEPS) as load:
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


def test_a_rolling_update_of_the_code_drops_nobody(serve_url: str, folders: dict[str, str]) -> None:
    """Replicas are replaced one after the other, and end what they have."""
    options = {"num_replicas": 2, "graceful_shutdown_timeout_s": 120}
    handle = run(folders["diffusion"], "rolled", options=options)
    before = pids(handle)

    with Load(handle, callers=8, steps=STEPS) as load:
        eventually(lambda: len(load.answers) >= 16)
        run(folders["diffusion"], "rolled", options=options, new_code=True)
        eventually(lambda: len(found := pids(handle)) == 2 and not found & before)
    assert load.errors == []
    wanted = [codes_alone(folders["diffusion"], n, num_inference_steps=STEPS) for n in range(8)]
    assert all(np.array_equal(codes, wanted[number]) for _, number, codes in load.answers)


def test_a_generator_whose_steps_hang_is_replaced(serve_url: str, folders: dict[str, str]) -> None:
    """Its port answers all the while: a step that may take no time at all stands for one that takes too long."""
    handle = run(folders["diffusion"], "hung", longest_step_s=1e-6, options={"graceful_shutdown_timeout_s": 1})
    (before,) = pids(handle)
    endless = handle.generate.remote(features(1), sampling(1, num_inference_steps=FOREVER))
    eventually(lambda: len(found := pids(handle)) == 1 and before not in found)
    with pytest.raises(Exception):  # noqa: B017 - whatever a stopped replica ends its calls with
        endless.result(timeout_s=30)
    codes = handle.generate.remote(features(1), sampling(1)).result(timeout_s=60).codes
    assert np.array_equal(codes, codes_alone(folders["diffusion"], 1))
