"""Which metrics are measured and with what, as configuration: a section each, which loads its network and makes it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal, TypeVar

import pydantic

from ..config import Config
from ..data.formats.names import absolute_pattern
from ..errors import UserError
from ..models.clip import load_clip
from .geneval_actor import GenEvalConfig, start_detector
from .metrics.base import Metric
from .metrics.bits import BitUsage
from .metrics.clip_score import PAPER_IMAGES as CLIP_IMAGES
from .metrics.clip_score import PAPER_MODEL, PAPER_TAG, clip_score
from .metrics.diversity import code_diversity, feature_diversity
from .metrics.features import Features, efficientnet_lite0, inception
from .metrics.fid import PAPER_IMAGES as FID_IMAGES
from .metrics.fid import frechet
from .metrics.frechet import GROUPS, Gaussian
from .metrics.geneval import geneval
from .metrics.image_reward import image_reward, load_image_reward
from .metrics.images import ImageSettings
from .metrics.lpips_distance import Net, load_lpips, lpips_distance, lpips_diversity
from .metrics.psnr import psnr
from .metrics.scene import scene_score
from .metrics.ssim import ssim

Maker = Callable[[], Metric]
"""Gives an empty metric; all that one gives share the network that was loaded for it."""
S = TypeVar("S", bound=Config)
Network = Literal["inception", "efficientnet_lite0"]


@dataclass(frozen=True)
class Tools:
    """What a metric is made with, beside its own settings."""

    device: str = "cpu"
    reference: Gaussian | None = None
    """Of FID."""
    per_prompt: int = 0
    """Images of each prompt, for metrics that wait for the last one; 0: not known."""


class Section(Config):
    """Settings of one metric."""

    needs: ClassVar[frozenset[str]] = frozenset({"images"})
    """Columns of a :class:`.metrics.base.Batch`; ``groups`` means several images of a prompt."""

    @abstractmethod
    def load(self, tools: Tools) -> Maker:
        """Load what it measures with; UserError where that is not to be had."""


class Images(Section):
    """A metric of images."""

    images: ImageSettings = ImageSettings()


class SceneScore(Images):
    """Share of images that show what a caption of the scenes says, by the set's own detector."""

    needs = frozenset({"images", "prompts"})

    def load(self, tools: Tools) -> Maker:
        return partial(scene_score, self.images)


class Bits(Section):
    """Usage of the bits, entropy of the codes, dead bits."""

    needs = frozenset({"codes"})

    def load(self, tools: Tools) -> Maker:
        return BitUsage


class BitDiversity(Section):
    """Share of bits in which two codes of a prompt differ."""

    needs = frozenset({"codes", "groups"})

    def load(self, tools: Tools) -> Maker:
        return partial(code_diversity, per_prompt=tools.per_prompt)


class PSNR(Images):
    needs = frozenset({"images", "references"})

    def load(self, tools: Tools) -> Maker:
        return partial(psnr, self.images)


class SSIM(Images):
    needs = frozenset({"images", "references"})

    def load(self, tools: Tools) -> Maker:
        return partial(ssim, self.images)


class LPIPS(Images):
    """Distance of deep features; without ``weights`` a stand-in with a random trunk and another name."""

    needs = frozenset({"images", "references"})
    net: Net = "vgg"
    weights: str | None = None
    """torchvision's file of the trunk."""

    def load(self, tools: Tools) -> Maker:
        return partial(lpips_distance, load_lpips(self.weights, net=self.net, device=tools.device), self.images)


class OfFeatures(Images):
    """A metric over the features of a network."""

    network: Network = "inception"
    """``inception`` is FID's own; any other gives a stand-in with another name."""
    weights: str | None = None
    """The network's file; efficientnet_lite0 has one in its package."""

    def features(self, device: str) -> Features:
        if self.network == "inception":
            return inception(self.weights, device=device)
        return efficientnet_lite0(self.weights, device=device)


class RFID(OfFeatures):
    """Frechet distance of reconstructions to their originals."""

    needs = frozenset({"images", "references"})

    def load(self, tools: Tools) -> Maker:
        return partial(frechet, self.features(tools.device), reconstruction=True, images=self.images)


class FID(OfFeatures):
    """Frechet distance to a reference."""

    images: ImageSettings = FID_IMAGES
    reference: str
    """Images (tars, parquet, a folder), or an ``.npz`` with ``mu`` and ``sigma``."""
    groups: int = pydantic.Field(GROUPS, ge=2)
    """Of the jackknife."""

    def load(self, tools: Tools) -> Maker:
        features = self.features(tools.device)
        return partial(frechet, features, reference=tools.reference, images=self.images, groups=self.groups)


