"""What every metric is: ``update`` with batches, ``merge`` with the same metric of other shards, ``result``, ``state``.

A metric has two parts that part ways: the network that scores images, and what was gathered from it. The second one is
plain arrays (``state``), so a driver merges shards without loading any weights. Merging shards in any order gives what
one pass over all samples gives, and a sample that comes twice is refused.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np

from ...errors import UserError

M = TypeVar("M", bound="Metric")
HIGHER = ("scene_score", "geneval", "clip_score", "image_reward", "psnr", "ssim")
LOWER = ("fid", "rfid", "frechet", "rfrechet", "lpips")


@dataclass(frozen=True)
class Batch:
    """Samples to measure; a metric says which of the optional columns it needs."""

    ids: Sequence[str]
    """Unique over all shards."""
    images: np.ndarray | None = None
    """uint8 ``[B, H, W, 3]``."""
    references: np.ndarray | None = None
    """Originals of reconstructions, uint8 ``[B, H, W, 3]``."""
    prompts: Sequence[str] | None = None
    codes: np.ndarray | None = None
    """0/1 uint8 ``[B, L, K]``."""
    groups: Sequence[str] | None = None
    """Samples of one group (prompt) are not independent; None: every sample is its own group."""
    meta: Sequence[Mapping[str, Any]] | None = None
    """What a benchmark says about each prompt (GenEval's ``tag, include, exclude``)."""
    detections: Sequence[Sequence[Any]] | None = None
    """Per image, the :class:`.geneval_rules.Detection` list."""

    def __len__(self) -> int:
        return len(self.ids)

    def need(self, column: str) -> Any:
        """The column, one entry a sample; UserError where it is missing."""
        value = getattr(self, column)
        if value is None:
            raise UserError(f"metrics: this one needs '{column}' with every sample")
        if len(value) != len(self.ids):
            raise UserError(f"metrics: {len(value)} {column} for {len(self.ids)} samples")
        return value

    @property
    def group_names(self) -> list[str]:
        return list(self.ids if self.groups is None else self.need("groups"))


@dataclass(frozen=True)
class Info:
    """What was measured, by what: two results are comparable where these agree."""

    name: str
    """A stand-in (other weights, features or detector) never has the real metric's name."""
    implementation: str
    """Package and version."""
    weights: str | None = None
    weights_hash: str | None = None
    """sha256 of the weights' file, or of the tensors where there is none."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Everything else that changes the number: image size, resize filter, image format, layers, thresholds."""

    def __post_init__(self) -> None:
        # As they come back from a file (lists for tuples), or a stored shard would differ from a fresh one.
        object.__setattr__(self, "settings", json.loads(json.dumps(dict(self.settings))))

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Info:
        return cls(**json.loads(text))


@dataclass(frozen=True)
class MetricResult:
    """A number, how sure it is, and what it is a number of."""

    name: str
    value: float
    low: float
    high: float
    """Ends of the confidence interval; nan where there is none."""
    count: int
    implementation: str
    weights: str | None
    weights_hash: str | None
    settings: Mapping[str, Any]
    """With ``interval``, the method, and ``confidence``."""
    parts: tuple[MetricResult, ...] = ()
    """Further numbers from the same pass: categories of a benchmark, say."""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; nan becomes null."""
        data = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "parts"}
        for key in ("value", "low", "high"):
            data[key] = data[key] if math.isfinite(data[key]) else None
        return {**data, "settings": dict(self.settings), "parts": [part.to_json() for part in self.parts]}


class Metric(ABC):
    """Base of the accumulators; ``kind`` is how a stored state finds its class again."""

    kind: ClassVar[str]

    def __init__(self, info: Info) -> None:
        self.info = info
        self.ids: set[str] = set()

    @abstractmethod
    def update(self, batch: Batch) -> None:
        """Add samples."""

    @abstractmethod
    def result(self, confidence: float = 0.95, seed: int = 0) -> MetricResult:
        """The number over everything added so far; ``seed`` is that of the bootstrap."""

    @abstractmethod
    def arrays(self) -> dict[str, np.ndarray]:
        """What was gathered, without the info."""

    @abstractmethod
    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Add what :meth:`arrays` gave, here or in another process."""

    def merge(self, other: Metric) -> None:
        """Add what ``other`` gathered; UserError unless it measured the same thing in the same way."""
        ours, theirs = (asdict(m.info) for m in (self, other))
        if self.kind != other.kind or ours != theirs:
            key = next((k for k in ours if ours[k] != theirs[k]), "kind")
            raise UserError(
                f"metric {self.info.name}: cannot merge, {key} is {ours.get(key)} here, {theirs.get(key)} there"
            )
        self.restore(other.arrays())

    def state(self) -> dict[str, np.ndarray]:
        """Everything as numpy arrays of numbers and text, none of objects: ``.npz`` without pickles."""
        return {"kind": np.array(self.kind), "info": np.array(self.info.to_json()), **self.arrays()}

    @classmethod
    def from_state(cls: type[M], state: Mapping[str, np.ndarray]) -> M:
        """A metric that can merge and give results, but has no network to update with."""
        if str(state["kind"]) != cls.kind:
            raise UserError(f"metric state: of kind '{state['kind']}', expected '{cls.kind}'")
        metric = cls(Info.from_json(str(state["info"])))
        metric.restore(state)
        return metric

    def claim(self, ids: Sequence[str]) -> None:
        """Note that these samples are in; UserError for one that already was."""
        new = set(ids)
        twice = sorted(self.ids & new)
        if twice or len(new) != len(ids):
            twice = twice or sorted(name for name, times in Counter(ids).items() if times > 1)
            raise UserError(f"metric {self.info.name}: sample {twice[0]} counted twice")
        self.ids |= new

    def make_result(
        self, value: float, low: float, high: float, count: int, *, parts: tuple[MetricResult, ...] = (), **extra: Any
    ) -> MetricResult:
        """A :class:`MetricResult` of this metric; ``extra`` joins its settings."""
        info, settings = self.info, {**self.info.settings, **extra}
        return MetricResult(
            info.name, value, low, high, count, info.implementation, info.weights, info.weights_hash, settings, parts
        )


def better(name: str) -> Literal["higher", "lower"] | None:
    """Which way a metric is better; None where it is a matter of taste, as diversity is."""
    return "lower" if name.startswith(LOWER) else "higher" if name.startswith(HIGHER) else None


def version_of(package: str) -> str:
    """``"package 1.2.3"`` of an installed distribution."""
    try:
        return f"{package} {metadata.version(package)}"
    except metadata.PackageNotFoundError:
        return f"{package} (version unknown)"


def text_array(values: Sequence[str]) -> np.ndarray:
    """Strings as a numpy array of text (an empty list too)."""
    return np.array(list(values), np.str_) if len(values) else np.empty(0, "<U1")
