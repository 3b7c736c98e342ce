"""Base classes of metrics: batches, results, and accumulators with ``update``, ``merge``, ``result`` and ``state``.

A metric separates the network that scores images from the values accumulated from it. The latter are plain arrays
(``state``), so a driver merges shards without loading any weights. Merging shards in any order gives the result of a single
pass over all samples; a duplicate sample is an error.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np

from ...errors import UserError
from ...storage import finite
from .names import earned_name

M = TypeVar("M", bound="Metric")
SETS = ("precision", "recall", "f_score", "density", "coverage")
HIGHER = ("scene_score", "geneval", "clip_score", "image_reward", "psnr", "ssim", *SETS)
LABEL = re.compile(r"\w+_(accuracy|top\d+)(/.*)?")
"""Names of label accuracies (:mod:`.labels`), of which higher is better."""
LOWER = ("fid", "rfid", "frechet", "rfrechet", "lpips", "kid", "kernel", "cmmd", "memorisation")


@dataclass(frozen=True)
class Batch:
    """Samples to measure; each metric requires some of the optional columns."""

    ids: Sequence[str]
    """Sample ids, unique over all shards."""
    images: np.ndarray | Sequence[np.ndarray] | None = None
    """uint8 ``[B, H, W, 3]``, or images of several sizes, each ``[H, W, 3]``."""
    references: np.ndarray | None = None
    """Originals of reconstructions, uint8 ``[B, H, W, 3]``."""
    prompts: Sequence[str] | None = None
    codes: np.ndarray | None = None
    """Bits 0/1, uint8 ``[B, L, K]``."""
    groups: Sequence[str] | None = None
    """Group (prompt) of each sample; samples of one group are not independent. None: every sample is its own group."""
    meta: Sequence[Mapping[str, Any]] | None = None
    """Metadata of each prompt (GenEval's ``tag, include, exclude``; labels), or of each image file."""
    detections: Sequence[Sequence[Any]] | None = None
    """List of :class:`.geneval_rules.Detection` of each image."""

    def __len__(self) -> int:
        return len(self.ids)

    def need(self, column: str) -> Any:
        """Return a column with one entry per sample; raises UserError if it is missing or has another length."""
        value = getattr(self, column)
        if value is None:
            raise UserError(f"metrics: this metric needs '{column}' for every sample")
        if len(value) != len(self.ids):
            raise UserError(f"metrics: {len(value)} {column} for {len(self.ids)} samples")
        return value

    @property
    def group_names(self) -> list[str]:
        return list(self.ids if self.groups is None else self.need("groups"))


@dataclass(frozen=True)
class Info:
    """Identity of a metric; results are comparable only if it is equal."""

    name: str
    """Metric name; with other weights than those that it stands for it becomes another (:func:`.names.earned_name`)."""
    implementation: str
    """Package and version."""
    weights: str | None = None
    weights_hash: str | None = None
    """sha256 of the weights file, or of the tensors if there is no file."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Everything else that affects the value: image size, resize filter, image format, layers, thresholds."""

    def __post_init__(self) -> None:
        # Normalize to the JSON form (lists for tuples), so that a shard loaded from a file equals a fresh one.
        object.__setattr__(self, "settings", json.loads(json.dumps(dict(self.settings))))
        earned = earned_name(self.name, self.weights, self.weights_hash, self.settings)
        object.__setattr__(self, "name", earned)

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Info:
        return cls(**json.loads(text))


@dataclass(frozen=True)
class MetricResult:
    """Value of a metric with its confidence interval and the metric's identity."""

    name: str
    value: float
    low: float
    high: float
    """Bounds of the confidence interval; nan if there is none."""
    count: int
    implementation: str
    weights: str | None
    weights_hash: str | None
    settings: Mapping[str, Any]
    """The metric's settings, with the interval's method (``interval``) and ``confidence``."""
    parts: tuple[MetricResult, ...] = ()
    """Additional results of the same pass, such as categories of a benchmark."""
    cautions: tuple[str, ...] = ()
    """Reasons not to take the value at face value, in one sentence each."""

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; nan and infinities become null, in the settings too."""
        data = {name: getattr(self, name) for name in self.__dataclass_fields__}
        parts = [part.to_json() for part in self.parts]
        about: dict[str, Any] = finite({**data, "parts": parts, "cautions": list(self.cautions)})
        return about


class Metric(ABC):
    """Base class of the accumulators; ``kind`` identifies the class of a stored state."""

    kind: ClassVar[str]

    def __init__(self, info: Info) -> None:
        self.info = info
        self.ids: set[str] = set()

    @abstractmethod
    def update(self, batch: Batch) -> None:
        """Add samples."""

    @abstractmethod
    def result(self, confidence: float = 0.95, seed: int = 0) -> MetricResult:
        """Compute the result over all samples added so far; ``seed`` seeds the bootstrap."""

    @abstractmethod
    def arrays(self) -> dict[str, np.ndarray]:
        """Return the accumulated values, without the info."""

    @abstractmethod
    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Add values returned by :meth:`arrays` of this or another process."""

    def merge(self, other: Metric) -> None:
        """Add the accumulated values of ``other``; raises UserError unless kind and info are equal."""
        ours, theirs = (asdict(m.info) for m in (self, other))
        if self.kind != other.kind or ours != theirs:
            key = next((k for k in ours if ours[k] != theirs[k]), "kind")
            raise UserError(
                f"metric {self.info.name}: cannot merge, {key} is {ours.get(key)} here, {theirs.get(key)} there"
            )
        self.restore(other.arrays())

    def state(self) -> dict[str, np.ndarray]:
        """Return everything as numpy arrays of numbers and text, not objects, to store as ``.npz`` without pickling."""
        return {"kind": np.array(self.kind), "info": np.array(self.info.to_json()), **self.arrays()}

    @classmethod
    def from_state(cls: type[M], state: Mapping[str, np.ndarray]) -> M:
        """Restore a metric that can merge and give results, but has no network to update with.

        Raises UserError for a state of another kind.
        """
        if str(state["kind"]) != cls.kind:
            raise UserError(f"metric state: kind '{state['kind']}', expected '{cls.kind}'")
        metric = cls(Info.from_json(str(state["info"])))
        metric.restore(state)
        return metric

    def claim(self, ids: Sequence[str]) -> None:
        """Record the ids of added samples; raises UserError for a duplicate."""
        new = set(ids)
        twice = sorted(self.ids & new)
        if twice or len(new) != len(ids):
            twice = twice or sorted(name for name, times in Counter(ids).items() if times > 1)
            raise UserError(f"metric {self.info.name}: sample {twice[0]} counted twice")
        self.ids |= new

    def make_result(
        self,
        value: float,
        low: float,
        high: float,
        count: int,
        *,
        parts: tuple[MetricResult, ...] = (),
        cautions: tuple[str, ...] = (),
        **extra: Any,
    ) -> MetricResult:
        """Create a :class:`MetricResult` of this metric; ``extra`` is added to its settings."""
        info, settings = self.info, {**self.info.settings, **extra}
        made_with = info.implementation, info.weights, info.weights_hash, settings
        return MetricResult(info.name, value, low, high, count, *made_with, parts, cautions)


def better(name: str) -> Literal["higher", "lower"] | None:
    """Return whether higher or lower values of a metric are better; None if neither is, as for diversity."""
    if LABEL.fullmatch(name):
        return "higher"
    return "lower" if name.startswith(LOWER) else "higher" if name.startswith(HIGHER) else None


def version_of(package: str) -> str:
    """Return name and version of an installed distribution, as ``"package 1.2.3"``."""
    try:
        return f"{package} {metadata.version(package)}"
    except metadata.PackageNotFoundError:
        return f"{package} (version unknown)"


def text_array(values: Sequence[str]) -> np.ndarray:
    """Convert strings to a numpy array of text, which may be empty."""
    return np.array(list(values), np.str_) if len(values) else np.empty(0, "<U1")
