"""Overhead suite: time of an engine step relative to the bare forward pass of a full slot table."""

from __future__ import annotations

from typing import Any, Literal

import torch

from ..config import Config
from ..engine.engine import EngineOptions, Request, StepEngine, build_engine
from ..models.generator import GeneratorConfig, build_generator
from ..models.sampling import SamplingParams
from ..rendering import Cell, Goal
from .measure import Spread, race
from .report import SuiteResult

GOAL = 1.05


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


def run_overhead(cfg: OverheadBench, repeats: int) -> SuiteResult:
    """Measure an engine step against the forward pass on the same rows; one row per table and generator kind."""
    rows: list[dict[str, Cell]] = []
    goals = []
    for name, size in cfg.sizes.items():
        for kind in ("diffusion", "ar"):
            engine = full_engine(size, kind)  # type: ignore[arg-type]

            def bare(engine: StepEngine = engine) -> None:
                for _ in range(cfg.steps_a_round):
                    with torch.no_grad():
                        engine.forward(engine.options.slots, 2)

            def step(engine: StepEngine = engine) -> None:
                for _ in range(cfg.steps_a_round):
                    # Keep all slots occupied: a bare pass has neither admissions nor finished images.
                    engine.position.zero_()
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
                    "buckets": " ".join(map(str, engine.buckets[2])),
                }
            )
            goals.append(Goal(f"{name} {kind}, step against forward", more["wall"].median, GOAL, "<="))
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
