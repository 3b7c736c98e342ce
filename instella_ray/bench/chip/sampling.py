"""Parts: diffusion and AR sampling by bucket, compilation and precision, and whether a seed's bits are always the same."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Literal, get_args

import torch

from ...engine.buckets import described
from ...engine.compilation import Compilation
from ...engine.engine import Request, StepEngine
from ...engine.events import Finished
from ...engine.kinds import build_engine
from ...engine.slots import EngineOptions
from ...engine.weights import serving_dtype
from ...errors import UserError
from ...flops import DeviceWork, generator_pass
from ...models.eight_bit import Quantization
from ...models.generator import build_generator
from ...models.sampling import SamplingParams
from ...rendering import Goal
from .rows import Bench, ChipRow
from .settings import GpuBenchConfig

Kind = Literal["diffusion", "ar"]

LATENCY_GOALS: dict[Kind, float] = {"diffusion": 0.10, "ar": 0.20}
"""Most seconds of an image alone."""
COMPILATIONS: tuple[Compilation, ...] = get_args(Compilation)
PLAIN = tuple(name for name in COMPILATIONS if "compile" not in name)
COMPILED = tuple(name for name in COMPILATIONS if "compile" in name)
PRECISIONS: dict[str, tuple[torch.dtype, Quantization]] = {
    "bf16": (torch.bfloat16, "none"),
    "fp16": (torch.float16, "none"),
    "fp8": (torch.bfloat16, "fp8"),
    "int8": (torch.bfloat16, "int8"),
}
"""Weights and activations that are compared."""


def lacking(compilation: Compilation, device: torch.device) -> str | None:
    """Return why ``compilation`` cannot be measured on ``device``; None if it can."""
    return "not measured: graphs need a GPU" if "graphs" in compilation and device.type == "cpu" else None


def fastest(device: torch.device) -> Compilation:
    """Return the fastest way to run the network that needs no compilation."""
    return "none" if lacking("graphs", device) else "graphs"


def engine_of(bench: Bench, kind: Kind, options: EngineOptions, dtype: torch.dtype | None = None) -> StepEngine:
    """Build an engine with random weights, by default in the precision of serving."""
    bench.fresh()
    torch.manual_seed(0)
    with bench.device:
        model = build_generator(bench.cfg.generator(kind))
    model = model.to(dtype or serving_dtype(bench.device, "auto")).eval().requires_grad_(False)
    return build_engine(model, torch.zeros(model.cfg.layers, 0, model.cfg.text_width), options)


def requests(cfg: GpuBenchConfig, count: int) -> list[Request]:
    """Create guided requests of one prompt with seeds 0, 1, ..., whose ids are their seeds."""
    shape = (cfg.text.layers, cfg.text_length, cfg.text.width)
    features = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    params = [SamplingParams.of(1, seed=seed, num_inference_steps=cfg.steps) for seed in range(count)]
    return [Request(str(seed), features, each, prompt="prompt") for seed, each in enumerate(params)]


def image_work(bench: Bench, engine: StepEngine, count: int) -> DeviceWork:
    """Return the work of generating ``count`` guided images together."""
    cfg, model = bench.cfg, engine.slots.model.cfg
    work = generator_pass(model, 2 * count, cfg.text_length, engine.slots.z.element_size())
    steps = cfg.steps if model.kind == "diffusion" else model.num_tokens
    return DeviceWork(steps * work.flop, steps * work.bytes)


def measure_diffusion(bench: Bench) -> None:
    """Measure diffusion in every bucket, launched kernel by kernel and as recorded graphs."""
    _by_bucket(bench, "diffusion")


def measure_ar(bench: Bench) -> None:
    """Measure AR in every bucket, as :func:`measure_diffusion`."""
    _by_bucket(bench, "ar")


def _by_bucket(bench: Bench, kind: Kind) -> None:
    for compilation in PLAIN:
        what = f"{kind}, {compilation}"
        if reason := lacking(compilation, bench.device):
            bench.emit(ChipRow(what, note=reason))
            continue
        options = EngineOptions(bench.cfg.slots, bench.cfg.text_length, compilation, batch_invariant=False)
        _buckets(bench, engine_of(bench, kind, options), kind, bench.cfg.buckets, what)


def measure_compiled_sampling(bench: Bench) -> None:
    """Measure compiled diffusion in an engine of its own for each bucket, because a compilation takes long.

    With graphs only in the first: an engine records, and so compiles, all buckets up to its slots.
    """
    for compilation in COMPILED:
        what = f"diffusion, {compilation}"
        if reason := lacking(compilation, bench.device):
            bench.emit(ChipRow(what, note=reason))
            continue
        for slots in bench.cfg.compiled_buckets[: 1 if "graphs" in compilation else None]:
            options = EngineOptions(slots, bench.cfg.text_length, compilation, batch_invariant=False)
            _buckets(bench, engine_of(bench, "diffusion", options), "diffusion", (slots,), what)


def measure_precisions(bench: Bench) -> None:
    """Measure diffusion in each precision, as recorded graphs where there are any."""
    compilation = fastest(bench.device)
    buckets = (bench.cfg.buckets[0], bench.cfg.buckets[-1])
    for name, (dtype, quantization) in PRECISIONS.items():
        what = f"diffusion, {compilation}, {name}"
        options = EngineOptions(
            bench.cfg.slots, bench.cfg.text_length, compilation, batch_invariant=False, quantization=quantization
        )
        try:
            engine = engine_of(bench, "diffusion", options, dtype)
        except UserError as error:  # a chip without fp8
            bench.emit(ChipRow(what, note=f"not measured: {error}"))
            continue
        _buckets(bench, engine, "diffusion", buckets, what)


def _buckets(bench: Bench, engine: StepEngine, kind: Kind, buckets: Sequence[int], what: str) -> None:
    """Measure complete images; the seconds of one alone are taken for those of the launches, where the host launches."""
    launches: float | None = None
    for count in buckets:
        batch = requests(bench.cfg, count)
        seconds = bench.time(lambda batch=batch: list(engine.run(batch)))  # type: ignore[misc]
        goal = None
        if count == 1:
            launches = None if "graphs" in engine.options.compilation else seconds.median
            goal = Goal(f"{what}, image alone", seconds.median, LATENCY_GOALS[kind], "<=", "s")
        work = image_work(bench, engine, count)
        bench.add(f"{what}, {count} together", seconds, work, images=count, launches=launches, goal=goal)


def measure_bits(bench: Bench) -> None:
    """Compare the bits of one seed in every bucket, and tell which buckets the engine uses for equal bits."""
    for what, engine in _engines(bench):
        digests = digests_of(bench.cfg, engine)
        largest = digests[str(bench.cfg.slots)]
        other = [bucket for bucket, digest in digests.items() if digest != largest]
        bench.emit(ChipRow(what, digests=digests, note=_differences(f"bucket {bench.cfg.slots}", other)))


def measure_restart(bench: Bench) -> None:
    """Compare the bits of one seed with those of :func:`measure_bits`, which ran in another process."""
    before = {row["what"]: row.get("digests") for row in bench.earlier.get("bits", ())}
    for what, engine in _engines(bench):
        digests = digests_of(bench.cfg, engine)
        if (others := before.get(what)) is None:
            bench.emit(ChipRow(what, digests=digests, note="not compared: the part bits has no such row"))
            continue
        other = [bucket for bucket, digest in digests.items() if digest != others.get(bucket)]
        bench.emit(ChipRow(what, digests=digests, note=_differences("the process of the part bits", other)))


def _differences(reference: str, buckets: Sequence[str]) -> str:
    if not buckets:
        return f"same bits as {reference} in every bucket"
    return f"OTHER bits than {reference} in buckets {' '.join(buckets)}"


def _engines(bench: Bench) -> Iterator[tuple[str, StepEngine]]:
    """Yield engines of each kind with their names: with all buckets, launched in each way, and with those of equal bits."""
    slots, length = bench.cfg.slots, bench.cfg.text_length
    for kind in get_args(Kind):
        for compilation in PLAIN:
            if not lacking(compilation, bench.device):
                options = EngineOptions(slots, length, compilation, batch_invariant=False)
                yield f"{kind}, {compilation}: bits of seed 0", engine_of(bench, kind, options)
    for kind in get_args(Kind):
        engine = engine_of(bench, kind, EngineOptions(slots, length, fastest(bench.device)))
        yield f"{kind}, buckets of equal bits: {described(engine.slots.passes)}", engine


def digests_of(cfg: GpuBenchConfig, engine: StepEngine) -> dict[str, str]:
    """Generate seed 0 together with other seeds in every bucket; returns digests of its codes by bucket."""
    found = {}
    for count in cfg.buckets:
        events = engine.run(requests(cfg, count))
        (codes,) = [event.codes for event in events if isinstance(event, Finished) and event.id == "0"]
        found[str(count)] = hashlib.sha256(codes.numpy().tobytes()).hexdigest()[:16]
    return found
