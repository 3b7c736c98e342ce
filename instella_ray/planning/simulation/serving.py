"""Discrete-event simulation of the endpoint: requests through ingress, text encoder, step engine and decoder.

Not simulated: deadlines, disconnecting clients, previews, lost replicas, and autoscaling (the number of replicas is fixed;
:mod:`.sizing` searches for it). Guidance has no extra cost: the engine always computes every row with and without prompt.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import simpy
from pydantic import Field, model_validator

from ...config import Config, load_config
from ...engine.buckets import bucket_sizes
from ...errors import UserError
from ...serving.config import ModelArgs, ServeArgs
from .clock import Compute, Processors, Variation
from .stage_time import StageTime
from .stations import BatchingReplica, Deployment, EngineReplica, Meters, Process, Replica

INGRESS, TEXT, DECODER = "ingress", "text", "decoder"
CALLS, TEXT_BATCH, DECODER_BATCH, WAIT_S = 64, 32, 8, 0.005
"""Constants of the real deployments: calls per replica, largest batches, batch collection time (s)."""


class Machine(Config):
    """Machine whose cores all replicas share."""

    cores: int = Field(ge=1)
    together: float = Field(1.0, gt=0, le=1)
    """Speed of a core when all compute, relative to one that computes alone."""


class ServingTimes(Config):
    """Service times of the stages."""

    ingress: StageTime
    """Time to parse a request and write its response; an ingress replica handles one at a time."""
    text: StageTime
    """Time to encode a batch of prompts that are not cached."""
    text_cached: float = Field(0.0, ge=0, le=1)
    """Cache hit rate of prompts."""
    admit: StageTime
    """Time to project the text of an image admitted to a slot, before a step."""
    step: dict[str, StageTime]
    """Time of a step by generator and number of slots."""
    decode: dict[str, StageTime]
    """Time to decode codes to pixels, by image size (``512x512``)."""
    file: dict[str, StageTime]
    """Time to encode pixels as a file, by image size."""
    hop_s: float = Field(0.0, ge=0)
    """Round-trip latency (s) of a call to another deployment, without computation."""
    hop_source: str = "given"
    """Source of ``hop_s``."""
    variation: float = Field(0.0, ge=0)
    """Coefficient of variation of all times above, which are gamma distributed."""


class RequestKind(Config):
    """Class of requests with the same parameters."""

    share: float = Field(1.0, gt=0)
    """Relative frequency."""
    model: str
    steps: tuple[int, int] = (20, 20)
    """Lowest and highest number of steps, uniformly distributed; an AR generator needs one per token."""
    size: str = "512x512"
    images: int = Field(1, ge=1)


class LoadConfig(Config):
    """Load: an open loop with Poisson arrivals, or a closed loop of clients that send the next request after a response."""

    rate: float | None = Field(None, gt=0)
    """Requests per second of an open loop."""
    in_flight: int | None = Field(None, ge=1)
    """Number of clients of a closed loop."""
    seconds: float = Field(60.0, gt=0)
    """Length of the measured window."""
    warm_up_s: float = Field(15.0, ge=0)
    """Seconds before the window, which are not counted."""
    mix: tuple[RequestKind, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _open_or_closed(self) -> LoadConfig:
        if (self.rate is None) == (self.in_flight is None):
            raise ValueError("expected either rate or in_flight")
        return self


class ServingConfig(Config):
    """Simulated endpoint: its settings, replicas, service times and load."""

    endpoint: str
    """Configuration or recipe of ``jobs/serve.py``, whose section ``app`` defines slots, queues and all other settings."""
    overrides: tuple[str, ...] = ()
    """Overrides of that section, ``key=value``."""
    replicas: dict[str, int] = Field(default_factory=dict)
    """Number of replicas by deployment (ingress, text, decoder and each generator); 1 if not given."""
    buckets: tuple[int, ...] | None = None
    """Batch sizes of the step engine; none means 1, 2, 4, ... up to its slots."""
    machine: Machine | None = None
    """Machine whose cores all replicas share; none gives each replica its own device."""
    times: ServingTimes
    load: LoadConfig

    def app(self) -> ServeArgs:
        """Load the endpoint's settings; raises UserError for a load that it cannot serve, or missing times."""
        app = load_config(ServeArgs, self.endpoint, self.overrides, section="app")
        for kind in self.load.mix:
            for name, table, key in (
                ("models", app.models, kind.model),
                ("times.step", self.times.step, kind.model),
                ("times.decode", self.times.decode, kind.size),
                ("times.file", self.times.file, kind.size),
            ):
                if key not in table:
                    raise UserError(f"serving.{name}: no '{key}', which load.mix uses (has {', '.join(table)})")
            if kind.images > (capacity := self.capacity(app.models[kind.model], kind.model)):
                raise UserError(f"serving.load.mix: {kind.images} images per request, expected at most {capacity}")
        names = [INGRESS, TEXT, DECODER, *app.models]
        if unknown := [name for name in self.replicas if name not in names]:
            raise UserError(f"serving.replicas.{unknown[0]}: expected one of {', '.join(names)}")
        return app

    def count(self, deployment: str) -> int:
        """Return the number of replicas of a deployment."""
        return self.replicas.get(deployment, 1)

    def capacity(self, model: ModelArgs, name: str) -> int:
        """Return the largest number of images in flight, as :attr:`ModelArgs.capacity` with this number of replicas."""
        return self.count(name) * 2 * model.slots + model.queue


