"""Resource plan of a training run: FLOP, GPU-days, memory, storage, network and cost, with all assumptions.

The paper states three inconsistent durations of its diffusion run: 20 days on a node of 8 (160 GPU-days), "approximately
200 GPU-days", and 177 GPU-days in Table 3. It gives 120 images/s per GPU but no number of steps: at that rate and a batch
of 4096, 160 GPU-days are 405,000 steps and 177 are 448,000. ``configs/paper/08-diffusion.yaml`` has 400,000.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field, model_validator

from .. import storage
from ..config import Config
from ..data.formats.codes import MANIFEST
from ..data.formats.names import find_files
from ..errors import UserError
from ..flops import (
    ACCELERATORS,
    AMD_OLMO_1B,
    TextEncoderSizes,
    TrainingFlops,
    generator_training,
    text_encoder_forward,
    tokenizer_training,
)
from ..models.bit import BITConfig
from ..models.checkpoint import parse_model, read_checkpoint_config
from ..models.folders import find_model
from ..models.generator import GeneratorConfig
from ..models.text_encoder import TextEncoderConfig, resolve_name
from ..training.generator import GeneratorRunConfig
from ..training.memory import (
    USABLE,
    Memory,
    choose_checkpointing,
    generator_memory,
    parameter_count,
    states,
    tokenizer_activations,
)
from ..training.settings import TrainConfig
from ..training.tokenizer import TokenizerConfig

PAPER_IMAGES_PER_SECOND = 120.0
"""Training throughput of the paper's generators on one MI300X (section 1)."""
CAPTION_BYTES = 500
"""Bytes of an image's long and short caption together."""


class PlanOptions(Config):
    """Assumptions of a plan that are not part of the run's configuration."""

    device: Literal["mi300x", "mi325x", "mi350x", "mi355x", "h100", "h100pcie", "h200", "a100"] = "mi300x"
    """Accelerator."""
    mfu: float | None = Field(None, gt=0, le=1)
    """Model FLOP utilization: share of the bf16 peak, without recomputation, as in metrics.jsonl."""
    hfu: float | None = Field(None, gt=0, le=1)
    """Hardware FLOP utilization, instead of mfu: also counts recomputation, so that gradient checkpointing costs time."""
    images_per_second: float | None = Field(None, gt=0)
    """Measured throughput of one GPU, instead of mfu."""
    price_per_gpu_hour: float | None = Field(None, ge=0)
    """Price of a GPU-hour in any currency; none omits the cost."""
    from_images: bool = False
    """Encode raw images in a generator's training loop instead of reading packed codes; implied by the run's images."""
    text_tokens: int | None = Field(None, ge=1)
    """Tokens of a caption, including padding; none means the text encoder's limit."""
    images: int = Field(100_000_000, ge=1)
    """Number of distinct images, if those of the run's data are not counted."""
    image_bytes: int = Field(150_000, ge=1)
    """Size of an image file."""

    @model_validator(mode="after")
    def _one_speed(self) -> PlanOptions:
        given = [name for name in ("mfu", "hfu", "images_per_second") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} both define the throughput: expected one of them")
        return self


