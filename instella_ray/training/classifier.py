"""Training of a classifier of labelled images, on the CPU in minutes: a tuned trunk, linear discriminants of its features."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from .. import logs, storage
from ..config import Config, OutputPath, validate
from ..data.formats.images import to_tensor
from ..data.formats.patterns import Pattern, absolute_pattern, pattern_text
from ..data.loading.labelled import LabelledImages, read_labelled
from ..data.provenance import shard_provenance
from ..errors import UserError
from ..evaluation.metrics.labels import rank
from ..evaluation.statistics import rate
from ..models.classifier import Classifier, ClassifierConfig, Label, new_classifier, save_classifier
from ..models.perceptual import PUBLISHED, WeightsFile
from ..runs import recorded
from .tuning import TuningConfig, tune

OWN = "own share"
"""Name of the share of the data that is not trained on."""
TOPS = (1, 5)


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a view of each of ``images [B, 3, S, S]`` in [-1, 1]: mirrored, moved, turned, scaled, other colours, blurred.

    What a move uncovers is filled with the colour of the border. Decoded images are blurred more than those of files, so
    part of the views are too.
    """

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(len(images), generator=generator) * (high - low) + low

    turn, scale = uniform(-0.1, 0.1), uniform(0.9, 1.15)
    mirror = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    rows = (turn.cos() * scale * mirror, -turn.sin() * scale, uniform(-0.06, 0.06))
    columns = (turn.sin() * scale * mirror, turn.cos() * scale, uniform(-0.06, 0.06))
    matrices = torch.stack([torch.stack(rows, 1), torch.stack(columns, 1)], 1)
    grid = F.affine_grid(matrices, list(images.shape), align_corners=False)
    views = F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
    small = F.interpolate(views, scale_factor=0.5, mode="bilinear", antialias=True, align_corners=False)
    blurred = F.interpolate(small, views.shape[-2:], mode="bilinear", align_corners=False)
    views = torch.where(uniform(0, 1).view(-1, 1, 1, 1) < 0.25, blurred, views)
    grey = views.mean(1, keepdim=True)
    views = grey + (views - grey) * uniform(0.7, 1.2).view(-1, 1, 1, 1)
    return ((views - 1) * uniform(0.9, 1.05).view(-1, 1, 1, 1) + 1).clamp(-1, 1)


class ClassifierRunConfig(Config):
    """Configuration of the training of a classifier."""

    data: Pattern
    """Images to train on, with the labels as texts in KEY.json: tars, parquet files or a folder."""
    output: OutputPath
    """Local folder for the model and its accuracies, which must not exist."""
    labels: Annotated[tuple[Label, ...], Field(min_length=1)] = ("style", "concept")
    """Names of the labels in KEY.json."""
    accuracy_of: dict[str, Pattern] = Field({})
    """Further images, by name, of which the accuracy is told."""
    held_out_share: float = Field(0.05, gt=0, lt=1)
    """Share of the data that is not trained on, by a hash of the keys; its accuracy is told as that of ``own share``."""
    size: int = Field(96, ge=32)
    """Side to which images are resized (px)."""
    weights: WeightsFile = PUBLISHED
    """Weights of EfficientNet-Lite0: those of the installed package, ``random``, or a file."""
    tuning: TuningConfig | None = None
    """Tuning of these weights to the images; without it they stay."""
    views: int = Field(2, ge=1)
    """Views of each image that the heads are fitted to: itself, and augmented ones; the time is proportional to it."""
    shrinkage: float = Field(0.3, gt=0)
    """Share of the features' own variances that is added to their covariance within classes."""
    batch_size: int = Field(64, ge=1)
    threads: int = Field(2, ge=1)
    """CPU threads."""
    seed: int = 0
    """Seed of the views, and of ``random`` weights."""


class FeatureSums:
    """Sums of features ``[N, D]`` of which linear discriminants of all labels follow; memory is that of ``[D, D]``."""

    def __init__(self, width: int, classes: Mapping[str, int]) -> None:
        self.count = 0
        self.outer = torch.zeros(width, width, dtype=torch.float64)
        self.total = torch.zeros(width, dtype=torch.float64)
        self.sums = {name: torch.zeros(number, width, dtype=torch.float64) for name, number in classes.items()}
        self.counts = {name: torch.zeros(number, dtype=torch.float64) for name, number in classes.items()}

    def add(self, features: Tensor, classes: Mapping[str, Tensor]) -> None:
        """Add ``features [B, D]`` of images of ``classes [B]`` by label."""
        rows = features.double()
        self.count += len(rows)
        self.outer.addmm_(rows.T, rows)
        self.total += rows.sum(0)
        for name, numbers in classes.items():
            self.sums[name].index_add_(0, numbers, rows)
            self.counts[name] += torch.bincount(numbers, minlength=len(self.counts[name]))

    def scaling(self) -> tuple[Tensor, Tensor]:
        """Return the mean and the inverse standard deviation of each feature, ``[D]``."""
        mean = self.total / self.count
        variance = self.outer.diagonal() / self.count - mean.square()
        return mean, variance.clamp_min(1e-8).rsqrt()

    def discriminant(self, label: str, shrinkage: float) -> tuple[Tensor, Tensor]:
        """Compute weights ``[C, D]`` and biases ``[C]`` of a label's linear discriminant over standardized features.

        The logits are those of normal distributions with one covariance, that within classes: directions in which images of
        one class differ, such as their styles where the class is what they show, count little.
        """
        mean, scale = self.scaling()
        centres = (self.sums[label] / self.counts[label][:, None] - mean) * scale
        total = (self.outer / self.count - torch.outer(mean, mean)) * torch.outer(scale, scale)
        within = total - (centres.T * (self.counts[label] / self.count)) @ centres
        within += shrinkage * torch.eye(len(mean), dtype=torch.float64)
        weights = torch.linalg.solve(within, centres.T).T
        return weights, -(weights * centres).sum(1) / 2