class Reference(FID):
    """Gathers what FID is measured against: images as they are, through no lossy format."""

    def load(self, tools: Tools) -> Maker:
        images = self.images.model_copy(update={"format": "pixels"})
        return partial(frechet, self.features(tools.device), images=images, groups=self.groups)


class ClipScore(Images):
    """Cosine between image and prompt; the paper's network is the default."""

    needs = frozenset({"images", "prompts"})
    images: ImageSettings = CLIP_IMAGES
    model: str = PAPER_MODEL
    weights: str | None = PAPER_TAG
    """A local file, or open_clip's tag, which downloads; null is a random network under another name."""
    prefix: str = ""
    """Put before each prompt."""

    def load(self, tools: Tools) -> Maker:
        clip = load_clip(self.model, self.weights, asker="metric clip_score", extra="eval", device=tools.device)
        return partial(clip_score, clip, images=self.images, prefix=self.prefix)


class ImageReward(Images):
    """People's liking, by the official network."""

    needs = frozenset({"images", "prompts"})
    weights: str
    """``ImageReward.pt``."""
    med_config: str
    """``med_config.json``."""

    def load(self, tools: Tools) -> Maker:
        scorer = load_image_reward(self.weights, self.med_config, device=tools.device)
        return partial(image_reward, scorer, weights=self.weights, images=self.images)


class GenEval(Images, GenEvalConfig):
    """GenEval with its official detector, which runs in an environment of its own."""

    needs = frozenset({"images", "meta"})

    def load(self, tools: Tools) -> Maker:
        own = {name: getattr(self, name) for name in GenEvalConfig.model_fields}
        return partial(geneval, start_detector(GenEvalConfig(**own)), images=self.images)


class FeatureDiversity(OfFeatures):
    """``1 - cosine`` of the features of two images of a prompt."""

    needs = frozenset({"images", "groups"})
    images: ImageSettings = ImageSettings(size=256)

    def load(self, tools: Tools) -> Maker:
        features = self.features(tools.device)
        return partial(feature_diversity, features, images=self.images, per_prompt=tools.per_prompt)


class LpipsDiversity(LPIPS):
    """LPIPS between two images of a prompt."""

    needs = frozenset({"images", "groups"})
    images: ImageSettings = ImageSettings(size=256)

    def load(self, tools: Tools) -> Maker:
        model = load_lpips(self.weights, net=self.net, device=tools.device)
        return partial(lpips_diversity, model, images=self.images, per_prompt=tools.per_prompt)


class MetricsConfig(Config):
    """What is measured: each metric named here, with its options (``psnr: {}`` for none)."""

    scene_score: SceneScore | None = None
    bit_usage: Bits | None = None
    """Usage of the bits, entropy of the codes, dead bits."""
    diversity_bits: BitDiversity | None = None
    """Share of bits in which two codes of a prompt differ."""
    psnr: PSNR | None = None
    ssim: SSIM | None = None
    lpips: LPIPS | None = None
    rfid: RFID | None = None
    fid: FID | None = None
    clip_score: ClipScore | None = None
    image_reward: ImageReward | None = None
    geneval: GenEval | None = None
    diversity_features: FeatureDiversity | None = None
    diversity_lpips: LpipsDiversity | None = None

    def sections(self) -> dict[str, Section]:
        """Those that are on, by name."""
        named = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: section for name, section in named.items() if section is not None}


EXPLAINED = {
    "images": "images: give the samples' tokenizer",
    "references": "originals beside reconstructions: give images and a tokenizer",
    "prompts": "a prompt or caption with every image",
    "codes": "codes: give samples, or images and a tokenizer",
    "meta": "samples of GenEval's prompts",
    "groups": "samples, several of each prompt",
}


def choose(metrics: MetricsConfig | None, offers: frozenset[str], *, scenes: bool) -> dict[str, Section]:
    """The sections to measure; None: those that need no file beside, the scene score where captions are ``scenes``.

    UserError for one that needs what the inputs do not have, and where nothing is left.
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
            raise UserError(f"metrics.{name}: needs {EXPLAINED[min(missing)]}")
    if not found:
        raise UserError("metrics: none is on; name those to measure, for example clip_score")
    return found


def absolute(section: S) -> S:
    """The section with local files by their full path: actors work in directories of their own."""
    given = {name: getattr(section, name, None) for name in ("weights", "med_config", "color_weights", "mmcv_wheel")}
    places = {name: str(Path(path).absolute()) for name, path in given.items() if path and Path(path).exists()}
    if isinstance(section, FID):
        places["reference"] = absolute_pattern(section.reference)
    return section.model_copy(update=places)
