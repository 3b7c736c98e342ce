"""Curated images for tokenizer training, any of them at any time: NumPy and Pillow alone, no torch (see ``loader``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from ... import storage
from ...errors import UserError
from ..formats.codes import LRUCache
from ..formats.images import UndecodableError, crop_square, decode_rgb, resize_shorter_edge
from ..formats.names import find_files, find_shards
from ..formats.sources import require_captions
from ..formats.tar_index import read_index, read_ranges
from ..formats.tar_source import read_samples
from .loader import CAPTIONS, CaptionChoice
from .order import EpochOrder, FileOrder, sample_uniforms, split_epochs

DECODERS = 4
"""Threads that decode; Pillow leaves Python's lock while it works."""
SILENT = 20
"""So many tars are counted without a progress bar."""


class ImageBatch(NamedTuple):
    """A tokenizer's training batch."""

    pixels: dict[int, np.ndarray]
    """By size: uint8 ``[B, size, size, 3]``, all of the same crops."""
    keys: list[str]


class ImageData:
    """Images cropped to a square at a random place along the longer side, each crop in one size or several.

    Curated folders say how many images their tars hold; other tars are read once to be counted. A batch reads the
    bytes of its images and no more, by the tars' indexes (:mod:`.tar_index`). What is decoded stays in memory up to
    ``cache_bytes``: a small set is decoded once, a large one again every time. Samples of ``window`` tars are mixed at a
    time.
    """

    def __init__(
        self,
        pattern: str,
        sizes: Sequence[int],
        seed: int,
        *,
        captions: bool = False,
        cache_bytes: int = 2 << 30,
        window: int = 256,
    ) -> None:
        """``captions`` makes :meth:`column` know them too."""
        self.sizes, self.largest, self.seed = tuple(sizes), max(sizes), seed
        shards = find_files(pattern)
        self.urls = [shard.url for shard in shards]
        self._indexes = LRUCache(
            lambda n: (read_index(self.urls[i], captions=captions) for i in n), lambda t: t.nbytes, 256 << 20
        )
        uncounted = sum(shard.rows is None for shard in shards)
        numbered = enumerate(tqdm(shards, desc="counting images", unit="shard", disable=uncounted < SILENT))
        counts = (self._indexes[i].num_rows if shard.rows is None else shard.rows for i, shard in numbered)
        self._starts = np.cumsum([0, *counts])
        self._pixels = LRUCache(self._decoded, lambda item: item[1].nbytes, cache_bytes)
        self._threads = ThreadPoolExecutor(DECODERS)
        self.order: Callable[[int], EpochOrder] = lru_cache(2)(
            lambda epoch: FileOrder(self._starts, seed, epoch, window)
        )
        if not len(self):
            raise UserError(f"{pattern}: no usable image in these shards")

    def __len__(self) -> int:
        return int(self._starts[-1])

    def batch(self, epoch: int, samples: np.ndarray) -> ImageBatch:
        """The samples as they look in their epoch."""
        epochs, index = split_epochs(len(self), epoch, samples)
        offsets = sample_uniforms(self.seed, epochs, index)[:, :2]
        items = self._pixels.many(index.tolist())
        crops = [crop_square(item[1], self.largest, (dx, dy)) for item, (dx, dy) in zip(items, offsets, strict=True)]
        pixels = {size: np.stack([_resized(crop, size) for crop in crops]) for size in self.sizes}
        return ImageBatch(pixels, [key for key, _ in items])

    def column(self, index: Sequence[int] | np.ndarray, name: str) -> list[str]:
        """What the tars' indexes say of the samples at ``index``, by the name of its column."""
        return [row[name] for _, row in self._rows(index)]

    def _rows(self, numbers: Sequence[int] | np.ndarray) -> list[tuple[int, dict[str, Any]]]:
        """The shard of each image, and its row there."""
        shards = (np.searchsorted(self._starts, numbers, side="right") - 1).tolist()
        places = [number - int(self._starts[shard]) for shard, number in zip(shards, numbers, strict=True)]
        found = [self._indexes[shard].slice(place, 1) for shard, place in zip(shards, places, strict=True)]
        return [(shard, row.to_pylist()[0]) for shard, row in zip(shards, found, strict=True)]

    def _decoded(self, numbers: list[int]) -> list[tuple[str, np.ndarray]]:
        """(key, uint8 ``[H, W, 3]`` with the shorter edge at the largest size) of each image."""
        shards, rows = zip(*self._rows(numbers), strict=True)
        urls = [self.urls[shard] for shard in shards]
        files = read_ranges(urls, [row["offset"] for row in rows], [row["bytes"] for row in rows])
        return list(self._threads.map(self._decode, urls, (row["key"] for row in rows), files))

    def _decode(self, url: str, key: str, data: bytes) -> tuple[str, np.ndarray]:
        try:
            image = decode_rgb(data, at_least=2 * self.largest)
        except UndecodableError as error:
            raise UserError(f"{url}: sample {key}: {error}; curate the shards first") from None
        return key, np.asarray(resize_shorter_edge(image, self.largest))


class CaptionedImageBatch(NamedTuple):
    """A generator's training batch, to be encoded."""

    pixels: np.ndarray
    """uint8 ``[B, size, size, 3]``."""
    captions: list[str]
    """Empty where the caption was dropped."""
    keys: list[str]


class CaptionedImageData:
    """Images as :class:`ImageData` crops them, with captions chosen as those of codes are."""

    def __init__(
        self, pattern: str, size: int, seed: int, captions: CaptionChoice = CaptionChoice(), **options: Any
    ) -> None:
        """``options`` are those of :class:`ImageData`."""
        self.images = ImageData(pattern, (size,), seed, captions=True, **options)
        self.size, self.seed, self.captions, self.order = size, seed, captions, self.images.order

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, epoch: int, samples: np.ndarray) -> CaptionedImageBatch:
        """The samples as they look in their epoch."""
        epochs, index = split_epochs(len(self), epoch, samples)
        chance = sample_uniforms(self.seed, epochs, index)[:, 2:]  # the first two place the crop
        captions = self.captions.choose(chance, *(self.images.column(index, name) for name in CAPTIONS))
        found = self.images.batch(epoch, samples)
        return CaptionedImageBatch(found.pixels[self.size], captions, found.keys)

    def long_captions(self, index: np.ndarray) -> list[str]:
        """Of the samples at ``index``."""
        return self.images.column(index, CAPTIONS[0])


def require_images(pattern: str) -> None:
    """UserError unless :class:`ImageData` has something to read there: shards, captions, a usable image."""
    urls = list(find_shards(pattern))
    require_captions(urls)
    if not any(_has_image(url) for url in urls):
        raise UserError(f"{pattern}: no usable image in these shards")


def _has_image(url: str) -> bool:
    with storage.open_file(url) as stream:
        return any(row["image"] and not row["problem"] for row in read_samples(stream, url))


def _resized(crop: np.ndarray, size: int) -> np.ndarray:
    if len(crop) == size:
        return crop
    return np.asarray(Image.fromarray(crop).resize((size, size), Image.Resampling.BICUBIC, reducing_gap=3.0))
