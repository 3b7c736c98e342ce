"""Reader of folders of image files: captions beside them, as ``NAME.txt``, ``NAME.caption`` or ``NAME.json``, or in a table.

The table is ``metadata.csv`` or ``metadata.jsonl``, as in the imagefolder convention of the ``datasets`` library: it
describes images of its folder and of those below, and is read like any table (:mod:`.table_source`). The images that no
table describes are read from here. Each folder of them is a shard of its own, a large one several, divided by a hash of the
names: new files change the shards of their own folder only.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

from ... import storage
from .files import AT_ONCE, list_files, read_files
from .images import IMAGE_ENDINGS, MAX_IMAGE_BYTES
from .keys import Keys
from .names import image_extension, split_extension
from .patterns import shard_label
from .rows import problem_row
from .table_source import scan_table
from .tar_source import CAPTION_ENDINGS, META, file_row
from .texts import CAPTION_NAMES

METADATA_FILES = ("metadata.csv", "metadata.jsonl")
"""Names of the tables that describe the images of their folder."""
FILES_PER_SHARD = 10_000
"""Images above which a folder is divided into several shards."""
SAMPLE_ENDINGS = (*IMAGE_ENDINGS, *CAPTION_ENDINGS, META)
_SHARD = re.compile(r"(?P<root>.+)#folder=(?P<folder>[^#,]*),(?P<part>\d+)/(?P<parts>\d+)")


class FolderShard(NamedTuple):
    """Images of one folder: those whose names have the hash ``part`` modulo ``parts``."""

    root: str
    """URL of the folder that keys are relative to."""
    folder: str
    """Path of the folder of the images, relative to ``root``; ``""``: ``root`` itself."""
    part: int = 0
    parts: int = 1

    @classmethod
    def parse(cls, url: str) -> FolderShard | None:
        """Return the shard of a :attr:`url`; None if it is that of something else."""
        if (found := _SHARD.fullmatch(url)) is None:
            return None
        folder = unquote(found["folder"], errors="surrogatepass")
        return cls(found["root"], folder, int(found["part"]), int(found["parts"]))

    @property
    def url(self) -> str:
        """``ROOT#folder=FOLDER,PART/PARTS``."""
        return f"{self.root}#folder={quote(self.folder, errors='surrogatepass')},{self.part}/{self.parts}"

    @property
    def label(self) -> str:
        """Label of the shard, a function of its URL alone (:func:`.patterns.shard_label`)."""
        path = f"{self.root}/{self.folder}".rstrip("/")
        label = shard_label(self._replace(part=0, parts=1).url, path)
        return label if self.parts == 1 else f"{label}__{self.part:05d}-of-{self.parts:05d}"

    def holds(self, stem: str) -> bool:
        """Return whether the files with the path ``stem`` without extension belong to the shard."""
        return _hash(stem.rpartition("/")[2]) % self.parts == self.part


def folder_shards(
    root: str, names: Iterable[str], described: Collection[str], files_per_shard: int
) -> list[FolderShard]:
    """Return the shards of the samples among the files ``names``, given as :func:`.files.list_files` of ``root``.

    ``described`` are the images that tables describe.
    """
    folders = defaultdict(list)
    for stem in _samples(names, described):
        folders[stem.rpartition("/")[0]].append(stem)
    sizes = {folder: -(-len(stems) // files_per_shard) for folder, stems in sorted(folders.items())}
    shards = [FolderShard(root, folder, part, parts) for folder, parts in sizes.items() for part in range(parts)]
    return [shard for shard in shards if shard.parts == 1 or any(map(shard.holds, folders[shard.folder]))]


def read_folder(
    shard: FolderShard, label: str, caption_keys: Sequence[str] = CAPTION_NAMES
) -> Iterator[dict[str, Any]]:
    """Yield the rows of one shard, sorted by name: the columns of :data:`.rows.SCHEMA` without ``last``.

    Every image is a row; captions and metadata without an image are one with the problem ``no_image``. There is at least
    one row: without any, its problem is ``empty_shard``. MissingFileError if the folder no longer exists.
    """
    folder = storage.join(shard.root, shard.folder) if shard.folder else shard.root
    samples = _samples(list_files(folder, recursive=False), _described(shard, caption_keys))
    stems, keys, number = filter(shard.holds, samples), Keys(), 0
    while part := list(islice(stems, AT_ONCE // 4)):  # a sample has two or three files
        names = [name for stem in part for name in samples[stem]]
        contents = dict(zip(names, read_files(folder, names), strict=True))
        for stem in part:
            name = f"{shard.folder}/{stem}" if shard.folder else stem
            for row in _rows(name, {file: contents[file] for file in samples[stem]}, keys, label, number, caption_keys):
                yield row
                number += 1
    if not number and not storage.exists(folder):
        raise storage.MissingFileError(f"{folder}: no such folder")
    if not number:
        yield problem_row(label, 0, "empty_shard")


def _rows(
    name: str,
    files: Mapping[str, bytes | None],
    keys: Keys,
    label: str,
    number: int,
    caption_keys: Sequence[str],
) -> Iterator[dict[str, Any]]:
    """Yield a row for each image among the files of one name, or one for those without an image."""
    images = [file for file in files if image_extension(file)]
    beside = [file for file in files if file not in images]
    for image in images or [""]:
        key, new = keys.assign(name)
        given = {split_extension(file)[1]: files[file] for file in filter(None, (image, *beside))}
        data = {ending: content for ending, content in given.items() if content is not None}
        small = {ending: content for ending, content in data.items() if len(content) <= MAX_IMAGE_BYTES}
        problem = "duplicate_key" if not new else "oversized_member" if len(small) < len(data) else None
        yield file_row(name, key, small, label, number, problem, caption_keys)
        number += 1


def _samples(names: Iterable[str], described: Collection[str]) -> dict[str, list[str]]:
    """Group files by their paths without extension, leaving out ``described`` images and what is beside them."""
    groups = defaultdict(list)
    for name in names:
        stem, ending = split_extension(name)
        if ending in SAMPLE_ENDINGS and name not in described:
            groups[stem].append(name)
    done = {split_extension(name)[0] for name in described}
    return {s: files for s, files in groups.items() if s not in done or any(map(image_extension, files))}


def _described(shard: FolderShard, caption_keys: Sequence[str]) -> set[str]:
    """Return the images of the folder that its table, or one of a folder above, describes."""
    folders = shard.folder.split("/") if shard.folder else []
    found = set[str]()
    for depth in range(len(folders) + 1):
        below = "".join(f"{name}/" for name in folders[depth:])
        for name in METADATA_FILES:
            url = storage.join(shard.root, *folders[:depth], name)
            if storage.exists(url):
                with storage.open_file(url) as stream:
                    paths = scan_table(stream, url, FILES_PER_SHARD, caption_keys, captions=False).paths
                found |= {path.removeprefix(below) for path in paths if path.startswith(below)}
    return found


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big")
