"""Caching suite: speedup from cached text keys/values and from the AR cache, on complete images without Ray.

The text keys/values of all layers depend only on the prompt. The diffusion baseline projects them at every denoising step,
like a model whose forward pass takes text features; the AR baseline recomputes the whole prefix for every token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from ..config import Config
from ..engine.engine import Request, StepEngine
from ..engine.events import Finished
from ..engine.kinds import build_engine
from ..engine.slots import EngineOptions
from ..models.generator import ARGenerator, DiffusionGenerator, GeneratorConfig, build_generator
from ..models.joint_attention import JointCache, TextKV
from ..models.sampling import SamplingParams, generate_ar, generate_diffusion
from ..rendering import Cell, Goal
from .measure import Spread, Timing, race, ratio
from .report import SuiteResult

DIFFUSION_GOAL, AR_GOAL = 1.25, 8.0


class CachingBench(Config):
    """Model sizes: the paper's latent and text length with a smaller network."""

    num_tokens: int = 128
    bits_per_token: int = 64
    width: int = 256
    """Width of the generator and of the text features, which are equal in the paper too."""
    layers: int = 6
    heads: int = 4
    text_length: int = 128
    batch: int = 4
    """Images per batch; guidance doubles the network's rows."""
    steps: int = 20


@dataclass(frozen=True)
class Prompts:
    """Text features of a batch and of the empty prompt."""

    features: Tensor
    """Features of the prompts, float32 ``[layers, B, T, width]``, no padding."""
    empty: Tensor
    """Features of the empty prompt, float32 ``[layers, 1, T, width]``, only padding."""

    @classmethod
    def of(cls, cfg: CachingBench) -> Prompts:
        """Create random features."""
        shape = (cfg.layers, cfg.batch, cfg.text_length, cfg.width)
        features = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        return cls(features, torch.zeros(cfg.layers, 1, *shape[2:]))

    @property
    def masks(self) -> tuple[Tensor, Tensor]:
        real = torch.ones(self.features.shape[1:3], dtype=torch.bool)
        return real, torch.zeros_like(real[:1])

    def project(self, model: DiffusionGenerator | ARGenerator) -> tuple[TextKV, TextKV]:
        """Project the keys and values of the prompts and of the empty prompt."""
        real, none = self.masks
        with torch.no_grad():
            return model.text_kv(self.features, real), model.text_kv(self.empty, none)


class UncachedText:
    """Diffusion network that projects the text features in every call."""

    def __init__(self, model: DiffusionGenerator, prompts: Prompts) -> None:
        self.cfg, self.x_embedder, self.model = model.cfg, model.x_embedder, model
        empty = prompts.empty.expand(-1, prompts.features.shape[1], -1, -1)
        self.features = torch.cat((prompts.features, empty), dim=1)
        real, none = prompts.masks
        self.mask = torch.cat((real, none.expand(len(real), -1)))

    def __call__(self, z: Tensor, t: Tensor, _: TextKV | JointCache) -> Tensor:
        """Run the network, ignoring the cached text."""
        return self.model(z, t, self.model.text_kv(self.features, self.mask))


def run_caching(cfg: CachingBench, repeats: int) -> SuiteResult:
    """Measure diffusion and AR generators, each against its uncached form; all contestants of a kind generate equal bits."""
    rows: list[dict[str, Cell]] = []
    prompts, params = (
        Prompts.of(cfg),
        SamplingParams.of(cfg.batch, seed=range(cfg.batch), num_inference_steps=cfg.steps),
    )
    diffusion, ar = cast(DiffusionGenerator, _model(cfg, "diffusion")), cast(ARGenerator, _model(cfg, "ar"))
    uncached = cast(DiffusionGenerator, UncachedText(diffusion, prompts))
    engines = {kind: _engine(model, cfg) for kind, model in (("diffusion", diffusion), ("ar", ar))}
    goals = []
    contestants: dict[str, dict[str, Callable[[], Tensor]]] = {
        "diffusion": {
            "text projected every step": lambda: generate_diffusion(uncached, *prompts.project(diffusion), params),
            "text projected once": lambda: generate_diffusion(diffusion, *prompts.project(diffusion), params),
            "engine": lambda: _drain(engines["diffusion"], prompts, params),
        },
        "ar": {
            "prefix computed every token": lambda: generate_ar(ar, *prompts.project(ar), params, use_cache=False),
            "cached": lambda: generate_ar(ar, *prompts.project(ar), params),
            "engine": lambda: _drain(engines["ar"], prompts, params),
        },
    }
    for kind, runs in contestants.items():
        timings = race(runs, repeats=repeats)
        rows += _rows(kind, timings, cfg.batch)
        slow, fast, _ = timings.values()
        goal = DIFFUSION_GOAL if kind == "diffusion" else AR_GOAL
        goals.append(Goal(f"{kind}, cached against uncached", ratio(slow.wall, fast.wall).median, goal, ">="))
    setting: dict[str, Any] = {**cfg.model_dump(), "threads": torch.get_num_threads(), "repeats": repeats}
    return SuiteResult("Caching of text and tokens", setting, rows, goals)


def _model(cfg: CachingBench, kind: str) -> DiffusionGenerator | ARGenerator:
    sizes = {name: getattr(cfg, name) for name in ("num_tokens", "bits_per_token", "width", "layers", "heads")}
    torch.manual_seed(0)
    options = GeneratorConfig.model_validate({**sizes, "kind": kind, "text_width": cfg.width, "zero_init": False})
    return build_generator(options).eval()


def _engine(model: DiffusionGenerator | ARGenerator, cfg: CachingBench) -> StepEngine:
    # The sampler adds no padding here, so both compute the same shapes.
    options = EngineOptions(slots=cfg.batch, text_length=cfg.text_length)
    return build_engine(model, torch.zeros(cfg.layers, 0, cfg.width), options)


def _drain(engine: StepEngine, prompts: Prompts, params: SamplingParams) -> Tensor:
    for i in range(len(params)):
        engine.submit(Request(str(i), prompts.features[:, i], params.map(lambda value, i=i: value[i : i + 1])))  # type: ignore[misc]
    done: dict[str, Tensor] = {}
    while not engine.idle:
        done |= {event.id: event.codes for event in engine.step() if isinstance(event, Finished)}
    return torch.stack([done[str(i)] for i in range(len(params))])


def _rows(kind: str, timings: Mapping[str, Timing], batch: int) -> list[dict[str, Cell]]:
    baseline = next(iter(timings.values()))
    return [
        {
            "generator": kind,
            "how": name,
            "ms an image": Spread.of([1000 * seconds / batch for seconds in timing.wall]).text(digits=1),
            "times as fast": ratio(baseline.wall, timing.wall).text(),
            "by processor time": ratio(baseline.cpu, timing.cpu).text(),
        }
        for name, timing in timings.items()
    ]
