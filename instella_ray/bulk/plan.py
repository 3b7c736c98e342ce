"""Plan of a sampling job: its configuration, the settings of a sweep, and the index and seed of each sample."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from ..accelerator import Precision
from ..config import Config, InputPath, OutputPath, validate
from ..data.formats.parts import Mode
from ..data.prompts import Prompt, PromptFile
from ..engine.compilation import Compilation
from ..errors import UserError
from ..models.eight_bit import Quantization
from ..models.sampling import Guidance, Redraw, Sampler, SamplingConfig, Temperature

DIFFUSION_ONLY = ("num_inference_steps", "sampler", "redraw")
"""Sampling settings that autoregressive models lack."""


class Sweep(Config):
    """Sweep over sampling settings: all combinations of the values; keys without values are taken from ``sampling``."""

    num_inference_steps: tuple[int, ...] = ()
    guidance_scale: tuple[Guidance, ...] = ()
    temperature: tuple[Temperature, ...] = ()
    sampler: tuple[Sampler, ...] = ()
    redraw: tuple[Redraw, ...] = ()

    def settings(self, base: SamplingConfig) -> dict[str, SamplingConfig]:
        """Return the settings by name, ``key=value`` joined by ``+``; without a sweep one setting named ''."""
        keys = [key for key in type(self).model_fields if getattr(self, key)]
        found = {}
        for values in itertools.product(*(dict.fromkeys(getattr(self, key)) for key in keys)):
            name = "+".join(f"{key}={value}" for key, value in zip(keys, values, strict=True))
            found[name] = SamplingConfig(**{**base.model_dump(), **dict(zip(keys, values, strict=True))})
        return found


class SampleConfig(Config):
    """Configuration of a sampling job."""

    model: InputPath
    """Model folder of a diffusion or AR generator."""
    prompts: PromptFile = "scenes"
    """A .txt, .jsonl, .csv, .tsv, .parquet or .json (also COCO's) file; ``scenes``: those of the procedural scenes.

    A row may have ``settings``: an object with sampling settings and the ``size`` of its decoded image, which count for this
    prompt in place of those here."""
    output: OutputPath
    """Folder for the parquet files and ``manifest.json``; a sweep writes one subfolder per setting."""
    mode: Mode = "new"
    """If the output exists: new fails, resume continues it, fresh starts over."""
    local: bool = False
    """Run in this process, one file after another, without Ray; the samples are identical."""
    count: int | None = Field(None, ge=1)
    """Number of prompts to draw; none means all."""
    images_per_prompt: int = Field(1, ge=1)
    seed: int = Field(0, ge=0)
    """Seed of the draw of prompts and of all sample seeds."""
    sampling: SamplingConfig = SamplingConfig()
    sweep: Sweep = Sweep()
    """Values of sampling settings, combined exhaustively; text features are shared."""
    batch_size: int = Field(16, ge=1)
    """Slots of each actor's step engine; does not affect the samples."""
    samples_per_file: int = Field(256, ge=1)
    """Samples per file: the most that is lost if an actor dies."""
    text_length: int = Field(128, ge=1)
    """Maximum prompt tokens; longer prompts are truncated, with a warning."""
    precision: Precision = "auto"
    """Precision of weights and arithmetic; auto: bfloat16 on GPUs, float32 on CPUs."""
    quantization: Quantization = "none"
    """Rounding of the generator's large matrices and their inputs to eight bits; faster, at some cost in quality."""
    compilation: Compilation = "none"
    """``compile`` for torch.compile, ``graphs`` for recorded CUDA or HIP graphs, ``compile+graphs`` for both."""
    actors: int | None = Field(None, ge=1)
    """Number of actors; none means one per GPU, or one per two CPUs."""
    gpus_per_actor: float = Field(0.0, ge=0)
    """GPU share of each actor; 0 samples on the CPU."""
    threads: int = Field(1, ge=1)
    """CPU threads of each actor."""
    price_per_hour: float | None = Field(None, ge=0, allow_inf_nan=False)
    """Price of one actor per hour, for the cost in the progress bar and the manifest."""


@dataclass(frozen=True)
class Planned:
    """Planned sample."""

    prompt: Prompt
    index: int
    """Number of this sample among all samples of the same text, from 0."""
    seed: int


def sample_seed(seed: int, text: str, index: int) -> int:
    """Derive a sample's 63-bit seed; it depends only on the arguments, not on the other samples of the set."""
    digest = hashlib.sha256(f"{seed}\n{index}\n{text}".encode()).digest()
    return int.from_bytes(digest[:8]) >> 1


def plan_samples(prompts: Sequence[Prompt], images_per_prompt: int, seed: int) -> Iterator[Planned]:
    """Yield all samples, by prompt. Repeated texts continue their indices, so that no two samples are identical."""
    seen: Counter[str] = Counter()
    for prompt in prompts:
        for index in range(seen[prompt.text], seen[prompt.text] + images_per_prompt):
            yield Planned(prompt, index, sample_seed(seed, prompt.text, index))
        seen[prompt.text] += images_per_prompt


def own_settings(prompt: Prompt) -> Mapping[str, Any]:
    """Return the ``settings`` of a prompt's row: sampling settings and ``size``; empty if it has none."""
    found = prompt.meta.get("settings")
    return found if isinstance(found, Mapping) else {}


def own_size(prompt: Prompt) -> int | None:
    """Return the image size (px) that a prompt's row gives; None if it gives none, UserError if it is no size."""
    size = own_settings(prompt).get("size")
    if size is not None and (not isinstance(size, int) or size < 1):
        raise UserError(f"prompt '{prompt.id}': settings.size = {size!r}: expected a number of pixels")
    return size


def own_sampling(prompt: Prompt, sampling: SamplingConfig) -> SamplingConfig:
    """Return ``sampling`` with the settings that a prompt's row gives; UserError if one of them is invalid."""
    own = {key: value for key, value in own_settings(prompt).items() if key != "size"}
    if not own:
        return sampling
    return validate(SamplingConfig, {**sampling.model_dump(), **own}, f"prompt '{prompt.id}': settings")


def settings_by_prompt(cfg: SampleConfig, kind: str, prompts: Sequence[Prompt]) -> tuple[str, ...]:
    """Return the names of the settings that rows of ``prompts`` give.

    Raises UserError for invalid ones, those that models of this ``kind`` lack, and those that the sweep varies.
    """
    found = set[str]()
    for prompt in prompts:
        own_sampling(prompt, cfg.sampling)
        own_size(prompt)
        found.update(own_settings(prompt))
    if wrong := next((key for key in DIFFUSION_ONLY if kind == "ar" and key in found), None):
        raise UserError(f"prompts {cfg.prompts}: settings.{wrong}: autoregressive models have none")
    if wrong := next((key for key in sorted(found) if getattr(cfg.sweep, key, ())), None):
        raise UserError(f"sweep.{wrong}: prompts {cfg.prompts} give it themselves; expected one of the two")
    return tuple(sorted(found))


def settings_of(cfg: SampleConfig, kind: str) -> dict[str, SamplingConfig]:
    """Return the sweep's settings by name; raises UserError for parameters that models of this ``kind`` lack."""
    if kind == "ar":
        wrong = next((k for k in DIFFUSION_ONLY if getattr(cfg.sweep, k)), None)
        if wrong:
            raise UserError(f"sweep.{wrong}: autoregressive models have none; expected guidance_scale or temperature")
    return cfg.sweep.settings(cfg.sampling)
