"""Units of work of an evaluation: sample files, or consecutive images of tars, parquet files, tables or folders."""

from __future__ import annotations

import hashlib
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any, Literal

from .. import storage
from ..bulk.sample_set import SampleBlock, SampleSet
from ..config import Config
from ..data.formats.files import file_stamps
from ..data.formats.folder_source import FolderShard
from ..data.formats.keys import readable
from ..data.formats.patterns import Pattern, shard_label
from ..data.formats.sources import count_rows, find_images, list_image_files, read_rows
from ..data.formats.texts import CAPTION_NAMES
from ..data.scenes import parse_caption
from ..errors import UserError

log = logging.getLogger(__name__)
FIRST_UNITS = 16
"""Units whose first images tell whether there are captions."""


class Unit(Config):
    """Unit of work, which an actor measures as a whole, again after an interruption."""

    setting: str
    """Name of the sweep's setting; '' without a sweep."""
    name: str
    """Name, unique within its setting and valid as a file name."""
    kind: Literal["samples", "images"]
    source: str
    """Sample folder, or URL of the shard of images (:func:`..data.formats.sources.find_inputs`)."""
    label: str
    """Prefix of the images' ids, which does not depend on the unit size."""
    first: int = 0
    """Index of the sample file, or of the first row."""
    rows: int | None
    """Number of rows; None: to the end of the shard."""


@dataclass(frozen=True)
class ImageSet:
    """Images that a pattern stands for."""

    units: list[Unit]
    identity: str
    """Sha256 of the names of all files that are read, with their sizes and times of change or a store's tags."""
    left_out: dict[str, int]
    """Number of files of folders that are not read, by ending, as ``.heic``, and of ``linked folder``."""


def sample_units(setting: str, samples: SampleSet) -> list[Unit]:
    """Create a unit for each file of a sample set."""
    files = enumerate(samples.manifest.files)
    base: dict[str, Any] = {"setting": setting, "kind": "samples", "source": samples.folder, "label": ""}
    return [Unit(**base, name=file.name.rsplit(".", 1)[0], first=i, rows=file.rows) for i, file in files]


def find_image_set(
    pattern: Pattern,
    rows_per_unit: int,
    caption_keys: Sequence[str] = CAPTION_NAMES,
    *,
    output: str | None = None,
) -> ImageSet:
    """Find the images of tars, parquet files, tables or folders, and cut them into units.

    The folder ``output``, that of the job itself, is no part of them. The number of rows of a tar is an estimate, so the
    last unit of a shard extends to the shard's end. Raises UserError as :func:`..data.formats.sources.find_images`, and for
    a folder within another one, whose images would be measured twice, and for shards and folders named in bytes that are not
    UTF-8.
    """
    # Only folders are cut there, because the ids of rows of other shards are counted from the start of the shard.
    shards = find_images(
        pattern,
        caption_keys,
        output=output,
        captions=False,
        rows_per_shard=sys.maxsize,
        files_per_shard=rows_per_unit,
    )
    for url in (url for url in shards if readable(url) != url):
        raise UserError(f"{readable(url).partition('#folder=')[0]}: name is not UTF-8; rename it")
    _refuse_nested(sorted({folder.root for url in shards if (folder := FolderShard.parse(url))}))
    units = [unit for url, label in shards.items() for unit in _shard_units(url, label, rows_per_unit)]
    files = list_image_files(pattern, output=output)
    digest = hashlib.sha256()
    for url, stamp in zip(files.read, file_stamps(files.read), strict=True):
        digest.update(f"{url}\0{stamp}\n".encode("utf-8", "surrogatepass"))
    return ImageSet(units, digest.hexdigest(), dict(sorted(files.left_out.items())))


def warn_left_out(source: str, left_out: Mapping[str, int]) -> None:
    """Log which files of folders are not read, by reason; nothing if all are."""
    if left_out:
        log.warning("%s: not read: %s", source, counts_text(left_out))


def counts_text(counts: Mapping[str, int]) -> str:
    """Format counts by reason, as ``2 no_image, 1 undecodable``."""
    return ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))


def read_samples_unit(unit: Unit) -> SampleBlock:
    """Read a sample file; raises :class:`..bulk.sample_set.BadFile` if it is incomplete."""
    return SampleSet(unit.source).block(unit.first)


def read_images_unit(unit: Unit, caption_keys: Sequence[str] = CAPTION_NAMES) -> Iterator[dict[str, Any]]:
    """Yield rows with ``id``, ``image`` (bytes), ``caption`` (or None) and ``problem`` (or None).

    The further images of one name in a folder, such as ``a.jpg`` and ``a.png``, get the ids ``a.2`` and so on.
    """
    rows = read_rows(unit.source, unit.label, captions=False, caption_keys=caption_keys, skip=unit.first)
    folder, times = FolderShard.parse(unit.source), dict[str, int]()
    for row in islice(rows, unit.rows):
        name = f"{unit.label}/{row['key']}"
        number = times[name] = times.get(name, 0) + 1
        if folder and row["problem"] == "duplicate_key":
            yield {**row, "id": f"{name}.{number}", "problem": None}  # no key has a dot in its last part
        else:
            yield {**row, "id": name}


def has_scene_captions(units: Sequence[Unit], caption_keys: Sequence[str]) -> bool:
    """Return whether all captions of the first unit (of images the first 64) are scene captions."""
    unit = units[0]
    if unit.kind == "samples":
        captions: list[str | None] = list(read_samples_unit(unit).prompts)
    else:
        rows = islice(read_images_unit(unit, caption_keys), 64)
        captions = [row["caption"] for row in rows if not row["problem"]]
    try:
        return bool(captions) and all(caption and parse_caption(caption) for caption in captions)
    except UserError:
        return False


def has_captions(units: Sequence[Unit], caption_keys: Sequence[str]) -> bool:
    """Return whether images have captions, judged by the first 16 of the first :data:`FIRST_UNITS` units."""
    return any(
        row["caption"] for unit in units[:FIRST_UNITS] for row in islice(read_images_unit(unit, caption_keys), 16)
    )


def _shard_units(url: str, label: str, rows_per_unit: int) -> list[Unit]:
    folder = FolderShard.parse(url)
    base: dict[str, Any] = {"setting": "", "kind": "images", "source": url}
    if folder:
        return [Unit(**base, name=label, label=shard_label(folder.root), rows=None)]
    parts = max(1, -(-count_rows(url) // rows_per_unit))
    starts = [rows_per_unit * part for part in range(parts)]
    return [
        Unit(
            **base,
            name=f"{label}-{first:07d}",
            label=label,
            first=first,
            rows=rows_per_unit if first < starts[-1] else None,
        )
        for first in starts
    ]


def _refuse_nested(folders: Sequence[str]) -> None:
    """Raise UserError for a folder that is, or is within, another one, however links lead there."""
    real = sorted((storage.join(os.path.realpath(url) if storage.is_local(url) else url, ""), url) for url in folders)
    for (outer, one), (inner, other) in pairwise(real):
        if inner.startswith(outer):
            raise UserError(
                f"{one} and {other}: images of the first are in the second too, and would be measured twice"
            )
