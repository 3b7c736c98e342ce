"""Drawing of sheets: rows of images of one size, with headings above them and labels under them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

TILE = 128
"""Side in pixels that small images are enlarged to at least."""
MARGIN = 6
"""Pixels between images, and around texts."""
LABEL_LINES = 4
"""Lines of a label; a longer one is cut."""
PAPER, INK = (255, 255, 255), (40, 40, 40)
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


class Sheet:
    """Drawing that grows downwards; images keep their pixels, small ones are enlarged by a whole factor."""

    def __init__(self, columns: int, height: int, width: int) -> None:
        """``height`` and ``width`` are those of all images."""
        self.factor = max(1, -(-TILE // width))
        self.size = (height * self.factor, width * self.factor)
        """Height and width of an image as it is drawn."""
        self.lefts = left_edges(columns, self.size[1])
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
        """Place a row of images, uint8 ``[N, height, width, 3]``, at most one for each column."""
        for left, image in zip(self.lefts, images, strict=False):
            enlarged = image.repeat(self.factor, axis=0).repeat(self.factor, axis=1)
            self.pasted.append((Image.fromarray(enlarged), (left, self.height)))
        self.height += self.size[0] + MARGIN

    def labels(self, labels: Sequence[str]) -> None:
        """Write a text under each image of the row above."""
        wrapped = [wrap(label or "(no prompt)", self.font, self.size[1]) for label in labels]
        for left, lines in zip(self.lefts, wrapped, strict=False):
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


def left_edges(columns: int, width: int) -> list[int]:
    """Return where images of ``width`` pixels begin in a row."""
    return [MARGIN + i * (width + MARGIN) for i in range(columns)]


def draw_sheet(images: np.ndarray, labels: Sequence[str], columns: int) -> np.ndarray:
    """Draw images, uint8 ``[N, H, W, 3]``, in rows of ``columns``, each with its label; returns uint8 ``[H, W, 3]``."""
    columns = min(columns, len(images))
    sheet = Sheet(columns, *images.shape[1:3])
    for start in range(0, len(images), columns):
        sheet.images(images[start : start + columns])
        sheet.labels(labels[start : start + columns])
    return sheet.drawn()


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
