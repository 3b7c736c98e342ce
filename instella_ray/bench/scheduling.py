"""Scheduling suite: requests that end in time, and latencies, by the engine's scheduling policy; no server."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from typing import Any, get_args

import numpy as np
import torch
from pydantic import Field

from ..config import Config
from ..engine.engine import Request, StepEngine
from ..engine.events import Finished
from ..engine.kinds import build_engine
from ..engine.scheduling import ALLOWANCE, Scheduling
from ..engine.slots import EngineOptions
from ..models.generator import GeneratorConfig, build_generator
from ..models.joint_attention import TextKV
from ..models.sampling import SamplingParams, generate
from ..rendering import Cell, Goal
from .load import mixed_requests, percentile
from .overhead import SIZES, TableSize
from .report import SuiteResult

STATIC = "static batches"
FIELDS = ("seed", "num_inference_steps", "guidance_scale", "temperature", "sampler")


class SchedulingBench(Config):
    """Slot table and load."""

    size: TableSize = SIZES["demo"]
    steps: tuple[int, int] = (5, 50)
    load: float = Field(0.9, gt=0)
    """Request rate of the open loop, as a share of the largest throughput of ``fifo``."""
    seconds: float = Field(7.0, gt=0)
    """Window (s) of each policy and seed; a quarter of it passes before as warm-up."""
    seeds: int = Field(3, ge=1)
    """Number of different arrival times."""


def run_scheduling(cfg: SchedulingBench) -> SuiteResult:
    """Measure an open loop with Poisson arrivals, and a closed loop with as many requests as slots, by policy.

    A request is in time if its latency is at most :data:`ALLOWANCE` times the time that it takes alone.
    """
    engines: dict[str, StepEngine] = {name: _engine(cfg.size, name) for name in get_args(Scheduling)}
    alone = TimeAlone(engines["fifo"], cfg)
    rate = cfg.load * len(_closed(engines["fifo"], cfg, 2 * cfg.size.slots, cfg.seconds)) / cfg.seconds
    slowdowns: dict[str, list[float]] = {name: [] for name in engines}
    latencies: dict[str, list[float]] = {name: [] for name in (*engines, STATIC)}
    for seed in range(cfg.seeds):
        for name, engine in engines.items():
            slowdowns[name] += [seconds / alone(request) for request, seconds in _open(engine, cfg, rate, seed)]
            latencies[name] += _closed(engine, cfg, cfg.size.slots, cfg.seconds / 2)
        latencies[STATIC] += _static(engines["fifo"], cfg, cfg.seconds / 2)
    shares = {name: float(np.mean([value <= ALLOWANCE for value in values])) for name, values in slowdowns.items()}
    rows: list[dict[str, Cell]] = [
        {
            "load": f"{rate:.1f}/s at random",
            "scheduling": name,
            "images": len(values),
            "in time": shares[name],
            "slowdown p50": percentile(values, 50),
            "slowdown p99": percentile(values, 99),
        }
        for name, values in slowdowns.items()
    ]
    rows += [
        {
            "load": f"{cfg.size.slots} in flight",
            "scheduling": name,
            "images": len(values),
            "images/s": len(values) / (cfg.seeds * cfg.seconds / 2),
            "p50 ms": percentile(values, 50) * 1000,
            "p99 ms": percentile(values, 99) * 1000,
        }
        for name, values in latencies.items()
    ]
    goals = [Goal(f"{cfg.load:g} of capacity, share in time", shares["deadline"], 0.99, ">=")]
    for name in engines:
        relative = percentile(latencies[name], 99) / percentile(latencies[STATIC], 99)
        goals.append(Goal(f"{cfg.size.slots} in flight, {name}, p99 against {STATIC}", relative, 0.6, "<="))
    setting = {"threads": torch.get_num_threads(), **cfg.model_dump(mode="json")}
    return SuiteResult("Scheduling policies of the engine", setting, rows, goals)


class TimeAlone:
    """Seconds that a request takes alone in an engine, from measurements of few and many steps."""

    def __init__(self, engine: StepEngine, cfg: SchedulingBench, repeats: int = 5) -> None:
        few, many = self.steps = cfg.steps
        self.seconds = {
            guided: [
                float(np.median([self._measure(engine, cfg, guided, steps) for _ in range(repeats)]))
                for steps in (few, many)
            ]
            for guided in (False, True)
        }

    def __call__(self, request: Request) -> float:
        """Interpolate the seconds of ``request``."""
        guided = bool(request.params.guidance_scale[0] > 0)
        return float(np.interp(int(request.params.num_inference_steps[0]), self.steps, self.seconds[guided]))

    @staticmethod
    def _measure(engine: StepEngine, cfg: SchedulingBench, guided: bool, steps: int) -> float:
        params = SamplingParams.of(1, num_inference_steps=steps, guidance_scale=float(guided))
        request = replace(next(_requests(cfg, 0)), params=params)
        began = time.perf_counter()
        for _ in engine.run([request]):
            pass
        return time.perf_counter() - began


def _engine(size: TableSize, scheduling: Scheduling) -> StepEngine:
    torch.manual_seed(0)
    given = size.model_dump(exclude={"slots", "text_length"})
    model = build_generator(GeneratorConfig(heads=4, zero_init=False, **given)).eval()
    options = EngineOptions(size.slots, size.text_length, scheduling=scheduling)
    return build_engine(model, torch.zeros(size.layers, 0, size.text_width), options)


def _requests(cfg: SchedulingBench, seed: int) -> Iterator[Request]:
    """Yield requests without end, with random values of all parameters, determined by ``seed``."""
    noise, size = torch.Generator().manual_seed(seed), cfg.size
    features = torch.randn(size.layers, size.text_length // 2, size.text_width, generator=noise)
    for number, body in enumerate(itertools.cycle(mixed_requests(512, (64,), cfg.steps, seed))):
        yield Request(str(number), features, SamplingParams.of(1, **{name: body[name] for name in FIELDS}))


def _open(engine: StepEngine, cfg: SchedulingBench, rate: float, seed: int) -> list[tuple[Request, float]]:
    """Return the requests that arrive in the window, with their latencies (s)."""
    rng, source = np.random.default_rng(seed), _requests(cfg, seed)
    start, upcoming = engine.clock(), 0.0
    arrivals: dict[str, Request] = {}
    latencies: list[tuple[Request, float]] = []
    end = cfg.seconds * 1.25
    upcoming += float(rng.exponential(1 / rate))
    while upcoming < end or not engine.idle:
        while upcoming < end and start + upcoming <= engine.clock():
            request = replace(next(source), arrival=start + upcoming)
            arrivals[request.id] = request
            engine.submit(request)
            upcoming += float(rng.exponential(1 / rate))
        if engine.idle:
            time.sleep(max(0.0, start + upcoming - engine.clock()))
        for event in engine.step():
            request = arrivals[event.id]
            assert isinstance(event, Finished) and request.arrival is not None
            if request.arrival - start >= cfg.seconds / 4:
                latencies.append((request, engine.clock() - request.arrival))
    return latencies


def _closed(engine: StepEngine, cfg: SchedulingBench, in_flight: int, seconds: float) -> list[float]:
    """Return the latencies (s) of the requests that end in the window, with ``in_flight`` in the engine at any time."""
    source = _requests(cfg, 0)
    submitted: dict[str, float] = {}
    latencies = []
    start = engine.clock() + seconds / 4
    while (now := engine.clock()) < start + seconds:
        while len(submitted) < in_flight:
            request = next(source)
            submitted[request.id] = now
            engine.submit(request)
        for event in engine.step():
            latency = engine.clock() - submitted.pop(event.id)
            if engine.clock() >= start:
                latencies.append(latency)
    for name in submitted:
        engine.cancel(name)
    engine.step()
    return latencies


def _static(engine: StepEngine, cfg: SchedulingBench, seconds: float) -> list[float]:
    """Return the latencies (s) of batches with as many requests as slots, one batch after the other."""
    model, source, slots = engine.slots.model, _requests(cfg, 0), cfg.size.slots
    latencies: list[float] = []
    end = time.perf_counter() + seconds
    with torch.no_grad():
        while (began := time.perf_counter()) < end:
            requests = list(itertools.islice(source, slots))
            text = _text(model, [*(request.features for request in requests), requests[0].features[:, :0]])
            params = SamplingParams(
                *(
                    torch.cat([getattr(request.params, each.name) for request in requests])
                    for each in fields(SamplingParams)
                )
            )
            generate(model, text.rows(slice(-1)), text.rows(slice(-1, None)), params)
            latencies += [time.perf_counter() - began] * slots
    return latencies


def _text(model: Any, features: Sequence[torch.Tensor]) -> TextKV:
    length = max(part.shape[1] for part in features)
    padded = torch.stack([torch.nn.functional.pad(part, (0, 0, length - part.shape[1], 0)) for part in features], 1)
    counts = torch.tensor([part.shape[1] for part in features])
    text: TextKV = model.text_kv(padded, torch.arange(length) >= length - counts[:, None])
    return text
