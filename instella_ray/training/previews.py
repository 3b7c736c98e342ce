"""Preview images of a run: a labelled strip for each preview, and a grid of all steps so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .. import storage
from ..data.formats.images import METADATA_LIMIT, decode_rgb, encode_image, read_metadata

FOLDER = "previews"
ORIGINALS, AVERAGED, RAW = "originals", "EMA", "raw weights"
"""Names of a preview's rows: what was to be reconstructed, and what the two sets of weights make."""
TILE = 128
"""Side in pixels that small images of a strip are enlarged to at least, and those of a grid reduced to at most."""
MARGIN = 6
"""Pixels between images, and around texts."""
LABEL_LINES = 4
"""Lines of a label; a longer one is cut."""
SHOWN_STEPS = 24
"""Largest number of steps in a grid: of more, these are spread evenly, the first and the last among them."""
PAPER, INK = (255, 255, 255), (40, 40, 40)
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


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


def _strip(preview: TrainingPreview) -> tuple[_Sheet, dict[str, int]]:
    """Lay out the rows of a strip; returns the sheet, and where the images of each row begin."""
    sheet, tops = _Sheet(preview, _factor(preview)), {}
    for name, images in preview.rows.items():
        sheet.text(name)
        tops[name] = sheet.height
        sheet.images(images)
    return sheet, tops


def draw_grid(previews: Mapping[int, TrainingPreview]) -> np.ndarray:
    """Draw previews by step, reduced, as a grid with a row for each step and the labels under them.

    Previews of other labels than the last one's are left out: their prompts have been changed since.
    """
    steps = alike(previews)
    last = previews[steps[-1]]
    sheet = _Sheet(last, _factor(last))
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
                for left in _lefts(len(facts["labels"]), width)
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


class _Sheet:
    """A drawing that grows downwards."""

    def __init__(self, preview: TrainingPreview, factor: int) -> None:
        images = next(iter(preview.rows.values()))
        self.factor = factor
        self.size = (images.shape[1] * factor, images.shape[2] * factor)
        """Height and width of an image as it is drawn."""
        self.lefts = _lefts(len(images), self.size[1])
        self.font = _font(max(13, self.size[1] // 32))
        self.line = sum(self.font.getmetrics()) if isinstance(self.font, ImageFont.FreeTypeFont) else 14
        self.height = MARGIN
        self.pasted: list[tuple[Image.Image, tuple[int, int]]] = []
        self.written: list[tuple[tuple[int, int], str]] = []

    def text(self, line: str) -> None:
        """Write a heading for the images below."""
        self.written.append(((MARGIN, self.height), line))
        self.height += self.line + MARGIN // 2

    def images(self, images: np.ndarray) -> None:
        """Place a row of images."""
        for left, image in zip(self.lefts, images, strict=True):
            enlarged = image.repeat(self.factor, axis=0).repeat(self.factor, axis=1)
            self.pasted.append((Image.fromarray(enlarged), (left, self.height)))
        self.height += self.size[0] + MARGIN

    def labels(self, labels: Sequence[str]) -> None:
        """Write a text under each column."""
        wrapped = [wrap(label or "(no prompt)", self.font, self.size[1]) for label in labels]
        for left, lines in zip(self.lefts, wrapped, strict=True):
            self.written += [((left, self.height + i * self.line), line) for i, line in enumerate(lines)]
        self.height += self.line * max(map(len, wrapped)) + MARGIN

    def drawn(self) -> np.ndarray:
        """Return the drawing, uint8 ``[H, W, 3]``."""
        sheet = Image.new("RGB", (self.lefts[-1] + self.size[1] + MARGIN, self.height), PAPER)
        for image, place in self.pasted:
            sheet.paste(image, place)
        draw = ImageDraw.Draw(sheet)
        for place, line in self.written:
            draw.text(place, line, fill=INK, font=self.font)
        return np.asarray(sheet)


def wrap(text: str, font: Font, width: int, lines: int = LABEL_LINES) -> list[str]:
    """Break ``text`` into at most ``lines`` lines of ``width`` pixels, between words where they fit; … marks a cut."""
    found: list[str] = []
    rest = " ".join(text.split())
    while rest and len(found) < lines:
        end = _fitting(rest, font, width)
        if end < len(rest) and len(found) == lines - 1:
            end = _fitting(rest, font, width - int(font.getlength("…")))
            return [*found, rest[:end].rstrip() + "…"]
        if end < len(rest) and (space := rest.rfind(" ", 0, end + 1)) > 0:
            end = space
        found.append(rest[:end])
        rest = rest[end:].lstrip()
    return found


def _fitting(text: str, font: Font, width: int) -> int:
    """Return how many characters of ``text`` fit into ``width`` pixels, at least one."""
    low, high = 1, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if font.getlength(text[:middle]) <= width else (low, middle - 1)
    return low


@lru_cache
def _font(size: int) -> Font:
    """Return DejaVu Sans, which has most scripts, if the system has it, else Pillow's own font."""
    try:
        return ImageFont.truetype("DejaVuSans.ttf", size)
    except OSError:
        return ImageFont.load_default(size)


def _factor(preview: TrainingPreview) -> int:
    return max(1, -(-TILE // next(iter(preview.rows.values())).shape[2]))


def _lefts(count: int, width: int) -> list[int]:
    return [MARGIN + i * (width + MARGIN) for i in range(count)]


def _reduced(image: np.ndarray) -> np.ndarray:
    if max(image.shape[:2]) <= TILE:
        return image
    small = Image.fromarray(image)
    small.thumbnail((TILE, TILE), Image.Resampling.LANCZOS)
    return np.asarray(small)


def _step(path: str) -> int:
    return int(path.rpartition("/step-")[2].removesuffix(".png"))
