"""Headers of tars: damage ends a tar with a reason, whatever is damaged, and costs neither the job nor its time."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instella_ray.data.formats import tar_reader
from instella_ray.data.formats.sources import count_rows, find_inputs, read_blocks, read_rows
from instella_ray.data.formats.tar_index import read_index
from instella_ray.data.formats.tar_reader import TarReader
from instella_ray.data.formats.tar_source import count_samples, read_samples
from instella_ray.data.loading.image_data import ImageData
from instella_ray.errors import UserError
from instella_ray.evaluation.units import find_image_set

from ...kit.shards import image_bytes, sample, tar_bytes

WHOLE = tar_bytes([member for i in range(4) for member in sample(f"{i}", i)])


def rows(data: bytes) -> list[dict[str, Any]]:
    return list(read_samples(io.BytesIO(data), "shard"))


def header_of(name: str) -> int:
    return WHOLE.index(name.encode() + b"\0")


def with_header(name: str, change: Callable[[bytearray], None]) -> bytes:
    """The tar with the header of a member changed, and its checksum made right again."""
    data, start = bytearray(WHOLE), header_of(name)
    header = data[start : start + 512]
    change(header)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    data[start : start + 512] = header
    return bytes(data)


def sized(size: bytes) -> bytes:
    def change(header: bytearray) -> None:
        header[124:136] = size.ljust(12, b"\0")

    return with_header("1.jpg", change)


def pax(*records: bytes, size: int | None = None) -> bytes:
    """The tar with an extended header before the second sample."""
    body = b"".join(records)
    header = tarfile.TarInfo("pax").create_ustar_header(
        {**tarfile.TarInfo("pax").get_info(), "type": tarfile.XHDTYPE, "size": len(body) if size is None else size},
        "utf-8",
        "strict",
    )
    start = header_of("1.jpg")
    return WHOLE[:start] + header + body.ljust(-(-len(body) // 512) * 512, b"\0") + WHOLE[start:]


NEGATIVE = b"\xff" * 11 + b"\x00"
HUGE = b"\x80" + b"\x7f" * 11
BROKEN = {
    "negative base-256 size": (sized(NEGATIVE), "damaged_shard"),
    "huge base-256 size": (sized(HUGE), "truncated_shard"),
    "size of letters": (sized(b"sixteen"), "damaged_shard"),
    "size beyond the end": (sized(b"77777777777"), "truncated_shard"),
    "wrong checksum": (WHOLE.replace(b"1.jpg\0", b"7.jpg\0", 1), "damaged_shard"),
    "pax length of zero": (pax(b"0 path=x\n"), "damaged_shard"),
    "pax length beyond its header": (pax(b"999 path=x\n"), "damaged_shard"),
    "pax length of letters": (pax(b"xx path=x\n"), "damaged_shard"),
    "pax record without a value": (pax(b"7 path\n"), "damaged_shard"),
    "pax size below zero": (pax(b"11 size=-5\n"), "damaged_shard"),
    "pax size beyond the end": (pax(b"18 size=999999999\n"), "truncated_shard"),
    "pax header without end": (pax(b"12 path=xxx\n", size=0o7777777777), "damaged_shard"),
    "web page": (b"<html>" + b"gone" * 500, "damaged_shard"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_damaged_header_ends_its_tar_with_a_reason(name: str) -> None:
    data, reason = BROKEN[name]
    found = rows(data)
    assert found[-1]["problem"] == reason and [row["problem"] for row in found[:-1]] == [None] * (len(found) - 1)
    assert [row["key"] for row in found[:-1]] == ["0"][: len(found) - 1]
    assert count_samples(io.BytesIO(data), "shard") <= len(found)


def test_the_sample_that_a_damage_cuts_keeps_its_bytes() -> None:
    data = WHOLE[: header_of("1.json") + 513]
    last = rows(data)[-1]
    assert (last["key"], last["problem"], last["image"]) == ("1", "truncated_shard", image_bytes(1))
    assert [member["data"] for member in last["members"]] == [b"a smooth image"]


def test_pax_headers_that_are_in_order_are_read() -> None:
    size = b"13 size=%d\n" % len(image_bytes(1))
    for record, key in ((b"17 path=long.jpg\n", "long"), (b"20 comment=anything\n", "1"), (size, "1")):
        row = next(row for row in rows(pax(record)) if row["key"] == key)
        assert row["image"] == image_bytes(1)


def test_tars_that_were_concatenated_are_read_as_one() -> None:
    other = tar_bytes(sample("other"))
    assert [row["key"] for row in rows(WHOLE + other)] == ["0", "1", "2", "3", "other"]
    assert [row["problem"] for row in rows(WHOLE + b"padding" * 300)] == [None] * 4


def test_an_extended_header_of_any_length_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar_reader, "MAX_HEADER_BYTES", 100)
    assert rows(pax(b"200 path=" + b"x" * 190 + b"\n"))[-1]["problem"] == "damaged_shard"


@given(st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_flipped_bytes_never_stop_a_run(flips: list[tuple[int, int]]) -> None:
    data = bytearray(WHOLE)
    for place, value in flips:
        data[place] = value
    check_any(bytes(data))


def check_any(data: bytes) -> None:
    try:
        found = rows(data)
    except UserError as error:  # the first bytes of a compressed file
        assert "compressed" in str(error)
        return
    assert found and [row["row"] for row in found] == list(range(len(found)))
    for row in found:
        assert row["offset"] is None or data[row["offset"] :].startswith(row["image"])
    reader = TarReader(io.BytesIO(data), "x")
    members = list(reader)
    assert all(0 <= member.offset <= member.offset + member.size <= len(data) for member in members)
    assert [member.offset for member in members] == sorted({member.offset for member in members})


HEADER = st.builds(
    lambda name, size, kind, magic: header(name, size, kind, magic),
    st.binary(max_size=100),
    st.one_of(st.sampled_from([b"0", b"5", b"1000", b"77777777777", b"-1", NEGATIVE, HUGE]), st.binary(max_size=12)),
    st.sampled_from([bytes([kind]) for kind in b"\x0001234567gxXLKSDVM"]),
    st.sampled_from([b"ustar\x0000", b"ustar  \0", bytes(8)]),
)
RECORD = st.builds(
    lambda length, key, value: b"%d %s=%s\n" % (length, key, value),
    st.integers(0, 40),
    st.sampled_from([b"path", b"size", b"linkpath", b"GNU.sparse.major", b"GNU.sparse.map", b"hdrcharset", b""]),
    st.one_of(st.sampled_from([b"5", b"-5", b"9" * 30, b"1,2", b"BINARY"]), st.binary(max_size=12)),
)
BLOCK = st.one_of(
    HEADER,
    st.lists(RECORD, max_size=4).map(lambda records: b"".join(records)[:512].ljust(512, b"\0")),
    st.binary(max_size=512).map(lambda data: data.ljust(512, b"\0")),
    st.just(bytes(512)),
)


def header(name: bytes, size: bytes, kind: bytes, magic: bytes) -> bytes:
    """A header with the right checksum, and anything else."""
    data = bytearray(512)
    data[: len(name)] = name
    data[100:124] = b"0000644\0" * 3
    data[124:136] = size.ljust(12, b"\0")
    data[136:148] = b"00000000000\0"
    data[156:157] = kind
    data[257:265] = magic
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data)
    return bytes(data)


@given(st.lists(BLOCK, max_size=12).map(b"".join), st.integers(0, 511))
def test_headers_of_any_kind_never_stop_a_run(data: bytes, cut: int) -> None:
    check_any(data[: len(data) - cut])


@pytest.mark.nightly
def test_a_minute_of_headers_and_flipped_bytes() -> None:
    began = time.monotonic()
    blocks = st.lists(st.one_of(BLOCK, st.sampled_from([WHOLE[i : i + 512] for i in range(0, 8192, 512)])), max_size=40)

    @settings(max_examples=1000, deadline=None, database=None)
    @given(blocks.map(b"".join), st.lists(st.tuples(st.integers(0, 1 << 15), st.integers(0, 255)), max_size=4))
    def fuzz(data: bytes, flips: list[tuple[int, int]]) -> None:
        changed = bytearray(data)
        for place, value in flips:
            if place < len(changed):
                changed[place] = value
        check_any(bytes(changed))

    while time.monotonic() - began < 60:
        fuzz()


# --- compressed tars


@pytest.fixture
def packed(tmp_path: Path) -> Callable[[str, bytes], Path]:
    def write(name: str, data: bytes) -> Path:
        path = tmp_path / "in" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        return path

    return write


ZSTD = b"\x28\xb5\x2f\xfd\x24\x00" + bytes(600)
PACKED = {"gzip": gzip.compress(WHOLE), "bzip2": bz2.compress(WHOLE), "xz": lzma.compress(WHOLE), "zstd": ZSTD}


@pytest.mark.parametrize("kind", PACKED)
def test_a_tar_that_is_compressed_inside_is_refused_by_every_reader(packed: Callable[..., Path], kind: str) -> None:
    path = str(packed("a.tar", PACKED[kind]))
    readers: list[Callable[[], object]] = [
        lambda: list(read_rows(path, "a")),
        lambda: list(read_blocks(path, "a", 10)),
        lambda: count_rows(path),
        lambda: read_index(path),
        lambda: ImageData(path, (16,), 0),
        lambda: find_image_set(path, 10),
    ]
    for read in readers:
        with pytest.raises(UserError, match=rf"a\.tar: a tar compressed with {kind}; decompress it first") as found:
            read()
        assert "\n" not in str(found.value)


@pytest.mark.parametrize(("name", "kind"), [("a.tar.gz", "gzip"), ("a.tgz", "gzip"), ("a.tar.zst", "zstd")])
def test_a_compressed_tar_is_refused_by_its_name(packed: Callable[..., Path], name: str, kind: str) -> None:
    path = packed(name, b"")
    packed("b.tar", WHOLE)
    searches: list[Callable[[], object]] = [
        lambda: find_inputs(str(path)),
        lambda: find_inputs(str(path.parent)),
        lambda: find_inputs(str(path.parent / "*")),
        lambda: find_image_set(str(path), 10),
        lambda: find_image_set(str(path.parent), 10),
    ]
    for search in searches:
        with pytest.raises(UserError, match=rf"{name}: a tar compressed with {kind}; decompress it first"):
            search()
    assert list(find_inputs(f"{path.parent}/*.tar").shards) == [f"{path.parent}/b.tar"]


def test_a_file_name_that_looks_like_a_compressed_file_is_a_name() -> None:
    assert [row["key"] for row in rows(tar_bytes(sample("BZh1")))] == ["BZh1"]
