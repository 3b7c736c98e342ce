"""Training batches of curated images, with or without captions, by random access; no torch (see :mod:`.loader`)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from functools import lru_cache
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from PIL import Image

from ... import logs, storage
from ...errors import UserError
from ...lru import LRUCache
from ..formats.images import UndecodableError, crop_square, decode_rgb, fit_square, shrink_shorter_edge
from ..formats.names import find_files, find_shards
from ..formats.patterns import Pattern, pattern_text
from ..formats.sources import require_captions
from ..formats.tar_index import read_index, read_ranges
from ..formats.tar_source import read_samples
from ..formats.texts import CAPTION_NAMES
from .loader import CAPTIONS, CaptionChoice
from .order import EpochOrder, FileOrder, sample_uniforms, split_epochs

DECODERS = 4
"""Default number of threads that decode and resize images; Pillow releases the GIL meanwhile."""
PROGRESS_BAR_TARS = 20
"""Minimum number of tars to count for which a progress bar is shown."""


class ImageBatch(NamedTuple):
    """Training batch of a tokenizer."""

    pixels: dict[int, np.ndarray]
    """Size -> uint8 ``[B, size, size, 3]``, of the same crops at each size that was asked for."""
    keys: list[str]


class ImageData:
    """Dataset of images, each cropped to a square at a random position along the longer side, at one or more sizes.

    Lists of shards of curated folders contain the numbers of images; other tars are read once to count them. A batch
    reads only the bytes of its images, by the indexes of the tars (:mod:`..formats.tar_index`). Decoded images are cached
    up to ``cache_bytes``: a small dataset is decoded once, a large one on every access. Samples of ``window`` tars are
    shuffled together.
    """

    def __init__(
        self,
        pattern: Pattern,
        sizes: Sequence[int],
        seed: int,
        *,
        captions: bool = False,
        cache_bytes: int = 2 << 30,
        window: int = 256,
        decoders: int = DECODERS,
    ) -> None:
        """Open the shards of ``pattern``; ``captions`` includes captions in :meth:`column`.

        Crops are made at the largest of ``sizes`` and resized to the others, in ``decoders`` threads.

        Raises UserError if there is no usable image.
        """
        self.sizes, self.largest, self.seed, self.window = tuple(sizes), max(sizes), seed, window
        shards = find_files(pattern)
        self.urls = [shard.url for shard in shards]
        self._indexes: LRUCache[int, pa.Table] = LRUCache(lambda table: table.nbytes, 256 << 20)
        self._captions = captions
        uncounted = sum(shard.rows is None for shard in shards)
        numbered = enumerate(
            logs.progress_bar(shards, desc="counting images", unit="shard", disable=uncounted < PROGRESS_BAR_TARS)
        )
        counts = (self._index(i).num_rows if shard.rows is None else shard.rows for i, shard in numbered)
        self.starts = np.cumsum([0, *counts])
        """Number of the first image of each tar, and of all images."""
        self._pixels: LRUCache[int, tuple[str, np.ndarray]] = LRUCache(lambda item: item[1].nbytes, cache_bytes)
        self._threads = ThreadPoolExecutor(decoders)
        self._reading = Lock()  # of the cache: previews read while the next batches are loaded
        self.order: Callable[[int], EpochOrder] = lru_cache(2)(
            lambda epoch: FileOrder(self.starts, seed, epoch, window)
        )
        if not len(self):
            raise UserError(f"{pattern_text(pattern)}: no usable image in these shards")

    def __len__(self) -> int:
        return int(self.starts[-1])

    def batch(self, epoch: int, samples: np.ndarray, sizes: Collection[int] | None = None) -> ImageBatch:
        """Return the batch of ``samples``, counted from ``epoch``, with the random choices of their epochs.

        Only the given ``sizes`` are made, of those of the dataset; None: all.
        """
        epochs, index = split_epochs(len(self), epoch, samples)
        offsets = sample_uniforms(self.seed, epochs, index)[:, :2]
        with self._reading:
            items = self._pixels.many(index.tolist(), self._decoded)
        pixels = {size: np.empty((len(items), size, size, 3), np.uint8) for size in sizes or self.sizes}

        def crop(number: int) -> None:
            dx, dy = offsets[number]
            square = _square(items[number][1], self.largest, (dx, dy))
            for size, rows in pixels.items():
                rows[number] = _resized(square, size)

        list(self._threads.map(crop, range(len(items))))
        return ImageBatch(pixels, [key for key, _ in items])

    def with_seed(self, seed: int) -> ImageData:
        """Return the same images, with other crops; both share a cache."""
        other = copy(self)
        other.seed = seed
        return other

    def column(self, index: Sequence[int] | np.ndarray, name: str) -> list[str]:
        """Return a column of the indexes of the tars (:data:`..formats.tar_index.SCHEMA`) for the samples at ``index``."""
        return [row[name] for _, row in self._rows(index)]

    def _index(self, shard: int) -> pa.Table:
        return self._indexes.get(shard, lambda: read_index(self.urls[shard], captions=self._captions))

    def _rows(self, numbers: Sequence[int] | np.ndarray) -> list[tuple[int, dict[str, Any]]]:
        """Return (shard number, index row) of each image."""
        shards = (np.searchsorted(self.starts, numbers, side="right") - 1).tolist()
        places = [number - int(self.starts[shard]) for shard, number in zip(shards, numbers, strict=True)]
        found = [self._index(shard).slice(place, 1) for shard, place in zip(shards, places, strict=True)]
        return [(shard, row.to_pylist()[0]) for shard, row in zip(shards, found, strict=True)]

    def _decoded(self, numbers: list[int]) -> list[tuple[str, np.ndarray]]:
        """Read and decode images to (key, uint8 ``[H, W, 3]``), with the shorter edge at most at the largest size.

        Smaller images are enlarged after they are cropped, because a long one would take gigabytes.
        """
        shards, rows = zip(*self._rows(numbers), strict=True)
        urls = [self.urls[shard] for shard in shards]
        files = read_ranges(urls, [row["offset"] for row in rows], [row["bytes"] for row in rows])
        return list(self._threads.map(self._decode, urls, (row["key"] for row in rows), files))

    def _decode(self, url: str, key: str, data: bytes) -> tuple[str, np.ndarray]:
        try:
            image = decode_rgb(data, at_least=2 * self.largest)
        except UndecodableError as error:
            raise UserError(f"{url}: sample {key}: {error}; curate the shards first") from None
        return key, np.asarray(shrink_shorter_edge(image, self.largest))


class CaptionedImageBatch(NamedTuple):
    """Training batch of a generator, before encoding by the tokenizer."""

    pixels: np.ndarray
    """uint8 ``[B, size, size, 3]``."""
    captions: list[str]
    """Captions; empty if dropped for guidance."""
    keys: list[str]
    tokens: list[list[int]] | None = None
    """Token ids of the captions, which the training task adds."""


class CaptionedImageData:
    """Dataset of images cropped as by :class:`ImageData`, with captions chosen as in :class:`.loader.CodesData`."""

    def __init__(
        self, pattern: Pattern, size: int, seed: int, captions: CaptionChoice = CaptionChoice(), **options: Any
    ) -> None:
        """Open the shards of ``pattern``; ``options`` are passed to :class:`ImageData`."""
        self.images = ImageData(pattern, (size,), seed, captions=True, **options)
        self.size, self.seed, self.captions, self.order = size, seed, captions, self.images.order
        self.starts, self.window = self.images.starts, self.images.window

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, epoch: int, samples: np.ndarray) -> CaptionedImageBatch:
        """Return the batch of ``samples``, counted from ``epoch``, with the random choices of their epochs."""
        epochs, index = split_epochs(len(self), epoch, samples)
        chance = sample_uniforms(self.seed, epochs, index)[:, 2:]  # the first two position the crop
        captions = self.captions.choose(chance, *(self.images.column(index, name) for name in CAPTIONS))
        found = self.images.batch(epoch, samples)
        return CaptionedImageBatch(found.pixels[self.size], captions, found.keys)

    def with_seed(self, seed: int) -> CaptionedImageData:
        """Return the same samples, with other crops and captions; both share a cache."""
        other = copy(self)
        other.seed, other.images = seed, self.images.with_seed(seed)
        return other

    def column(self, index: np.ndarray, name: str) -> list[str]:
        """Return a column of the indexes of the tars, as :meth:`ImageData.column`."""
        return self.images.column(index, name)


def require_images(pattern: Pattern, caption_keys: Sequence[str] = CAPTION_NAMES) -> None:
    """Raise UserError unless ``pattern`` matches shards with captions and at least one usable image."""
    urls = list(find_shards(pattern))
    require_captions(urls, caption_keys)
    if not any(_has_image(url, caption_keys) for url in urls):
        raise UserError(f"{pattern_text(pattern)}: no usable image in these shards")


def _has_image(url: str, caption_keys: Sequence[str]) -> bool:
    with storage.open_file(url) as stream:
        rows = read_samples(stream, url, caption_keys=caption_keys)
        return any(row["image"] and not row["problem"] for row in rows)


def _square(pixels: np.ndarray, size: int, offset: tuple[float, float]) -> np.ndarray:
    if min(pixels.shape[:2]) == size:
        return crop_square(pixels, size, offset)
    return fit_square(Image.fromarray(pixels), size, offset)


def _resized(crop: np.ndarray, size: int) -> np.ndarray:
    if len(crop) == size:
        return crop
    return np.asarray(Image.fromarray(crop).resize((size, size), Image.Resampling.BICUBIC, reducing_gap=3.0))
