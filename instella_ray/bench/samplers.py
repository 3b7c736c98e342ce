"""Suite samplers: scene score and diversity of the diffusion samplers over the number of steps, on trained models.

Temperature and guidance are searched for each sampler and number of steps on one model; the others, trained apart, are
measured with what was found. Measurements are kept in a file, so that a stopped run goes on where it was.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import Field

from .. import logs, storage
from ..config import Config, InputPath
from ..data.formats.images import to_pixels, to_tensor
from ..data.scene_score import score
from ..data.scenes import Expectation, render, scene_of, scene_prompts
from ..errors import UserError
from ..evaluation.metrics.diversity import bit_distance
from ..evaluation.statistics import student_mean
from ..models.generator import DiffusionGenerator
from ..models.sampling import Guidance, Redraw, Sampler, SamplingParams, Temperature, generate_diffusion
from ..pipeline import InstellaPipeline
from .report import Cell, SuiteResult

PROMPT_SEED = 777
FAITHFUL = 0.95
"""Least diversity, as a share of the data's, of the settings that the search may choose."""


class SamplerArm(Config):
    """A sampler and its share of bits drawn anew."""

    sampler: Sampler
    redraw: Redraw = 0.0

    @property
    def label(self) -> str:
        return f"{self.sampler}, redraw {self.redraw:g}" if self.redraw else self.sampler


class SamplersBench(Config):
    """Models, samplers and the settings to search."""

    search: InputPath | None = None
    """Model folder of the diffusion generator on which temperature and guidance are searched; a demo's folder will do."""
    models: tuple[InputPath, ...] = ()
    """Model folders of generators that were trained with other seeds, on which the settings found are measured."""
    arms: tuple[SamplerArm, ...] = (
        SamplerArm(sampler="posterior_release"),
        SamplerArm(sampler="posterior"),
        SamplerArm(sampler="ancestral"),
        SamplerArm(sampler="ancestral", redraw=0.1),
        SamplerArm(sampler="ancestral", redraw=0.3),
        SamplerArm(sampler="ancestral", redraw=0.6),
        SamplerArm(sampler="simplified"),
    )
    steps: tuple[int, ...] = (2, 4, 8, 20, 50, 100)
    searched_steps: int = Field(50, ge=1)
    """Largest number of steps to search at; more steps take the settings found there."""
    temperatures: tuple[Temperature, ...] = (0.6, 0.8, 1.0)
    guidance_scales: tuple[Guidance, ...] = (0.0, 0.5, 1.0)
    prompts_per_category: int = Field(20, ge=1)
    images_per_prompt: int = Field(2, ge=2)


class Setting(NamedTuple):
    """Sampling settings of a measurement."""

    arm: SamplerArm
    steps: int
    temperature: float
    guidance_scale: float


@dataclass(frozen=True)
class Measured:
    """Scene score and diversity of bits within a prompt."""

    score: float
    diversity: float


class TrainedModel:
    """Diffusion generator with its tokenizer, and the prompts' text features."""

    def __init__(self, folder: str, cfg: SamplersBench) -> None:
        pipeline = InstellaPipeline.from_pretrained(folder)
        if not isinstance(pipeline.transformer, DiffusionGenerator):
            raise UserError(f"{folder}: an autoregressive generator, expected a diffusion generator")
        self.generator, self.tokenizer = pipeline.transformer, pipeline.tokenizer
        prompts = scene_prompts(cfg.prompts_per_category, PROMPT_SEED)
        self.expected = [prompt for prompt in prompts for _ in range(cfg.images_per_prompt)]
        self.images_per_prompt = cfg.images_per_prompt
        with torch.no_grad():
            self.text = self.generator.text_kv(*pipeline.text_encoder.encode([e.caption for e in self.expected]))
            self.no_text = self.generator.text_kv(*pipeline.text_encoder.encode([""]))

    def measure(self, setting: Setting) -> Measured:
        """Measure samples of all prompts with ``setting``."""
        params = SamplingParams.of(
            len(self.expected),
            seed=list(range(len(self.expected))),
            num_inference_steps=setting.steps,
            temperature=setting.temperature,
            guidance_scale=setting.guidance_scale,
            sampler=setting.arm.sampler,
            redraw=setting.arm.redraw,
        )
        return self._measured(generate_diffusion(self.generator, self.text, self.no_text, params))

    def measure_data(self) -> Measured:
        """Measure reconstructions of as many true images of the prompts."""
        images = [render(scene_of(np.random.default_rng([PROMPT_SEED, i]), e), self._size) for i, e in self._numbered()]
        return self._measured(self.tokenizer.encode(to_tensor(np.stack(images))))

    @property
    def _size(self) -> int:
        return self.tokenizer.cfg.image_size

    def _numbered(self) -> Iterator[tuple[int, Expectation]]:
        return enumerate(self.expected)

    def _measured(self, codes: torch.Tensor) -> Measured:
        images = to_pixels(self.tokenizer.decode(codes, self._size, self._size))
        correct = [score(image, expect).correct for image, expect in zip(images, self.expected, strict=True)]
        groups = codes.flatten(1).numpy().reshape(-1, self.images_per_prompt, codes[0].numel())
        return Measured(float(np.mean(correct)), float(np.mean([bit_distance(group) for group in groups])))