@dataclasses.dataclass(frozen=True)
class Plan:
    """Resource needs of a run. Times, FLOP and bytes are in base units, without prefixes."""

    model: str
    parameters: int
    device: str
    gpus: int
    samples: int
    flop_per_sample: dict[str, float]
    """FLOP by part: ``forward``, ``backward``, frozen networks, recomputation, and the sums ``model`` and ``hardware``."""
    images_per_second: float
    """Throughput of one GPU."""
    mfu: float
    """Model FLOP utilization."""
    hfu: float
    """Hardware FLOP utilization: also counts recomputation."""
    gpu_hours: float
    memory: dict[str, float]
    """Memory of one worker by use (bytes)."""
    device_memory: float
    """Memory of one GPU (bytes)."""
    storage: dict[str, float]
    """Size of the data set and of the kept checkpoints (bytes)."""
    network: dict[str, float]
    """``sent_per_step``: bytes that a worker sends per step; ``read_per_second``: bytes that all workers read per second."""
    cost: float | None
    assumptions: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Return all figures, including derived ones, for JSON."""
        derived = {"gpu_days": self.gpu_days, "wall_hours": self.gpu_hours / self.gpus}
        return dataclasses.asdict(self) | derived | {"memory_total": self.memory_total, "fits": self.fits}

    @property
    def gpu_days(self) -> float:
        return self.gpu_hours / 24

    @property
    def memory_total(self) -> float:
        """Memory of one worker (bytes)."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """Whether a worker fits into a GPU's memory, with a tenth reserved for the allocator and libraries."""
        return self.memory_total <= USABLE * self.device_memory

    def text(self) -> str:
        """Format the plan for a terminal."""
        days = self.gpu_days / self.gpus
        parts = ", ".join(f"{name} {value / 1e9:,.0f}" for name, value in self.flop_per_sample.items())
        uses = ", ".join(f"{name} {value / 1e9:.1f}" for name, value in self.memory.items() if value >= 5e7)
        verdict = "fits" if self.fits else "does not fit"
        rows = {
            "run": f"{self.model}, {self.parameters / 1e9:.3g} B weights, {self.samples:,} samples",
            "GFLOP per sample": parts,
            "speed": f"{self.images_per_second:,.1f} images/s per GPU: MFU {self.mfu:.1%}, HFU {self.hfu:.1%}",
            "time": f"{self.gpu_days:,.1f} GPU-days ({self.gpu_hours:,.0f} GPU-hours), {days:,.1f} days on {self.gpus} GPUs",
            "memory per GPU": f"{self.memory_total / 1e9:.1f} GB of {self.device_memory / 1e9:.0f} ({verdict}): {uses}",
            "storage": ", ".join(f"{name} {value / 1e9:,.1f} GB" for name, value in self.storage.items()),
            "network": f"each GPU sends {self.network['sent_per_step'] / 1e9:.2f} GB per step; "
            f"all together read {self.network['read_per_second'] / 1e6:,.2f} MB/s of data",
            "cost": "unknown without a price" if self.cost is None else f"{self.cost:,.0f}",
        }
        width = max(map(len, rows))
        lines = [f"{name:<{width}}  {value}" for name, value in rows.items()]
        return "\n".join([*lines, "assumed:", *(f"  - {line}" for line in self.assumptions)])


class _PlannedRun(NamedTuple):
    """Figures of a run that depend on its model and data."""

    name: str
    parameters: int
    flops: TrainingFlops
    frozen: dict[str, float]
    """FLOP per sample of each frozen network, by name."""
    memory: Memory
    """Memory of a worker (bytes)."""
    checkpointing: str
    """Whether blocks are recomputed, and why."""
    data: dict[str, float]
    """Size of the data set by kind (bytes)."""
    sample_bytes: float
    """Bytes read per sample."""
    assumptions: list[str]


