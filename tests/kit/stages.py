"""Generator stages on Serve, and requests that differ in everything."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from instella_ray.engine.engine import Request
from instella_ray.engine.events import Finished
from instella_ray.engine.kinds import build_engine
from instella_ray.engine.slots import EngineOptions
from instella_ray.models.checkpoint import load_model
from instella_ray.models.sampling import SamplingParams

OPTIONS = EngineOptions(slots=6, text_length=24)
FOREVER = 100_000_000
EMPTY = np.zeros((2, 2, 384), np.float32)


def deployment(name: str, **options: Any) -> Any:
    """The generator stage as a Serve deployment whose code has not changed since it was last deployed.

    That is what ``serve deploy`` finds where a file differs in ``user_config`` alone; ``serve.run`` by itself takes
    everything for new code, and starts new replicas.
    """
    from ray import serve

    from instella_ray.serving.deployments import GeneratorStage

    stage = {"ray_actor_options": {"num_cpus": 0.1}, "max_ongoing_requests": 64, **options}
    made = serve.deployment(name=name, **stage)(GeneratorStage)
    made._version = "1"
    return made


def features(number: int) -> np.ndarray:
    """Float32 ``[2, T, 384]``, T from 0 to 23."""
    return np.random.default_rng(number).standard_normal((2, number % 24, 384), dtype=np.float32)


def sampling(number: int, **changes: Any) -> dict[str, Any]:
    return {
        "seed": number * 7919,
        "num_inference_steps": 1 + number * 13 % 50,
        "guidance_scale": float(number % 3),
        "temperature": (0.5, 1.0, 0.0)[number % 3],
        "sampler": ("simplified", "posterior", "simplified", "ancestral")[number % 4],
        "redraw": (0.0, 0.3)[number // 3 % 2],
        "final_draw": number % 2 == 0,
        **changes,
    }


def codes_alone(path: str, number: int, **changes: Any) -> np.ndarray:
    """The codes of request ``number`` from an engine of its own, in this process."""
    model: Any = load_model(path)
    engine = build_engine(model, torch.tensor(EMPTY), OPTIONS)
    params = SamplingParams.of(1, **sampling(number, **changes))
    engine.submit(Request("x", torch.tensor(features(number)), params))
    while not engine.idle:
        for event in engine.step():
            if isinstance(event, Finished):
                return event.codes.numpy()
    raise AssertionError("the engine ended without an image")


def eventually(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not so within {seconds} s"
        time.sleep(0.1)


def pids(handle: Any) -> set[int]:
    """Processes of the replicas that answer; none while one is on its way out."""
    from ray.exceptions import RayActorError
    from ray.serve.exceptions import DeploymentUnavailableError

    try:
        return {status["pid"] for status in handle.broadcast("status").results(timeout_s=10)}
    except (RayActorError, DeploymentUnavailableError, TimeoutError):
        return set()


class Load:
    """Callers of a generator in threads, each with a request of its own, again and again until told to stop."""

    def __init__(self, handle: Any, *, callers: int, steps: int) -> None:
        self.handle, self.steps = handle, steps
        self.answers: list[tuple[float, int, np.ndarray]] = []
        """When each answered call began, its request's number, and its codes."""
        self.errors: list[tuple[float, Exception]] = []
        """Seconds until each failure."""
        self._end = threading.Event()
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
        params = sampling(number, num_inference_steps=self.steps)
        while not self._end.is_set():
            began = time.monotonic()
            try:
                made = self.handle.generate.remote(features(number), params).result(timeout_s=120)
                self.answers.append((began, number, made.codes))
            except Exception as error:
                self.errors.append((time.monotonic() - began, error))
