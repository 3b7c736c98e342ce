"""The demo's images: training shards, and held-out images for measurement and prompts."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np

from .. import storage
from ..data.curation.prefilter import Prefilter
from ..data.formats.images import UndecodableError, decode_rgb, fit_square
from ..data.formats.names import find_shards
from ..data.formats.parts import KEPT
from ..data.formats.tar_source import read_samples
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

    train: str
    """Pattern of the training shards."""
    captions: list[str]
    """Captions of the held-out images."""
    pixels: np.ndarray
    """Held-out images, uint8 ``[N, size, size, 3]``, centre crops."""


def scene_images(demo: DemoConfig) -> HeldOutImages:
    """Read the held-out shard of the demo's scenes, and return it with the training shards."""
    (held_out,) = find_shards(demo.path("shards", "held_out"))
    return _images(demo.path("shards", "*.tar"), list(_usable(held_out, demo)))


def own_images(demo: DemoConfig) -> HeldOutImages:
    """Split the images of ``demo.shards``: whole tars are held out, starting with the last, until there are enough.

    Raises UserError if too few images can be held out, or none are left for training.
    """
    assert demo.shards is not None
    require_images(demo.shards, demo.caption_keys)
    urls = list(find_shards(demo.shards))
    sizes = {url: storage.size(url) for url in urls}
    least, share = min(LEAST, demo.held_out), SHARE * sum(sizes.values())
    held_out: list[tuple[str, np.ndarray]] = []
    while len(urls) > 1 and (len(held_out) < least or (share > 0 and len(held_out) < min(ENOUGH, demo.held_out))):
        url = urls.pop()
        share -= sizes[url]
        held_out = [*islice(_usable(url, demo), demo.held_out), *held_out]
    if len(held_out) < least:
        raise UserError(
            f"shards {demo.shards}: {len(held_out)} usable images in the tars after the first, "
            f"expected at least {least} to measure on"
        )
    train = ",".join(urls)
    require_images(train, demo.caption_keys)
    return _images(train, held_out[: demo.held_out])


def demo_prompts(demo: DemoConfig, images: HeldOutImages) -> list[tuple[str, str]]:
    """Return (prompt, category) of every image to generate; with ``demo.shards`` captions of held-out images."""
    if demo.shards is None:
        return [(e.caption, e.category) for e in scene_prompts(demo.prompts_per_category, demo.seed)]
    return [(caption, "captions") for caption in islice(dict.fromkeys(images.captions), demo.prompts_per_category)]


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


def _images(train: str, held_out: list[tuple[str, np.ndarray]]) -> HeldOutImages:
    return HeldOutImages(train, [caption for caption, _ in held_out], np.stack([pixels for _, pixels in held_out]))