def plan_run(run: GeneratorRunConfig | TokenizerConfig, options: PlanOptions) -> Plan:
    """Plan ``run`` on ``options.device``; raises UserError for a text encoder whose sizes cannot be read."""
    train, device = run.train, ACCELERATORS[options.device]
    planned = _generator(run, options) if isinstance(run, GeneratorRunConfig) else _tokenizer(run, options)
    gpus, bf16 = train.workers.ranks, train.precision != "fp32"
    if options.images_per_second is not None:
        speed, source = options.images_per_second, f"{options.images_per_second:g} images/s per GPU, as given"
    elif options.mfu is not None:
        speed, source = options.mfu * device.peak / planned.flops.model, f"MFU {options.mfu:.3g}, as given"
    else:
        hfu = options.hfu or paper_hfu()
        speed = hfu * device.peak / planned.flops.hardware
        paper = f": the paper's {PAPER_IMAGES_PER_SECOND:g} images/s on an MI300X from raw images, with recomputation"
        source = f"HFU {hfu:.3g}{', as given' if options.hfu else paper}"
    samples = train.steps * train.global_batch
    hours = samples / speed / 3600
    recomputed = {"recomputed": planned.flops.recomputed} if planned.flops.recomputed else {}
    flops = {"forward": planned.flops.forward, "backward": planned.flops.backward, **planned.frozen, **recomputed}
    # Weights, EMA and AdamW's two moments, all float32; a new checkpoint is written before an old one is deleted.
    checkpoints = 16.0 * planned.parameters * (train.keep_checkpoints + 1)
    return Plan(
        model=planned.name,
        parameters=planned.parameters,
        device=device.label,
        gpus=gpus,
        samples=samples,
        flop_per_sample=flops | {"model": planned.flops.model, "hardware": planned.flops.hardware},
        images_per_second=speed,
        mfu=speed * planned.flops.model / device.peak,
        hfu=speed * planned.flops.hardware / device.peak,
        gpu_hours=hours,
        memory=planned.memory._asdict(),
        device_memory=device.memory,
        storage=planned.data | {"checkpoints": checkpoints},
        network={
            "sent_per_step": _sent_per_step(planned.parameters, train, bf16),
            "read_per_second": speed * gpus * planned.sample_bytes,
        },
        cost=None if options.price_per_gpu_hour is None else hours * options.price_per_gpu_hour,
        assumptions=[
            f"speed: {source}",
            f"{device.label}: {device.peak / 1e12:,.0f} TFLOP/s bf16 dense, {device.memory / 1e9:.0f} GB ({device.source})",
            f"{train.sharding}, {planned.checkpointing}, "
            f"{'bf16 autocast' if bf16 else 'float32 (slower than the bf16 peak that MFU is a share of)'}, "
            f"micro-batch {_micro_batch(train)}",
            "fits means within nine tenths of the memory; restarts, previews and validation are not in the time",
            *planned.assumptions,
        ],
    )


def paper_hfu() -> float:
    """Return the HFU of the paper's throughput on its hardware, when captions and raw images are encoded within the loop.

    With gradient checkpointing, without which its micro-batch of 512 does not fit.
    """
    model = GeneratorConfig(time_layers=1)
    sample = generator_training(model, 128, AMD_OLMO_1B, tokenizer=BITConfig(), gradient_checkpointing=True)
    return PAPER_IMAGES_PER_SECOND * sample.hardware / ACCELERATORS["mi300x"].peak


def text_encoder_sizes(cfg: TextEncoderConfig) -> TextEncoderSizes:
    """Sizes of the language model that ``cfg`` names, without loading weights; the paper's needs no hub either."""
    if cfg.name == TextEncoderConfig().name and cfg.layers is None:
        return AMD_OLMO_1B
    from transformers import AutoConfig, AutoModel

    try:
        extra = {"gguf_file": cfg.gguf_file} if cfg.gguf_file else {}
        described = AutoConfig.from_pretrained(resolve_name(cfg.name), **extra)
        with torch.device("meta"):
            model = AutoModel.from_config(described)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"text encoder '{cfg.name}': its sizes cannot be read ({reason})") from None
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    return TextEncoderSizes.of(model, cfg.layers)


def _generator(run: GeneratorRunConfig, options: PlanOptions) -> _PlannedRun:
    encoder, tokenizer = text_encoder_sizes(run.text_encoder), _tokenizer_sizes(run.tokenizer)
    bit = tokenizer or BITConfig()
    facts = {
        "num_tokens": bit.num_tokens,
        "bits_per_token": bit.bits_per_token,
        "layers": encoder.layers,
        "text_width": encoder.width,
    }
    given = run.model.model_fields_set
    model = run.model.model_copy(update={name: value for name, value in facts.items() if name not in given})
    tokens = options.text_tokens or run.text_encoder.max_length
    online = bit if options.from_images or run.images else None

    def memory(again: bool) -> Memory:
        world, bf16 = run.train.workers.ranks, run.train.precision != "fp32"
        return generator_memory(
            *(model, encoder, tokens, run.train), world=world, bf16=bf16, tokenizer=online, gradient_checkpointing=again
        )

    device = ACCELERATORS[options.device]
    again, reason = choose_checkpointing(run.gradient_checkpointing, memory(False), device.memory)
    flops = generator_training(model, tokens, encoder, tokenizer=online, gradient_checkpointing=again)
    text = text_encoder_forward(encoder, tokens)
    frozen = {"text encoder": text} | ({"tokenizer": flops.frozen - text} if online else {})
    rows = _rows(run)
    count = rows or options.images
    kind, each = ("images", options.image_bytes) if online else ("codes", bit.code_bytes)
    assumptions = [f"captions of {tokens} tokens, never cached"]
    if tokenizer is None:
        assumptions.append(f"tokenizer {run.tokenizer}: not found, assuming the paper's sizes")
    if rows is None:
        assumptions.append(f"{count:,} distinct images")
    assumptions.append(f"{each:,} bytes of {kind} per sample, and {CAPTION_BYTES} of captions")
    return _PlannedRun(
        name=f"{model.kind} generator",
        parameters=parameter_count(model),
        flops=flops,
        frozen=frozen,
        memory=memory(again),
        checkpointing=f"{'with' if again else 'without'} gradient checkpointing ({reason})",
        data={kind: float(count * (each + CAPTION_BYTES))},
        sample_bytes=float(each + CAPTION_BYTES),
        assumptions=assumptions,
    )


