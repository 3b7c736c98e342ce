"""How many of what: replicas of each deployment for a load and its limits, CPU workers that keep GPUs busy."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from pydantic import Field
from tqdm import tqdm

from ...config import Config
from ...errors import UserError
from .pipeline import ENCODERS, DataJobs, simulate_line
from .serving import DECODER, DECODER_BATCH, INGRESS, TEXT, ServingConfig, ServingOutcome, simulate_serving

MOST_REPLICAS = 4096


class Slo(Config):
    """What callers are promised."""

    p99_s: float = Field(gt=0)
    """99 of a hundred requests are answered within so many seconds."""
    refused: float = Field(0.001, ge=0, le=1)
    """Largest share of requests that may be refused."""

    def met(self, outcome: ServingOutcome) -> bool:
        return outcome.percentile(99) <= self.p99_s and outcome.refused_share <= self.refused


@dataclass(frozen=True)
class Layout:
    """Replicas by deployment, and what they do."""

    replicas: dict[str, int]
    outcome: ServingOutcome


def size_serving(cfg: ServingConfig, slo: Slo, seed: int = 0) -> Layout:
    """Replicas that meet ``slo`` under ``cfg``'s load, of which no single one can be left out.

    From those that the mean load needs, the busiest deployment gets more until the limits are met; then each gives back
    what it can. UserError for limits that no number of replicas meets: with one image alone the time is too long.
    """
    if cfg.load.rate is None:
        raise UserError("serving.load: sizing needs a rate of requests; a closed loop never asks for more than it gets")
    tried: dict[tuple[int, ...], Layout] = {}
    counts = _needed(cfg, cfg.load.rate)
    with tqdm(desc="sizing", unit="layout", delay=3, leave=False) as bar:

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
                    f"slo: p99 within {slo.p99_s:g} s cannot be had with any number of replicas "
                    f"(p50 {layout.outcome.percentile(50):.3g} s while all are idle); expected more"
                )
        changed = True
        while changed:
            changed = False
            for name in counts:
                while counts[name] > 1 and slo.met(attempt(fewer := {**counts, name: counts[name] - 1}).outcome):
                    counts, changed = fewer, True
        return attempt(counts)


def size_cpus(jobs: DataJobs, gpus: int, busy: float = 0.95, seed: int = 0) -> int | None:
    """Fewest CPU workers with which encoding keeps ``gpus`` at work for the share ``busy``; None where storage forbids it."""

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
    # Where several are at their end, who waits most tells who is the cause.
    full = {name: share for name, share in outcome.utilisation.items() if share > 0.95}
    return max(full, key=lambda name: outcome.waiting[name]) if full else outcome.bottleneck


def _needed(cfg: ServingConfig, rate: float) -> dict[str, int]:
    """Replicas by the mean load and the best batches alone: with fewer a queue would grow without end."""
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
