"""What a sampling job is to make: its configuration, the settings of a sweep, and each sample's number and seed."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pydantic import Field

from ..accelerator import Precision
from ..config import Config
from ..data.formats.parts import Mode
from ..data.prompts import Prompt
from ..engine.buckets import Compilation
from ..errors import UserError
from ..models.sampling import Guidance, Sampler, SamplingConfig, Temperature


class Sweep(Config):
    """Values to try; every combination becomes a setting. Keys without values stay as ``sampling`` has them."""

    num_inference_steps: tuple[int, ...] = ()
    guidance_scale: tuple[Guidance, ...] = ()
    temperature: tuple[Temperature, ...] = ()
    sampler: tuple[Sampler, ...] = ()

    def settings(self, base: SamplingConfig) -> dict[str, SamplingConfig]:
        """Settings by name; the one of no sweep is named ''."""
        keys = [key for key in type(self).model_fields if getattr(self, key)]
        found = {}
        for values in itertools.product(*(dict.fromkeys(getattr(self, key)) for key in keys)):
            name = "+".join(f"{key}={value}" for key, value in zip(keys, values, strict=True))
            found[name] = SamplingConfig(**{**base.model_dump(), **dict(zip(keys, values, strict=True))})
        return found


class SampleConfig(Config):
    """Which images to make, as codes."""

    model: str
    """Model folder of a diffusion or AR generator."""
    prompts: str = "scenes"
    """A .txt, .jsonl, .parquet or (COCO) .json file; ``scenes`` are the procedural set's own."""
    output: str
    """Folder for the parquet files and ``manifest.json``; a sweep has a folder a setting within."""
    mode: Mode = "new"
    """When the output exists: new refuses, resume goes on with it, fresh starts over."""
    local: bool = False
    """Work in this process, one file after another, without Ray; the samples are the same."""
    count: int | None = Field(None, ge=1)
    """Draw so many of the prompts; none means all."""
    images_per_prompt: int = Field(1, ge=1)
    seed: int = Field(0, ge=0)
    """Of the draw of prompts and of every sample's own seed."""
    sampling: SamplingConfig = SamplingConfig()
    sweep: Sweep = Sweep()
    """Values of the sampling settings to try, all combinations; text features are shared."""
    batch_size: int = Field(16, ge=1)
    """Slots of each actor's step engine; changes no bit."""
    samples_per_file: int = Field(256, ge=1)
    """What is lost at most when an actor dies."""
    text_length: int = Field(128, ge=1)
    """Longer prompts are cut to so many tokens, with a warning."""
    precision: Precision = "auto"
    """auto: bfloat16 on GPUs, float32 on CPUs."""
    compilation: Compilation = "none"
    """``compile`` for torch.compile, ``graphs`` for recorded CUDA or HIP graphs."""
    actors: int | None = Field(None, ge=1)
    """None means one a GPU, or one for every two CPUs."""
    gpus_per_actor: float = Field(0.0, ge=0)
    """GPU share of each actor; 0 samples on the CPU."""
    threads: int = Field(1, ge=1)
    """CPU threads of each actor."""
    price_per_hour: float | None = Field(None, ge=0)
    """What an actor's hour costs, for the bar and the manifest."""


@dataclass(frozen=True)
class Planned:
    """A sample to make."""

    prompt: Prompt
    index: int
    """Number of the image among those of this text."""
    seed: int


def sample_seed(seed: int, text: str, index: int) -> int:
    """A sample's own seed, 63 bits: the same in every set that has this text, whatever else it has."""
    digest = hashlib.sha256(f"{seed}\n{index}\n{text}".encode()).digest()
    return int.from_bytes(digest[:8]) >> 1


def plan_samples(prompts: Sequence[Prompt], images_per_prompt: int, seed: int) -> Iterator[Planned]:
    """All samples, by prompt. A text that comes again goes on with its indices: no two samples are the same image."""
    seen: Counter[str] = Counter()
    for prompt in prompts:
        for index in range(seen[prompt.text], seen[prompt.text] + images_per_prompt):
            yield Planned(prompt, index, sample_seed(seed, prompt.text, index))
        seen[prompt.text] += images_per_prompt


def settings_of(cfg: SampleConfig, kind: str) -> dict[str, SamplingConfig]:
    """The sweep's settings by name; UserError for what a model of this ``kind`` does not have."""
    if kind == "ar":
        wrong = next((k for k in ("num_inference_steps", "sampler") if getattr(cfg.sweep, k)), None)
        if wrong:
            raise UserError(f"sweep.{wrong}: an autoregressive model has none; expected guidance_scale or temperature")
    return cfg.sweep.settings(cfg.sampling)
