"""WebDataset tar reader: rows of samples with images as bytes; an invalid sample becomes a row with a problem."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, Any

from .images import IMAGE_ENDINGS, MAX_IMAGE_BYTES
from .metadata import json_object
from .names import Keys, member_name
from .texts import TextError, caption_of, clean_text


def read_samples(stream: IO[bytes], shard: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of one tar, in order: the columns of :data:`.rows.SCHEMA` without ``last``, and ``offset``.

    ``offset`` is the position of the image in the tar (bytes). There is at least one row: a truncated tar ends with a
    row whose problem is ``truncated_shard``, in place of the incomplete sample; one without samples gives
    ``empty_shard``.
    """
    number = 0
    for sample in _samples(stream):
        yield sample.row(shard, number)
        number += 1
    if not number:
        yield FileSample("", problem="empty_shard").row(shard, 0)


def count_samples(stream: IO[bytes]) -> int:
    """Count the samples of a tar by its headers, without reading their contents; up to the damage of a damaged tar."""
    keys: set[str] = set()
    try:
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            keys.update(name[0] for member in tar if (name := member_name(member.name)))
    except tarfile.TarError:
        pass
    return len(keys)


CAPTION_ENDINGS = ("txt", "caption")
"""Extensions of files and tar members that hold a caption, in order of preference."""


@dataclass
class FileSample:
    """Sample whose image, caption and metadata are files or tar members of one name and several extensions."""

    key: str
    parts: dict[str, bytes] = field(default_factory=dict)
    """Contents by lower-case extension."""
    places: dict[str, int] = field(default_factory=dict)
    """Positions in the tar by extension (bytes)."""
    problem: str | None = None
    """Problem of the sample as a whole."""

    def row(self, shard: str, number: int) -> dict[str, Any]:
        """Return the sample as row ``number`` of ``shard``, as :func:`read_samples`."""
        kind = next((t for t in IMAGE_ENDINGS if t in self.parts), "")
        image = self.parts.get(kind)
        meta_text = clean_text(self.parts.get("json", b"{}"))
        meta = json_object(meta_text)
        captions = (clean_text(self.parts.get(ending, b"")) for ending in CAPTION_ENDINGS)
        missing = None
        try:
            caption = next(filter(None, captions), "") or caption_of(meta or {})
            missing = "no_caption" if not caption else "bad_metadata" if meta is None else None
        except TextError:
            caption, missing = "", "bad_caption"
        missing = "no_image" if image is None else missing
        values = {"key": self.key, "shard": shard, "row": number, "problem": self.problem or missing}
        return {
            **values,
            "image": image,
            "caption": caption or None,
            "meta": meta_text,
            "offset": self.places.get(kind),
        }


def _samples(stream: IO[bytes]) -> Iterator[FileSample]:
    """Group consecutive members with the same key into samples; invalid UTF-8 in names is replaced."""
    sample: FileSample | None = None
    keys = Keys()
    try:
        with _Tar.open(fileobj=stream, mode="r|*", encoding="utf-8", errors="replace") as tar:
            for member in tar:
                name = member_name(member.name)
                if name is None or member.isdir():
                    continue
                key, extension = name
                if sample is None or sample.key != key or extension in sample.parts:
                    if sample is not None:
                        yield sample
                    sample = FileSample(key, problem=keys.problem(key))
                if sample.problem == "unsafe_name":
                    continue
                if member.size > MAX_IMAGE_BYTES:
                    sample.problem = "oversized_member"
                elif member.isfile():
                    sample.places[extension] = member.offset_data
                    content = tar.extractfile(member)
                    sample.parts[extension] = content.read() if content else b""
            if tar.ending is not tarfile.EOFHeaderError:  # type: ignore[attr-defined]
                raise EOFError
            if sample is not None:
                yield sample
    except (tarfile.TarError, EOFError, ValueError):
        yield FileSample(sample.key if sample else "", problem="truncated_shard")


class _Member(tarfile.TarInfo):
    @classmethod
    def fromtarfile(cls, tarfile: tarfile.TarFile) -> _Member:
        try:
            return super().fromtarfile(tarfile)
        except Exception as error:
            tarfile.ending = type(error)  # type: ignore[attr-defined]
            raise


class _Tar(tarfile.TarFile):
    """Tar file that records how it ended: the standard class treats a missing end or a broken header as a regular end."""

    tarinfo = _Member
    ending: type[Exception] | None = None
