"""Reader of units of work as metric batches: decodes codes and reconstructs original images with the tokenizer."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image

from ..data.formats.images import UndecodableError, decode_rgb, fit_square, to_pixels, to_tensor
from ..data.formats.metadata import json_object
from ..data.formats.texts import CAPTION_NAMES
from ..models.bit import BIT
from ..models.checkpoint import load_expected
from .metrics.base import Batch
from .units import Unit, read_images_unit, read_samples_unit

T = TypeVar("T")
HARMLESS = {"no_caption", "bad_caption", "bad_metadata"}
"""Problems of a row that are ignored if captions are not needed."""


@dataclass(frozen=True)
class ReaderOptions:
    """Options of decoding, resizing and batching."""

    tokenizer: str | None
    """Model folder of the BIT; None leaves samples as codes and images without reconstruction."""
    size: int
    """Pixels a side of the measured images; of images without a tokenizer, where a metric asks for no size of its own."""
    batch_size: int
    captions: bool = False
    """Whether captions are required: images without one are quarantined."""
    caption_keys: Sequence[str] = CAPTION_NAMES
    """Names of captions in KEY.json and of columns with captions, in order of preference."""


@dataclass(frozen=True)
class LabelledBatch:
    """A batch with the category and source hash of each row."""

    batch: Batch
    """Images without a tokenizer are as they are in their files, of any sizes."""
    categories: list[str | None]
    originals: list[str]
    """Hash of each source image file; '' for samples."""
    fit: int | None = None
    """Size of images without a tokenizer for metrics that do not resize them; None: they have it already."""

    def at(self, size: int | None) -> Batch:
        """Return the batch for a metric that resizes images to ``size``; None: it takes them as they are measured."""
        return self.batch if size is not None or self.fit is None else self._fitted

    @cached_property
    def _fitted(self) -> Batch:
        assert self.fit is not None and self.batch.images is not None
        images = [fit_square(Image.fromarray(image), self.fit) for image in self.batch.images]
        return replace(self.batch, images=np.stack(images))


@dataclass
class Reader:
    """Reader of units of work; ``quarantined`` counts unreadable images by reason."""

    options: ReaderOptions
    device: torch.device
    quarantined: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        folder = self.options.tokenizer
        self.bit = load_expected(folder, BIT, device=self.device) if folder else None

    def batches(self, unit: Unit, only: Collection[str] | None = None) -> Iterator[LabelledBatch]:
        """Yield the unit's rows in order, or those with ids in ``only``; batch boundaries are deterministic."""
        return self._samples(unit, only) if unit.kind == "samples" else self._images(unit, only)

    def _samples(self, unit: Unit, only: Collection[str] | None) -> Iterator[LabelledBatch]:
        block = read_samples_unit(unit)
        chosen = [row for row, name in enumerate(block.ids) if only is None or name in only]
        for rows in _batches(chosen, self.options.batch_size):
            codes = block.codes[rows]
            ids, prompts, groups = (
                [column[row] for row in rows] for column in (block.ids, block.prompts, block.prompt_ids)
            )
            meta, categories = [block.meta[row] for row in rows], [block.categories[row] for row in rows]
            images = self._decode(codes) if self.bit else None
            yield LabelledBatch(Batch(ids, images, None, prompts, codes, groups, meta), categories, [""] * len(ids))

    def _images(self, unit: Unit, only: Collection[str] | None) -> Iterator[LabelledBatch]:
        for rows in _batches(self._originals(unit, only), self.options.batch_size):
            ids, captions, images, hashes, meta = zip(*rows, strict=True)
            prompts = [caption or "" for caption in captions]
            if self.bit is None:
                pixels, fit = [np.asarray(image) for image in images], self.options.size
                batch = Batch(ids, pixels, prompts=prompts, meta=meta)
            else:
                originals, fit = np.stack([fit_square(image, self.options.size) for image in images]), None
                codes = self.bit.encode(to_tensor(originals).to(self.device)).cpu().numpy()
                batch = Batch(ids, self._decode(codes), originals, prompts, codes, meta=meta)
            yield LabelledBatch(batch, [None] * len(ids), list(hashes), fit)

    def _originals(
        self, unit: Unit, only: Collection[str] | None
    ) -> Iterator[tuple[str, str | None, Image.Image, str, dict[str, Any]]]:
        for row in read_images_unit(unit, self.options.caption_keys):
            if only is not None and row["id"] not in only:
                continue
            try:
                image = self._original(row)
            except UndecodableError as error:
                self.quarantined[str(error)] += 1
                continue
            digest = hashlib.sha256(row["image"]).hexdigest()[:16]
            yield row["id"], row["caption"], image, digest, json_object(row["meta"]) or {}

    def _original(self, row: dict[str, Any]) -> Image.Image:
        harmless = () if self.options.captions else HARMLESS
        if row["image"] is None or (row["problem"] and row["problem"] not in harmless):
            raise UndecodableError(row["problem"] or "no_image")
        if self.options.captions and not row["caption"]:
            raise UndecodableError("no_caption")
        return decode_rgb(row["image"])

    def _decode(self, codes: np.ndarray) -> np.ndarray:
        assert self.bit is not None
        size = self.options.size
        return to_pixels(self.bit.decode(torch.from_numpy(codes).to(self.device), size, size))


def _batches(rows: Iterable[T], size: int) -> Iterator[list[T]]:
    rest = iter(rows)
    while part := list(islice(rest, size)):
        yield part