class Measurements:
    """Measurements of this run and earlier ones, in a JSON file."""

    def __init__(self, cfg: SamplersBench, path: str) -> None:
        self.cfg, self.path = cfg, path
        self.about = {"prompts_per_category": cfg.prompts_per_category, "images_per_prompt": cfg.images_per_prompt}
        self.entries: list[dict[str, Any]] = storage.read_json(path) if storage.exists(path) else []
        self.known = {_key(entry["what"]): Measured(**entry["result"]) for entry in self.entries}
        self.models: dict[str, TrainedModel] = {}

    def of(self, folder: str, setting: Setting | None) -> Measured:
        """Return what is measured of a model with ``setting``, or of its tokenizer with true images (None)."""
        what: dict[str, Any] = {"model": folder, **self.about}
        if setting is not None:
            what |= {**setting._asdict(), "arm": setting.arm.model_dump()}
        if _key(what) not in self.known:
            if folder not in self.models:
                self.models[folder] = TrainedModel(folder, self.cfg)
            model = self.models[folder]
            self.known[_key(what)] = result = model.measure_data() if setting is None else model.measure(setting)
            self.entries.append({"what": what, "result": vars(result)})
            storage.write_json(self.path, self.entries)
        return self.known[_key(what)]


def _key(what: Mapping[str, Any]) -> str:
    return json.dumps(what, sort_keys=True)


def run_samplers(cfg: SamplersBench, path: str) -> SuiteResult:
    """Search temperature and guidance on one model and measure the others; one row per sampler and number of steps.

    Measurements are written to the file ``path``, and those that it has are not repeated. Rows have Student's intervals
    over the models, with the settings found and without guidance at temperature 1. Raises UserError before the first
    measurement if models are missing.
    """
    if cfg.search is None or len(cfg.models) < 2:
        raise UserError("suite samplers: expected search=MODEL_FOLDER and at least two models=[MODEL_FOLDER, ...]")
    measurements = Measurements(cfg, path)
    found = search(cfg, cfg.search, measurements)
    plain = {(arm.label, steps): Setting(arm, steps, 1.0, 0.0) for arm in cfg.arms for steps in cfg.steps}
    settings = [*dict.fromkeys([*found.values(), *plain.values()])]
    wanted = [(folder, setting) for folder in cfg.models for setting in [None, *settings]]
    for folder, setting in logs.progress_bar(wanted, desc="measuring", unit="setting"):
        measurements.of(folder, setting)

    def columns(setting: Setting | None) -> dict[str, Cell]:
        each = [measurements.of(folder, setting) for folder in cfg.models]
        return {
            "score": _over_models([m.score for m in each]),
            "diversity": _over_models([m.diversity for m in each]),
        }

    rows: list[dict[str, Cell]] = [{"sampler": "true images", "steps": "", **columns(None)}]
    for place, chosen in found.items():
        unguided = {f"{name} at 1.0 and 0": cell for name, cell in columns(plain[place]).items()}
        about: dict[str, Cell] = {
            "sampler": chosen.arm.label,
            "steps": chosen.steps,
            "temperature": f"{chosen.temperature:g}",
            "guidance": f"{chosen.guidance_scale:g}",
        }
        rows.append({**about, **columns(chosen), **unguided})
    images = len(scene_prompts(cfg.prompts_per_category, PROMPT_SEED)) * cfg.images_per_prompt
    return SuiteResult("Samplers", {"models": len(cfg.models), "images a measurement": images}, rows)


def search(cfg: SamplersBench, folder: str, measurements: Measurements) -> dict[tuple[str, int], Setting]:
    """Return the settings to use by label of the sampler and number of steps, searched on the model ``folder``.

    They are those of the highest score among settings with at least :data:`FAITHFUL` of the data's diversity; where none
    has it, the most diverse.
    """
    searched = sorted(steps for steps in cfg.steps if steps <= cfg.searched_steps)
    if not searched:
        raise UserError(f"searched_steps {cfg.searched_steps}: expected at least the fewest steps, {min(cfg.steps)}")
    pairs = [(temperature, scale) for temperature in cfg.temperatures for scale in cfg.guidance_scales]
    todo = [Setting(arm, steps, *pair) for arm in cfg.arms for steps in searched for pair in pairs]
    least = FAITHFUL * measurements.of(folder, None).diversity
    results = {s: measurements.of(folder, s) for s in logs.progress_bar(todo, desc="search", unit="setting")}
    found = {}
    for arm in cfg.arms:
        for steps in cfg.steps:
            at = steps if steps in searched else searched[-1]
            options = {s: m for s, m in results.items() if (s.arm, s.steps) == (arm, at)}
            found[arm.label, steps] = _best(options, least)._replace(steps=steps)
    return found


def _best(options: Mapping[Setting, Measured], least: float) -> Setting:
    """Return the best-scoring setting of at least the diversity ``least``, or the most diverse."""
    diverse = [setting for setting, measured in options.items() if measured.diversity >= least]
    if not diverse:
        return max(options, key=lambda setting: options[setting].diversity)
    return max(diverse, key=lambda setting: (options[setting].score, options[setting].diversity))


def _over_models(values: Sequence[float]) -> str:
    low, high = np.clip(student_mean(np.array(values)), 0, 1)
    return f"{np.mean(values):.3f} ({low:.3f} to {high:.3f})"
