"""GenEval metric: share of images that show what their prompt describes, in six tasks; the score is the mean over tasks.

The official prompts (553, four images each) have metadata with the required objects; a detector finds the objects of each
image; :mod:`.geneval_rules` compares them. The metric is named ``geneval`` only with the official detector (Mask2Former
with Swin-S for objects, CLIP ViT-L/14 for colours, see :mod:`.geneval_worker`). Otherwise its name includes the detector's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from ...errors import UserError
from .base import Batch, Info, version_of
from .geneval_rules import OFFICIAL, TASKS, Detection, Rules, evaluate
from .images import ImageSettings
from .rates import RateMetric, SampleVerdict

OFFICIAL_DETECTOR = "mask2former_swin_s"


@dataclass(frozen=True)
class DetectorInfo:
    """Identity of the detector that made the detections."""

    name: str
    implementation: str
    weights: str | None = None
    weights_hash: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


class Detector(Protocol):
    """Object detector."""

    info: DetectorInfo

    def detect(self, images: np.ndarray, meta: Sequence[Mapping[str, Any]]) -> list[list[Detection]]:
        """Detect objects in uint8 ``[B, H, W, 3]``, with colours for the classes whose colour ``meta`` specifies."""
        ...


def colored_classes(meta: Mapping[str, Any]) -> list[str]:
    """Return the classes whose colour a prompt's metadata specifies."""
    return sorted({clause["class"] for clause in meta.get("include", ()) if "color" in clause})


def geneval(
    detector: DetectorInfo | Detector, rules: Rules = OFFICIAL, images: ImageSettings = ImageSettings()
) -> RateMetric:
    """Create GenEval of ``images`` with their prompts' ``meta``, or of precomputed ``detections`` of the named detector."""
    about = detector if isinstance(detector, DetectorInfo) else detector.info

    def verdicts(batch: Batch) -> list[SampleVerdict]:
        meta = batch.need("meta")
        if batch.detections is not None:
            found: Sequence[Sequence[Detection]] = batch.need("detections")
        elif isinstance(detector, DetectorInfo):
            raise UserError(f"metric geneval: no detections, expected them or a loaded detector '{about.name}'")
        else:
            found = detector.detect(images.prepare(batch.need("images")), meta)
        return [image_verdict(f, m, rules) for f, m in zip(found, meta, strict=True)]

    official = about.name == OFFICIAL_DETECTOR and rules == OFFICIAL
    settings = {
        "detector": about.name,
        "rules": rules.describe(),
        "rules_implementation": version_of("instella-ray"),
        "images": images.describe(),
        **about.settings,
    }
    name = "geneval" if official else f"geneval_rules_{about.name}"
    return RateMetric(Info(name, about.implementation, about.weights, about.weights_hash, settings), verdicts)


def image_verdict(
    detections: Sequence[Detection], metadata: Mapping[str, Any], rules: Rules = OFFICIAL
) -> SampleVerdict:
    """Evaluate one image; raises UserError for metadata that is not GenEval's."""
    tag = metadata.get("tag")
    if tag not in TASKS:
        raise UserError(f"metric geneval: metadata with tag {tag!r}, expected one of {', '.join(TASKS)}")
    return SampleVerdict(tag, *evaluate(detections, metadata, rules))
