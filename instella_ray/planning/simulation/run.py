"""``instella-ray simulate``: runs the configured simulations and reports figures and assumptions as tables."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from ...config import Config, load_config
from ...errors import UserError
from ...rendering import Cell, table
from .pipeline import DataJobs, LineOutcome, LineStage, simulate_line
from .serving import ServingConfig, ServingOutcome, simulate_serving
from .sizing import Slo, size_cpus, size_serving
from .stage_time import StageTime
from .training import ClusterConditions, Run, TrainingOutcome, simulate_training

DAY_S = 86400


class TrainingJob(Config):
    """A run of ``jobs/train_generator.py`` on the simulated GPUs."""

    run: str
    """The run's configuration, a file or a recipe."""
    overrides: tuple[str, ...] = ()
    """Overrides of that configuration, ``key=value``."""
    images_per_second: float = Field(gt=0)
    """Throughput of one GPU while computing."""
    speed_source: str
    """Source of that figure."""
    largest_micro_batch: int = Field(512, ge=1)
    """Largest micro-batch that fits into memory (samples)."""
    loader: StageTime
    """Time to load a batch by number of samples, in the loader's thread."""
    cluster: ClusterConditions


class SimulateConfig(Config):
    """Systems to simulate: any of an endpoint, the data jobs and a training run."""

    seed: int = 0
    gpus: int = Field(8, ge=1)
    """GPUs of the encoding job and of the training run."""
    serving: ServingConfig | None = None
    slo: Slo | None = None
    """Objective for which to size the endpoint's replicas; none simulates ``serving.replicas``."""
    data: DataJobs | None = None
    busy: float = Field(0.95, gt=0, lt=1)
    """Target utilisation of the encoding GPUs, for which to size the CPU workers."""
    training: TrainingJob | None = None


@dataclass(frozen=True)
class Simulated:
    """Title, figures and table rows of one simulated system."""

    title: str
    figures: dict[str, Any]
    rows: list[dict[str, Cell]]


@dataclass(frozen=True)
class Report:
    """Results of all simulated systems, and the assumptions."""

    gpus: int
    systems: dict[str, Simulated]
    assumptions: list[str]

    def text(self) -> str:
        """Format the report as Markdown."""
        parts = [f"## {system.title}\n\n{table(system.rows)}" for system in self.systems.values()]
        return "\n\n".join([*parts, "Assumed:\n\n" + "\n".join(f"- {line}" for line in self.assumptions)])

    def as_dict(self) -> dict[str, Any]:
        """Return the figures and assumptions for JSON."""
        figures = {name: system.figures for name, system in self.systems.items()}
        return {"gpus": self.gpus, **figures, "assumptions": self.assumptions}


def run_simulation(cfg: SimulateConfig) -> Report:
    """Simulate every system of ``cfg``; raises UserError if it has none, or an objective that cannot be met."""
    systems = {}
    if cfg.serving is not None:
        systems["serving"] = _serving(cfg, cfg.serving)
    if cfg.data is not None:
        systems["data"] = _data(cfg, cfg.data)
    if cfg.training is not None:
        systems["training"] = _training(cfg, cfg.training)
    if not systems:
        raise UserError("nothing to simulate: expected at least one of serving, data, training")
    return Report(cfg.gpus, systems, list(_assumptions(cfg)))


def _serving(cfg: SimulateConfig, serving: ServingConfig) -> Simulated:
    if cfg.slo is not None:
        layout = size_serving(serving, cfg.slo, cfg.seed)
        replicas, outcome = layout.replicas, layout.outcome
    else:
        outcome = simulate_serving(serving, cfg.seed)
        replicas = {name: serving.count(name) for name in outcome.utilisation}
    app = serving.app()
    gpus = sum(
        count * app.gpus(app.models.get(name, getattr(app, name, app.text)))
        for name, count in replicas.items()
        if name != "ingress"
    )
    figures = {
        "replicas": replicas,
        "gpus": gpus,
        "images_per_s": outcome.images_per_s,
        "p50_s": outcome.percentile(50),
        "p99_s": outcome.percentile(99),
        "refused_share": outcome.refused_share,
        "bottleneck": _bottleneck(replicas, outcome),
        "utilisation": outcome.utilisation,
        "waiting": outcome.waiting,
    }
    rows: list[dict[str, Cell]] = [
        {
            "deployment": name,
            "replicas": count,
            "busy": f"{outcome.utilisation[name]:.0%}",
            "images waiting": outcome.waiting[name],
        }
        for name, count in replicas.items()
    ]
    load = serving.load
    asked = f"{load.rate:g} requests/s" if load.rate is not None else f"{load.in_flight} requests in flight"
    title = (
        f"Serving {asked}: {outcome.images_per_s:.1f} images/s, p50 {outcome.percentile(50):.2f} s, "
        f"p99 {outcome.percentile(99):.2f} s, {outcome.refused_share:.1%} refused; {gpus:.1f} GPUs, "
        f"bottleneck: {figures['bottleneck']}"
    )
    return Simulated(title, figures, rows)


def _bottleneck(replicas: dict[str, int], outcome: ServingOutcome) -> str:
    return max(replicas, key=lambda name: outcome.utilisation[name])


