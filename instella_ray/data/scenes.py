"""``scenes``: a procedural dataset of captioned images with GenEval's six categories, for demos and end-to-end tests.

Coloured shapes on a light background, with exact captions. Every image is a function of (seed, index), anti-aliased at
any size, and can be checked by :mod:`.scene_score`.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from ..errors import UserError

CATEGORIES = ("single_object", "two_objects", "counting", "colors", "color_attribution", "position")
SHAPES = ("circle", "square", "triangle", "cross")
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 39, 40),
    "yellow": (240, 196, 25),
    "green": (40, 160, 70),
    "blue": (40, 90, 215),
    "purple": (150, 60, 180),
    "black": (30, 30, 30),
}
NUMBERS = {"two": 2, "three": 3, "four": 4}
RELATIONS = ("left of", "right of", "above", "below")

TURNS = {"counting": 2, "color_attribution": 3, "position": 4}
"""Scenes of a category per round of the dataset (others: 1). These categories have most of the distinct captions, or
relate words to positions and numbers, which a generator needs many more examples to learn than names of shapes."""

GRID, JITTER, RADII = 2, 0.01, (0.185, 0.2)
"""Objects lie in cells of a GRID x GRID grid, off centre by up to JITTER, with a radius in RADII (image side = 1)."""


@dataclass(frozen=True)
class SceneObject:
    """Coloured shape; centre and radius in units of the image side, y downwards."""

    shape: str
    color: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Expectation:
    """Content of a caption: ``objects`` as (shape, colour or None) pairs, a count, and a relation between two objects."""

    category: str
    objects: tuple[tuple[str, str | None], ...]
    count: int = 1
    relation: str | None = None

    @property
    def caption(self) -> str:
        """Caption in GenEval's wording."""
        if self.category == "counting":
            number = next(word for word, n in NUMBERS.items() if n == self.count)
            return f"a photo of {number} {_plural(self.objects[0][0])}"
        names = [f"a {color} {shape}" if color else f"a {shape}" for shape, color in self.objects]
        joint = f" {self.relation} " if self.relation else " and "
        return f"a photo of {joint.join(names)}"


@dataclass(frozen=True)
class Scene:
    """Description of an image: its caption's content, objects and background."""

    expect: Expectation
    objects: tuple[SceneObject, ...]
    background: int
    """Grey level of the plain background, 0 to 255."""

    @property
    def caption(self) -> str:
        return self.expect.caption

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "caption": self.caption}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Scene:
        data = json.loads(text)
        expect = data["expect"]
        expect["objects"] = tuple((shape, color) for shape, color in expect["objects"])
        return cls(Expectation(**expect), tuple(SceneObject(**o) for o in data["objects"]), data["background"])


def sample_expectation(rng: np.random.Generator, category: str) -> Expectation:
    """Sample a random expectation of ``category``; UserError for an unknown category."""
    first, second = (SHAPES[i] for i in rng.permutation(len(SHAPES))[:2])
    color, other = (list(COLORS)[i] for i in rng.permutation(len(COLORS))[:2])
    if category == "single_object":
        return Expectation(category, ((first, None),))
    if category == "two_objects":
        return Expectation(category, ((first, None), (second, None)))
    if category == "counting":
        return Expectation(category, ((first, None),), count=int(rng.integers(2, 5)))
    if category == "colors":
        return Expectation(category, ((first, color),))
    if category == "color_attribution":
        return Expectation(category, ((first, color), (second, other)))
    if category == "position":
        relation = RELATIONS[rng.integers(len(RELATIONS))]
        return Expectation(category, ((first, None), (second, None)), relation=relation)
    raise UserError(f"scene category '{category}': expected one of {', '.join(CATEGORIES)}")


def sample_scene(rng: np.random.Generator, category: str | None = None) -> Scene:
    """Sample a random scene of ``category`` (None: any) that shows exactly the objects of its caption."""
    return scene_of(rng, sample_expectation(rng, category or CATEGORIES[rng.integers(len(CATEGORIES))]))


def scene_of(rng: np.random.Generator, expect: Expectation) -> Scene:
    """Sample a random scene that shows exactly what ``expect`` says."""
    named = expect.objects * expect.count
    if expect.relation:
        cells = _related_cells(rng, expect.relation)
    else:
        cells = [divmod(int(c), GRID) for c in rng.permutation(GRID * GRID)[: len(named)]]
    free = [list(COLORS)[i] for i in rng.permutation(len(COLORS))]
    objects = []
    for i, ((shape, color), (row, column)) in enumerate(zip(named, cells, strict=True)):
        dx, dy = rng.uniform(-JITTER, JITTER, 2)
        x, y = (column + 0.5) / GRID + dx, (row + 0.5) / GRID + dy
        # Where the caption gives no colour, counted objects share one, and others differ.
        chosen = color or free[0 if expect.category == "counting" else i]
        objects.append(SceneObject(shape, chosen, round(x, 4), round(y, 4), round(rng.uniform(*RADII), 4)))
    return Scene(expect, tuple(objects), int(rng.integers(232, 243)))