def _tokenizer(run: TokenizerConfig, options: PlanOptions) -> _PlannedRun:
    if options.from_images:
        raise UserError("from_images: expected none for a tokenizer, which is always trained from images")
    size, largest, bf16 = run.model.image_size, max(run.sizes), run.train.precision != "fp32"
    micro, frozen, parameters = _micro_batch(run.train), run.freeze_encoder, parameter_count(run.model)
    each = [tokenizer_training(run.model, size, output, frozen_encoder=frozen) for output in run.sizes]
    flops = TrainingFlops(*(sum(parts) / len(each) for parts in zip(*each, strict=True)))
    return _PlannedRun(
        name=f"tokenizer at {', '.join(map(str, run.sizes))} px",
        parameters=parameters,
        flops=flops,
        frozen={"encoder": flops.frozen} if frozen else {},
        memory=states(parameters, run.train.sharding, run.train.workers.ranks, bf16=bf16)._replace(
            inputs=micro * 3.0 * (size**2 + largest**2) * 4,
            activations=micro * tokenizer_activations(run.model, size, largest, bf16=bf16, frozen_encoder=frozen),
        ),
        checkpointing="without gradient checkpointing",
        data={"images": float(options.images * options.image_bytes)},
        sample_bytes=float(options.image_bytes),
        assumptions=[
            f"{options.images:,} distinct images of {options.image_bytes:,} bytes",
            "networks of the losses (perceptual, discriminator) are not counted",
        ],
    )


def _micro_batch(train: TrainConfig) -> int:
    return train.micro_batch_size or train.global_batch // train.workers.ranks


def _sent_per_step(parameters: int, train: TrainConfig, bf16: bool) -> float:
    """Compute the bytes that each worker sends per step in ring collectives, (workers - 1) / workers of each tensor."""
    workers = train.workers.ranks
    share, half = (workers - 1) / workers, 2 if bf16 else 4
    accumulation = train.global_batch // workers // _micro_batch(train)
    if train.sharding == "ddp":  # all-reduce = reduce-scatter, then all-gather; once a step
        return share * 2 * 4 * parameters
    if train.sharding == "zero2":  # gradients are scattered after each micro-batch, weights gathered once
        return share * 4 * parameters * (accumulation + 1)
    return share * (2 * half + 4) * parameters * accumulation  # weights gathered forward and backward


def _tokenizer_sizes(folder: str) -> BITConfig | None:
    try:
        model = parse_model(read_checkpoint_config(find_model(folder))["model"], folder)
    except UserError:
        return None
    return model if isinstance(model, BITConfig) else None


def _rows(run: GeneratorRunConfig) -> int | None:
    """Count the rows of all code folders, or of all image shards; None if one is missing or has no count."""
    if run.images is not None:
        try:
            counts = [shard.rows for shard in find_files(run.images)]
        except UserError:
            return None
        return sum(filter(None, counts)) if None not in counts else None
    files = [storage.join(source.folder, MANIFEST) for source in run.sources]
    if not all(storage.exists(file) for file in files):
        return None
    return sum(storage.read_json(file)["rows"] for file in files)
