"""Simulation suite: throughput and latency predicted from isolated stage times, against real measurements."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import psutil
import yaml

from .. import storage
from ..data.encode import EncodeConfig, run_encode
from ..data.ray_data import init_ray
from ..models.bit import BIT
from ..models.checkpoint import save_model
from ..planning.simulation.pipeline import ENCODERS, LineStage, simulate_line
from ..planning.simulation.serving import (
    INGRESS,
    LoadConfig,
    Machine,
    RequestKind,
    ServingConfig,
    ServingTimes,
    simulate_serving,
)
from ..planning.simulation.stage_time import StageTime
from ..rendering import Cell, Goal
from .data import DataBench, _write_shards
from .load import Load, closed_loop, mixed_requests, open_loop
from .measure import Spread
from .report import SuiteResult
from .serving import GRAPH, endpoints, graph_args, save_models
from .simulated_training import TrainingStages, predicted_rate, real_rate, training_config
from .simulation_settings import SimulationBench
from .stage_times import DataStages, Stages
from .usage import processes

T = TypeVar("T")
LOW, HIGH = 0.8, 1.2
"""Acceptable range of predicted / measured."""


def run_simulation_bench(cfg: SimulationBench) -> SuiteResult:
    """Predict and measure every load and job; one row each with both values and their ratio."""
    init_ray(log_to_driver=False)
    rows: list[dict[str, Cell]] = []
    goals: list[Goal] = []
    with tempfile.TemporaryDirectory() as name:
        found = _serving(cfg, Path(name), rows)
        machine = _machine(found)
        _encoding(cfg, Path(name), machine, rows)
        _training(cfg, Path(name), rows)
    for row in rows:
        for what in ("throughput", "p50"):
            if f"{what} ratio" in row:
                ratio = float(row[f"{what} ratio"])
                goals.append(Goal(f"{row['what']}: {what}, predicted/real", ratio, LOW, ">="))
                goals.append(Goal(f"{row['what']}: {what}, predicted/real", ratio, HIGH, "<="))
    about = {**cfg.model_dump(mode="json"), "load before": found["load"], **{k: str(v) for k, v in found.items()}}
    return SuiteResult("Simulation against measurements", about, rows, goals)


def _serving(cfg: SimulationBench, folder: Path, rows: list[dict[str, Cell]]) -> dict[str, Any]:
    found: dict[str, Any] = {"load": os.getloadavg()[0]}
    models_at = folder / "models"
    models_at.mkdir()
    models = save_models(cfg.graph, models_at)
    found |= _alone(cfg, models)
    (folder / "graph").mkdir()
    with endpoints(cfg.graph, folder / "graph", (GRAPH,)) as urls:
        url = urls[GRAPH]
        closed_loop(url, _bodies(cfg, 0, 512), 4, cfg.seconds)
        found |= _request_overhead(cfg, url, found)
        predicted_by = _prediction(cfg, found, folder, models)
        real: dict[str, list[Load]] = {}
        loads = {f"{n} in flight": {"in_flight": n} for n in cfg.in_flight}
        for number in range(cfg.rounds):
            for place, (name, load) in enumerate(loads.items()):
                bodies = _bodies(cfg, 1 + number * 10 + place, 512)
                real.setdefault(name, []).append(closed_loop(url, bodies, load["in_flight"], cfg.seconds))
        rate = cfg.open_share * Load.joined(real[list(loads)[-1]]).rate
        random = f"{rate:.1f}/s at random"
        for number in range(cfg.rounds):
            bodies = _bodies(cfg, 1000 + number, 512)
            real.setdefault(random, []).append(open_loop(url, bodies, rate, cfg.seconds, number))
    for name, parts in real.items():
        asked: dict[str, Any] = {**loads.get(name, {"rate": rate})}
        simulated = LoadConfig(mix=_mix(cfg), seconds=300, warm_up_s=20, **asked)
        outcome = simulate_serving(predicted_by.model_copy(update={"load": simulated}))
        seen = Load.joined(parts)
        rows.append(
            _compared(f"serving, {name}", outcome.images_per_s, seen.rate)
            | {
                "p50 s predicted": outcome.percentile(50),
                "p50 s real": seen.percentile(50),
                "p50 ratio": outcome.percentile(50) / seen.percentile(50),
                "p99 s predicted": outcome.percentile(99),
                "p99 s real": seen.percentile(99),
            }
        )
    return found


def _compared(what: str, predicted: float, real: float) -> dict[str, Cell]:
    return {
        "what": what,
        "images/s predicted": predicted,
        "images/s real": real,
        "throughput ratio": predicted / real,
    }


def _bodies(cfg: SimulationBench, seed: int, count: int) -> list[dict[str, Any]]:
    """Create request bodies with unique prompts, so that none is cached."""
    bodies = mixed_requests(count, cfg.graph.sizes, cfg.graph.steps, seed)
    return [{**body, "prompt": f"{body['prompt']}, {seed} {i}"} for i, body in enumerate(bodies)]


def _mix(cfg: SimulationBench) -> tuple[RequestKind, ...]:
    sizes = [f"{width}x{height}" for width in cfg.graph.sizes for height in cfg.graph.sizes]
    return tuple(RequestKind(model="diffusion", steps=cfg.graph.steps, size=size) for size in sizes)


def _alone(cfg: SimulationBench, models: dict[str, str]) -> dict[str, Any]:
    """Measure stage times of one process alone, and its relative speed with one process per core (``together``)."""
    import ray

    actor: Any = ray.remote(num_cpus=0)(Stages)
    actors = [actor.remote(cfg.graph, models, cfg.repeats) for _ in range(_cores())]
    rows = cfg.graph.slots
    ray.get([each.step.remote(rows) for each in actors])  # wait until all have started
    found = ray.get(actors[0].measure.remote())
    alone = ray.get(actors[0].step.remote(rows))
    # Repeated, because the processes do not start and end at exactly the same time.
    beside = [ray.get([each.step.remote(rows) for each in actors]) for _ in range(3)]
    for each in actors:
        ray.kill(each)
    found["together"] = min(1.0, alone / Spread.of([seconds for both in beside for seconds in both]).median)
    return found


def _request_overhead(cfg: SimulationBench, url: str, stages: dict[str, Any]) -> dict[str, float]:
    """Measure CPU time and latency of a request outside of the stages, from sequential requests with few steps."""
    began, used = time.perf_counter(), _cpu_seconds()
    time.sleep(cfg.seconds / 2)
    idle = (_cpu_seconds() - used) / (time.perf_counter() - began)
    few = cfg.graph.steps[0]
    bodies = [{**body, "num_inference_steps": few} for body in _bodies(cfg, 2000, 512)]
    began, used = time.perf_counter(), _cpu_seconds()
    load = closed_loop(url, bodies, 1, cfg.seconds)
    passed = time.perf_counter() - began
    requests = load.answered * passed / load.window_s
    cpu = (_cpu_seconds() - used - idle * passed) / requests
    mean = sum(load.latencies) / len(load.latencies)
    decode = sum(times[1] for times in stages["decode"].values()) / len(stages["decode"])
    file = sum(stages["file"].values()) / len(stages["file"])
    inside = stages["text"] + stages["admit"] + few * stages["step"][1] + decode + file
    # Subtract the decoder's batch collection time (5 ms), which is simulated.
    return {
        "ingress": max(0.0, cpu - inside),
        "hop": max(0.0, (mean - max(cpu, inside) - 0.005) / 3),
        "one request": mean,
        "inside": inside,
        "cpu": cpu,
        "idle": idle,
    }


def _machine(found: Mapping[str, Any]) -> Machine:
    """Describe this machine; the idle CPU use of Ray's processes is subtracted from its cores' speed."""
    return Machine(cores=_cores(), together=max(0.1, found["together"] - found["idle"] / _cores()))


def _cpu_seconds() -> float:
    total = 0.0
    for pid in processes(with_ray=True):
        try:
            times = psutil.Process(pid).cpu_times()
            total += times.user + times.system
        except psutil.Error:
            continue  # the process has exited
    return total


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _prediction(cfg: SimulationBench, found: dict[str, Any], folder: Path, models: dict[str, str]) -> ServingConfig:
    def time_of(seconds: dict[int, float]) -> StageTime:
        return StageTime(seconds=seconds, source="measured alone")

    endpoint = folder / "endpoint.yaml"
    args = {**graph_args(cfg.graph, models), "sizes": list(cfg.graph.sizes)}
    storage.write_text(str(endpoint), yaml.safe_dump({"app": args}))
    times = ServingTimes(
        ingress=time_of({1: found["ingress"]}),
        text=time_of({1: found["text"]}),
        admit=time_of({1: found["admit"]}),
        step={"diffusion": time_of(found["step"])},
        decode={size: time_of(seconds) for size, seconds in found["decode"].items()},
        file={size: time_of({1: seconds}) for size, seconds in found["file"].items()},
        hop_s=found["hop"],
    )
    return ServingConfig(
        endpoint=str(endpoint),
        # Client, proxy and ingress are separate processes, which work on different requests concurrently.
        replicas={INGRESS: 3},
        buckets=tuple(found["buckets"]),
        machine=_machine(found),
        times=times,
        load=LoadConfig(in_flight=1, mix=_mix(cfg)),
    )


def _encoding(cfg: SimulationBench, folder: Path, machine: Machine, rows: list[dict[str, Cell]]) -> None:
    """Predict and measure the encoding job with one actor, which also decodes: Ray Data fuses both stages on CPUs."""
    made = DataBench(images_per_shard=cfg.images_per_shard)
    few, many = cfg.shards
    shards = _write_shards(made, folder / "shards", many)
    for name, sizes in cfg.tokenizers.items():
        at = folder / name
        at.mkdir()
        save_model(at, BIT(sizes))
        given, repeats = (str(at), shards[0], sizes.image_size), max(2, cfg.repeats // 5)
        took, alone = _with_stage_times(DataStages, given, repeats, partial(_jobs, cfg, at, shards, folder))
        stages = [LineStage(ENCODERS, 1, (alone["decode"] + alone["encode"]) * cfg.images_per_shard)]
        predicted = simulate_line(stages, machine=machine).blocks_per_s * cfg.images_per_shard
        real = (many - few) * cfg.images_per_shard / (took[1] - took[0])
        rows.append(
            _compared(f"encoding with the {name} tokenizer", predicted, real)
            | {"decode ms": alone["decode"] * 1000, "encode ms": alone["encode"] * 1000}
        )


def _training(cfg: SimulationBench, folder: Path, rows: list[dict[str, Cell]]) -> None:
    """Predict and measure training from the images of the encoding jobs."""
    for name, sizes in cfg.trained.items():
        run = training_config(
            sizes, f"{folder}/shards/*.tar", folder / f"trained-{name}", cfg.training_steps, cfg.global_batch
        )
        real, alone = _with_stage_times(TrainingStages, (run,), cfg.repeats, partial(real_rate, run))
        found: dict[str, Cell] = {f"{key} ms": alone[key] * 1000 for key in ("batch", "step", "save")}
        rows.append(_compared(f"training the {name} tokenizer", predicted_rate(run, alone, _cores()), real) | found)


def _with_stage_times(
    kind: type, given: tuple[Any, ...], repeats: int, work: Callable[[], T]
) -> tuple[T, dict[str, float]]:
    """Run ``work`` and return its result with the stage times of ``kind``.

    Stage times are the mean of measurements before and after, since the machine's speed drifts.
    """
    import ray

    def measure() -> dict[str, float]:
        actor: Any = ray.remote(num_cpus=0)(kind).remote(*given)
        found: dict[str, float] = ray.get(actor.measure.remote(repeats))
        ray.kill(actor)
        return found

    before, done, after = measure(), work(), measure()
    return done, {name: (before[name] + after[name]) / 2 for name in before}


def _jobs(cfg: SimulationBench, tokenizer: Path, shards: Sequence[str], folder: Path) -> list[float]:
    """Measure the seconds of the small and of the large job."""
    return [_job(cfg, tokenizer, shards[:count], folder / f"{tokenizer.name}-{count}") for count in cfg.shards]


def _job(cfg: SimulationBench, tokenizer: Path, shards: Sequence[str], output: Path) -> float:
    """Run the job and return its seconds."""
    began = time.perf_counter()
    run_encode(
        EncodeConfig(
            input=",".join(shards),
            output=str(output),
            tokenizer=str(tokenizer),
            rows_per_file=cfg.images_per_shard,
            actors=1,
        )
    )
    return time.perf_counter() - began
