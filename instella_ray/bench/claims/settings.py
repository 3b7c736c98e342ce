"""Settings of the claims: sentences of the paper, each with two arms, a metric and a direction."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

from pydantic import Field, field_validator

from ...config import Config, OutputPath

TokenizerMetric = Literal["psnr", "reconstruction_score", "bit_entropy", "dead_bits", "largest_spike"]
GeneratorMetric = Literal["scene_score", "diversity"]


class MetricText(NamedTuple):
    """Description of a metric in the page."""

    name: str
    unit: str
    higher_is_better: bool
    about: str


METRICS: dict[TokenizerMetric | GeneratorMetric, MetricText] = {
    "psnr": MetricText("PSNR", "dB", True, "mean over held-out images, which are decoded from hard bits"),
    "reconstruction_score": MetricText("reconstruction score", "", True, "scene score of the reconstructions"),
    "bit_entropy": MetricText("bit entropy", "bits", True, "mean entropy of a bit over held-out images, at most 1"),
    "dead_bits": MetricText("dead bits", "", False, "share of bits that are the same in all held-out images"),
    "largest_spike": MetricText(
        "largest spike", "", False, "largest loss of a step after warm-up, relative to the median of the 20 before"
    ),
    "scene_score": MetricText("scene score", "", True, "share of generated images that show what their prompt says"),
    "diversity": MetricText("diversity", "", True, "share of bits that differ between two images of a prompt"),
}


class ClaimArm(Config):
    """One side of a claim: the settings in which it differs from the recipes that all arms share."""

    name: str
    overrides: tuple[str, ...] = ()
    """Dotted keys and values, such as ``tokenizer.model.pixel_head=conv``: of ``tokenizer`` and ``generator`` the keys of
    their training, of ``sampling`` those of a sampling configuration."""


class PaperClaim(Config):
    """A sentence of the paper, and what would show it: the proposed arm is better than the baseline by the metric."""

    name: str
    section: str
    """Section of the paper."""
    sentence: str
    """What the paper says there, quoted."""
    proposed: ClaimArm
    baseline: ClaimArm
    metric: TokenizerMetric | GeneratorMetric
    size: int | None = Field(None, ge=1)
    """Output size at which ``psnr`` is compared (px), one of ``sizes``; null: the first of them."""
    margin: float = Field(0.0, ge=0)
    """Difference by which the proposed arm may be worse, for claims that nothing is lost."""
    note: str = ""
    """What to know of the comparison."""

    @property
    def generates(self) -> bool:
        """Whether the metric is one of generated images."""
        return self.metric in get_args(GeneratorMetric)


class ClaimsBench(Config):
    """Claims, their seeds, and the scenes that all arms share.

    Arms are those of ``configs/tokenizer/demo.yaml`` and ``configs/generator/demo.yaml`` but for their overrides."""

    claims: tuple[PaperClaim, ...] = ()
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1)
    """Seeds of training. A generator is trained on codes of the tokenizer of its seed."""
    scenes: int = Field(4000, ge=1)
    """Number of training scenes."""
    held_out: int = Field(300, ge=1)
    """Number of held-out scenes, on which tokenizers are measured."""
    sizes: tuple[int, ...] = Field((64, 128), min_length=1)
    """Output sizes at which reconstructions are measured (px)."""
    prompts_per_category: int = Field(20, ge=1)
    """Prompts of each of the scenes' six categories, for generators."""
    images_per_prompt: int = Field(2, ge=2)
    """Generated images per prompt, at least two for their diversity."""
    overrides: tuple[str, ...] = ()
    """Overrides of all arms, before their own."""
    local: bool = False
    """Train one arm after the other in this process, without Ray."""
    page: OutputPath | None = None
    """Markdown file of the verdicts, with its figure beside it; null: ``claims.md`` among the results."""

    @field_validator("claims")
    @classmethod
    def _names_differ(cls, claims: tuple[PaperClaim, ...]) -> tuple[PaperClaim, ...]:
        names = [claim.name for claim in claims]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"expected different names, got {min(twice)} twice")
        return claims

    @field_validator("seeds")
    @classmethod
    def _seeds_differ(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"expected different seeds, got {seeds}")
        return seeds
