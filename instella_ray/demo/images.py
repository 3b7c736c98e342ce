"""The demo's images: shards to train on, and what is held out to measure on and to take prompts from."""

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
"""Held-out images: no further tar is held out above the first number, and fewer than the second measure nothing."""
SHARE = 0.15
"""Part of a small set that is held out, in bytes: to count images, all of them would have to be read."""


class HeldOutImages(NamedTuple):
    """What a demo trains on and is measured on."""

    train: str
    """Pattern of the shards to train on."""
    captions: list[str]
    """Of the held-out images."""
    pixels: np.ndarray
    """The held-out images, uint8 ``[N, size, size, 3]``, centre crops."""


def scene_images(demo: DemoConfig) -> HeldOutImages:
    """The scenes that the demo has drawn, in training shards and one that is held out."""
    (held_out,) = find_shards(demo.path("shards", "held_out"))
    return _images(demo.path("shards", "*.tar"), list(_usable(held_out, demo)))


def own_images(demo: DemoConfig) -> HeldOutImages:
    """The images of ``demo.shards``: whole tars are held out, from the last one on, until there are enough.

    UserError when too few can be held out, or none is left to train on.
    """
    assert demo.shards is not None
    require_images(demo.shards)
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
            f"expected at least {least} of them to measure on"
        )
    train = ",".join(urls)
    require_images(train)
    return _images(train, held_out[: demo.held_out])


def demo_prompts(demo: DemoConfig, images: HeldOutImages) -> list[tuple[str, str]]:
    """(prompt, category) of every image to generate. With shards of one's own: captions of held-out images."""
    if demo.shards is None:
        return [(e.caption, e.category) for e in scene_prompts(demo.prompts_per_category, demo.seed)]
    return [(caption, "captions") for caption in islice(dict.fromkeys(images.captions), demo.prompts_per_category)]


def _usable(url: str, demo: DemoConfig) -> Iterator[tuple[str, np.ndarray]]:
    """(caption, pixels) of the samples that curation would keep: what is measured on is like what is trained on."""
    judge = Prefilter(curate_config(demo, url).filters)
    with storage.open_file(url) as stream:
        for row in read_samples(stream, url):
            if judge.verdict(row)[0] != KEPT:
                continue
            try:
                yield row["caption"], fit_square(decode_rgb(row["image"]), demo.size)
            except UndecodableError:
                continue


def _images(train: str, held_out: list[tuple[str, np.ndarray]]) -> HeldOutImages:
    return HeldOutImages(train, [caption for caption, _ in held_out], np.stack([pixels for _, pixels in held_out]))
