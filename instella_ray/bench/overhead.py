"""Overhead suite: time of an engine step relative to the bare forward pass of a full slot table."""

from __future__ import annotations

import itertools
from typing import Any, Literal

import numpy as np
import torch

from ..config import Config
from ..engine.engine import Request, StepEngine
from ..engine.kinds import build_engine
from ..engine.slots import EngineOptions
from ..models.generator import GeneratorConfig, build_generator
from ..models.sampling import SamplingParams
from ..rendering import Cell, Goal
from .measure import Spread, race, ratio
from .report import SuiteResult

GOAL = 1.05
MIXED_GOAL = 0.97


class TableSize(Config):
    """Sizes of a generator and of its slot table."""

    num_tokens: int
    bits_per_token: int
    width: int
    layers: int
    text_width: int
    text_length: int
    slots: int


SIZES = {
    "demo": TableSize(num_tokens=8, bits_per_token=16, width=128, layers=6, text_width=384, text_length=48, slots=16),
    "medium": TableSize(
        num_tokens=128, bits_per_token=64, width=256, layers=6, text_width=256, text_length=128, slots=8
    ),
}


class OverheadBench(Config):
    """Slot tables to measure."""

    sizes: dict[str, TableSize] = SIZES
    steps_a_round: int = 4
    """Steps per timed round."""
    mixed_steps_a_round: int = 40
    """Steps per timed round of mixed requests."""


def run_overhead(cfg: OverheadBench, repeats: int) -> SuiteResult:
    """Measure an engine step against the forward pass on the same rows; one row per table and generator kind.

    The last row compares a queue of mixed requests with one of requests that are all alike, on the first table.
    """
    rows: list[dict[str, Cell]] = []
    goals = []
    for name, size in cfg.sizes.items():
        for kind in ("diffusion", "ar"):
            engine = full_engine(size, kind)  # type: ignore[arg-type]

            def bare(engine: StepEngine = engine) -> None:
                for _ in range(cfg.steps_a_round):
                    with torch.no_grad():
                        engine.slots.forward(engine.options.slots, 2)

            def step(engine: StepEngine = engine) -> None:
                for _ in range(cfg.steps_a_round):
                    # Keep all slots occupied: a bare pass has neither admissions nor finished images.
                    engine.slots.position.zero_()
                    for entry in filter(None, engine.entries):
                        entry.left = entry.steps
                    engine.step()

            timings = race({"bare": bare, "step": step}, repeats=repeats)
            each = 1000 / cfg.steps_a_round
            times = {key: Spread.of(timing.wall) for key, timing in timings.items()}
            more = {
                clock: Spread.of([s / b for b, s in zip(getattr(timings["bare"], clock), values, strict=True)])
                for clock, values in vars(timings["step"]).items()
            }
            rows.append(
                {
                    "table": name,
                    "generator": kind,
                    "rows": 2 * size.slots,
                    "forward ms": times["bare"].text(each),
                    "step ms": times["step"].text(each),
                    "step / forward": more["wall"].text(digits=3),
                    "by processor time": more["cpu"].text(digits=3),
                    "buckets": " ".join(map(str, engine.slots.buckets[2])),
                }
            )
            goals.append(Goal(f"{name} {kind}, step against forward", more["wall"].median, GOAL, "<="))
    name, size = next(iter(cfg.sizes.items()))
    row, goal = _mixed(name, size, cfg.mixed_steps_a_round, max(1, repeats // 2))
    rows.append(row)
    goals.append(goal)
    setting: dict[str, Any] = {"threads": torch.get_num_threads(), "repeats": repeats}
    sizes = {name: " ".join(f"{k}={v}" for k, v in size.model_dump().items()) for name, size in cfg.sizes.items()}
    return SuiteResult("Engine overhead over a forward pass", {**setting, **sizes}, rows, goals)


def full_engine(size: TableSize, kind: Literal["diffusion", "ar"]) -> StepEngine:
    """Create an engine with random weights in which every slot has an image with many steps left."""
    torch.manual_seed(0)
    given = size.model_dump(exclude={"slots", "text_length"})
    model = build_generator(GeneratorConfig(kind=kind, heads=4, zero_init=False, **given)).eval()
    empty = torch.zeros(size.layers, 0, size.text_width)
    engine = build_engine(model, empty, EngineOptions(slots=size.slots, text_length=size.text_length))
    for i in range(size.slots):
        params = SamplingParams.of(1, seed=i, num_inference_steps=10 + i, guidance_scale=i / 2, temperature=i / 10)
        engine.submit(Request(str(i), torch.randn(size.layers, size.text_length // 2, size.text_width), params))
    engine.step()
    return engine


def _mixed(name: str, size: TableSize, steps_a_round: int, repeats: int) -> tuple[dict[str, Cell], Goal]:
    """Measure steps with mixed requests against those with requests that are all alike; both keep all slots occupied."""
    # 5 to 50 steps, 27.5 in the mean.
    lengths = itertools.cycle(np.random.default_rng(0).permutation(np.arange(5, 51)).tolist())
    mixed, alike = (full_engine(size, "diffusion") for _ in range(2))
    features = torch.randn(size.layers, size.text_length // 2, size.text_width)
    numbers, alike_lengths = itertools.count(size.slots), itertools.cycle((27, 28))

    def queue(engine: StepEngine, steps: int, guidance: float, temperature: float) -> None:
        number = next(numbers)
        params = SamplingParams.of(
            1, seed=number, num_inference_steps=steps, guidance_scale=guidance, temperature=temperature
        )
        engine.submit(Request(str(number), features, params))

    def run_mixed() -> None:
        for _ in range(steps_a_round):
            while len(mixed.waiting) < size.slots:
                steps = next(lengths)
                queue(mixed, steps, guidance=steps % 5, temperature=steps % 3 / 2)
            mixed.step()

    def run_alike() -> None:
        for _ in range(steps_a_round):
            while len(alike.waiting) < size.slots:
                queue(alike, next(alike_lengths), guidance=2.0, temperature=0.5)
            alike.step()

    timings = race({"mixed": run_mixed, "alike": run_alike}, repeats=repeats)
    relative = ratio(timings["alike"].wall, timings["mixed"].wall)
    row: dict[str, Cell] = {
        "table": name,
        "generator": "diffusion",
        "rows": 2 * size.slots,
        "rate mixed / alike": relative.text(digits=3),
    }
    return row, Goal(f"{name} diffusion, rate of mixed requests against alike ones", relative.median, MIXED_GOAL, ">=")
