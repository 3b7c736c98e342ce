"""Units of work of an evaluation: sample files, or consecutive images of tars, parquet files or folders."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from .. import storage
from ..bulk.sample_set import SampleBlock, SampleSet
from ..config import Config
from ..data.formats.shards import find_shards
from ..data.formats.tar_source import read_samples
from ..data.prompts import TEXT_KEYS
from ..data.scenes import parse_caption
from ..errors import UserError

IMAGE_TYPES = (".jpg", ".jpeg", ".png", ".webp")
IMAGE_COLUMNS = ("image", "jpg", "png", "webp", "bytes")
KEY_COLUMNS = ("key", "__key__", "id")


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


def image_units(pattern: str, rows_per_unit: int, setting: str = "") -> list[Unit]:
    """Create units for the images of tars, parquet files or folders; raises UserError if there are no images.

    The number of rows of a tar is an estimate, so the last unit of a shard extends to the shard's end.
    """
    for suffix, kind in ((".tar", "tar"), (".parquet", "parquet")):
        if any(_has_files(part, suffix) for part in pattern.split(",")):
            shards = find_shards(pattern, suffix)
            return [u for url, name in shards.items() for u in _shard_units(setting, kind, url, name, rows_per_unit)]
    return [u for part in pattern.split(",") for u in _folder_units(setting, part.strip(), rows_per_unit)]


def read_samples_unit(unit: Unit) -> SampleBlock:
    """Read a sample file; raises :class:`.sample_set.BadFile` if it is incomplete."""
    return SampleSet(unit.source).block(unit.first)


def read_images_unit(unit: Unit) -> Iterator[dict[str, Any]]:
    """Yield rows with ``key``, ``image`` (bytes), ``caption`` (or None) and ``problem`` (or None)."""
    end = None if unit.rows is None else unit.first + unit.rows
    if unit.kind == "files":
        for name in unit.files:
            image = storage.read_bytes(storage.join(unit.source, name))
            yield {"key": name.rsplit(".", 1)[0], "image": image, "caption": None, "problem": None}
    elif unit.kind == "tar":
        with storage.open_file(unit.source) as stream:
            yield from islice(read_samples(stream, unit.name), unit.first, end)
    else:
        yield from islice(_parquet_rows(unit.source), unit.first, end)


def label(unit: Unit) -> str:
    """Return the shard's name: the prefix of its images' ids, which does not depend on the unit size."""
    return unit.name if unit.kind == "samples" else unit.name.rpartition("-")[0]


def has_scene_captions(units: Sequence[Unit]) -> bool:
    """Return whether all captions of the first unit (of images the first 64) are scene captions."""
    unit = units[0]
    if unit.kind == "samples":
        captions: list[str | None] = list(read_samples_unit(unit).prompts)
    else:
        captions = [row["caption"] for row in islice(read_images_unit(unit), 64) if not row["problem"]]
    try:
        return bool(captions) and all(caption and parse_caption(caption) for caption in captions)
    except UserError:
        return False


def has_captions(units: Sequence[Unit]) -> bool:
    """Return whether images have captions, judged by the first 16."""
    return any(row["caption"] for row in islice(read_images_unit(units[0]), 16))


def _has_files(part: str, suffix: str) -> bool:
    part = part.strip()
    fs, path = storage.filesystem(part)
    return bool(storage.glob(storage.join(part, f"*{suffix}"))) if fs.isdir(path) else part.endswith(suffix)


def _shard_units(setting: str, kind: str, url: str, name: str, rows_per_unit: int) -> list[Unit]:
    parts = max(1, -(-_rows(kind, url) // rows_per_unit))
    starts = [rows_per_unit * part for part in range(parts)]
    base: dict[str, Any] = {"setting": setting, "kind": kind, "source": url}
    return [
        Unit(**base, name=f"{name}-{first:07d}", first=first, rows=rows_per_unit if first < starts[-1] else None)
        for first in starts
    ]


def _rows(kind: str, url: str) -> int:
    with storage.open_file(url) as stream:
        try:
            if kind == "parquet":
                return int(pq.ParquetFile(stream).metadata.num_rows)
            with tarfile.open(fileobj=stream, mode="r:") as tar:  # reads headers only
                return len({member.name.removeprefix("./").partition(".")[0] for member in tar})
        except tarfile.TarError:
            return 0
        except pa.ArrowException as error:
            raise UserError(f"{url}: not a parquet file ({str(error).splitlines()[0]})") from None


def _folder_units(setting: str, folder: str, rows_per_unit: int) -> list[Unit]:
    fs, root = storage.filesystem(folder)
    found = fs.find(root) if fs.isdir(root) else []
    files = sorted(path[len(root) :].strip("/") for path in found if path.lower().endswith(IMAGE_TYPES))
    if not files:
        raise UserError(f"{folder}: no images found; expected tars, parquet files, or a folder of jpg, png or webp")
    base: dict[str, Any] = {"setting": setting, "kind": "files", "source": folder}
    name = folder.rstrip("/").rsplit("/", 1)[-1]
    return [
        Unit(**base, name=f"{name}-{first:07d}", first=first, rows=len(part), files=tuple(part))
        for first in range(0, len(files), rows_per_unit)
        if (part := files[first : first + rows_per_unit])
    ]


def _parquet_rows(url: str) -> Iterator[dict[str, Any]]:
    with storage.open_file(url) as stream:
        try:
            file = pq.ParquetFile(stream)
            names = file.schema_arrow.names
            image, key, caption = (
                next((name for name in known if name in names), None)
                for known in (IMAGE_COLUMNS, KEY_COLUMNS, TEXT_KEYS)
            )
            if image is None:
                raise UserError(f"{url}: no column of images, expected one of {', '.join(IMAGE_COLUMNS)}")
            columns = [name for name in (image, key, caption) if name]
            number = 0
            for batch in file.iter_batches(64, columns=columns):
                for row in batch.to_pylist():
                    data = row[image]["bytes"] if isinstance(row[image], dict) else row[image]
                    text = str(row[caption]) if caption and row[caption] else None
                    name = str(row[key]) if key else f"{number:07d}"
                    yield {"key": name, "image": data, "caption": text, "problem": None if data else "no_image"}
                    number += 1
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{url}: damaged parquet file ({str(error).splitlines()[0]})") from None
