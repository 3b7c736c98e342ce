"""Splits by name: whole concepts held out, pairs of style and concept, single drawings; copies never on both sides.

Each drawing's split follows from hashes of its names alone, so that it is the same whatever other sets are built with it.
Two rules look at the others, and leave drawings out: those of a held-out pair, unless training shows its concept in another
style and its style with another concept; and training drawings that are near duplicates of held-out ones.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, Protocol

import numpy as np
from pydantic import Field

from ...config import Config
from ..curation.dedup import Fingerprints, near_pairs
from ..curation.filters.duplicates import DuplicateConfig
from ..formats.parts import DROPPED

Split = Literal["train", "held-out-concepts", "held-out-pairs", "held-out"]
TRAIN: Split = "train"
PAIRS: Split = "held-out-pairs"
HELD_OUT: Split = "held-out"
SPLITS: tuple[Split, ...] = (TRAIN, "held-out-concepts", PAIRS, HELD_OUT)
COPY, ALONE = f"{DROPPED}:copy_of_held_out", f"{DROPPED}:pair_without_its_concept"
"""Verdicts on a training drawing that is a near duplicate of a held-out one, and on a held-out pair whose concept or style
has no training drawing left."""


class HoldOutConfig(Config):
    """Shares of names to hold out."""

    concepts: float = Field(0.03, ge=0, lt=1)
    """Share of concepts of which all drawings are held out, in ``held-out-concepts``."""
    pairs: float = Field(0.05, ge=0, lt=1)
    """Share of the pairs of style and concept that are held out, in ``held-out-pairs``."""
    drawings: float = Field(0.03, ge=0, lt=1)
    """Share of the other drawings that are held out, in ``held-out``."""


class Named(Protocol):
    """What has the names that splits follow from."""

    @property
    def style(self) -> str: ...
    @property
    def concept(self) -> str: ...
    @property
    def key(self) -> str: ...


class StyledConcept(NamedTuple):
    """Pair of style and concept."""

    style: str
    concept: str


def split_by_names(drawing: Named, shares: HoldOutConfig) -> Split:
    """Return the split of a drawing by its names alone; capital letters make no other concept."""
    place = _place(drawing)
    if _hash("concept", place.concept) < shares.concepts:
        return "held-out-concepts"
    if _hash("pair", *place) < shares.pairs:
        return PAIRS
    if _hash("drawing", *place, drawing.key) < shares.drawings:
        return HELD_OUT
    return TRAIN


def split_all(
    drawings: Sequence[Named], prints: Fingerprints, shares: HoldOutConfig, same: DuplicateConfig
) -> list[str]:
    """Return the split of each drawing, or the verdict with which it is left out (:data:`COPY`, :data:`ALONE`)."""
    places = [_place(drawing) for drawing in drawings]
    found: list[str] = [split_by_names(drawing, shares) for drawing in drawings]
    for number in _copies([split != TRAIN for split in found], prints, same):
        found[number] = COPY
    shown = _Shown(place for place, split in zip(places, found, strict=True) if split == TRAIN)
    return [
        ALONE if split == PAIRS and place not in shown else split for place, split in zip(places, found, strict=True)
    ]


def _place(drawing: Named) -> StyledConcept:
    return StyledConcept(drawing.style, drawing.concept.casefold())


class _Shown:
    """Pairs of which the given ones show the concept in another style, and the style with another concept."""

    def __init__(self, places: Iterable[StyledConcept]) -> None:
        self.pairs = Counter(set(places))
        self.concepts = Counter(place.concept for place in self.pairs)
        self.styles = Counter(place.style for place in self.pairs)

    def __contains__(self, place: StyledConcept) -> bool:
        itself = self.pairs[place]
        return self.concepts[place.concept] > itself and self.styles[place.style] > itself


def _copies(held: Sequence[bool], prints: Fingerprints, same: DuplicateConfig) -> list[int]:
    """Return the indices of drawings not ``held`` that are exact or near duplicates of one that is."""
    hashes, group = np.unique(prints.near, return_inverse=True)
    members: dict[int, list[int]] = defaultdict(list)
    for number, of in enumerate(group.tolist()):
        members[of].append(number)
    pairs = [(of, of) for of in members]
    if same.max_distance is not None:
        pairs += near_pairs(hashes, same.max_distance)
    copies = set[int]()
    for a, b in pairs:
        for one in members[a]:
            for other in members[b]:
                training, kept = (one, other) if held[other] else (other, one)
                if held[training] or not held[kept]:
                    continue
                if prints.exact[one] == prints.exact[other] or (
                    same.max_distance is not None and _close(prints.colors, one, other, same.max_color_difference)
                ):
                    copies.add(training)
    return sorted(copies)


def _close(colors: np.ndarray, one: int, other: int, limit: int) -> bool:
    return bool(np.abs(colors[one].astype(np.int16) - colors[other]).max() <= limit)


def _hash(*names: str) -> float:
    """Return a number in [0, 1) that is uniform over ``names``."""
    digest = hashlib.sha256("\0".join(names).encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2**56