def run_classifier(cfg: ClassifierRunConfig) -> dict[str, Any]:
    """Train a classifier, measure its accuracy on images it has not seen, and write both; returns the accuracies.

    They are those of :func:`accuracy` by the name of a set. Raises UserError for an output that exists, a label that
    images lack, and a label with a single value.
    """
    if not storage.is_local(cfg.output):
        raise UserError(f"output {cfg.output}: expected a local folder")
    folder = Path(storage.filesystem(cfg.output)[1])
    if folder.exists():
        raise UserError(f"output {cfg.output}: exists; choose another folder")
    data, others = absolute_pattern(cfg.data), {name: absolute_pattern(each) for name, each in cfg.accuracy_of.items()}
    if OWN in others:
        raise UserError(f"accuracy_of.{OWN}: the name of the share of the data that is held out; choose another")
    torch.set_num_threads(cfg.threads)
    inputs = [
        *shard_provenance("images", data),
        *(p for each in others.values() for p in shard_provenance("held out", each)),
    ]
    with storage.atomic_dir(folder) as temporary, recorded(str(temporary), "train_classifier", cfg, inputs):
        images = read_labelled(data, cfg.labels, cfg.size)
        held_out = np.array([_is_held_out(key, cfg.held_out_share) for key in images.keys])
        if held_out.all() or not held_out.any():
            raise UserError(
                f"held_out_share {cfg.held_out_share}: of {len(images)} images, all or none would be held out"
            )
        train = images.part(np.flatnonzero(~held_out))
        model = fit_classifier(cfg, train)
        measured = {OWN: accuracy(model, images.part(np.flatnonzero(held_out)), cfg.batch_size)}
        for name, each in others.items():
            measured[name] = accuracy(model, read_labelled(each, cfg.labels, cfg.size), cfg.batch_size)
        about = {"source": pattern_text(cfg.data), "sha256": images.sha256, "images": len(train)}
        save_classifier(temporary, model, {"data": about, "accuracy": measured})
    return measured


def fit_classifier(cfg: ClassifierRunConfig, train: LabelledImages) -> Classifier:
    """Tune a new classifier as configured, and fit its heads to the features of ``train`` and of augmented views of it."""
    labels = {name: tuple(sorted(set(values))) for name, values in train.labels.items()}
    model_cfg = validate(ClassifierConfig, {"size": cfg.size, "labels": labels}, train.source)
    model = new_classifier(model_cfg, cfg.weights, cfg.seed)
    places = {name: {value: place for place, value in enumerate(values)} for name, values in labels.items()}
    classes = {name: torch.tensor([places[name][v] for v in values]) for name, values in train.labels.items()}
    if cfg.tuning is not None:
        tune(model, train, classes, cfg.tuning, cfg.batch_size, cfg.seed, augmented)
    sums = FeatureSums(model.width, {name: len(values) for name, values in labels.items()})
    generator = torch.Generator().manual_seed(cfg.seed)
    starts = [(view, start) for view in range(cfg.views) for start in range(0, len(train), cfg.batch_size)]
    with torch.inference_mode(), logs.progress_bar(total=cfg.views * len(train), desc="train", unit="view") as bar:
        for view, start in starts:
            rows = slice(start, start + cfg.batch_size)
            images = to_tensor(train.images[rows])
            views = augmented(images, generator) if view else images
            sums.add(model.features(views), {name: each[rows] for name, each in classes.items()})
            bar.update(len(views))
    model.set_heads(*sums.scaling(), {name: sums.discriminant(name, cfg.shrinkage) for name in labels})
    return model


def accuracy(model: Classifier, images: LabelledImages, batch_size: int) -> dict[str, Any]:
    """Measure the accuracies of a classifier by label: ``top1`` and ``top5`` with 95 % intervals, over ``count`` images.

    Images of ``unknown`` values, that the classifier was not trained on, are counted apart.
    """
    scores: dict[str, list[np.ndarray]] = {name: [] for name in model.cfg.labels}
    with torch.inference_mode():
        for start in range(0, len(images), batch_size):
            for name, found in model(to_tensor(images.images[start : start + batch_size])).items():
                scores[name].append(found.numpy())
    return {
        name: _rates(np.concatenate(found), images.labels[name], model.cfg.labels[name])
        for name, found in scores.items()
    }


def _rates(scores: np.ndarray, expected: Sequence[str], values: Sequence[str]) -> dict[str, Any]:
    places = {value: place for place, value in enumerate(values)}
    ranks = np.array([rank(row, places[e]) for row, e in zip(scores, expected, strict=True) if e in places], np.int64)
    about: dict[str, Any] = {"count": len(ranks), "unknown": len(expected) - len(ranks)}
    for top in TOPS if len(ranks) else ():
        found = rate(ranks < top)
        about[f"top{top}"] = {"value": found.value, "low": found.low, "high": found.high}
    return about


def _is_held_out(key: str, share: float) -> bool:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) < share * 2**64


def accuracy_rows(measured: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the accuracies of :func:`run_classifier` as the rows of a table."""
    rows = []
    for of, labels in measured.items():
        for label, about in labels.items():
            found = {f"top {top}": _percent(about.get(f"top{top}")) for top in TOPS}
            rows.append({"images": of, "label": label, **found, "count": about["count"], "unknown": about["unknown"]})
    return rows


def _percent(found: Mapping[str, float] | None) -> str:
    return "–" if found is None else f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"
