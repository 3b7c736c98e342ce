"""Resource plan of an endpoint: memory of each stage, replicas that may share a GPU, GPUs, and the least times.

Ray reserves shares of a GPU (``num_gpus``) but does not limit what a replica takes of its memory or time: replicas share
a GPU well if they fit into its memory together, whichever Ray puts there.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

from ..errors import UserError
from ..flops import ACCELERATORS, Accelerator, DeviceWork, bit_decode, generator_pass, text_encoder_forward
from ..models.bit import BITConfig
from ..models.checkpoint import parse_model, read_checkpoint_config
from ..models.generator import GeneratorConfig
from ..rendering import digits, table
from ..serving.config import ModelArgs, ServeArgs, StageArgs
from ..serving.deployments import DECODE_BATCH, ENCODE_BATCH
from ..serving.setup import check_sizes, located, one_text_encoder
from ..training.memory import USABLE
from .plan import PlanOptions, text_encoder_sizes
from .replica_memory import (
    CONTEXT,
    ReplicaMemory,
    decoder_replica,
    generator_replica,
    text_encoder_replica,
    weight_bytes,
)

UNITS = 10_000
"""Smallest parts of a GPU that Ray reckons with."""
GB = 1e9


class LeastTimes(NamedTuple):
    """Times of a generator that no implementation can undercut, in seconds."""

    step_of_one: float
    """Step with one image."""
    bound_of_one: str
    """What bounds it: ``compute`` or ``memory``."""
    step_of_all: float
    """Step with an image in every slot."""
    bound_of_all: str
    image: dict[int, float]
    """One image alone, from prompt to pixels, by edge in pixels."""
    images_per_second: float
    """Images per second that one replica can generate on a GPU of its own; the most, not the least."""


@dataclasses.dataclass(frozen=True)
class PlannedStage:
    """Replicas of one stage."""

    least_replicas: int
    most_replicas: int
    num_gpus: float
    """GPU share of each replica; 0 computes on CPUs."""
    memory: ReplicaMemory
    """Memory of one replica (bytes), of the host without a GPU."""
    times: LeastTimes | None = None
    """Of generators on GPUs."""

    @property
    def units(self) -> int:
        return round(self.num_gpus * UNITS)


@dataclasses.dataclass(frozen=True)
class EndpointPlan:
    """Resource needs of an endpoint. Times and bytes are in base units, without prefixes."""

    device: str
    device_memory: float
    """Memory of one GPU (bytes)."""
    stages: dict[str, PlannedStage]
    """By the name of their deployment."""
    assumptions: list[str]

    @property
    def least(self) -> list[Counter[str]]:
        """Replicas on each GPU, with the fewest of every stage."""
        return self._packed({name: stage.least_replicas for name, stage in self.stages.items()})

    @property
    def most(self) -> list[Counter[str]]:
        """Replicas on each GPU, with the most of every stage."""
        return self._packed({name: stage.most_replicas for name, stage in self.stages.items()})

    @property
    def heaviest(self) -> Counter[str]:
        """Replicas that Ray may put on one GPU and that need the most memory together."""
        heaviest = {0: Counter[str]()}
        for name, stage in self.stages.items():
            for _ in range(min(stage.most_replicas, UNITS // stage.units) if stage.units else 0):
                for used, replicas in list(heaviest.items()):
                    more, total = replicas + Counter([name]), used + stage.units
                    if total <= UNITS and self.bytes_of(more) > self.bytes_of(heaviest.get(total, Counter())):
                        heaviest[total] = more
        return max(heaviest.values(), key=self.bytes_of)

    @property
    def fits(self) -> bool:
        """Whether all replicas that may share a GPU fit into its memory, with a tenth reserved for the allocator."""
        return self.bytes_of(self.heaviest) <= USABLE * self.device_memory

    @property
    def warnings(self) -> list[str]:
        """Problems of the configuration on this device."""
        if self.fits:
            return []
        need = self.bytes_of(self.heaviest) / GB
        return [
            f"{_names(self.heaviest)} may share one {self.device} by their num_gpus and need {need:.1f} GB of its "
            f"{self.device_memory / GB:.0f}; raise num_gpus, or lower slots or prompt_cache_bytes"
        ]

    def bytes_of(self, replicas: Mapping[str, int]) -> float:
        """Return the memory of ``replicas`` (bytes)."""
        return sum(count * self.stages[name].memory.total for name, count in replicas.items())

    def as_dict(self) -> dict[str, Any]:
        """Return all figures, including derived ones, for JSON."""
        stages = {
            name: dataclasses.asdict(stage)
            | {
                "memory": stage.memory._asdict() | {"total": stage.memory.total},
                "times": stage.times and stage.times._asdict(),
                "share_of_memory": self._share(stage),
            }
            for name, stage in self.stages.items()
        }
        return {
            "device": self.device,
            "device_memory": self.device_memory,
            "stages": stages,
            "gpus": {"least": len(self.least), "most": len(self.most)},
            "replicas_by_gpu": {"least": self.least, "most": self.most},
            "heaviest": {"replicas": self.heaviest, "memory": self.bytes_of(self.heaviest)},
            "fits": self.fits,
            "warnings": self.warnings,
            "assumptions": self.assumptions,
        }

    def text(self) -> str:
        """Format the plan for a terminal."""
        lines = [
            f"memory of a replica in GB, and its share of one {self.device} ({self.device_memory / GB:.0f} GB):",
            table([self._row(name, stage) for name, stage in self.stages.items()]),
        ]
        if times := {name: stage.times for name, stage in self.stages.items() if stage.times}:
            lines += ["", "estimates: at least these times, and at most these rates, on a GPU of its own:"]
            lines += [table([_speeds(name, each) for name, each in times.items()])]
        lines += ["", f"GPUs: {_gpus(self.least, 'the fewest')}", f"      {_gpus(self.most, 'the most')}"]
        if self.heaviest:
            verdict = "fit" if self.fits else "do not fit"
            together = f"{self.bytes_of(self.heaviest) / GB:.1f} GB of {self.device_memory / GB:.0f} ({verdict})"
            lines.append(f"heaviest that may share a GPU: {_names(self.heaviest)}, {together}")
        lines += ["assumed:", *(f"  - {line}" for line in self.assumptions)]
        return "\n".join([*lines, *(f"warning: {line}" for line in self.warnings)])

    def _packed(self, counts: Mapping[str, int]) -> list[Counter[str]]:
        """Put each replica on the first GPU that has room, from the largest share down."""
        gpus: list[Counter[str]] = []
        for name in sorted(counts, key=lambda name: -self.stages[name].units):
            units = self.stages[name].units
            for _ in range(counts[name] if units else 0):
                gpu = next((gpu for gpu in gpus if self._units_of(gpu) + units <= UNITS), None)
                if gpu is None:
                    gpu = Counter()
                    gpus.append(gpu)
                gpu[name] += 1
        return gpus

    def _units_of(self, replicas: Mapping[str, int]) -> int:
        return sum(count * self.stages[name].units for name, count in replicas.items())

    def _share(self, stage: PlannedStage) -> float | None:
        """Return the share of a GPU's usable memory that a replica needs; None on CPUs."""
        return stage.memory.total / (USABLE * self.device_memory) if stage.num_gpus else None

    def _row(self, name: str, stage: PlannedStage) -> dict[str, str]:
        fewest, most, share = stage.least_replicas, stage.most_replicas, self._share(stage)
        uses = {use: digits(value / GB) for use, value in stage.memory._asdict().items()}
        return {
            "stage": name,
            "replicas": str(fewest) if fewest == most else f"{fewest} to {most}",
            "num_gpus": digits(stage.num_gpus),
            "share needed": "on CPUs" if share is None else digits(share, significant=2),
            "total": digits(stage.memory.total / GB),
        } | uses