@dataclass(frozen=True)
class ServingOutcome:
    """Simulated throughput, latencies and utilisation of an endpoint."""

    window_s: float
    """Length of the measured window (s)."""
    arrived: int
    """Number of requests, including warm-up; each is either ``answered`` or ``refused``."""
    answered: int
    refused: int
    images_per_s: float
    """Images completed per second in the window."""
    latencies: np.ndarray
    """Latencies (s) of requests that arrived in the window and were accepted."""
    refused_share: float
    """Share of requests arriving in the window that were refused."""
    utilisation: dict[str, float]
    """Mean share of busy replicas by deployment; for generators of occupied slots."""
    waiting: dict[str, float]
    """Mean number of waiting images by deployment."""
    inside: float
    """Mean number of requests in flight."""

    def percentile(self, share: float) -> float:
        """Return the ``share``-th percentile of latency in seconds; infinite without accepted requests."""
        return float(np.percentile(self.latencies, share)) if len(self.latencies) else float("inf")

    @property
    def bottleneck(self) -> str:
        """Deployment with the highest utilisation."""
        return max(self.utilisation, key=lambda name: self.utilisation[name])


def simulate_serving(cfg: ServingConfig, seed: int = 0) -> ServingOutcome:
    """Simulate the load until every request is answered; the result depends only on the arguments."""
    return _Simulation(cfg, seed).run()


