"""The endpoint as discrete events: requests through ingress, text encoder, step engine and decoder, as its settings say.

Not simulated: deadlines, callers who leave, previews, lost replicas, and autoscaling (a number of replicas is given, which
is what :mod:`.sizing` looks for). Guidance costs nothing: the engine computes every row with the prompt and without.
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
from .stations import BatchingReplica, Deployment, Meters, Process, Replica, Steps

INGRESS, TEXT, DECODER = "ingress", "text", "decoder"
CALLS, TEXT_BATCH, DECODER_BATCH, FILE_THREADS, WAIT_S = 64, 32, 8, 2, 0.005
"""Of the real deployments: calls a replica holds, largest batches, threads for image files, seconds to collect a batch."""


class Machine(Config):
    """One machine that every replica runs on."""

    cores: int = Field(ge=1)
    together: float = Field(1.0, gt=0, le=1)
    """Speed of a core when all compute, against one alone."""


class ServingTimes(Config):
    """How long each stage takes."""

    ingress: StageTime
    """Reading a request and writing its answer, one at a time in a replica of the ingress."""
    text: StageTime
    """Prompts of a batch that are not in the cache."""
    text_cached: float = Field(0.0, ge=0, le=1)
    """Share of prompts that the cache has."""
    admit: StageTime
    """Projecting the text of an image that gets a slot, before a step."""
    step: dict[str, StageTime]
    """By generator: a step over so many slots."""
    decode: dict[str, StageTime]
    """By size (``512x512``): codes to pixels."""
    file: dict[str, StageTime]
    """By size: pixels to a file."""
    hop_s: float = Field(0.0, ge=0)
    """A call's way to another deployment and back, in which nothing computes."""
    hop_source: str = "given"
    variation: float = Field(0.0, ge=0)
    """Coefficient of variation of every time above, gamma distributed."""


class RequestKind(Config):
    """Requests that ask for the same."""

    share: float = Field(1.0, gt=0)
    model: str
    steps: tuple[int, int] = (20, 20)
    """Lowest and highest number of steps, all equally likely; an AR generator takes one a token."""
    size: str = "512x512"
    images: int = Field(1, ge=1)


