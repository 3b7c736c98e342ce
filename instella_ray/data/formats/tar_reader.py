"""Members of a tar: names, positions and bytes, bounded by the file whatever its headers claim.

The standard library parses single headers here, but does not iterate: it follows negative sizes backwards, reads headers
of any length into memory, and takes damage for the end of the tar.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

from ...errors import UserError
from .images import MAX_IMAGE_BYTES

MAX_HEADER_BYTES = 1 << 20
"""Maximum size of an extended header, which holds a long name; a larger one is damage."""
COMPRESSIONS = {
    b"\x1f\x8b\x08": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x04\x22\x4d\x18": "lz4",
}
"""First bytes of compressed files."""
COMPRESSED_ENDINGS = {
    **dict.fromkeys((".tar.gz", ".tgz"), "gzip"),
    **dict.fromkeys((".tar.zst", ".tzst"), "zstd"),
    **dict.fromkeys((".tar.bz2", ".tbz2", ".tbz"), "bzip2"),
    **dict.fromkeys((".tar.xz", ".txz"), "xz"),
    ".tar.lz4": "lz4",
}
TRUNCATED, DAMAGED = "truncated_shard", "damaged_shard"
"""Ledger reasons of tars that break off, or have a header that is not one."""
_BLOCK = tarfile.BLOCKSIZE
_END_BLOCK = bytes(_BLOCK)
_PAX, _PAX_GLOBAL = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE), tarfile.XGLTYPE
_WITHOUT_DATA = (tarfile.DIRTYPE, tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)
_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)


@dataclass(slots=True)
class Member:
    """Member of a tar that is not a folder."""

    name: str
    """Name with surrogate escapes for bytes that are not UTF-8."""
    size: int
    """Size of the data (bytes)."""
    offset: int
    """Position of the data in the tar (bytes)."""
    is_file: bool
    """False for links, devices and sparse files, whose bytes are not in the tar as such."""
    data: bytes | None = None
    """The data, if already read."""


class TarReader:
    """Iterates once over the members of a seekable stream, in order, and reads their data.

    After the last member ``damage`` is a ledger reason, or None if the tar is complete. Tars that were concatenated are
    read as one. Raises UserError, naming ``url``, for a compressed tar.
    """

    def __init__(self, stream: IO[bytes], url: str) -> None:
        self.url = url
        self.damage: str | None = None
        self.read_ahead = True
        """Whether members are yielded with their data, up to :data:`.images.MAX_IMAGE_BYTES`, or by headers alone."""
        self._stream, self._end = stream, stream.seek(0, 2)
        self._at = self._end

    def __iter__(self) -> Iterator[Member]:
        try:
            yield from self._members()
        except _DamageError as error:
            self.damage = str(error)

    def read(self, member: Member) -> bytes:
        """Return the data of a member."""
        return self._read(member.offset, member.size) if member.data is None else member.data

    def _members(self) -> Iterator[Member]:
        position, ended = 0, False
        common: dict[str, str] = {}
        extended: dict[str, str] = {}
        while True:
            block = self._read(position, _BLOCK)
            if block == _END_BLOCK:
                position, ended = position + _BLOCK, True
                continue
            try:
                header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            except tarfile.HeaderError:
                if ended:
                    return  # padding behind the end
                if not position:
                    self._refuse_compressed(block)
                raise _DamageError(DAMAGED if len(block) == _BLOCK else TRUNCATED) from None
            position, ended = position + _BLOCK, False
            if header.type == tarfile.GNUTYPE_SPARSE:
                position = self._behind_sparse_headers(position, block)
            if header.type in (*_PAX, _PAX_GLOBAL, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
                data = self._header_data(position, header.size)
                if header.type == _PAX_GLOBAL:
                    common |= _pax_records(data)
                elif header.type in _PAX:
                    extended |= _pax_records(data)
                elif header.type == tarfile.GNUTYPE_LONGNAME:
                    extended["path"] = _text(data.rstrip(b"\0"))
                position = _padded(position, header.size)
                continue
            member = _member(header, {**common, **extended}, position)
            extended = {}
            if not 0 <= member.size <= self._end - position:
                raise _DamageError(DAMAGED if member.size < 0 else TRUNCATED)
            if member.is_file and self.read_ahead and member.size <= MAX_IMAGE_BYTES:
                member.data = self._read(position, member.size)
            if header.type != tarfile.DIRTYPE:
                yield member
            position = _padded(position, member.size)

    def _refuse_compressed(self, start: bytes) -> None:
        if kind := next((kind for magic, kind in COMPRESSIONS.items() if start.startswith(magic)), None):
            raise compressed_error(self.url, kind)

    def _header_data(self, position: int, size: int) -> bytes:
        if not 0 <= size <= MAX_HEADER_BYTES:
            raise _DamageError(DAMAGED)
        if size > self._end - position:
            raise _DamageError(TRUNCATED)
        return self._read(position, size)

    def _behind_sparse_headers(self, position: int, block: bytes) -> int:
        more = block[482]
        while more:
            block = self._header_data(position, _BLOCK)
            position, more = position + _BLOCK, block[504]
        return position

    def _read(self, position: int, size: int) -> bytes:
        if self._at != position:
            self._stream.seek(position)
        data = self._stream.read(size)
        self._at = position + len(data)
        return data


def compressed_error(url: str, kind: str) -> UserError:
    """Return the error of a compressed tar."""
    return UserError(f"{url}: a tar compressed with {kind}; decompress it first, because images are read by position")


class _DamageError(Exception):
    """Header that is not one, or data beyond the end of the file; the message is a ledger reason."""


def _member(header: tarfile.TarInfo, extended: dict[str, str], position: int) -> Member:
    size = 0 if header.type in _WITHOUT_DATA else header.size
    if header.type not in _WITHOUT_DATA and (given := extended.get("size")):
        if not re.fullmatch("[0-9]{1,20}", given):
            raise _DamageError(DAMAGED)
        size = int(given)
    sparse = any(key.startswith("GNU.sparse.") for key in extended)
    name = extended.get("GNU.sparse.name") or extended.get("path") or header.name
    return Member(name, size, position, header.type in _FILES and not sparse)


def _pax_records(data: bytes) -> dict[str, str]:
    """Parse the records ``LENGTH KEY=VALUE\\n`` of an extended header."""
    records: dict[str, str] = {}
    while data.rstrip(b"\0"):
        length, space, _ = data.partition(b" ")
        if not (space and length.isdigit() and len(length) < 8 and 0 < int(length) <= len(data)):
            raise _DamageError(DAMAGED)
        record, data = data[len(length) + 1 : int(length)], data[int(length) :]
        key, equals, value = record.partition(b"=")
        if not equals or not value.endswith(b"\n"):
            raise _DamageError(DAMAGED)
        records[_text(key)] = _text(value[:-1])
    return records


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def _padded(position: int, size: int) -> int:
    """Return the position behind data of ``size`` bytes, padded to whole blocks."""
    return position + -(-size // _BLOCK) * _BLOCK
