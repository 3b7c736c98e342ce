"""Images with labels from their metadata, decoded into memory; no torch."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ... import logs
from ...errors import UserError
from ..formats.images import UndecodableError, decode_rgb, fit_square
from ..formats.metadata import json_object, required_text
from ..formats.patterns import Pattern, pattern_text
from ..formats.sources import find_images, read_rows

log = logging.getLogger(__name__)
WITHOUT_CAPTION = {None, "no_caption", "bad_caption"}
"""Problems of a sample that its image and labels are usable with."""


@dataclass(frozen=True)
class LabelledImages:
    """Images in the order of their shards."""

    source: str
    keys: list[str]
    images: np.ndarray
    """uint8 ``[N, S, S, 3]``."""
    labels: dict[str, list[str]]
    """Value of each image by label."""
    hashes: list[str]
    """sha256 of each image file."""

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def sha256(self) -> str:
        """Hash of keys, labels and image files, in order."""
        digest = hashlib.sha256()
        for key, *values, found in zip(self.keys, *self.labels.values(), self.hashes, strict=True):
            digest.update(json.dumps([key, values, found]).encode())
        return digest.hexdigest()

    def part(self, rows: np.ndarray) -> LabelledImages:
        """Return the images at ``rows [M]``."""
        labels = {name: [values[row] for row in rows] for name, values in self.labels.items()}
        keys, hashes = ([each[row] for row in rows] for each in (self.keys, self.hashes))
        return LabelledImages(self.source, keys, self.images[rows], labels, hashes)


def read_labelled(pattern: Pattern, labels: Sequence[str], size: int) -> LabelledImages:
    """Read all images of ``pattern``, resized and cropped to ``size``, whose KEY.json has a text for each of ``labels``.

    Images that cannot be read are counted in a warning. Raises UserError for a sample without one of the labels, and if no
    image is left.
    """
    source, bad = pattern_text(pattern), Counter[str]()
    keys, images, hashes = list[str](), list[np.ndarray](), list[str]()
    found: dict[str, list[str]] = {name: [] for name in labels}
    with logs.progress_bar(_rows(pattern), desc=f"read {source.rpartition('/')[2]}", unit="image") as rows:
        for key, data, meta in rows:
            try:
                if isinstance(meta, str):
                    raise UndecodableError(meta)
                pixels = fit_square(decode_rgb(data), size)
            except UndecodableError as error:
                bad[str(error)] += 1
                continue
            for name in labels:
                found[name].append(required_text(meta, name, f"{source}: sample {key}"))
            hashes.append(hashlib.sha256(data).hexdigest())
            keys.append(key)
            images.append(pixels)
    if bad:
        log.warning("%s: not read: %s", source, ", ".join(f"{n} {reason}" for reason, n in sorted(bad.items())))
    if not keys:
        raise UserError(f"{source}: no usable image")
    return LabelledImages(source, keys, np.stack(images), found, hashes)


def _rows(pattern: Pattern) -> Iterator[tuple[str, bytes, dict[str, object] | str]]:
    """Yield key, image file and metadata of each sample, or its problem in place of the metadata."""
    for url, label in find_images(pattern, captions=False).items():
        for row in read_rows(url, label, captions=False):
            if row["image"] is None or row["problem"] not in WITHOUT_CAPTION:
                yield row["key"], b"", row["problem"] or "no_image"
            else:
                yield row["key"], row["image"], json_object(row["meta"]) or {}
