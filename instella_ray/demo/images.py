"""The demo's images: training shards, and held-out images for measurement and prompts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from .. import logs, storage
from ..data.curation.prefilter import Prefilter
from ..data.formats.images import UndecodableError, decode_rgb, fit_square
from ..data.formats.names import find_shards
from ..data.formats.parts import KEPT, Ledger
from ..data.formats.patterns import Pattern, pattern_text
from ..data.formats.sources import find_images, read_rows, require_captions
from ..data.formats.tar_source import read_samples
from ..data.icons.splits import HELD_OUT, TRAIN
from ..data.loading.image_data import require_images
from ..data.scenes import scene_prompts
from ..errors import UserError
from .recipe import DemoConfig, curate_config

ENOUGH, LEAST = 200, 16
"""Number of held-out images above which no further tar is held out, and the minimum number for measurement."""
SHARE = 0.15
"""Share of a small data set to hold out, in bytes, since counting images would require reading all of them."""


class HeldOutImages(NamedTuple):
    """Training shards and held-out images."""

    train: Pattern
    """Pattern of the training shards."""
    captions: list[str]
    """Captions of the held-out images."""
    pixels: np.ndarray
    """Held-out images, uint8 ``[N, size, size, 3]``, centre crops."""


def written_images(demo: DemoConfig) -> HeldOutImages:
    """Read the held-out images that the demo has written, scenes or others, and return them with the training shards."""
    return _images(demo.path("shards", "*.tar"), _usable_of(demo.path("shards", "held_out"), demo))


def icon_images(demo: DemoConfig) -> HeldOutImages:
    """Read the held-out single drawings of the icons that the demo has built, and return them with the training shards."""
    return _images(demo.path("icons", TRAIN, "*.tar"), _usable_of(demo.path("icons", HELD_OUT), demo))


def image_shards(demo: DemoConfig) -> dict[str, str]:
    """Find the shards of ``demo.images``, URL -> label."""
    assert demo.images is not None
    return find_images(demo.images, demo.caption_keys, output=demo.folder)


def read_images(demo: DemoConfig, shards: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """Yield the rows of :func:`image_shards`, in order (:data:`..data.formats.rows.SCHEMA` without ``last``)."""
    for url, label in shards.items():
        yield from read_rows(url, label, caption_keys=demo.caption_keys)


def digest(row: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a row's image, in whose order images are held out: copies of one are, or are not, together."""
    return hashlib.sha256(row["image"]).hexdigest()


def held_out_boundary(demo: DemoConfig) -> str:
    """Return the largest :func:`digest` of the images of ``demo.images`` to hold out.

    Reads and decodes all images. Raises UserError if there are no captions, or too few images for measurement and training.
    """
    assert demo.images is not None
    shards = image_shards(demo)
    require_captions(list(shards), demo.caption_keys)
    prefilter, ledger, usable = Prefilter(curate_config(demo, "").filters), Ledger(), set[str]()
    for row in logs.progress_bar(read_images(demo, shards), desc="images", unit="image"):
        verdict, _ = prefilter.verdict(row)
        ledger.count([verdict])
        if verdict == KEPT:
            usable.add(digest(row))
    least = min(LEAST, demo.held_out)
    if len(usable) < 2 * least:
        expected = f"expected at least {2 * least} usable and different ones, half of them to measure on"
        raise UserError(
            f"images {pattern_text(demo.images)}: {ledger.summary()}, {len(usable)} of them different; {expected}"
        )
    count = min(demo.held_out, max(least, min(ENOUGH, round(SHARE * len(usable)))))
    return sorted(usable)[count - 1]


def own_images(demo: DemoConfig) -> HeldOutImages:
    """Split the images of ``demo.shards``: whole tars are held out, starting with the last, until there are enough.

    Raises UserError if too few images can be held out, or none are left for training.
    """
    assert demo.shards is not None
    urls = list(find_shards(demo.shards, output=demo.folder))
    require_images(demo.shards, demo.caption_keys)
    sizes = {url: storage.size(url) for url in urls}
    least, share = min(LEAST, demo.held_out), SHARE * sum(sizes.values())
    held_out: list[tuple[str, np.ndarray]] = []
    while len(urls) > 1 and (len(held_out) < least or (share > 0 and len(held_out) < min(ENOUGH, demo.held_out))):
        url = urls.pop()
        share -= sizes[url]
        held_out = [*islice(_usable(url, demo), demo.held_out), *held_out]
    if len(held_out) < least:
        raise UserError(
            f"shards {pattern_text(demo.shards)}: {len(held_out)} usable images in the tars after the first, "
            f"expected at least {least} to measure on"
        )
    train = tuple(urls)
    require_images(train, demo.caption_keys)
    return _images(train, held_out[: demo.held_out])


def demo_prompts(demo: DemoConfig, images: HeldOutImages) -> list[tuple[str, str]]:
    """Return (prompt, category) of every image to generate; captions of held-out images unless they are scenes."""
    if demo.draws_scenes:
        return [(e.caption, e.category) for e in scene_prompts(demo.prompts_per_category, demo.seed)]
    return [(caption, "captions") for caption in islice(dict.fromkeys(images.captions), demo.prompts_per_category)]


def _usable_of(folder: str, demo: DemoConfig) -> list[tuple[str, np.ndarray]]:
    """Return the first ``demo.held_out`` of :func:`_usable` in the tars of a folder."""
    return list(islice((image for url in find_shards(folder) for image in _usable(url, demo)), demo.held_out))


def _usable(url: str, demo: DemoConfig) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (caption, pixels) of the samples that curation keeps, so that held-out images match the training data."""
    prefilter = Prefilter(curate_config(demo, url).filters)
    with storage.open_file(url) as stream:
        for row in read_samples(stream, url, caption_keys=demo.caption_keys):
            if prefilter.verdict(row)[0] != KEPT:
                continue
            try:
                yield row["caption"], fit_square(decode_rgb(row["image"]), demo.size)
            except UndecodableError:
                continue


def _images(train: Pattern, held_out: list[tuple[str, np.ndarray]]) -> HeldOutImages:
    return HeldOutImages(train, [caption for caption, _ in held_out], np.stack([pixels for _, pixels in held_out]))
