"""Units of work of an evaluation: sample files, or consecutive images of tars, parquet files or folders."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, Literal

from .. import storage
from ..bulk.sample_set import SampleBlock, SampleSet
from ..config import Config
from ..data.formats.names import find_image_files, find_shards, names_shards
from ..data.formats.patterns import Pattern, expand_part, shard_label, split_pattern
from ..data.formats.sources import count_rows, read_rows, refuse_links
from ..data.formats.texts import CAPTION_NAMES
from ..data.scenes import parse_caption
from ..errors import UserError


class Unit(Config):
    """Unit of work, which an actor measures as a whole, again after an interruption."""

    setting: str
    """Name of the sweep's setting; '' without a sweep."""
    name: str
    """Name, unique within its setting and valid as a file name."""
    kind: Literal["samples", "tar", "parquet", "files"]
    source: str
    """Sample folder, shard, or folder of the image files."""
    first: int = 0
    """Index of the sample file, or of the first row."""
    rows: int | None
    """Number of rows; None: to the end of the shard."""
    files: tuple[str, ...] = ()
    """Image files relative to the folder."""


def sample_units(setting: str, samples: SampleSet) -> list[Unit]:
    """Create a unit for each file of a sample set."""
    files = enumerate(samples.manifest.files)
    base: dict[str, Any] = {"setting": setting, "kind": "samples", "source": samples.folder}
    return [Unit(**base, name=file.name.rsplit(".", 1)[0], first=i, rows=file.rows) for i, file in files]


def image_units(pattern: Pattern, rows_per_unit: int, setting: str = "") -> list[Unit]:
    """Create units for the images of tars, parquet files or folders; raises UserError if there are no images.

    The number of rows of a tar is an estimate, so the last unit of a shard extends to the shard's end.
    """
    for suffix, kind in ((".tar", "tar"), (".parquet", "parquet")):
        if any(names_shards(part, suffix) for part in split_pattern(pattern)):
            shards = find_shards(pattern, suffix)
            if kind == "parquet":
                refuse_links(shards)
            return [u for url, name in shards.items() for u in _shard_units(setting, kind, url, name, rows_per_unit)]
    folders = [each for part in split_pattern(pattern) for each in expand_part(part)]
    return [unit for folder in folders for unit in _folder_units(setting, folder, rows_per_unit)]


def read_samples_unit(unit: Unit) -> SampleBlock:
    """Read a sample file; raises :class:`..bulk.sample_set.BadFile` if it is incomplete."""
    return SampleSet(unit.source).block(unit.first)


def read_images_unit(unit: Unit, caption_keys: Sequence[str] = CAPTION_NAMES) -> Iterator[dict[str, Any]]:
    """Yield rows with ``key``, ``image`` (bytes), ``caption`` (or None) and ``problem`` (or None)."""
    end = None if unit.rows is None else unit.first + unit.rows
    if unit.kind == "files":
        for name in unit.files:
            image = storage.read_bytes(storage.join(unit.source, name))
            yield {"key": name.rsplit(".", 1)[0], "image": image, "caption": None, "problem": None}
    else:
        rows = read_rows(unit.source, label(unit), captions=False, caption_keys=caption_keys)
        yield from islice(rows, unit.first, end)


def label(unit: Unit) -> str:
    """Return the shard's name: the prefix of its images' ids, which does not depend on the unit size."""
    return unit.name if unit.kind == "samples" else unit.name.rpartition("-")[0]


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
    """Return whether images have captions, judged by the first 16."""
    return any(row["caption"] for row in islice(read_images_unit(units[0], caption_keys), 16))


def _shard_units(setting: str, kind: str, url: str, name: str, rows_per_unit: int) -> list[Unit]:
    parts = max(1, -(-count_rows(url) // rows_per_unit))
    starts = [rows_per_unit * part for part in range(parts)]
    base: dict[str, Any] = {"setting": setting, "kind": kind, "source": url}
    return [
        Unit(**base, name=f"{name}-{first:07d}", first=first, rows=rows_per_unit if first < starts[-1] else None)
        for first in starts
    ]


def _folder_units(setting: str, folder: str, rows_per_unit: int) -> list[Unit]:
    files = find_image_files(folder)
    base: dict[str, Any] = {"setting": setting, "kind": "files", "source": folder}
    name = shard_label(folder.rstrip("/"))
    return [
        Unit(**base, name=f"{name}-{first:07d}", first=first, rows=len(part), files=tuple(part))
        for first in range(0, len(files), rows_per_unit)
        if (part := files[first : first + rows_per_unit])
    ]
