"""Configuration sections of the metrics; each section loads its network and creates its metric."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

import pydantic

from ..config import Config, InputPath
from ..data.formats.patterns import absolute_pattern
from ..errors import UserError
from .feature_settings import (
    CMMD,
    FID,
    KID,
    RFID,
    DensityCoverage,
    FeatureDiversity,
    MemorisationTest,
    PixelMemorisation,
    PrecisionRecall,
    shared_clip,
)
from .geneval_actor import GenEvalConfig, start_detector
from .image_reward_actor import ImageRewardConfig, load_image_reward
from .metrics.bits import BitUsage
from .metrics.clip_score import PAPER_IMAGES as CLIP_IMAGES
from .metrics.clip_score import PAPER_MODEL, PAPER_TAG, clip_score
from .metrics.diversity import code_diversity
from .metrics.geneval import geneval
from .metrics.image_reward import image_reward
from .metrics.images import ImageSettings
from .metrics.labels import label_accuracy, load_scorer
from .metrics.lpips_distance import Net, load_lpips, lpips_distance, lpips_diversity
from .metrics.psnr import psnr
from .metrics.scene import scene_score
from .metrics.ssim import ssim
from .sections import Images, Maker, Section, Tools

S = TypeVar("S", bound=Config)


class SceneScore(Images):
    """Share of images that match their scene caption, according to the scene detector."""

    needs = frozenset({"images", "prompts"})

    def load(self, tools: Tools) -> Maker:
        return partial(scene_score, self.images)


class Bits(Section):
    """Bit usage, code entropy and dead bits."""

    needs = frozenset({"codes"})

    def load(self, tools: Tools) -> Maker:
        return BitUsage


class BitDiversity(Section):
    """Share of bits that differ between two codes of the same prompt."""

    needs = frozenset({"codes", "groups"})

    def load(self, tools: Tools) -> Maker:
        return partial(code_diversity, per_prompt=tools.per_prompt)


class PSNR(Images):
    """Peak signal-to-noise ratio of reconstructions (dB)."""

    needs = frozenset({"images", "references"})

    def load(self, tools: Tools) -> Maker:
        return partial(psnr, self.images)


class SSIM(Images):
    """Structural similarity of reconstructions."""

    needs = frozenset({"images", "references"})

    def load(self, tools: Tools) -> Maker:
        return partial(ssim, self.images)


class LPIPS(Images):
    """LPIPS distance; without ``weights`` the trunk is random and the metric has another name."""

    needs = frozenset({"images", "references"})
    net: Net = "vgg"
    weights: InputPath | None = None
    """torchvision weights file of the trunk."""

    def load(self, tools: Tools) -> Maker:
        return partial(lpips_distance, load_lpips(self.weights, net=self.net, device=tools.device), self.images)


class ClipScore(Images):
    """Cosine similarity of image and prompt embeddings; the default network is the paper's."""

    needs = frozenset({"images", "prompts"})
    images: ImageSettings = CLIP_IMAGES
    model: str = PAPER_MODEL
    weights: str | None = PAPER_TAG
    """Local file, or open_clip tag, which is downloaded; null uses random weights and another metric name."""
    prefix: str = ""
    """Text prepended to each prompt."""

    def load(self, tools: Tools) -> Maker:
        clip = shared_clip(self.model, self.weights, "metric clip_score", tools)
        return partial(clip_score, clip, images=self.images, prefix=self.prefix)


class ImageReward(Images, ImageRewardConfig):
    """ImageReward human-preference score by the official network, if need be in an isolated environment."""

    needs = frozenset({"images", "prompts"})

    def load(self, tools: Tools) -> Maker:
        own = {name: getattr(self, name) for name in ImageRewardConfig.model_fields}
        scorer = load_image_reward(ImageRewardConfig(**own), device=tools.device)
        return partial(image_reward, scorer, images=self.images)


class GenEval(Images, GenEvalConfig):
    """GenEval with its official detector, which runs in an isolated environment."""

    needs = frozenset({"images", "meta"})

    def load(self, tools: Tools) -> Maker:
        own = {name: getattr(self, name) for name in GenEvalConfig.model_fields}
        return partial(geneval, start_detector(GenEvalConfig(**own)), images=self.images)


