"""Preview images of a run: a labelled strip for each preview, and a grid of all steps so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from .. import storage
from ..data.formats.images import METADATA_LIMIT, decode_rgb, encode_image, read_metadata
from ..sheet import TILE, Sheet, left_edges

FOLDER = "previews"
ORIGINALS, AVERAGED, RAW = "originals", "EMA", "raw weights"
"""Names of a preview's rows: what was to be reconstructed, and what the two sets of weights make."""
SHOWN_STEPS = 24
"""Largest number of steps in a grid: of more, these are spread evenly, the first and the last among them."""


class PreviewInputs(NamedTuple):
    """What previews are made from."""

    labels: tuple[str, ...]
    """A text for each image: prompt or key."""
    originals: np.ndarray | None = None
    """Images to reconstruct, uint8 ``[N, H, W, 3]``."""


class TrainingPreview(NamedTuple):
    """Images that a run's weights make of the same inputs after some steps."""

    rows: dict[str, np.ndarray]
    """By name of the row: uint8 ``[N, H, W, 3]``, of the same shape in all rows."""
    labels: tuple[str, ...]
    """A text for each of the N columns."""

    def reduced(self) -> TrainingPreview:
        """Return the rows that a grid shows, with images of at most :data:`TILE` pixels a side."""
        shown = (name for name in (ORIGINALS, AVERAGED) if name in self.rows)
        return TrainingPreview(
            {name: np.stack([_reduced(image) for image in self.rows[name]]) for name in shown}, self.labels
        )


def preview_file(run_dir: str, step: int) -> str:
    """Return the file of the preview after ``step`` steps."""
    return storage.join(run_dir, FOLDER, f"step-{step:07d}.png")


def draw_strip(preview: TrainingPreview) -> np.ndarray:
    """Draw a preview, uint8 ``[H, W, 3]``: its named rows one below the other, and the labels under them.

    Images keep their pixels; small ones are enlarged by a whole factor.
    """
    sheet, _ = _strip(preview)
    sheet.labels(preview.labels)
    return sheet.drawn()


def _strip(preview: TrainingPreview) -> tuple[Sheet, dict[str, int]]:
    """Lay out the rows of a strip; returns the sheet, and where the images of each row begin."""
    sheet, tops = _sheet_of(preview), {}
    for name, images in preview.rows.items():
        sheet.text(name)
        tops[name] = sheet.height
        sheet.images(images)
    return sheet, tops


def _sheet_of(preview: TrainingPreview) -> Sheet:
    images = next(iter(preview.rows.values()))
    return Sheet(*images.shape[:3])


def draw_grid(previews: Mapping[int, TrainingPreview]) -> np.ndarray:
    """Draw previews by step, reduced, as a grid with a row for each step and the labels under them.

    Previews of other labels than the last one's are left out: their prompts have been changed since.
    """
    steps = alike(previews)
    last = previews[steps[-1]]
    sheet = _sheet_of(last)
    if ORIGINALS in last.rows:
        sheet.text(ORIGINALS)
        sheet.images(last.rows[ORIGINALS])
    for step in steps:
        sheet.text(f"step {step:,}")
        sheet.images(previews[step].rows[AVERAGED])
    sheet.labels(last.labels)
    return sheet.drawn()


def alike(previews: Mapping[int, TrainingPreview]) -> list[int]:
    """Return the steps to show, at most :data:`SHOWN_STEPS`, whose labels and sizes are those of the last one."""
    last = previews[max(previews)]
    same = [
        step
        for step, preview in previews.items()
        # A preview that was read from its file may have shorter labels.
        if all(map(_same_start, preview.labels, last.labels))
        and len(preview.labels) == len(last.labels)
        and preview.rows[AVERAGED].shape == last.rows[AVERAGED].shape
    ]
    return spread(sorted(same))


def _same_start(a: str, b: str) -> bool:
    return a.startswith(b) or b.startswith(a)


def spread(steps: Sequence[int], count: int = SHOWN_STEPS) -> list[int]:
    """Choose at most ``count`` of the ascending ``steps``, evenly spread, with the first and the last one."""
    if len(steps) <= count:
        return list(steps)
    wanted = np.linspace(steps[0], steps[-1], count)
    nearest = {int(np.abs(np.array(steps) - each).argmin()) for each in wanted}
    return [steps[i] for i in sorted(nearest)]


def encode_preview(preview: TrainingPreview, strip: np.ndarray) -> bytes:
    """Encode a drawn ``strip`` as a PNG that :func:`decode_preview` can read the images of."""
    sheet, tops = _strip(preview)
    # Escaped, a character takes up to 12 bytes.
    longest = (METADATA_LIMIT - 1000) // (12 * len(preview.labels))
    labels = [label[:longest] for label in preview.labels]
    facts = {"labels": labels, "tops": tops, "factor": sheet.factor, "size": sheet.size}
    return encode_image(strip, "png", facts)


def decode_preview(data: bytes) -> TrainingPreview | None:
    """Read a preview from a PNG of :func:`encode_preview`; None if it does not say where its images are."""
    facts: Any = read_metadata(data)
    if not facts or "tops" not in facts:
        return None
    pixels, factor, (height, width) = np.asarray(decode_rgb(data)), facts["factor"], facts["size"]
    rows = {
        name: np.stack(
            [
                pixels[top : top + height, left : left + width][::factor, ::factor]
                for left in left_edges(len(facts["labels"]), width)
            ]
        )
        for name, top in facts["tops"].items()
    }
    return TrainingPreview(rows, tuple(facts["labels"]))


def read_previews(run_dir: str, until: int) -> dict[int, TrainingPreview]:
    """Read the previews of a run up to step ``until``, reduced; of many, as many as a grid shows."""
    found = {_step(path): path for path in storage.glob(storage.join(run_dir, FOLDER, "step-*.png"))}
    steps = spread(sorted(step for step in found if step <= until))
    read = {step: decode_preview(storage.read_bytes(found[step])) for step in steps}
    return {step: preview.reduced() for step, preview in read.items() if preview is not None}


def joined(images: np.ndarray) -> np.ndarray:
    """Place images ``[N, H, W, 3]`` side by side."""
    return np.concatenate(list(images), axis=1)


def _reduced(image: np.ndarray) -> np.ndarray:
    if max(image.shape[:2]) <= TILE:
        return image
    small = Image.fromarray(image)
    small.thumbnail((TILE, TILE), Image.Resampling.LANCZOS)
    return np.asarray(small)


def _step(path: str) -> int:
    return int(path.rpartition("/step-")[2].removesuffix(".png"))