def plan_endpoint(args: ServeArgs, options: PlanOptions) -> EndpointPlan:
    """Plan ``args`` on ``options.device`` from the configurations of its model folders, without loading weights.

    Raises UserError for a folder or text encoder whose sizes cannot be read, and for contradictory settings.
    """
    args.check()
    args = located(args)
    device = ACCELERATORS[options.device]
    tokenizer = _read(args.tokenizer, BITConfig)
    check_sizes(args, tokenizer)
    generators = {name: _read(model.path, GeneratorConfig) for name, model in args.models.items()}
    encoder = one_text_encoder(args)
    sizes, tokens = text_encoder_sizes(encoder), min(encoder.max_length, args.text_length)
    batch = 1 if all(model.batch_invariant for model in args.models.values()) else ENCODE_BATCH
    edge = max(args.sizes)
    stages = {
        "TextEncoder": _stage(
            args, args.text, text_encoder_replica(sizes, batch, tokens, _value_bytes(args, args.text))
        ),
        "Decoder": _stage(
            args, args.decoder, decoder_replica(tokenizer, DECODE_BATCH, edge, _value_bytes(args, args.decoder))
        ),
    }
    prompt = DeviceWork(text_encoder_forward(sizes, tokens), _value_bytes(args, args.text) * sizes.matrix_weights)
    before_and_after = {
        size: device.least_seconds(prompt)[0] + device.least_seconds(_decoding(tokenizer, size))[0]
        for size in args.sizes
    }
    for name, cfg in generators.items():
        model = args.models[name]
        size = _value_bytes(args, model)
        memory = generator_replica(cfg, model.options(args.text_length), size)
        times = _least_times(cfg, model, args.text_length, size, device, before_and_after) if args.gpus(model) else None
        stages[f"Generator-{name}"] = dataclasses.replace(_stage(args, model, memory), times=times)
    return EndpointPlan(
        device.label,
        device.memory,
        stages,
        assumptions=[
            f"{device.label}: {device.peak / 1e12:,.0f} TFLOP/s bf16 dense, {device.bandwidth / 1e12:.1f} TB/s, "
            f"{device.memory / GB:.0f} GB ({device.source})",
            f"{CONTEXT / GB:.0f} GB a process for the device's context, kernels and libraries",
            "needs and fit are of nine tenths of the memory; caches are at their limits",
            f"prompts of {tokens} tokens; up to {DECODE_BATCH} images of {edge} px decoded at once; float32 model folders",
            "a swap of weights holds a second engine until the requests of the first have ended, which is not counted",
            "times count arithmetic, weights and keys and values; no launches of kernels, no calls, no other replicas",
        ],
    )