class LabelAccuracy(Images):
    """Share of images in which a classifier finds a label of their prompts or metadata."""

    classifier: InputPath
    """Folder that ``instella-ray train-classifier`` has written."""
    label: str
    """Name of the label, such as ``style``."""
    top: int = pydantic.Field(1, ge=1)
    """Number of the likeliest values of which one must be the label's."""
    by: str | None = None
    """Key of the metadata by whose values the rate is told too; the value is then their mean."""

    def load(self, tools: Tools) -> Maker:
        scorer = tools.network(("classifier", self.classifier), partial(load_scorer, self.classifier, tools.device))
        return partial(label_accuracy, scorer, self.label, top=self.top, by=self.by, images=self.images)


class LpipsDiversity(LPIPS):
    """LPIPS distance between two images of the same prompt."""

    needs = frozenset({"images", "groups"})
    images: ImageSettings = ImageSettings(size=256)

    def load(self, tools: Tools) -> Maker:
        model = load_lpips(self.weights, net=self.net, device=tools.device)
        return partial(lpips_diversity, model, images=self.images, per_prompt=tools.per_prompt)


class MetricsConfig(Config):
    """Metrics to measure: those named here, with their options (``psnr: {}`` for defaults)."""

    scene_score: SceneScore | None = None
    bit_usage: Bits | None = None
    """Bit usage, code entropy and dead bits."""
    diversity_bits: BitDiversity | None = None
    """Share of bits that differ between two codes of the same prompt."""
    psnr: PSNR | None = None
    ssim: SSIM | None = None
    lpips: LPIPS | None = None
    rfid: RFID | None = None
    fid: FID | None = None
    kid: KID | None = None
    precision_recall: PrecisionRecall | None = None
    density_coverage: DensityCoverage | None = None
    cmmd: CMMD | None = None
    memorisation: MemorisationTest | None = None
    memorisation_pixels: PixelMemorisation | None = None
    clip_score: ClipScore | None = None
    image_reward: ImageReward | None = None
    geneval: GenEval | None = None
    diversity_features: FeatureDiversity | None = None
    diversity_lpips: LpipsDiversity | None = None
    labels: dict[Annotated[str, pydantic.Field(pattern="^[a-z][a-z0-9_]*$")], LabelAccuracy] = pydantic.Field({})
    """Accuracies of labels, by a name for each."""

    @pydantic.model_validator(mode="after")
    def _one_name_each(self) -> MetricsConfig:
        if twice := next((name for name in self.labels if name in type(self).model_fields), None):
            raise ValueError(f"labels.{twice}: the name of another metric; choose one such as style_accuracy")
        return self

    def sections(self) -> dict[str, Section]:
        """Return the enabled sections by name."""
        named = {name: getattr(self, name) for name in type(self).model_fields if name != "labels"} | self.labels
        return {name: section for name, section in named.items() if section is not None}


MISSING_COLUMN = {
    "images": "images: give the samples' tokenizer",
    "references": "originals of reconstructions: give images and a tokenizer",
    "prompts": "a prompt or caption for every image",
    "codes": "codes: give samples, or images and a tokenizer",
    "meta": "samples of GenEval's prompts",
    "groups": "several samples per prompt",
}


def choose(metrics: MetricsConfig | None, offers: frozenset[str], *, scenes: bool) -> dict[str, Section]:
    """Return the sections to measure; for None those that need no external file, and the scene score if ``scenes``.

    Raises UserError for a metric that needs a column missing from ``offers``, and if no metric is left.
    """
    if metrics is None:
        free = MetricsConfig(
            scene_score=SceneScore() if scenes else None,
            bit_usage=Bits(),
            diversity_bits=BitDiversity(),
            psnr=PSNR(),
            ssim=SSIM(),
        )
        found = {name: section for name, section in free.sections().items() if section.needs <= offers}
    else:
        found = metrics.sections()
    for name, section in found.items():
        if missing := section.needs - offers:
            raise UserError(f"metrics.{name}: needs {MISSING_COLUMN[min(missing)]}")
    if not found:
        raise UserError("metrics: none enabled; expected at least one, for example clip_score")
    return found


PATHS = ("weights", "med_config", "vocabulary", "color_weights", "mmcv_wheel", "classifier")
"""Settings that may name local files."""


def absolute(section: S) -> S:
    """Return a copy with absolute paths of local files, since each actor runs in another working directory."""
    given = {name: getattr(section, name, None) for name in PATHS}
    places: dict[str, Any] = {
        n: str(Path(path).absolute()) for n, path in given.items() if path and Path(path).exists()
    }
    if isinstance(section, Section):
        places |= {role: absolute_pattern(pattern) for role, pattern in section.patterns().items()}
    return section.model_copy(update=places)
