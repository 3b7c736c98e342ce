"""Configuration sections of the metrics over features of a network, and of the features of their references."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable, Mapping
from functools import partial
from typing import Any, ClassVar

import pydantic

from ..config import InputPath
from ..data.formats.patterns import Pattern
from ..models.clip import Clip, load_clip
from .metrics.base import Info
from .metrics.clip_score import clip_features
from .metrics.diversity import feature_diversity
from .metrics.feature_rows import FeatureRows
from .metrics.features import WIDTHS, Features, Network, NetworkResize, efficientnet_lite0, inception, small_pixels
from .metrics.fid import PAPER_IMAGES as FID_IMAGES
from .metrics.fid import frechet
from .metrics.frechet import GROUPS
from .metrics.images import ImageSettings
from .metrics.kernel import KernelDistance
from .metrics.memorisation import Distance, Memorisation
from .metrics.neighbours import Coverage, Precision
from .sections import Images, Maker, Tools

CMMD_MODEL, CMMD_TAG = "ViT-L-14-336", "openai"


class FeatureMetric(Images):
    """Settings of a metric over features of images."""

    @property
    @abstractmethod
    def key(self) -> Hashable:
        """Identity of the features; metrics with an equal one share a network."""

    @abstractmethod
    def features(self, tools: Tools) -> Features:
        """Load the network."""


class NetworkMetric(FeatureMetric):
    """Settings of a metric over the features of a network for images."""

    network: Network = "inception"
    """Feature network: ``inception`` is FID's standard; with any other the metric has another name.

    ``pixels`` is no network but the image shrunk to 24 px, whose distances are root mean square errors."""
    weights: InputPath | None = None
    """Weights file of the network; none uses the weights packaged with efficientnet_lite0."""
    network_resize: NetworkResize = "legacy"
    """Resize to the size of ``inception``: ``legacy`` is TensorFlow 1's, ``clean`` is clean-fid's, as in the paper."""

    @property
    def key(self) -> Hashable:
        return (self.network, self.weights, self.network_resize)

    @property
    def width(self) -> int:
        """Number of features."""
        return WIDTHS[self.network]

    def features(self, tools: Tools) -> Features:
        return tools.network(self.key, partial(self._load, tools.device))

    def _load(self, device: str) -> Features:
        if self.network == "inception":
            return inception(self.weights, resize=self.network_resize, device=device)
        if self.network == "pixels":
            return small_pixels(device=device)
        return efficientnet_lite0(self.weights, device=device)


class FeatureDiversity(NetworkMetric):
    """``1 - cosine`` of the features of two images of the same prompt."""

    needs = frozenset({"images", "groups"})
    images: ImageSettings = ImageSettings(size=256)

    def load(self, tools: Tools) -> Maker:
        return partial(feature_diversity, self.features(tools), images=self.images, per_prompt=tools.per_prompt)


class RFID(NetworkMetric):
    """Frechet distance between reconstructions and their originals."""

    needs = frozenset({"images", "references"})

    def load(self, tools: Tools) -> Maker:
        return partial(frechet, self.features(tools), reconstruction=True, images=self.images)


class FID(NetworkMetric):
    """Frechet distance to reference statistics."""

    roles = ("reference",)
    images: ImageSettings = FID_IMAGES
    reference: Pattern
    """Reference images (tars, parquet files, a folder), or an ``.npz`` file with ``mu`` and ``sigma``."""
    groups: int = pydantic.Field(GROUPS, ge=2)
    """Number of jackknife groups; fewer than 5 give no interval."""

    def load(self, tools: Tools) -> Maker:
        expected = tools.references.get("fid", {}).get("reference")
        features = self.features(tools)
        return partial(frechet, features, expected=expected, images=self.images, groups=self.groups)


class SetMetric(NetworkMetric):
    """Settings of a metric that compares sets of features; its references are images, as statistics have no features."""

    images: ImageSettings = FID_IMAGES


class KID(SetMetric):
    """Kernel distance to reference images, which unlike FID is unbiased for few images."""

    roles = ("reference",)
    reference: Pattern
    """Reference images: tars, parquet files or a folder."""

    def load(self, tools: Tools) -> Maker:
        features = self.features(tools)
        name = "kid" if features.name == "inception" else f"kernel_{features.name}"
        own = {"kernel": "cubic", "unbiased": True, "scale": 1, **tools.references.get("kid", {})}
        return _rows_maker(KernelDistance, name, self, features, own)


class PrecisionRecall(SetMetric):
    """Precision and recall: shares of images, and of reference images, within the neighbourhoods of the others."""

    roles = ("reference",)
    reference: Pattern
    """Reference images: tars, parquet files or a folder."""
    neighbours: int = pydantic.Field(3, ge=1)
    """Number of nearest neighbours that a neighbourhood reaches to."""

    def load(self, tools: Tools) -> Maker:
        features = self.features(tools)
        own = {"neighbours": self.neighbours, **tools.references.get("precision_recall", {})}
        return _rows_maker(Precision, _suffixed("precision", features), self, features, own)


class DensityCoverage(SetMetric):
    """Density and coverage: how many reference neighbourhoods images are in, and the share of these with any."""

    roles = ("reference",)
    reference: Pattern
    """Reference images: tars, parquet files or a folder."""
    neighbours: int = pydantic.Field(5, ge=1)
    """Number of nearest neighbours that a neighbourhood reaches to."""

    def load(self, tools: Tools) -> Maker:
        features = self.features(tools)
        own = {"neighbours": self.neighbours, **tools.references.get("density_coverage", {})}
        return _rows_maker(Coverage, _suffixed("coverage", features), self, features, own)


class MemorisationTest(SetMetric):
    """Probability that an image is nearer to the training images than a held-out one is (0.5: none memorised)."""

    roles = ("training", "held_out")
    training: Pattern
    """Images that the model was trained on: tars, parquet files or a folder."""
    held_out: Pattern
    """Images of the same kind that it was not trained on."""
    distance: Distance = "euclidean"
    """Distance of two images' features; ``cosine`` does not depend on their contrast."""
    place: ClassVar[str] = "memorisation"
    """Name of the section."""

    def load(self, tools: Tools) -> Maker:
        features, own = self.features(tools), tools.references.get(self.place, {})
        own = {"distance": self.distance, **own}
        return _rows_maker(Memorisation, f"memorisation_{features.name}", self, features, own)


