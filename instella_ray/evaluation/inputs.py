"""What an evaluation is asked to measure, looked at before any of it is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from ..bulk.sample_set import SampleSet, find_sample_sets
from ..config import Config
from ..data.formats.names import absolute_pattern
from ..data.formats.parts import Mode
from ..errors import UserError
from ..models.bit import BITConfig
from ..models.checkpoint import parse_model, read_checkpoint_config, weight_hash
from .metric_settings import MetricsConfig
from .select import ShowConfig
from .units import Unit, has_captions, has_scene_captions, image_units, sample_units

PLAIN_SIZE = 256
"""Pixels a side of images that are measured as they are, where nothing else is asked for."""


class EvaluateConfig(Config):
    """What is measured, by which metrics, and where the report goes."""

    output: str
    """Folder for ``report.html``, ``results.json`` and what the metrics gathered."""
    samples: str | None = None
    """Folder of samples, one set or a sweep."""
    images: str | None = None
    """In place of samples: tars, parquet files or folders of images, which the tokenizer reconstructs."""
    tokenizer: str | None = None
    """Model folder of the BIT. Without it samples stay codes, and images are measured as they are: a ceiling."""
    size: int | None = Field(None, ge=16)
    """Pixels a side of the images that are measured; none means the tokenizer's own."""
    mode: Mode = "new"
    """When the output exists: new refuses, resume goes on with it, fresh starts over."""
    local: bool = False
    """Work in this process, one unit after another, without Ray; the numbers are the same."""
    metrics: MetricsConfig | None = None
    """Those to measure; none means those that need no file beside."""
    preset: str | None = None
    """A table of the paper whose numbers stand beside ours: paper-table1, paper-table3, ..."""
    show: ShowConfig = ShowConfig()
    seed: int = 0
    """Of the bootstrap."""
    batch_size: int = Field(16, ge=1)
    """Images a call of a network."""
    rows_per_unit: int = Field(1000, ge=1)
    """Images that an actor measures in one go; of samples it is a file."""
    actors: int | None = Field(None, ge=1)
    """Measuring actors; none means one a GPU, or one for every two CPUs."""
    gpus_per_actor: float = Field(0.0, ge=0)
    """GPU share of each actor; 0 measures on the CPU."""

    @model_validator(mode="after")
    def _one_subject(self) -> EvaluateConfig:
        if (self.samples is None) == (self.images is None):
            raise ValueError("expected one of samples, images")
        return self

    def absolute(self) -> EvaluateConfig:
        """With full paths, as actors work in directories of their own; the name of a folder may hold commas."""
        places = {"images": self.images and absolute_pattern(self.images)}
        for name in ("output", "samples", "tokenizer"):
            path = getattr(self, name)
            places[name] = str(Path(path).absolute()) if path and "://" not in path else path
        return self.model_copy(update=places)


class EvaluationInputs:
    """Its units of work, what they offer to metrics, and what a report says of them."""

    def __init__(self, cfg: EvaluateConfig) -> None:
        self.size = cfg.size or PLAIN_SIZE
        self.tokenizer_hash: str | None = None
        if cfg.tokenizer is not None:
            self._look_at(cfg, cfg.tokenizer)
        if cfg.samples is not None:
            self.sets = find_sample_sets(cfg.samples)
            self.units = {name: sample_units(name, found) for name, found in self.sets.items()}
            each = {found.run.images_per_prompt for found in self.sets.values()}
            self.per_prompt = each.pop() if len(each) == 1 else 0
            self.offers = {"codes", "prompts", "meta"} | ({"images"} if cfg.tokenizer else set())
            self.offers |= {"groups"} if self.per_prompt != 1 else set()
            self.about = {name: _about(found) for name, found in self.sets.items()}
            self._check_tokenizer(cfg)
        else:
            self.units = {"": image_units(str(cfg.images), cfg.rows_per_unit)}
            self.per_prompt = 0
            self.offers = {"images"} | ({"references", "codes"} if cfg.tokenizer else set())
            self.offers |= {"prompts"} if has_captions(self.units[""]) else set()
            self.about = {"": {"images": cfg.images}}
        empty = next((name for name, units in self.units.items() if not units), None)
        if empty is not None:
            raise UserError(f"samples {cfg.samples}: setting '{empty}' holds no files")
        self.scenes = "prompts" in self.offers and has_scene_captions(next(iter(self.units.values())))

    @property
    def all_units(self) -> list[Unit]:
        return [unit for units in self.units.values() for unit in units]

    def _look_at(self, cfg: EvaluateConfig, tokenizer: str) -> None:
        bit = parse_model(read_checkpoint_config(tokenizer)["model"], tokenizer)
        if not isinstance(bit, BITConfig):
            raise UserError(f"tokenizer {tokenizer}: holds a {bit.kind} generator, expected a BIT")
        self.size, self.tokenizer_hash = cfg.size or bit.image_size, weight_hash(tokenizer)
        multiple = bit.size_multiple if cfg.images else bit.decode_multiple
        if self.size % multiple:
            raise UserError(f"size {self.size}: not a multiple of {multiple}, as tokenizer {tokenizer} needs")

    def _check_tokenizer(self, cfg: EvaluateConfig) -> None:
        for found in self.sets.values():
            theirs = found.run.tokenizer_hash
            if cfg.tokenizer is not None and theirs != self.tokenizer_hash:
                ours = str(self.tokenizer_hash)[:12]
                raise UserError(f"{found.folder}: codes of tokenizer {str(theirs)[:12]}, {cfg.tokenizer} is {ours}")


def _about(samples: SampleSet) -> dict[str, Any]:
    manifest = samples.manifest
    run = manifest.run.model_dump(mode="json")
    cost = {"seconds": manifest.seconds, "cost": manifest.cost, "price_per_hour": manifest.price_per_hour}
    each = manifest.seconds / manifest.rows if manifest.rows else None
    return {"run_id": manifest.run_id, **run, "hardware": manifest.hardware, **cost, "seconds_per_image": each}