def coverage(shape: str, x: np.ndarray, y: np.ndarray, radius: float, pixel: float) -> np.ndarray:
    """Return the share of each pixel (width ``pixel``) that ``shape`` covers, at offsets x, y from its centre: its
    signed distance field, clipped to one pixel."""
    ax, ay = np.abs(x), np.abs(y)
    if shape == "circle":
        distance = np.hypot(x, y) - 0.88 * radius
    elif shape == "square":
        distance = np.maximum(ax, ay) - 0.97 * radius
    elif shape == "triangle":
        distance = np.maximum(y - 0.75 * radius, 0.864 * ax - 0.504 * (y + 1.05 * radius))
    else:
        long, short = radius, 0.32 * radius
        distance = np.minimum(np.maximum(ax - long, ay - short), np.maximum(ax - short, ay - long))
    return np.clip(0.5 - distance / pixel, 0, 1)


def render(scene: Scene, size: int) -> np.ndarray:
    """Render a scene as an anti-aliased image, uint8 ``[size, size, 3]``."""
    canvas = np.full((size, size, 3), float(scene.background))
    centres = (np.arange(size) + 0.5) / size
    for item in scene.objects:
        reach = 1.1 * item.radius + 1 / size
        columns = np.flatnonzero(np.abs(centres - item.x) <= reach)
        rows = np.flatnonzero(np.abs(centres - item.y) <= reach)
        x, y = centres[columns][None] - item.x, centres[rows][:, None] - item.y
        alpha = coverage(item.shape, x, y, item.radius, 1 / size)[..., None]
        patch = canvas[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        patch += alpha * (np.array(COLORS[item.color]) - patch)
    return canvas.round().astype(np.uint8)


def scene_at(seed: int, index: int) -> Scene:
    """Return scene ``index`` of the dataset of ``seed``; categories alternate, some several times per round (TURNS)."""
    return sample_scene(np.random.default_rng([seed, index]), _ROUND[index % len(_ROUND)])


_ROUND = [category for category in CATEGORIES for _ in range(TURNS.get(category, 1))]


def scene_rows(count: int, seed: int, size: int) -> Iterator[tuple[str, bytes, str, dict[str, Any]]]:
    """Yield ``count`` samples as (key, PNG bytes, caption, metadata), as :mod:`.formats.shards` writes them."""
    for index in range(count):
        scene = scene_at(seed, index)
        buffer = io.BytesIO()
        Image.fromarray(render(scene, size)).save(buffer, "PNG", compress_level=1)
        meta = {"width": size, "height": size, "scene": json.loads(scene.to_json())}
        yield f"{seed:04d}{index:08d}", buffer.getvalue(), scene.caption, meta


def scene_prompts(per_category: int, seed: int) -> list[Expectation]:
    """Sample evaluation prompts, ``per_category`` of each category; distinct if the category has that many."""
    prompts: list[Expectation] = []
    for number, category in enumerate(CATEGORIES):
        rng = np.random.default_rng([seed, number, 1])
        pool = list(dict.fromkeys(sample_expectation(rng, category) for _ in range(20 * per_category)))
        prompts += [pool[i % len(pool)] for i in range(per_category)]
    return prompts


def parse_caption(caption: str) -> Expectation:
    """Parse a caption of this dataset into its expectation; UserError for any other text."""
    shape, color = "|".join(SHAPES), "|".join(COLORS)
    noun = rf"an? (?:({color}) )?({shape})"
    text = caption.strip().lower().rstrip(".")
    if match := re.fullmatch(rf"a photo of ({'|'.join(NUMBERS)}) ({'|'.join(map(_plural, SHAPES))})", text):
        singular = next(s for s in SHAPES if _plural(s) == match[2])
        return Expectation("counting", ((singular, None),), count=NUMBERS[match[1]])
    if match := re.fullmatch(rf"a photo of {noun}", text):
        return Expectation("colors" if match[1] else "single_object", ((match[2], match[1]),))
    if match := re.fullmatch(rf"a photo of {noun} (and|{'|'.join(RELATIONS)}) {noun}", text):
        pair = Expectation("two_objects", ((match[2], match[1]), (match[5], match[4])))
        if match[3] != "and":
            return replace(pair, category="position", relation=match[3])
        return replace(pair, category="color_attribution") if match[1] and match[4] else pair
    raise UserError(f"caption '{caption}': not a scenes caption, for example 'a photo of a red circle'")


def _related_cells(rng: np.random.Generator, relation: str) -> list[tuple[int, int]]:
    low, high = sorted(int(i) for i in rng.permutation(GRID)[:2])
    line = int(rng.integers(GRID))
    cells = [(line, low), (line, high)] if relation in ("left of", "right of") else [(low, line), (high, line)]
    return cells if relation in ("left of", "above") else cells[::-1]


def _plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")
