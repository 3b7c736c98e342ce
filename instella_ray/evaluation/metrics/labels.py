"""Label accuracy: share of images in which a classifier finds the label that their prompt or metadata names.

Named ``LABEL_accuracy``, or ``LABEL_topK`` where it suffices that the label is among the K likeliest. Images of labels
that the classifier does not know are counted apart, as in its own accuracy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...data.formats.images import to_tensor
from ...data.formats.metadata import required_text
from ...errors import UserError
from ...models.checkpoint import WEIGHTS
from ...models.classifier import load_classifier, resized
from ...storage import file_sha256
from .base import Batch, Info, version_of
from .images import ImageSettings
from .rates import RateMetric, SampleVerdict

FILES = "the prompts file or KEY.json"
ALL = "all"
"""Category of the images of a metric without ``by``."""


@dataclass(frozen=True)
class LabelScorer:
    """Classifier with its identity; ``compute`` maps uint8 ``[B, H, W, 3]`` to scores ``[B, values]`` by label."""

    labels: Mapping[str, Sequence[str]]
    """Values of each label."""
    weights: str
    weights_hash: str
    compute: Callable[[np.ndarray], Mapping[str, np.ndarray]]
    settings: Mapping[str, Any] = field(default_factory=dict)
    accuracy: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Its accuracies of true images by set and label, as :func:`...training.classifier.accuracy` tells them."""
    _last: list[Any] = field(default_factory=list, repr=False, compare=False)

    def of_batch(self, batch: Batch, images: ImageSettings) -> Mapping[str, np.ndarray]:
        """Return the scores of a batch's images after preprocessing; computed once for several metrics in turn."""
        if not self._last or self._last[0] is not batch or self._last[1] != images:
            self._last[:] = [batch, images, self.compute(images.prepare(batch.need("images")))]
        found: Mapping[str, np.ndarray] = self._last[2]
        return found


def load_scorer(folder: str, device: str = "cpu") -> LabelScorer:
    """Load a classifier for metrics; UserError as :func:`...models.classifier.load_classifier`."""
    model, config = load_classifier(folder, device)

    def compute(images: np.ndarray) -> dict[str, np.ndarray]:
        scores = model(resized(to_tensor(images).to(device), model.cfg.size))
        return {name: found.float().cpu().numpy() for name, found in scores.items()}

    settings = {"network_input": f"{model.cfg.size} px, bicubic with antialiasing", "trained_on": config["data"]}
    digest = file_sha256(str(Path(folder) / WEIGHTS))
    return LabelScorer(model.cfg.labels, Path(folder).name, digest, compute, settings, config["accuracy"])


def label_accuracy(
    scorer: LabelScorer,
    label: str,
    *,
    top: int = 1,
    by: str | None = None,
    images: ImageSettings = ImageSettings(),
) -> RateMetric:
    """Create the accuracy of ``label``: among the ``top`` likeliest values is that of the sample's metadata.

    ``by``: key of the metadata whose values are the categories. Images whose label has a value that ``scorer`` does not know
    are not counted. Raises UserError for a label that ``scorer`` has not, and when measuring for a sample without ``label``
    or ``by``.
    """
    if label not in scorer.labels:
        raise UserError(f"classifier {scorer.weights}: no label '{label}', expected one of {', '.join(scorer.labels)}")
    values = list(scorer.labels[label])
    places = {value: place for place, value in enumerate(values)}

    def verdicts(batch: Batch) -> list[SampleVerdict]:
        scores = scorer.of_batch(batch, images)[label]
        found = []
        for name, meta, row in zip(batch.ids, batch.need("meta"), scores, strict=True):
            sample = f"sample {name}"
            category = ALL if by is None else required_text(meta, by, sample, FILES)
            expected = required_text(meta, label, sample, FILES)
            place = places.get(expected)
            correct = None if place is None else rank(row, place) < top
            said = "" if correct else f"{values[int(row.argmax())]}, not {expected}{' (unknown)' * (place is None)}"
            found.append(SampleVerdict(category, correct, said))
        return found

    own = {of: about[label].get(f"top{top}") for of, about in scorer.accuracy.items()}
    settings = {"label": label, "top": top, "by": by, "values": len(values), "images": images.describe()}
    settings["own_accuracy"] = {of: found["value"] for of, found in own.items() if found}
    name = f"{label}_accuracy" if top == 1 else f"{label}_top{top}"
    info = Info(name, version_of("instella-ray"), scorer.weights, scorer.weights_hash, {**settings, **scorer.settings})
    return RateMetric(info, verdicts)


def rank(scores: np.ndarray, place: int) -> int:
    """Return how many of ``scores [values]`` come before that at ``place``: larger ones, and equal ones before it."""
    return int((scores > scores[place]).sum() + (scores[:place] == scores[place]).sum())
