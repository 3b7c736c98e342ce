"""Sizing by simulation: replicas of each deployment that meet an SLO, and CPU workers that keep GPUs busy."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from pydantic import Field

from ... import logs
from ...config import Config
from ...errors import UserError
from .pipeline import ENCODERS, DataJobs, simulate_line
from .serving import DECODER, DECODER_BATCH, INGRESS, TEXT, ServingConfig, ServingOutcome, simulate_serving

MOST_REPLICAS = 4096


class Slo(Config):
    """Service-level objective of the endpoint."""

    p99_s: float = Field(gt=0)
    """Largest 99th percentile of latency (s)."""
    refused: float = Field(0.001, ge=0, le=1)
    """Largest share of requests that may be refused."""

    def met(self, outcome: ServingOutcome) -> bool:
        return outcome.percentile(99) <= self.p99_s and outcome.refused_share <= self.refused


@dataclass(frozen=True)
class Layout:
    """Replicas by deployment, and their simulated outcome."""

    replicas: dict[str, int]
    outcome: ServingOutcome


def size_serving(cfg: ServingConfig, slo: Slo, seed: int = 0) -> Layout:
    """Find replicas that meet ``slo`` under the load of ``cfg``, such that none can be removed.

    Starts with the replicas that the mean load needs, adds replicas to the bottleneck until the SLO is met, then removes
    those that are not needed. Raises UserError for an SLO that no number of replicas meets.
    """
    if cfg.load.rate is None:
        raise UserError("serving.load: sizing needs a rate of requests; a closed loop adapts to the capacity")
    tried: dict[tuple[int, ...], Layout] = {}
    counts = _needed(cfg, cfg.load.rate)
    with logs.progress_bar(desc="sizing", unit="layout", delay=3, leave=False) as bar:

        def attempt(replicas: dict[str, int]) -> Layout:
            key = tuple(replicas.values())
            if key not in tried:
                bar.update()
                tried[key] = Layout(replicas, simulate_serving(cfg.model_copy(update={"replicas": replicas}), seed))
            return tried[key]

        while not slo.met((layout := attempt(counts)).outcome):
            counts = {**counts, (name := _busiest(layout)): counts[name] + max(1, counts[name] // 10)}
            if max(counts.values()) > MOST_REPLICAS or layout.outcome.utilisation[name] < 0.05:
                raise UserError(
                    f"slo: p99 within {slo.p99_s:g} s cannot be met with any number of replicas "
                    f"(p50 {layout.outcome.percentile(50):.3g} s at low utilisation); expected a higher limit"
                )
        changed = True
        while changed:
            changed = False
            for name in counts:
                while counts[name] > 1 and slo.met(attempt(fewer := {**counts, name: counts[name] - 1}).outcome):
                    counts, changed = fewer, True
        return attempt(counts)


def size_cpus(jobs: DataJobs, gpus: int, busy: float = 0.95, seed: int = 0) -> int | None:
    """Find the fewest CPU workers that keep ``gpus`` encoders at utilisation ``busy``; None if storage is too slow."""

    def enough(cpus: int) -> bool:
        outcome = simulate_line(jobs.encoding(gpus, cpus), variation=jobs.variation, seed=seed)
        return outcome.utilisation[ENCODERS] >= busy

    storage, cpus, encoders = jobs.encoding(gpus, 1)
    if storage.capacity < busy * encoders.capacity:
        return None
    low = max(1, int(busy * encoders.capacity / cpus.capacity))
    high = ceil(1.1 * low) + 1
    while not enough(high):
        if high > 100 * low:
            return None
        high *= 2
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle + 1, high)
    return low


def _busiest(layout: Layout) -> str:
    outcome = layout.outcome
    # If several are saturated, the one with the longest queue is the cause.
    full = {name: share for name, share in outcome.utilisation.items() if share > 0.95}
    return max(full, key=lambda name: outcome.waiting[name]) if full else outcome.bottleneck


def _needed(cfg: ServingConfig, rate: float) -> dict[str, int]:
    """Compute the replicas needed for the mean load with full batches; with fewer, queues grow without bound."""
    app, times, total = cfg.app(), cfg.times, sum(kind.share for kind in cfg.load.mix)
    seconds = dict.fromkeys([INGRESS, TEXT, DECODER, *dict.fromkeys(kind.model for kind in cfg.load.mix)], 0.0)
    seconds[INGRESS] = rate * times.ingress.of(1)
    seconds[TEXT] = rate * times.text.of(1) * (1 - times.text_cached)
    for kind in cfg.load.mix:
        images, slots = rate * kind.share / total * kind.images, app.models[kind.model].slots
        each = sum(kind.steps) / 2 * times.step[kind.model].of(slots) / slots + times.admit.of(1)
        seconds[kind.model] += images * each
        seconds[DECODER] += images * times.decode[kind.size].of(DECODER_BATCH) / DECODER_BATCH
    return {name: max(1, ceil(need)) for name, need in seconds.items()}
