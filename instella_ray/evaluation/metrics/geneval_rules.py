"""GenEval's scoring rules (Ghosh et al. 2023), applied to detections given as plain data.

A prompt's metadata has ``tag`` (the task), ``include`` (clauses that must all hold) and ``exclude`` (clauses of which none
may hold): clauses with ``class``, ``count``, and optionally ``color`` or ``position`` (relation, index of the clause it
refers to). The rules follow the official evaluation, including its order of steps and corner cases:

- a detection counts above a confidence of 0.3, in the task ``counting`` above 0.9; at most 16 per class, by confidence;
- ``include`` considers the ``count`` most confident objects of its class, and requires at least that many;
- colour: all considered objects have the clause's colour, according to a zero-shot classifier;
- position: each considered object has the relation to each object of the other clause, which itself must hold;
- ``exclude``: fewer than ``count`` objects. Counting prompts exclude one more object than they require, so the count is
  exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")


@dataclass(frozen=True)
class Detection:
    """A detected object."""

    label: str
    """Class name in GenEval's spelling (``computer mouse``, ``tv remote``)."""
    score: float
    box: tuple[float, float, float, float]
    """Left, top, right, bottom in pixels; y points down."""
    color: str | None = None
    """One of :data:`COLORS`; None unless a prompt specifies this class's colour."""


@dataclass(frozen=True)
class Rules:
    """Thresholds of the rules; the defaults are the official ones."""

    threshold: float = 0.3
    counting_threshold: float = 0.9
    max_objects: int = 16
    max_overlap: float = 1.0
    """Overlap (IoU) at which the less confident of two objects of a class is dropped; 1 keeps all."""
    position_margin: float = 0.1
    """Offset between two objects' centres that counts as zero, as a fraction of the sum of their sizes."""

    def describe(self) -> dict[str, Any]:
        return asdict(self)


OFFICIAL = Rules()


def select(detections: Sequence[Detection], tag: str, rules: Rules = OFFICIAL) -> dict[str, list[Detection]]:
    """Select the detections that count for task ``tag``, by class, most confident first."""
    least = rules.counting_threshold if tag == "counting" else rules.threshold
    found: dict[str, list[Detection]] = {}
    for detection in sorted(detections, key=lambda d: -d.score):
        if detection.score > least:
            found.setdefault(detection.label, []).append(detection)
    for label, objects in found.items():
        kept: list[Detection] = []
        for candidate in objects[: rules.max_objects]:
            if rules.max_overlap == 1 or all(overlap(k.box, candidate.box) < rules.max_overlap for k in kept):
                kept.append(candidate)
        found[label] = kept
    return found


def overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """Compute the intersection over union of two boxes with inclusive pixel coordinates."""

    def area(box: Sequence[float]) -> float:
        return max(box[2] - box[0] + 1, 0) * max(box[3] - box[1] + 1, 0)

    both = area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
    either = area(a) + area(b) - both
    return both / either if either else 0.0


def relations(a: Detection, b: Detection, margin: float = OFFICIAL.position_margin) -> set[str]:
    """Return the relations of ``a`` to ``b``: any of left of, right of, above, below.

    The offset between centres is reduced on each axis by ``margin`` times the sum of both widths (heights); a relation
    holds if the remainder is more than half of the full offset's length.
    """
    boxes = np.array([a.box, b.box], np.float64).reshape(2, 2, 2)
    centres, sizes = boxes.mean(1), np.abs(boxes[:, 1] - boxes[:, 0])
    offset = centres[0] - centres[1]
    rest = np.maximum(np.abs(offset) - margin * sizes.sum(0), 0) * np.sign(offset)
    if (np.abs(rest) < 1e-3).all():
        return set()
    dx, dy = rest / np.linalg.norm(offset)
    found = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {name for name, holds in found.items() if holds}


def evaluate(detections: Sequence[Detection], metadata: Mapping[str, Any], rules: Rules = OFFICIAL) -> tuple[bool, str]:
    """Return whether the detections satisfy a prompt's metadata, and the reasons if they do not."""
    objects = select(detections, metadata["tag"], rules)
    groups: list[list[Detection] | None] = []
    reasons = []
    for clause in metadata.get("include", ()):
        found = objects.get(clause["class"], [])[: clause["count"]]
        why = _clause(found, clause, groups, rules)
        groups.append(None if why else found)
        reasons += [why] if why else []
    for clause in metadata.get("exclude", ()):
        number = len(objects.get(clause["class"], []))
        if number >= clause["count"]:
            reasons.append(f"expected {clause['class']}<{clause['count']}, found {number}")
    return not reasons, "; ".join(reasons)


def _clause(
    found: list[Detection], clause: Mapping[str, Any], groups: list[list[Detection] | None], rules: Rules
) -> str:
    """Return the reason why the clause does not hold for its objects; empty if it holds."""
    name, count = clause["class"], clause["count"]
    if len(found) < count:
        return f"expected {name}>={count}, found {len(found)}"
    color = clause.get("color")
    if color is not None:
        right = sum(d.color == color for d in found)
        if right < count:
            seen = ", ".join(str(d.color) for d in found)
            return f"expected {color} {name}>={count}, found {right} ({seen})"
    if clause.get("position"):
        relation, target = clause["position"]
        others = groups[target]
        if others is None:
            return f"no target for {name} to be {relation}"
        for one in found:
            for other in others:
                seen_so = relations(one, other, rules.position_margin)
                if relation not in seen_so:
                    return f"expected {name} {relation} target, found {' and '.join(sorted(seen_so)) or 'none'}"
    return ""