def _data(cfg: SimulateConfig, jobs: DataJobs) -> Simulated:
    lines = {"curation": jobs.curation(), "encoding": jobs.encoding(cfg.gpus)}
    figures: dict[str, Any] = {}
    rows: list[dict[str, Cell]] = []
    for name, stages in lines.items():
        outcome = simulate_line(stages, variation=jobs.variation, seed=cfg.seed)
        figures[name] = _line(jobs, stages, outcome)
        rows.append({"job": name, **{key: value for key, value in figures[name].items() if key != "utilisation"}})
        rows[-1] |= {f"{stage} busy": f"{share:.0%}" for stage, share in outcome.utilisation.items()}
    figures["cpus_to_keep_gpus_busy"] = cpus = size_cpus(jobs, cfg.gpus, cfg.busy, cfg.seed)
    need = "storage is too slow for any number of" if cpus is None else f"{cpus}"
    title = f"{jobs.images:,} images, encoding on {cfg.gpus} GPUs: {need} CPU workers keep them busy"
    return Simulated(title, figures, rows)


def _line(jobs: DataJobs, stages: list[LineStage], outcome: LineOutcome) -> dict[str, Any]:
    rate = jobs.images_per_s(outcome)
    return {
        "CPU workers": stages[1].workers,
        "images_per_s": round(rate, 1),
        "days": jobs.images / rate / DAY_S,
        "bottleneck": outcome.bottleneck,
        "utilisation": outcome.utilisation,
    }


def _training(cfg: SimulateConfig, job: TrainingJob) -> Simulated:
    run = planned(job, cfg.gpus)
    outcome = simulate_training(run, job.cluster, cfg.seed)
    figures = {
        "days": outcome.seconds / DAY_S,
        "busy": outcome.busy,
        "bottleneck": outcome.bottleneck,
        "failures": outcome.failures,
        "shares": outcome.shares,
    }
    rows: list[dict[str, Cell]] = [
        {"time goes to": name, "share": f"{share:.1%}"} for name, share in outcome.shares.items()
    ]
    title = (
        f"Training {run.steps:,} steps on {cfg.gpus} GPUs: {outcome.seconds / DAY_S:.2f} days, GPUs busy {outcome.busy:.0%}, "
        f"{_failed(outcome)}, bottleneck: {outcome.bottleneck}"
    )
    return Simulated(title, figures, rows)


def _failed(outcome: TrainingOutcome) -> str:
    return f"{outcome.failures} failure{'' if outcome.failures == 1 else 's'}"


def planned(job: TrainingJob, gpus: int) -> Run:
    """Derive the simulated run on ``gpus`` GPUs from its plan; raises UserError if they do not divide its global batch."""
    from ...training.generator import GeneratorRunConfig
    from ..plan import PlanOptions, plan_run

    batch = load_config(GeneratorRunConfig, job.run, job.overrides).train.global_batch
    share, rest = divmod(batch, gpus)
    if rest:
        raise UserError(f"gpus {gpus}: expected a divisor of the run's global batch of {batch}")
    micro = next(size for size in range(min(job.largest_micro_batch, share), 0, -1) if share % size == 0)
    sizes = [f"train.workers.count={gpus}", f"train.micro_batch_size={micro}"]
    run = load_config(GeneratorRunConfig, job.run, [*job.overrides, *sizes])
    plan = plan_run(run, PlanOptions(images_per_second=job.images_per_second))
    per_sample = plan.network["read_per_second"] / (plan.images_per_second * gpus)
    return Run(
        gpus=gpus,
        steps=run.train.steps,
        step_s=share / job.images_per_second,
        sends_after=micro / share if run.train.sharding == "ddp" else 1.0,
        sent_bytes=plan.network["sent_per_step"],
        batch_bytes=per_sample * batch,
        batch_s=job.loader.of(share),
        # Weights, EMA and the optimizer's two moments in float32.
        checkpoint_bytes=16.0 * plan.parameters,
        checkpoint_every=run.train.checkpoint_every,
    )


def _assumptions(cfg: SimulateConfig) -> Iterator[str]:
    if cfg.serving is not None:
        times = cfg.serving.times
        yield from _sources("serving.times", times)
        yield f"serving.times.hop_s: {times.hop_s:g} s ({times.hop_source}); every time varies by {times.variation:.0%}"
        yield "serving: steady load, a fixed number of replicas, no deadlines and no lost replicas"
        yield "serving: replicas.ingress stands for ingress_replicas of the endpoint, one as long as it is not set"
    if cfg.data is not None:
        yield from _sources("data", cfg.data)
        yield f"data.storage: {cfg.data.storage.bytes_per_s / 1e9:g} GB/s in total ({cfg.data.storage.source})"
    if cfg.training is not None:
        yield f"training: {cfg.training.images_per_second:g} images/s per GPU ({cfg.training.speed_source})"
        yield from _sources("training", cfg.training)
        cluster = cfg.training.cluster
        yield (
            f"training.cluster: {cluster.network_bytes_per_s / 1e9:g} GB/s per GPU in a ring, overlapped with the "
            f"backward pass; each node fails once in {cluster.node_mtbf_days:g} days ({cluster.source})"
        )


def _sources(prefix: str, cfg: Config) -> Iterator[str]:
    """Yield a line for each stage time in ``cfg``."""
    for name in type(cfg).model_fields:
        value = getattr(cfg, name)
        each = value.items() if isinstance(value, dict) else [("", value)]
        for key, found in each:
            if isinstance(found, StageTime):
                yield f"{prefix}.{name}{f'.{key}' if key else ''}: {found.of(1):.4g} s for one ({found.source})"
