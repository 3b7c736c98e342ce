"""WebDataset tar reader: rows of samples with images as bytes; an invalid sample becomes a row with a problem."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, NamedTuple

from .images import IMAGE_ENDINGS, MAX_IMAGE_BYTES
from .keys import ORIGINAL_KEY, Keys, is_apple_double, is_unsafe, member_name, readable
from .metadata import json_object
from .parts import APPLE_DOUBLE
from .rows import problem_row
from .tar_reader import Member, TarReader
from .texts import CAPTION_NAMES, TextError, caption_of, caption_text, clean_text, decode_text, one_line

CAPTION, META = "txt", "json"
"""Extensions of captions and of metadata, as written."""
CAPTION_ENDINGS = (CAPTION, "caption")
"""Extensions of files and tar members that hold a caption, in order of preference."""
RUN_MEMBERS = 16
"""Consecutive members of one key that are read ahead; a sample with more is read by position."""
MAX_SAMPLE_BYTES = 4 * MAX_IMAGE_BYTES
"""Maximum size of the members of a sample together; the rest is not read."""


def read_samples(
    stream: IO[bytes], shard: str, url: str | None = None, caption_keys: Sequence[str] = CAPTION_NAMES
) -> Iterator[dict[str, Any]]:
    """Yield the rows of one tar, in order: the columns of :data:`.rows.SCHEMA` without ``last``, and ``offset``.

    ``offset`` is the position of the image in the tar (bytes). The caption is ``KEY.txt``, or else that of
    ``caption_keys`` in ``KEY.json``. Every member that is not a folder is part of one row. There is at least one row: a
    tar that breaks off ends with a row whose problem is ``truncated_shard`` or ``damaged_shard``, in place of the last
    sample; one without samples gives ``empty_shard``. Raises UserError, naming ``url`` (default: ``shard``), for a
    compressed tar.
    """
    reader, keys, number = TarReader(stream, url or shard), Keys(), 0
    for sample in _samples(reader):
        yield sample.row(reader, shard, number, keys, caption_keys)
        number += 1
    if not number:
        yield {**problem_row(shard, 0, reader.damage or "empty_shard"), "offset": None}


def count_samples(stream: IO[bytes], url: str) -> int:
    """Count the rows of a tar by its headers, without reading their contents; up to the damage of a damaged tar."""
    reader = TarReader(stream, url)
    reader.read_ahead = False
    return sum(1 for _ in _samples(reader))


def file_row(
    name: str,
    key: str,
    data: Mapping[str, bytes],
    shard: str,
    number: int,
    problem: str | None,
    caption_keys: Sequence[str],
) -> dict[str, Any]:
    """Return the row of the sample ``name`` whose image, caption and metadata are files, by extension in ``data``.

    ``problem`` takes precedence over those that are found here.
    """
    kind = next((ending for ending in IMAGE_ENDINGS if ending in data), None)
    meta_text, meta = _metadata(data.get(META, b"{}"))
    if meta is not None and key != name:
        meta.setdefault(ORIGINAL_KEY, readable(name))
    caption, missing = "", None
    try:
        caption = _caption([data.get(ending, b"") for ending in CAPTION_ENDINGS], meta or {}, caption_keys)
    except TextError:
        missing = "bad_caption"
    missing = missing or ("no_caption" if not caption else "bad_metadata" if meta is None else None)
    return {
        "key": key,
        "shard": shard,
        "row": number,
        "problem": problem or ("no_image" if kind is None else missing),
        "image": None if kind is None else data[kind],
        "caption": caption or None,
        "meta": meta_text if meta is None else json.dumps(meta),
    }


class _Part(NamedTuple):
    """Member of a tar with the parts of its name."""

    member: Member
    key: str
    """Name up to the first dot of the base name; the whole name if that has none."""
    stem: str
    """Name up to the last dot."""
    tail: str
    """What follows the first dot: ``seg.png``; empty for a name without key or extension."""
    extension: str
    """What follows the last dot."""
    problem: str | None = None
    """Ledger reason, for a name without key or extension."""


@dataclass
class _Sample:
    name: str
    problem: str | None = None
    members: dict[str, Member] = field(default_factory=dict)
    """Members by extension."""

    def row(
        self, reader: TarReader, shard: str, number: int, keys: Keys, caption_keys: Sequence[str]
    ) -> dict[str, Any]:
        key, new = keys.assign(self.name)
        data = self._data(reader)
        row = file_row(self.name, key, data, shard, number, self._problem(new, data), caption_keys)
        kind = next((ending for ending in IMAGE_ENDINGS if ending in data), None)
        held = (kind,) if row["problem"] else (kind, *CAPTION_ENDINGS, META)
        return {
            **row,
            "members": [_further(*item, data) for item in self.members.items() if item[0] not in held],
            "offset": None if kind is None else self.members[kind].offset,
        }

    def _data(self, reader: TarReader) -> dict[str, bytes]:
        """Read the members that are files, up to the limits of one and of all."""
        data, left = dict[str, bytes](), MAX_SAMPLE_BYTES
        for extension, member in self.members.items():
            if member.is_file and member.size <= min(MAX_IMAGE_BYTES, left):
                data[extension] = reader.read(member)
                left -= member.size
        return data

    def _problem(self, new: bool, data: Mapping[str, bytes]) -> str | None:
        if self.problem:
            return self.problem
        if is_unsafe(self.name):
            return "unsafe_name"
        if not new:
            return "duplicate_key"
        unread = [member.is_file for extension, member in self.members.items() if extension not in data]
        return None if not unread else "oversized_member" if all(unread) else "not_a_file"


def _samples(reader: TarReader) -> Iterator[_Sample]:
    """Group members into samples.

    While samples are complete and consecutive, they are read as they come. The first that is not ends that: the rest of
    the tar is listed by its headers, and read by position.
    """
    done: dict[str, tuple[str, ...]] = {}
    run: list[_Part] = []
    parts = map(_part, reader)
    for part in parts:
        if run and part.key != run[0].key:
            if not _is_complete(run, done):
                run.append(part)
                break
            sample = _Sample(run[0].key, members={each.tail: each.member for each in run})
            done[sample.name] = tuple(sample.members)
            yield sample
            run = []
        run.append(part)
        if part.tail != part.extension or len(run) == RUN_MEMBERS:
            break
    reader.read_ahead = False
    listed = [*run, *parts]
    yield from _joined(listed, done, reader.damage)


def _joined(parts: Sequence[_Part], done: Mapping[str, Collection[str]], damage: str | None) -> list[_Sample]:
    """Group the members of a tar, in any order, into samples in the order of their first members.

    A name ends at its last dot if it has an image and a caption or metadata, or if WebDataset's name, up to the first
    dot, has no image; else its members are further parts of the sample of that name: ``a.seg.png`` of ``a.png``. The
    n-th member of a name and an extension is part of the n-th sample of that name, or of a later one that its
    predecessor is part of. Samples ``done`` before (name -> extensions) are not joined with later members.
    """
    images = {part.stem for part in parts if part.extension in IMAGE_ENDINGS}
    complete = {part.stem for part in parts if part.extension in (*CAPTION_ENDINGS, META)} & images
    samples: list[_Sample] = []
    by_name: dict[str, list[_Sample]] = defaultdict(list)
    counts: Counter[tuple[str, str]] = Counter()
    name, index = "", 0
    for part in parts:
        if part.problem:
            samples.append(sample := _Sample(part.key, part.problem, {"": part.member}))
            continue
        before, (name, extension) = name, _place(part, images, complete)
        index = max(counts[name, extension], index if name == before else 0)
        counts[name, extension] = index + 1
        if index == len(by_name[name]):
            samples.append(_Sample(name))
            by_name[name].append(samples[-1])
            if name in done:
                samples[-1].problem = "duplicate_key" if extension in done[name] else "unsorted_shard"
        sample = by_name[name][index]
        sample.members[extension] = part.member
    if damage and samples:
        sample.problem = damage
    return samples


def _part(member: Member) -> _Part:
    found = None if is_apple_double(member.name) else member_name(member.name)
    if found is None:
        name = member.name.removeprefix("./")
        return _Part(member, name, name, "", "", APPLE_DOUBLE if is_apple_double(name) else "bad_name")
    inner, dot, extension = found[1].rpartition(".")
    return _Part(member, found[0], found[0] + dot + inner, found[1], extension)


def _place(part: _Part, images: Collection[str], complete: Collection[str]) -> tuple[str, str]:
    """Return the name of the sample that a member is part of, and its extension there."""
    if part.key in images and part.stem not in complete:
        return part.key, part.tail
    return part.stem, part.extension


def _is_complete(run: Sequence[_Part], done: Collection[str]) -> bool:
    extensions = {part.extension for part in run}
    return (
        run[0].key not in done
        and len(extensions) == len(run)
        and "" not in extensions
        and not extensions.isdisjoint(IMAGE_ENDINGS)
        and not extensions.isdisjoint((*CAPTION_ENDINGS, META))
    )


def _metadata(data: bytes) -> tuple[str, dict[str, Any] | None]:
    """Return metadata as text, and as an object; None if it is not one."""
    try:
        text = decode_text(data)
    except TextError:
        return clean_text(data), None
    # Spaces within values stay; only what is no JSON with its line breaks and NUL is read as one line.
    meta = json_object(text)
    return one_line(text), json_object(one_line(text)) if meta is None else meta


def _caption(files: Sequence[bytes], meta: Mapping[str, Any], names: Sequence[str]) -> str:
    """Return the caption of the first text file, or else of the metadata; TextError if all that there is is no text."""
    problem = None
    for data in files:
        try:
            if caption := caption_text(data):
                return caption
        except TextError as error:
            problem = problem or error
    caption = caption_of(meta, names)
    if problem and not caption:
        raise problem
    return caption


def _further(extension: str, member: Member, data: Mapping[str, bytes]) -> dict[str, Any]:
    about = {"name": readable(member.name), "extension": readable(extension), "size": member.size}
    return {**about, "data": data.get(extension)}