def _read(folder: str, kind: type[Any]) -> Any:
    """Read the configuration of a model folder; UserError if it is no ``kind``."""
    cfg = parse_model(read_checkpoint_config(folder)["model"], folder)
    if not isinstance(cfg, kind):
        expected, got = ("tokenizer", "generator") if kind is BITConfig else ("generator", "tokenizer")
        raise UserError(f"{folder}: holds a {got}, expected a {expected}")
    return cfg


def _value_bytes(args: ServeArgs, stage: StageArgs) -> int:
    """Return the bytes of a value in the precision of ``stage``, as :func:`..engine.weights.serving_dtype` chooses it."""
    auto = "bf16" if args.gpus(stage) else "fp32"
    return 2 if (args.precision if args.precision != "auto" else auto) == "bf16" else 4


def _stage(args: ServeArgs, stage: StageArgs, memory: ReplicaMemory) -> PlannedStage:
    return PlannedStage(stage.least_replicas, stage.most_replicas, args.gpus(stage), memory)


def _decoding(cfg: BITConfig, edge: int) -> DeviceWork:
    """Return the work of decoding one image, with float32 weights."""
    return DeviceWork(
        bit_decode(cfg, edge, edge).forward, weight_bytes(cfg, "quantizer.embed", "decoder.", "to_pixel.")
    )


def _least_times(
    cfg: GeneratorConfig,
    model: ModelArgs,
    text_length: int,
    size: int,
    device: Accelerator,
    before_and_after: Mapping[int, float],
) -> LeastTimes:
    steps = model.defaults.num_inference_steps if cfg.kind == "diffusion" else cfg.num_tokens
    branches = 2 if model.defaults.guidance_scale else 1
    one, all_slots = (
        device.least_seconds(generator_pass(cfg, branches * images, text_length, size)) for images in (1, model.slots)
    )
    image = {edge: seconds + steps * one[0] for edge, seconds in before_and_after.items()}
    return LeastTimes(*one, *all_slots, image, model.slots / (steps * all_slots[0]))


def _speeds(name: str, times: LeastTimes) -> dict[str, str]:
    step = {
        "stage": name,
        "step of 1, ms": f"{digits(1e3 * times.step_of_one)} ({times.bound_of_one})",
        "of all slots": f"{digits(1e3 * times.step_of_all)} ({times.bound_of_all})",
    }
    images = {f"{edge} px alone, ms": digits(1e3 * seconds) for edge, seconds in times.image.items()}
    return step | images | {"images/s": digits(times.images_per_second)}


def _gpus(gpus: list[Counter[str]], which: str) -> str:
    placed = Counter(map(_names, gpus))
    return "; ".join([f"{len(gpus)} for {which} replicas", *(f"{count} of {names}" for names, count in placed.items())])


def _names(replicas: Mapping[str, int]) -> str:
    return " + ".join(name if count == 1 else f"{count} x {name}" for name, count in replicas.items())