class _Simulation:
    def __init__(self, cfg: ServingConfig, seed: int) -> None:
        self.cfg, self.app, self.env = cfg, cfg.app(), simpy.Environment()
        machine = cfg.machine
        self.compute: Compute = Processors(self.env, machine.cores, machine.together) if machine else self.env.timeout
        # Separate random streams, so that the number of replicas does not change arrival times and request contents.
        arrivals, self.content, self.routes, times = (np.random.default_rng([seed, part]) for part in range(4))
        self.arrivals, self.vary = arrivals, Variation(cfg.times.variation, times)
        self.deployments = {INGRESS: self._ingress(), TEXT: self._text(), DECODER: self._decoder()}
        self.deployments |= {name: self._generator(name, model) for name, model in self.app.models.items()}
        self.free_capacity = {name: cfg.capacity(model, name) for name, model in self.app.models.items()}
        self.shares = list(accumulate(kind.share for kind in cfg.load.mix))
        self.inside = Meters.of(self.env).present
        self.begin, self.end = cfg.load.warm_up_s, cfg.load.warm_up_s + cfg.load.seconds
        self.arrived = self.answered = self.refused = self.images = self.came = self.turned_away = 0
        self.latencies: list[float] = []

    def run(self) -> ServingOutcome:
        env, load = self.env, self.cfg.load
        if load.rate is not None:
            env.process(self._open(load.rate))
        else:
            for _ in range(load.in_flight or 0):
                env.process(self._client())
        env.run(self.begin)
        meters = {name: deployment.meters for name, deployment in self.deployments.items()}
        for meter in meters.values():
            meter.restart()
        self.inside.restart()
        env.run(self.end)
        busy = {name: meter.busy.mean / self.cfg.count(name) for name, meter in meters.items()}
        # An engine is busy with a single image, so its spare capacity is given by the share of occupied slots.
        for name, model in self.app.models.items():
            busy[name] = meters[name].served.mean / (self.cfg.count(name) * model.slots)
        waiting, inside = {name: meter.waiting for name, meter in meters.items()}, self.inside.mean
        rate = self.images / load.seconds
        env.run()
        share = self.turned_away / self.came if self.came else 0.0
        return ServingOutcome(
            load.seconds,
            self.arrived,
            self.answered,
            self.refused,
            rate,
            np.array(self.latencies),
            share,
            busy,
            waiting,
            inside,
        )

    # --- requests

    def _open(self, rate: float) -> Process:
        while True:
            yield self.env.timeout(float(self.arrivals.exponential(1 / rate)))
            if self.env.now >= self.end:
                return
            self.env.process(self._request())

    def _client(self) -> Process:
        while self.env.now < self.end:
            yield self.env.process(self._request())
            # Without a delay a refused client would retry forever at the same simulated time.
            yield self.env.timeout(1e-6)

    def _request(self) -> Process:
        asked, kind = self.env.now, self._kind()
        steps = int(self.content.integers(kind.steps[0], kind.steps[1], endpoint=True))
        cached = bool(self.content.random() < self.cfg.times.text_cached)
        counts = self.begin <= asked < self.end
        self.arrived += 1
        self.came += counts
        if self.free_capacity[kind.model] < kind.images:
            self.refused += 1
            self.turned_away += counts
            return
        self.free_capacity[kind.model] -= kind.images
        self.inside.add(1)
        yield from self._call(INGRESS)
        # Further images of the prompt find its features in the cache, or share its batch.
        ways = [self._image(kind, steps, cached or number > 0) for number in range(kind.images)]
        yield self.env.all_of([self.env.process(way) for way in ways])
        self.inside.add(-1)
        self.free_capacity[kind.model] += kind.images
        self.answered += 1
        if self.begin <= self.env.now <= self.end:
            self.images += kind.images
        if counts:
            self.latencies.append(self.env.now - asked)

    def _kind(self) -> RequestKind:
        place = float(self.content.random()) * self.shares[-1]
        return self.cfg.load.mix[int(np.searchsorted(self.shares, place, side="right"))]

    def _image(self, kind: RequestKind, steps: int, cached: bool) -> Process:
        yield from self._call(TEXT, cached)
        yield from self._call(kind.model, None, steps)
        yield from self._call(DECODER, kind.size)

    def _call(self, name: str, key: Hashable = None, steps: int = 0) -> Process:
        if name != INGRESS and self.cfg.times.hop_s:
            yield self.env.timeout(self.cfg.times.hop_s)
        yield from self.deployments[name].call(key, steps)

    # --- deployments

    def _ingress(self) -> Deployment:
        times = self.cfg.times
        # The ingress has no limit of its own: the admission gate bounds the number of requests in flight.
        return self._deployment(INGRESS, 1 << 30, lambda m: self._batches(m, lambda key, n: times.ingress.of(n)))

    def _text(self) -> Deployment:
        times, alone = self.cfg.times, all(model.batch_invariant for model in self.app.models.values())

        def seconds(cached: Hashable, count: int) -> float:
            return 0.0 if cached else times.text.of(count)

        return self._deployment(
            TEXT, CALLS, lambda m: self._batches(m, seconds, size=1 if alone else TEXT_BATCH, wait_s=WAIT_S)
        )

    def _decoder(self) -> Deployment:
        times = self.cfg.times

        def seconds(size: Hashable, count: int) -> float:
            return times.decode[str(size)].of(count)

        def file(size: Hashable, count: int) -> float:
            return self.vary(times.file[str(size)].of(count))

        threads = self.app.decoder.file_threads
        more: dict[str, Any] = {"size": DECODER_BATCH, "wait_s": WAIT_S, "after": file, "threads": threads}
        return self._deployment(DECODER, CALLS, lambda m: self._batches(m, seconds, **more))

    def _generator(self, name: str, model: ModelArgs) -> Deployment:
        times, buckets = self.cfg.times, self.cfg.buckets or bucket_sizes(model.slots)
        if max(buckets) != model.slots:
            raise UserError(f"serving.buckets: expected the largest to be the {model.slots} slots of models.{name}")

        def seconds(rows: int, admitted: int) -> float:
            return self.vary(times.step[name].of(rows) + admitted * times.admit.of(1))

        return self._deployment(
            name, model.ongoing, lambda m: EngineReplica(self.env, self.compute, seconds, m, buckets)
        )

    def _batches(self, meters: Meters, seconds: Any, **more: Any) -> BatchingReplica:
        return BatchingReplica(self.env, self.compute, lambda key, n: self.vary(seconds(key, n)), meters, **more)

    def _deployment(self, name: str, ongoing: int, make: Any) -> Deployment:
        meters = Meters.of(self.env)
        replicas: list[Replica] = [make(meters) for _ in range(self.cfg.count(name))]
        return Deployment(self.env, replicas, ongoing, meters, self.routes)
