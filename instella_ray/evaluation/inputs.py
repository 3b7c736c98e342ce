"""Configuration and validated inputs of an evaluation."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from .. import storage
from ..bulk.sample_set import SampleSet, find_sample_sets
from ..config import Config, InputPath, OutputPath
from ..data.formats.parts import Mode
from ..data.formats.patterns import Pattern, absolute_pattern, pattern_text
from ..data.formats.texts import CAPTION_NAMES, CaptionKeys
from ..errors import UserError
from ..models.bit import BITConfig
from ..models.checkpoint import parse_model, read_checkpoint_config, weight_hash
from ..models.folders import find_model
from .metric_settings import MetricsConfig
from .select import ShowConfig
from .units import Unit, find_image_set, has_captions, has_scene_captions, sample_units, warn_left_out

PLAIN_SIZE = 256
"""Default size (pixels a side) of images that are measured without a tokenizer."""


class EvaluateConfig(Config):
    """Inputs, metrics and output of an evaluation job."""

    output: OutputPath
    """Output folder for ``report.html``, ``results.json`` and the metrics' states."""
    samples: InputPath | None = None
    """Folder of generated samples: one sample set, or a sweep of several."""
    images: Pattern | None = None
    """Images to reconstruct with the tokenizer, instead of samples: tars, parquet files, tables or folders."""
    caption_keys: CaptionKeys = CAPTION_NAMES
    """Names of captions in KEY.json and of columns with captions, in any case, in order of preference."""
    tokenizer: InputPath | None = None
    """Model folder of the BIT. None measures samples as codes only, and images without reconstruction (an upper bound)."""
    size: int | None = Field(None, ge=16)
    """Pixels a side of decoded samples, or of reconstructions and their originals; none means the tokenizer's image size.

    Without a tokenizer, metrics with ``images.size`` crop and resize the images as they are in their files; only those
    without get them at this size (none: 256).
    """
    mode: Mode = "new"
    """If the output exists: new fails, resume continues it, fresh deletes it and starts over."""
    local: bool = False
    """Measure all units sequentially in this process, without Ray; the results are the same."""
    metrics: MetricsConfig | None = None
    """Metrics to measure; none means all that need no external files."""
    preset: str | None = None
    """Table of the paper whose numbers are shown beside results of its own protocol: paper-table1, paper-table3, ..."""
    show: ShowConfig = ShowConfig()
    seed: int = 0
    """Seed of the bootstrap."""
    batch_size: int = Field(16, ge=1)
    """Images per forward pass of a network."""
    rows_per_unit: int = Field(1000, ge=1)
    """Images per unit of work; for samples a unit is one file."""
    actors: int | None = Field(None, ge=1)
    """Number of actors; none means one per GPU, or one per two CPUs."""
    gpus_per_actor: float = Field(0.0, ge=0)
    """GPU share of each actor; 0 measures on the CPU."""

    @model_validator(mode="after")
    def _one_subject(self) -> EvaluateConfig:
        if (self.samples is None) == (self.images is None):
            raise ValueError("expected one of samples, images")
        return self

    @property
    def source(self) -> str:
        """What is measured: the folder of the samples, or the images."""
        return self.samples or pattern_text(self.images or "")

    def absolute(self) -> EvaluateConfig:
        """Return a copy with absolute paths, since each actor runs in another working directory.

        Raises UserError for a tokenizer that names no checkpoint.
        """
        places: dict[str, Any] = {"images": self.images and absolute_pattern(self.images)}
        places["tokenizer"] = self.tokenizer and find_model(self.tokenizer)
        for name in ("output", "samples"):
            path = getattr(self, name)
            places[name] = path and storage.absolute(path)
        return self.model_copy(update=places)


class EvaluationInputs:
    """Units of work of an evaluation by setting, the batch columns they provide to metrics, and their description.

    Raises UserError for a tokenizer that is not a BIT or does not match the samples or the size, and for settings
    without files.
    """

    def __init__(self, cfg: EvaluateConfig) -> None:
        self.size = cfg.size or PLAIN_SIZE
        self.tokenizer_hash: str | None = None
        self.identity: str | None = None
        self.left_out: dict[str, int] = {}
        if cfg.tokenizer is not None:
            self._read_tokenizer(cfg, cfg.tokenizer)
        if cfg.samples is not None:
            self.sets = find_sample_sets(cfg.samples)
            self.units = {name: sample_units(name, samples) for name, samples in self.sets.items()}
            each = {found.run.images_per_prompt for found in self.sets.values()}
            self.per_prompt = each.pop() if len(each) == 1 else 0
            self.offers = {"codes", "prompts", "meta"} | ({"images"} if cfg.tokenizer else set())
            self.offers |= {"groups"} if self.per_prompt != 1 else set()
            self.about = {name: _about(found) for name, found in self.sets.items()}
            self._check_tokenizer(cfg)
        elif cfg.images is not None:
            found = find_image_set(cfg.images, cfg.rows_per_unit, cfg.caption_keys, output=cfg.output)
            self.units, self.identity, self.left_out = {"": found.units}, found.identity, found.left_out
            warn_left_out(cfg.source, found.left_out)
            self.per_prompt = 0
            self.offers = {"images"} | ({"references", "codes"} if cfg.tokenizer else set())
            self.offers |= {"prompts"} if has_captions(self.units[""], cfg.caption_keys) else set()
            self.about = {"": {"images": cfg.source}}
        empty = next((name for name, units in self.units.items() if not units), None)
        if empty is not None:
            raise UserError(f"samples {cfg.samples}: setting '{empty}' has no files")
        first = next(iter(self.units.values()))
        self.scenes = "prompts" in self.offers and has_scene_captions(first, cfg.caption_keys)

    @property
    def all_units(self) -> list[Unit]:
        return [unit for units in self.units.values() for unit in units]

    def _read_tokenizer(self, cfg: EvaluateConfig, tokenizer: str) -> None:
        bit = parse_model(read_checkpoint_config(tokenizer)["model"], tokenizer)
        if not isinstance(bit, BITConfig):
            raise UserError(f"tokenizer {tokenizer}: contains a {bit.kind} generator, expected a BIT")
        self.size, self.tokenizer_hash = cfg.size or bit.image_size, weight_hash(tokenizer)
        multiple = bit.size_multiple if cfg.images else bit.decode_multiple
        if self.size % multiple:
            raise UserError(f"size {self.size}: not a multiple of {multiple}, as tokenizer {tokenizer} needs")

    def _check_tokenizer(self, cfg: EvaluateConfig) -> None:
        for found in self.sets.values():
            theirs = found.run.tokenizer_hash
            if cfg.tokenizer is not None and theirs != self.tokenizer_hash:
                ours = str(self.tokenizer_hash)[:12]
                raise UserError(
                    f"{found.folder}: codes of tokenizer {str(theirs)[:12]}, expected {ours} ({cfg.tokenizer})"
                )


def _about(samples: SampleSet) -> dict[str, Any]:
    manifest = samples.manifest
    run = manifest.run.model_dump(mode="json", exclude=set() if manifest.run.by_prompt else {"by_prompt"})
    cost = {"seconds": manifest.seconds, "cost": manifest.cost, "price_per_hour": manifest.price_per_hour}
    each = manifest.seconds / manifest.rows if manifest.rows else None
    return {"run_id": manifest.run_id, **run, "hardware": manifest.hardware, **cost, "seconds_per_image": each}
