"""Scene score: detects the objects in an image of :mod:`.scenes`, and checks them against its caption.

Like GenEval it checks a caption against detected objects; unlike GenEval its detector knows only the shapes and colours
of scenes. It has a different name so that the two are not confused.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from .scenes import CATEGORIES, COLORS, RADII, SHAPES, Expectation, coverage

MIN_CONTRAST = 40.0
"""Minimum difference of an object from the background (grey levels, 0 to 255)."""
MIN_AREA = 0.35 * np.pi * RADII[0] ** 2 * 0.5
"""Minimum area of an object (share of the image); smaller regions are ignored as noise."""
MIN_FIT = 0.6
"""Minimum overlap (intersection over union) with the template of the best-matching shape."""
MARGIN = 0.1
"""Minimum distance between centres for a spatial relation to hold (image side = 1)."""

_EXTENT = {  # bounds of a shape with radius 1: left, right, top, bottom
    "circle": (-0.88, 0.88, -0.88, 0.88),
    "square": (-0.97, 0.97, -0.97, 0.97),
    "triangle": (-1.05, 1.05, -1.05, 0.75),
    "cross": (-1.0, 1.0, -1.0, 1.0),
}


@dataclass(frozen=True)
class Detected:
    """Detected object; centre in units of the image side, y downwards."""

    shape: str
    color: str
    x: float
    y: float
    fit: float
    """Overlap (intersection over union) with the template of the shape, 0 to 1."""


@dataclass(frozen=True)
class Verdict:
    """Result of checking an image against its caption."""

    correct: bool
    reason: str
    """Why the image is wrong; empty if it is correct."""
    detected: tuple[Detected, ...]


def detect(image: np.ndarray) -> list[Detected]:
    """Detect objects in an image, uint8 ``[H, W, 3]``; tolerates the blur and noise of a lossy reconstruction."""
    pixels = image.astype(np.float32)
    # The border gives the background: objects never touch it, but may cover most of the rest.
    ring = np.concatenate((pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]))
    background = np.median(ring, axis=0)
    contrast = np.abs(pixels - background).max(-1)
    height, width = contrast.shape
    labels, _ = ndimage.label(contrast > MIN_CONTRAST)
    found = []
    for number, box in enumerate(ndimage.find_objects(labels), start=1):
        own = np.where(labels[box] == number, contrast[box], 0)
        # Normalised by the object's peak contrast, so that strong and weak colours have their edges at the same position.
        alpha = np.clip(own / max(np.percentile(own[own > 0], 85), 1), 0, 1)
        parts, _ = ndimage.label(alpha > 0.5)
        for part, inner in enumerate(ndimage.find_objects(parts), start=1):
            mask = parts[inner] == part
            if mask.sum() < MIN_AREA * height * width:
                continue
            shape, fit = _best_shape(np.where(mask, alpha[inner], 0))
            if fit < MIN_FIT:
                continue
            core = mask & (alpha[inner] > 0.85)
            color = _nearest_color(np.median(pixels[box][inner][core if core.any() else mask], axis=0))
            y = (box[0].start + (inner[0].start + inner[0].stop) / 2) / height
            x = (box[1].start + (inner[1].start + inner[1].stop) / 2) / width
            found.append(Detected(shape, color, x, y, fit))
    return found


def score(image: np.ndarray, expect: Expectation) -> Verdict:
    """Check an image, uint8 ``[H, W, 3]``, against an expectation, with GenEval's semantics: all named objects must be
    present; only counting requires an exact number."""
    seen = detect(image)

    def matching(shape: str, color: str | None) -> list[Detected]:
        return [d for d in seen if d.shape == shape and color in (None, d.color)]

    groups = [matching(shape, color) for shape, color in expect.objects]
    reason = ""
    if expect.category == "counting":
        if len(groups[0]) != expect.count:
            reason = f"{len(groups[0])} of {expect.objects[0][0]}, expected {expect.count}"
    elif not all(groups):
        missing = next(named for named, group in zip(expect.objects, groups, strict=True) if not group)
        reason = f"no {' '.join(filter(None, missing[::-1]))}"
    elif expect.relation and not any(_holds(expect.relation, a, b) for a in groups[0] for b in groups[1]):
        reason = f"not {expect.relation}"
    return Verdict(not reason, reason, tuple(seen))


def score_images(expected: Iterable[Expectation], images: Iterable[np.ndarray]) -> dict[str, float]:
    """Return :func:`score_table` of ``images``, uint8 ``[H, W, 3]`` each, of what is expected in them."""
    pairs = zip(expected, images, strict=True)
    return score_table((expect.category, score(image, expect).correct) for expect, image in pairs)


def score_table(results: Iterable[tuple[str, bool]]) -> dict[str, float]:
    """Aggregate (category, correct) pairs into the share of correct images per category, and ``overall``, the mean over
    the categories."""
    by_category: dict[str, list[bool]] = {}
    for category, correct in results:
        by_category.setdefault(category, []).append(correct)
    table = {name: float(np.mean(by_category[name])) for name in CATEGORIES if name in by_category}
    return {**table, "overall": float(np.mean(list(table.values()))) if table else 0.0}


def _best_shape(alpha: np.ndarray) -> tuple[str, float]:
    height, width = alpha.shape
    fits = {}
    for shape in SHAPES:
        left, right, top, bottom = _EXTENT[shape]
        radius = (width / (right - left) + height / (bottom - top)) / 2
        x = np.arange(width) + 0.5 - width / 2 + radius * (left + right) / 2
        y = np.arange(height) + 0.5 - height / 2 + radius * (top + bottom) / 2
        template = coverage(shape, x[None], y[:, None], radius, 1.0)
        fits[shape] = float(np.minimum(alpha, template).sum() / np.maximum(alpha, template).sum())
    best = max(fits, key=fits.__getitem__)
    return best, fits[best]


def _nearest_color(rgb: np.ndarray) -> str:
    return min(COLORS, key=lambda name: float(((rgb - np.array(COLORS[name])) ** 2).sum()))


def _holds(relation: str, a: Detected, b: Detected) -> bool:
    dx, dy = b.x - a.x, b.y - a.y
    along, across = (dx, dy) if relation in ("left of", "right of") else (dy, dx)
    if relation in ("right of", "below"):
        along = -along
    return along > MARGIN and along > abs(across)
