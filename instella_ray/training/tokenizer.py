"""Tokenizer training (section 2.1): configuration, loss, task and evaluation of one stage. Stages: :mod:`.stages`."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar, cast

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from .. import logs, storage
from ..accelerator import upload
from ..config import InputPath
from ..data.formats.codes import dead_bits
from ..data.formats.images import channels_first, normalized, to_pixels, to_tensor
from ..data.formats.patterns import Pattern, absolute_pattern
from ..data.loading.image_data import ImageBatch, ImageData, require_images
from ..data.loading.loader import Data
from ..data.loading.split import FileData
from ..data.provenance import shard_provenance
from ..errors import UserError
from ..flops import tokenizer_training
from ..models import rng
from ..models.bit import BIT, BITConfig
from ..models.checkpoint import Model, build_model
from ..models.discriminator import DiscriminatorConfig
from ..models.folders import find_model
from .adversarial import DRAWS, AdversarialConfig, Adversary
from .held_out import complete_held_out, held_out_set, hold_out
from .launch import launch
from .logged import ADVERSARY, TOKENIZER, check_keep_best
from .losses import (
    BIT_SHARE,
    CollapseWatch,
    PerceptualConfig,
    ReconstructionLoss,
    TokenizerLossConfig,
    bit_share,
    bit_summary,
    psnr,
)
from .previews import PreviewInputs
from .settings import TrainingRun
from .start_from import parent_provenance, trained_tokenizer
from .tokenizer_validation import TokenizerValidation, TokenizerValidator, complete_validation
from .validation import validating

log = logging.getLogger(__name__)
SIZE = "output_size"
PREVIEWED = 8
"""Images of a preview."""
F = TypeVar("F", PerceptualConfig, DiscriminatorConfig)


class TokenizerConfig(TrainingRun):
    """Configuration of a tokenizer run."""

    model: BITConfig
    data: Pattern
    """Curated WebDataset tars (path or glob, or several separated by commas)."""
    start_from: InputPath | None = None
    """Model folder of the same sizes whose (EMA) weights initialize the model; none means random initialization."""
    output_sizes: tuple[int, ...] = ()
    """Output sizes in pixels, of which each step uses one (512, 768 and 1024 in the paper's second stage); none means
    the model's image_size."""
    freeze_encoder: bool = False
    """Freeze the encoder and train only the decoder and the quantizer (the paper's third stage)."""
    adversarial: AdversarialConfig | None = None
    """Add adversarial training against a discriminator (the paper's third stage)."""
    temperature: float = Field(0.5, ge=0, allow_inf_nan=False)
    """Quantizer temperature tau in training (0.5 in the paper's first stage: it prevents code collapse). 0 thresholds the
    bits, as at inference. A one_hot quantizer has none."""
    late_temperature: float = Field(0.1, ge=0, allow_inf_nan=False)
    """Quantizer temperature in the last part of the run (the paper's second stage)."""
    late_fraction: float = 0.3
    """Fraction of the run that uses ``late_temperature``."""
    freeze_norm_fraction: float = 0.5
    """Fraction of the run after which the batch statistics of the logits are frozen (with normalize_logits)."""
    collapse_limit: float = Field(0.25, ge=0, le=1)
    """Fraction of bits that are constant over all images since the last logged line, above which one warning is logged,
    after the end of warm-up."""
    loss: TokenizerLossConfig = TokenizerLossConfig()
    validation: TokenizerValidation | None = None
    """Evaluation of checkpoints during training; None disables it."""

    @model_validator(mode="after")
    def _options_fit(self) -> TokenizerConfig:
        if self.loss.code_weight and self.model.quantizer != "binary":
            raise ValueError(f"loss.code_weight {self.loss.code_weight}: only the binary quantizer has it, expected 0")
        if self.train.sharding != "ddp":
            raise ValueError(f"train.sharding {self.train.sharding}: not supported for tokenizers, expected ddp")
        return self

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sides of the decoded images in pixels."""
        return self.output_sizes or (self.model.image_size,)

    def size_index(self, step: int) -> int:
        """Return the index in :attr:`sizes` of the output size of ``step``, the same on any number of ranks."""
        return int(np.random.default_rng((self.train.seed, step)).integers(len(self.sizes)))


class TokenizerLoss(nn.Module):
    """Training loss of one micro-batch: forward pass at a temperature, loss and logged parts."""

    def __init__(self, bit: BIT, cfg: TokenizerLossConfig, adversary: Adversary | None = None) -> None:
        super().__init__()
        self.bit = bit
        self.supervised = ReconstructionLoss(cfg)
        self.code_weight = cfg.code_weight if bit.cfg.quantizer == "binary" else 1.0
        self.adversary = adversary  # not a submodule: its parameters have their own optimizer

    def forward(
        self, images: Tensor, targets: Tensor, seeds: Tensor, temperature: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and its parts of ``images [B, 3, H, W]``, reconstructed at the size of ``targets``.

        Both are floats in [-1, 1] or, as the data are, uint8, which become such floats here, on the device.
        ``seeds [B]`` determine each sample's crop positions, discriminator augmentation and bit draws.
        """
        images, targets = normalized(images), normalized(targets)
        first, sizes = torch.zeros_like(seeds), self.bit.cfg
        draws = rng.uniforms(seeds, first, 1, DRAWS, stream=rng.TRAINING)[:, 0]
        u = rng.uniforms(seeds, first + 1, sizes.num_tokens, sizes.bits_per_token, stream=rng.TRAINING)
        height, width = targets.shape[-2:]
        out = self.bit(images, temperature=temperature, u=u, height=height, width=width)
        loss, parts = self.supervised(out.images, targets, draws[:, :2])
        # Logged if there are several: steps between two lines may have different ones.
        size = targets.new_full((), width)
        parts |= {"code_loss": out.code_loss, BIT_SHARE: bit_share(out.codes), SIZE: size}
        if self.code_weight:
            loss = loss + self.code_weight * out.code_loss
        if self.adversary is not None:
            loss, more = self.adversary.add_loss(loss, out.images, targets, draws, last_layer(self.bit))
            parts |= more
        return loss, parts


def last_layer(bit: BIT) -> Tensor:
    """Return the weight tensor of the last layer, which is followed only by its bias."""
    return list(bit.to_pixel.parameters())[-2]


class HeldOutReconstruction(nn.Module):
    """Loss of reconstructions from hard bits, as the tokenizer is used, without regularization and discriminator."""

    def __init__(self, bit: BIT, supervised: ReconstructionLoss) -> None:
        super().__init__()
        self.bit, self.supervised = bit, supervised

    def forward(self, images: Tensor, seeds: Tensor, **targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and its parts, means over the sizes of ``targets``; arguments as :class:`TokenizerLoss`."""
        places = rng.uniforms(seeds, torch.zeros_like(seeds), 1, 2, stream=rng.TRAINING)[:, 0]
        codes = self.bit.encode(normalized(images))
        wanted = map(normalized, targets.values())
        found = [self.supervised(self.bit.decode(codes, *t.shape[-2:]), t, places) for t in wanted]
        parts = {name: torch.stack([each[name] for _, each in found]).mean() for name in found[0][1]}
        return torch.stack([loss for loss, _ in found]).mean(), parts


class SizedImages(Data, Protocol):
    """Dataset of images that makes only the sizes that are asked for."""

    def batch(self, epoch: int, samples: np.ndarray, sizes: Collection[int] | None = None, /) -> Any: ...


class TokenizerTask:
    """Training task of a :class:`BIT`; implements :class:`.trainer.TrainingTask`."""

    def __init__(self, cfg: TokenizerConfig) -> None:
        torch.manual_seed(cfg.train.seed)
        self.cfg = cfg
        sizes = sorted({cfg.model.image_size, *cfg.sizes})

        def load(data: Pattern) -> FileData:
            return ImageData(data, sizes, cfg.train.seed, decoders=cfg.train.workers.decoders)

        (data,), held_out = hold_out([load(cfg.data)], [1], cfg.train.held_out, load)
        self.data = cast(SizedImages, data)  # all of the images, or those that are not held out
        model = build_model(cfg.model.model_dump())
        assert isinstance(model, BIT)
        if cfg.start_from is not None:
            model.load_state_dict(trained_tokenizer(cfg.start_from, cfg.model).state_dict())
        if cfg.freeze_encoder:
            model.encoder.requires_grad_(False)
        self.model: Model = model
        self.bit = model
        self.discriminator: Adversary | None = None
        if cfg.adversarial is not None:
            self.discriminator = Adversary(cfg.adversarial, len(cfg.sizes), cfg.train.seed)
        loss = TokenizerLoss(model, cfg.loss, self.discriminator)
        self.step_module: nn.Module = loss
        measured = HeldOutReconstruction(model, loss.supervised)
        self.held_out = held_out_set(cfg.train.held_out, held_out, measured, self._held_out_inputs)
        self.temperature = cfg.temperature
        self.size = cfg.sizes[0]
        self.watch = CollapseWatch(cfg.collapse_limit)

    def batch(self, step: int, epoch: int, samples: np.ndarray) -> ImageBatch:
        """Load the images at the two sizes that ``step`` needs."""
        return self.data.batch(epoch, samples, {self.cfg.model.image_size, self.cfg.sizes[self.cfg.size_index(step)]})

    def micro_batches(self, batch: ImageBatch, size: int, seeds: Tensor) -> list[dict[str, Any]]:
        images, targets = (channels_first(batch.pixels[side]) for side in (self.cfg.model.image_size, self.size))
        inputs = {"images": images, "targets": targets, "seeds": seeds}
        parts = zip(*(value.split(size) for value in inputs.values()), strict=True)
        return [{**dict(zip(inputs, part, strict=True)), "temperature": self.temperature} for part in parts]

    def begin(self, batch: ImageBatch) -> None:
        """Calibrate the patch embedding on the first batch, unless the weights are pretrained."""
        if self.cfg.start_from is None:
            self.bit.calibrate(self._images(batch, self.bit))

    def before_step(self, step: int) -> None:
        done = step / self.cfg.train.steps
        late = done >= 1 - self.cfg.late_fraction
        self.temperature = self.cfg.late_temperature if late else self.cfg.temperature
        if self.bit.quantizer.norm is not None:
            self.bit.quantizer.norm.train(done < self.cfg.freeze_norm_fraction)
        index = self.cfg.size_index(step)
        self.size = self.cfg.sizes[index]
        if self.discriminator is not None:
            self.discriminator.before_step(step, index)

    def summary(self, step: int, means: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return scalars with bit usage statistics, and the mean output size if there are several; warn on collapse."""
        share = means.pop(BIT_SHARE)
        size = means.pop(SIZE)
        bits = bit_summary(share)
        first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
        if first and step >= self.cfg.train.optimizer.warmup_steps:
            self.watch.look(step, bits, share)
        sizes = {SIZE: size} if len(self.cfg.sizes) > 1 else {}
        return {**means, **bits, **sizes}

    def flops(self, parts: list[dict[str, Any]]) -> float:
        """Return the tokenizer's FLOP on all images; the networks of the losses are not counted."""
        count = sum(len(part["images"]) for part in parts)
        size, frozen = self.cfg.model.image_size, self.cfg.freeze_encoder
        return count * tokenizer_training(self.cfg.model, size, self.size, frozen_encoder=frozen).model

    def _held_out_inputs(self, batch: ImageBatch, seeds: Tensor) -> dict[str, Any]:
        targets = {f"target_{size}": channels_first(batch.pixels[size]) for size in self.cfg.sizes}
        return {"images": channels_first(batch.pixels[self.cfg.model.image_size]), "seeds": seeds, **targets}

    def preview_inputs(self) -> PreviewInputs:
        """Return the first held-out images, or without any the first images, with their keys."""
        data = self.held_out.data if self.held_out else self.data
        batch = data.batch(0, np.arange(min(PREVIEWED, len(data))))
        return PreviewInputs(tuple(batch.keys), batch.pixels[self.cfg.model.image_size])

    def preview(self, model: Model, inputs: PreviewInputs) -> np.ndarray:
        """Return reconstructions of the originals."""
        assert isinstance(model, BIT) and inputs.originals is not None
        return to_pixels(reconstruct(model, to_tensor(inputs.originals)))

    def _images(self, batch: ImageBatch, bit: BIT) -> Tensor:
        """Return the images at the model's size, float32 ``[B, 3, H, W]`` on the device of ``bit``."""
        pixels = torch.from_numpy(batch.pixels[self.cfg.model.image_size])
        return to_tensor(upload(pixels, next(bit.parameters()).device))

    def keys(self, batch: ImageBatch) -> list[str]:
        return batch.keys

    def saved(self) -> None:
        """Do nothing: all that the next steps depend on is in the checkpoint."""

    def close(self) -> None:
        """Do nothing: there is nothing to report at the end."""

    def extra(self) -> Mapping[str, Any]:
        return {}


def reconstruct(bit: BIT, images: Tensor) -> Tensor:
    """Encode ``images [B, 3, H, W]`` to hard bits and decode them; returns float32 on the CPU."""
    device = next(bit.parameters()).device
    return bit.decode(bit.encode(images.to(device)), *images.shape[-2:]).float().cpu()


class ReconstructionQuality(NamedTuple):
    """Reconstruction metrics of a tokenizer."""

    psnr: float
    """Mean over images in dB."""
    dead_bits: float
    """Fraction of bits that are constant over all images."""


def evaluate_tokenizer(bit: BIT, images: Tensor, batch_size: int = 64, *, title: str) -> ReconstructionQuality:
    """Measure ``bit`` with hard bits on ``images [N, 3, H, W]`` in [-1, 1], showing a progress bar."""
    device = next(bit.parameters()).device
    values, codes = [], []
    for part in logs.progress_bar(images.split(batch_size), desc=title, unit="batch"):
        code = bit.encode(part.to(device))
        values.append(psnr(bit.decode(code, *part.shape[-2:]).cpu(), part))
        codes.append(code.cpu())
    share = torch.cat(codes).float().mean(0)
    return ReconstructionQuality(float(torch.cat(values).mean()), float(dead_bits(share).float().mean()))


def complete_tokenizer(cfg: TokenizerConfig) -> TokenizerConfig:
    """Return ``cfg`` with absolute paths, as workers need it.

    UserError for sizes that do not fit the model or the loss, micro-batches too small for normalize_logits, shards without
    images, weights that cannot be loaded, a ``keep_best`` metric that is not logged, and a validation that cannot be run.
    """
    for name, size, multiple in (
        ("model.image_size", cfg.model.image_size, cfg.model.size_multiple),
        *(("output_sizes", size, cfg.model.decode_multiple) for size in cfg.output_sizes),
    ):
        if size <= 0 or size % multiple:
            raise UserError(f"{name} {size}: not a multiple of {multiple}")
    look = cfg.loss.perceptual
    if look.network != "none" and look.crop > min(cfg.sizes):
        raise UserError(f"loss.perceptual.crop {look.crop}: images are decoded to {min(cfg.sizes)} px")
    least = min(cfg.train.micro_batch_size or cfg.train.global_batch // n for n in cfg.train.worker_counts())
    if cfg.model.normalize_logits and cfg.freeze_norm_fraction > 0 and least < 2:
        raise UserError(
            f"train.micro_batch_size {least}: model.normalize_logits takes statistics of a micro-batch, expected at least 2 "
            "images on each worker, or freeze_norm_fraction 0"
        )
    require_images(cfg.data)
    held_out = complete_held_out(cfg.train.held_out, require_images)
    facts: dict[str, Any] = {
        "data": absolute_pattern(cfg.data),
        "train": cfg.train.model_copy(update={"held_out": held_out}),
    }
    if look.network != "none":
        facts["loss"] = cfg.loss.model_copy(update={"perceptual": _with_absolute_weights(look)})
    if cfg.adversarial is not None:
        discriminator = _with_absolute_weights(cfg.adversarial.discriminator)
        facts["adversarial"] = cfg.adversarial.model_copy(update={"discriminator": discriminator})
    if cfg.start_from is not None:
        facts["start_from"] = find_model(cfg.start_from)
        trained_tokenizer(facts["start_from"], cfg.model)
    if cfg.validation is not None:
        in_process, multiple = cfg.train.workers.count == 0, cfg.model.decode_multiple
        facts["validation"] = complete_validation(cfg.validation, cfg.sizes, multiple, in_process=in_process)
    complete = cfg.model_copy(update=facts)
    check_keep_best(cfg.train, tokenizer_metrics(complete, ReconstructionLoss(complete.loss)))
    if complete.adversarial is not None:
        if (start := complete.adversarial.start_step) >= cfg.train.steps:
            log.warning("adversarial.start_step %d: the run ends after %d steps, without it", start, cfg.train.steps)
        Adversary(complete.adversarial, len(cfg.sizes), cfg.train.seed)
    return complete


def tokenizer_metrics(cfg: TokenizerConfig, loss: ReconstructionLoss) -> tuple[str, ...]:
    """Return the names of the logged loss parts and statistics."""
    edges = ("edges",) if cfg.loss.gradient_weight else ()
    perceptual = (loss.perceptual.name, f"{loss.perceptual.name}_crop") if loss.perceptual is not None else ()
    size = ("output_size",) if len(cfg.sizes) > 1 else ()
    return (*TOKENIZER, *edges, *perceptual, *(ADVERSARY if cfg.adversarial is not None else ()), *size)


def _with_absolute_weights(cfg: F) -> F:
    return cfg.model_copy(update={"weights": storage.absolute(cfg.weights)}) if Path(cfg.weights).is_file() else cfg


def run_tokenizer(cfg: TokenizerConfig, description: str = "tokenizer") -> str:
    """Train on ``cfg.train.workers`` and return the final checkpoint's folder, a model folder."""
    cfg = complete_tokenizer(cfg)  # validates before anything is written and any worker starts
    inputs = shard_provenance("shards", cfg.data)
    if cfg.train.held_out is not None and cfg.train.held_out.data is not None:
        inputs += shard_provenance("held_out", cfg.train.held_out.data)
    if cfg.start_from is not None:
        inputs = (*inputs, parent_provenance(cfg.start_from))
    with validating(tokenizer_validator(cfg)):
        return launch(
            cfg, lambda device: TokenizerTask(cfg), description=description, job="train_tokenizer", inputs=inputs
        )


def tokenizer_validator(cfg: TokenizerConfig) -> TokenizerValidator | None:
    """Create the validator of a complete configuration; None if validation is disabled."""
    if cfg.validation is None:
        return None
    return TokenizerValidator(cfg.validation, cfg.train.run_dir, here=cfg.train.workers.count == 0)
