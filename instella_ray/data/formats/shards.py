"""WebDataset tar writer, in img2dataset's layout: ``KEY.jpg``, ``KEY.txt`` (caption), ``KEY.json`` (metadata)."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from ... import storage
from .containers import file_extension
from .images import IMAGE_ENDINGS
from .keys import safe_extension, safe_key
from .metadata import json_text
from .tar_index import index_row, index_url, write_index
from .tar_source import CAPTION, CAPTION_ENDINGS, META

Sample = tuple[str, bytes, str, dict[str, Any]]
"""(key, encoded image, caption, metadata)."""


def write_tar(url: str, samples: Iterable[Sample]) -> int:
    """Write one shard and its index, atomically and reproducibly to the byte; returns the number of samples.

    Keys are those of :func:`.keys.safe_key`, or become them.
    """
    return _write(url, ((*sample, []) for sample in samples))


def remove_shard(url: str) -> None:
    """Delete a tar and its index, if they exist."""
    storage.remove_tree(url)
    storage.remove_tree(index_url(url))


def write_samples(url: str, rows: Iterable[dict[str, Any]]) -> int:
    """Write rows with ``key, image, caption, meta`` (JSON) and ``members`` by :func:`write_tar`.

    Further members keep their extensions, except that those of other images become ``other.EXTENSION``.
    """
    return _write(
        url,
        ((row["key"], row["image"], row["caption"], json.loads(row["meta"]), row.get("members") or []) for row in rows),
    )


def write_webdataset(samples: Iterable[Sample], folder: str, samples_per_shard: int) -> Iterator[tuple[str, int]]:
    """Write ``samples`` as ``folder/00000.tar``, ...; yields (url, number of samples) of each finished shard."""
    rest, number = iter(samples), 0
    while part := list(islice(rest, samples_per_shard)):
        url = storage.join(folder, f"{number:05d}.tar")
        yield url, write_tar(url, part)
        number += 1


def _write(url: str, samples: Iterable[tuple[str, bytes, str, dict[str, Any], list[dict[str, Any]]]]) -> int:
    index: list[dict[str, Any]] = []
    with storage.open_file(url, "wb") as stream, tarfile.open(fileobj=stream, mode="w|") as tar:
        for name, image, caption, meta, members in samples:
            key = safe_key(name)
            kind = file_extension(image)
            _add(tar, f"{key}.{kind}", image)
            # tar.offset is the end of the image, padded to whole blocks.
            index.append(index_row(key, tar.offset - -len(image) // 512 * -512, image, caption, meta))
            _add(tar, f"{key}.{CAPTION}", caption.encode())
            _add(tar, f"{key}.{META}", json_text(meta, sort_keys=True).encode())
            used = {*IMAGE_ENDINGS, kind, CAPTION, META}
            for member in members:
                if member["extension"] in (*CAPTION_ENDINGS, META):
                    continue  # of a sample whose caption was none, and has been replaced
                extension = safe_extension(member["extension"])
                while extension in used:
                    extension = f"other.{extension}"
                used.add(extension)
                _add(tar, f"{key}.{extension}", member["data"])
    write_index(url, index)
    return len(index)


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))