class PixelMemorisation(MemorisationTest):
    """The same by pixels, shrunk to 24 px, which tells copies that a network takes for others, and the reverse."""

    network: Network = "pixels"
    place = "memorisation_pixels"


class CMMD(FeatureMetric):
    """Kernel distance of CLIP embeddings to those of reference images."""

    roles = ("reference",)
    images: ImageSettings = ImageSettings(size=336)
    reference: Pattern
    """Reference images: tars, parquet files or a folder."""
    model: str = CMMD_MODEL
    """CLIP model, by open_clip's name; any but the default gives the metric another name."""
    weights: str | None = CMMD_TAG
    """Local file, or open_clip tag, which is downloaded; null uses random weights and another metric name."""

    @property
    def key(self) -> Hashable:
        return ("clip", self.model, self.weights)

    def features(self, tools: Tools) -> Features:
        return clip_features(shared_clip(self.model, self.weights, "metric cmmd", tools))

    def load(self, tools: Tools) -> Maker:
        features = self.features(tools)
        name = "cmmd" if self.model == CMMD_MODEL and self.weights is not None else f"cmmd_{features.name}"
        own = {"kernel": "gaussian, sigma 10", "unbiased": False, "scale": 1000, **tools.references.get("cmmd", {})}
        return _rows_maker(KernelDistance, name, self, features, own)


class Reference(Images):
    """Gathers the features of a metric's reference images, or their statistics, without lossy recompression."""

    metric: FeatureMetric
    rows: bool
    """Whether the features themselves are needed; statistics need less memory."""

    def load(self, tools: Tools) -> Maker:
        features, images = self.metric.features(tools), self.images.model_copy(update={"format": "pixels"})
        if not self.rows:
            return partial(frechet, features, images=images)
        return _rows_maker(FeatureRows, "features", self, features, {})


def shared_clip(model: str, weights: str | None, asker: str, tools: Tools) -> Clip:
    """Load a CLIP model, once for all metrics that use it."""
    load = partial(load_clip, model, weights, asker=asker, extra="eval", device=tools.device)
    return tools.network(("clip", model, weights), load)


def _rows_maker(
    accumulator: type[FeatureRows], name: str, section: Images, features: Features, own: Mapping[str, Any]
) -> Maker:
    images = section.images
    settings = {"features": features.name, **features.settings, "images": images.describe(), **own}
    info = Info(name, features.implementation, features.weights, features.weights_hash, settings)
    return partial(accumulator, info, features, images)


def _suffixed(name: str, features: Features) -> str:
    return name if features.name == "inception" else f"{name}_{features.name}"