class LoadConfig(Config):
    """What comes in: at random moments or, in a closed loop, from clients that ask again when they have their answer."""

    rate: float | None = Field(None, gt=0)
    """Requests a second, Poisson."""
    in_flight: int | None = Field(None, ge=1)
    """Clients of a closed loop."""
    seconds: float = Field(60.0, gt=0)
    warm_up_s: float = Field(15.0, ge=0)
    """Before them; not counted."""
    mix: tuple[RequestKind, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _open_or_closed(self) -> LoadConfig:
        if (self.rate is None) == (self.in_flight is None):
            raise ValueError("expected either rate or in_flight")
        return self


class ServingConfig(Config):
    """An endpoint, how many replicas it has, and what is asked of it."""

    endpoint: str
    """A file of ``jobs/serve.py`` (its section ``app``): slots, queues and the rest are taken from there."""
    overrides: tuple[str, ...] = ()
    """``key=value`` for keys of that section."""
    replicas: dict[str, int] = Field(default_factory=dict)
    """By deployment: ingress, text, decoder and each generator; 1 where nothing is said."""
    buckets: tuple[int, ...] | None = None
    """Batch sizes that the step engine may use; none means 1, 2, 4, ... up to its slots."""
    machine: Machine | None = None
    """Where all replicas share cores; none gives each its own device."""
    times: ServingTimes
    load: LoadConfig

    def app(self) -> ServeArgs:
        """The endpoint's own settings. UserError for a load that it cannot serve, or times that it lacks."""
        app = load_config(ServeArgs, self.endpoint, self.overrides, section="app")
        for kind in self.load.mix:
            for name, table, key in (
                ("models", app.models, kind.model),
                ("times.step", self.times.step, kind.model),
                ("times.decode", self.times.decode, kind.size),
                ("times.file", self.times.file, kind.size),
            ):
                if key not in table:
                    raise UserError(f"serving.{name}: no '{key}', which load.mix asks for (has {', '.join(table)})")
            if kind.images > (capacity := self.capacity(app.models[kind.model], kind.model)):
                raise UserError(f"serving.load.mix: {kind.images} images a request, there is room for {capacity}")
        names = [INGRESS, TEXT, DECODER, *app.models]
        if unknown := [name for name in self.replicas if name not in names]:
            raise UserError(f"serving.replicas.{unknown[0]}: expected one of {', '.join(names)}")
        return app

    def count(self, deployment: str) -> int:
        """Its replicas."""
        return self.replicas.get(deployment, 1)

    def capacity(self, model: ModelArgs, name: str) -> int:
        """Images that may be under way, as :attr:`ModelArgs.capacity` says for its own number of replicas."""
        return self.count(name) * model.ongoing + model.queue


@dataclass(frozen=True)
class ServingOutcome:
    """What the clients would see, and how busy each deployment would be."""

    window_s: float
    arrived: int
    """Requests from beginning to end, warm-up included; all of them are ``answered`` or ``refused``."""
    answered: int
    refused: int
    images_per_s: float
    """Answered within the window."""
    latencies: np.ndarray
    """Seconds, of requests that came within the window and were let in."""
    refused_share: float
    """Of requests that came within the window."""
    utilisation: dict[str, float]
    """By deployment: mean share of its replicas that are at work; of generators, of their slots."""
    waiting: dict[str, float]
    """By deployment: mean number of images that wait there."""
    inside: float
    """Mean number of requests under way."""

    def percentile(self, share: float) -> float:
        """Seconds within which ``share`` per cent were answered; infinite where nobody was."""
        return float(np.percentile(self.latencies, share)) if len(self.latencies) else float("inf")

    @property
    def bottleneck(self) -> str:
        """The busiest deployment."""
        return max(self.utilisation, key=lambda name: self.utilisation[name])


def simulate_serving(cfg: ServingConfig, seed: int = 0) -> ServingOutcome:
    """Run the load to its end and until everybody has an answer. A function of its arguments alone."""
    return _Simulation(cfg, seed).run()


class _Simulation:
    def __init__(self, cfg: ServingConfig, seed: int) -> None:
        self.cfg, self.app, self.env = cfg, cfg.app(), simpy.Environment()
        machine = cfg.machine
        self.compute: Compute = Processors(self.env, machine.cores, machine.together) if machine else self.env.timeout
        # Streams of their own: a further replica does not change who comes when, and what they ask for.
        arrivals, self.content, self.routes, times = (np.random.default_rng([seed, part]) for part in range(4))
        self.arrivals, self.vary = arrivals, Variation(cfg.times.variation, times)
        self.deployments = {INGRESS: self._ingress(), TEXT: self._text(), DECODER: self._decoder()}
        self.deployments |= {name: self._generator(name, model) for name, model in self.app.models.items()}
        self.room = {name: cfg.capacity(model, name) for name, model in self.app.models.items()}
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
        # An engine steps for one image as for many: how full it is tells how much more it could do.
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

    # --- what comes in

    def _open(self, rate: float) -> Process:
        while True:
            yield self.env.timeout(float(self.arrivals.exponential(1 / rate)))
            if self.env.now >= self.end:
                return
            self.env.process(self._request())

    def _client(self) -> Process:
        while self.env.now < self.end:
            yield self.env.process(self._request())
            # A refused client that asks again at once would stop the clock.
            yield self.env.timeout(1e-6)

    def _request(self) -> Process:
        asked, kind = self.env.now, self._kind()
        steps = int(self.content.integers(kind.steps[0], kind.steps[1], endpoint=True))
        cached = bool(self.content.random() < self.cfg.times.text_cached)
        counts = self.begin <= asked < self.end
        self.arrived += 1
        self.came += counts
        if self.room[kind.model] < kind.images:
            self.refused += 1
            self.turned_away += counts
            return
        self.room[kind.model] -= kind.images
        self.inside.add(1)
        yield from self._call(INGRESS)
        # The prompt's further images find it in the cache, or in the batch.
        ways = [self._image(kind, steps, cached or number > 0) for number in range(kind.images)]
        yield self.env.all_of([self.env.process(way) for way in ways])
        self.inside.add(-1)
        self.room[kind.model] += kind.images
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

    # --- what is there

    def _ingress(self) -> Deployment:
        times = self.cfg.times
        # Serve holds as many requests there as may be under way, and the gate bounds those.
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

        more: dict[str, Any] = {"size": DECODER_BATCH, "wait_s": WAIT_S, "after": file, "threads": FILE_THREADS}
        return self._deployment(DECODER, CALLS, lambda m: self._batches(m, seconds, **more))

    def _generator(self, name: str, model: ModelArgs) -> Deployment:
        times, buckets = self.cfg.times, self.cfg.buckets or bucket_sizes(model.slots)
        if max(buckets) != model.slots:
            raise UserError(f"serving.buckets: expected the largest to be the {model.slots} slots of models.{name}")

        def seconds(rows: int, admitted: int) -> float:
            return self.vary(times.step[name].of(rows) + admitted * times.admit.of(1))

        return self._deployment(name, model.ongoing, lambda m: Steps(self.env, self.compute, seconds, m, buckets))

    def _batches(self, meters: Meters, seconds: Any, **more: Any) -> BatchingReplica:
        return BatchingReplica(self.env, self.compute, lambda key, n: self.vary(seconds(key, n)), meters, **more)

    def _deployment(self, name: str, ongoing: int, make: Any) -> Deployment:
        meters = Meters.of(self.env)
        replicas: list[Replica] = [make(meters) for _ in range(self.cfg.count(name))]
        return Deployment(self.env, replicas, ongoing, meters, self.routes)
