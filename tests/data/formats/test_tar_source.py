"""Samples of tars: every member is part of one row, in any order and under any name."""

from __future__ import annotations

import io
import tarfile
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instella_ray.data.formats import tar_source
from instella_ray.data.formats.tar_source import count_samples, read_samples

from ...kit.shards import Members, image_bytes, sample, tar_bytes

IMAGE = image_bytes()


def rows(members: Members | bytes, **options: Any) -> list[dict[str, Any]]:
    data = members if isinstance(members, bytes) else tar_bytes(members)
    found = list(read_samples(io.BytesIO(data), "shard", **options))
    assert [row["row"] for row in found] == list(range(len(found)))
    if found[0]["problem"] not in ("empty_shard", "truncated_shard", "damaged_shard"):
        assert count_samples(io.BytesIO(data), "shard") == len(found)
    for row in found:
        if row["image"]:
            assert data[row["offset"] :].startswith(row["image"])
    return found


def verdicts(members: Members) -> list[tuple[str, str | None]]:
    return [(row["key"], row["problem"]) for row in rows(members)]


def pair(name: str, number: int = 0, kind: str = "jpg") -> Members:
    return [(f"{name}.{kind}", IMAGE + b"%d" % number), (f"{name}.txt", f"caption {number}".encode())]


# --- names


def test_dots_in_names_do_not_join_samples() -> None:
    names = [f"img_v{i // 10}.{i % 10}" for i in range(20)]
    found = rows([m for i, name in enumerate(names) for m in pair(name, i, "png")])
    assert [row["key"] for row in found] == [name.replace(".", "%2E") for name in names]
    assert [row["caption"] for row in found] == [f"caption {i}" for i in range(20)]
    assert [row["image"] for row in found] == [IMAGE + b"%d" % i for i in range(20)]
    assert [row["problem"] for row in found] == [None] * 20
    assert [row["meta"] for row in found][:1] == ['{"original_key": "img_v0.0"}']


def test_names_with_and_without_dots_are_told_apart() -> None:
    members = [m for i, name in enumerate(("cat", "cat.2", "dog.1", "22.05", "eel..x")) for m in pair(name, i)]
    for given_members in (members, sorted(members), members[::-1]):
        found = {row["key"]: (row["caption"], row["problem"]) for row in rows(given_members)}
        keys = ("cat", "cat%2E2", "dog%2E1", "22%2E05", "eel%2E%2Ex")
        assert found == {key: (f"caption {i}", None) for i, key in enumerate(keys)}


@pytest.mark.parametrize("text", ["txt", "json"])
def test_extensions_of_several_parts_stay_with_their_sample(text: str) -> None:
    caption = b"a dog" if text == "txt" else b'{"caption": "a dog"}'
    members = [
        (f"{i}.{e}", d)
        for i in "ab"
        for e, d in (("depth.npy", b"d"), ("jpg", IMAGE), ("seg.png", b"s"), (text, caption))
    ]
    found = rows(members)
    assert [(row["key"], row["caption"], row["problem"]) for row in found] == [
        ("a", "a dog", None),
        ("b", "a dog", None),
    ]
    assert [[(m["name"], m["extension"], m["size"], m["data"]) for m in row["members"]] for row in found] == [
        [(f"{i}.depth.npy", "depth.npy", 1, b"d"), (f"{i}.seg.png", "seg.png", 1, b"s")] for i in "ab"
    ]


def test_members_that_are_no_part_of_a_sample_are_rows_with_their_bytes() -> None:
    members = [("README", b"read me"), *sample("a"), (".hidden", b"h"), ("x/.jpg", b"j"), ("b.npy", b"n"), *sample("c")]
    found = rows(members)
    assert [(row["key"], row["problem"]) for row in found] == [
        ("README", "bad_name"),
        ("a", None),
        ("%2Ehidden", "bad_name"),
        ("x/%2Ejpg", "bad_name"),
        ("b", "no_image"),
        ("c", None),
    ]
    assert [[m["data"] for m in row["members"]] for row in found] == [[b"read me"], [], [b"h"], [b"j"], [b"n"], []]


def test_attributes_of_macos_are_told_from_images() -> None:
    members = [
        m for i in range(2) for name, data in sample(f"./{i}") for m in ((f"./._{name[2:]}", b"x"), (name, data))
    ]
    assert Counter(row["problem"] for row in rows(members)) == {"apple_double": 6, None: 2}


def test_folders_are_passed_over_and_links_are_not_files() -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        kinds = {
            "d": tarfile.DIRTYPE,
            "soft.jpg": tarfile.SYMTYPE,
            "hard.jpg": tarfile.LNKTYPE,
            "pipe.jpg": tarfile.FIFOTYPE,
        }
        for name, kind in kinds.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "a.jpg"
            tar.addfile(info)
        for name, data in sample("a"):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    found = rows(buffer.getvalue())
    assert [(row["key"], row["problem"]) for row in found] == [
        ("soft", "not_a_file"),
        ("hard", "not_a_file"),
        ("pipe", "not_a_file"),
        ("a", None),
    ]
    assert found[0]["members"] == [{"name": "soft.jpg", "extension": "jpg", "size": 0, "data": None}]


def test_names_that_lead_out_of_a_folder_keep_their_bytes() -> None:
    for name in ("../../a", "/etc/a"):
        (row,) = rows(pair(name))
        assert (row["problem"], row["image"]) == ("unsafe_name", IMAGE + b"0")
        assert [member["data"] for member in row["members"]] == [b"caption 0"]


# --- order


def test_a_tar_of_images_and_then_captions_is_joined() -> None:
    members = [m for i in range(5) for m in sample(f"{i}", i, caption=f"caption {i}", n=i)]
    images, rest = [m for m in members if m[0].endswith("jpg")], [m for m in members if not m[0].endswith("jpg")]
    expected = [{**row, "offset": None} for row in rows(members)]
    for given_members in (images + rest, rest[::-1] + images, sorted(members, key=lambda m: m[0][::-1])):
        found = sorted(({**row, "offset": None} for row in rows(given_members)), key=lambda row: row["key"])
        assert [{**row, "row": i} for i, row in enumerate(found)] == expected


def test_a_member_that_comes_after_its_sample_has_ended_is_refused_as_unsorted() -> None:
    found = rows([*pair("a"), *pair("b"), ("a.json", b'{"punsafe": 1}')])
    assert [(row["key"], row["problem"]) for row in found] == [("a", None), ("b", None), ("a", "unsorted_shard")]
    assert [member["data"] for member in found[2]["members"]] == [b'{"punsafe": 1}']


def test_a_sample_that_comes_again_is_a_duplicate_with_its_bytes() -> None:
    for members in ([*pair("a", 1), *pair("b"), *pair("a", 2)], [*pair("a", 1), *pair("a", 2), *pair("b")]):
        found = {row["problem"]: row for row in rows(members) if row["key"] == "a"}
        assert found[None]["image"] == IMAGE + b"1" and found["duplicate_key"]["image"] == IMAGE + b"2"
        assert [member["data"] for member in found["duplicate_key"]["members"]] == [b"caption 2"]


def test_a_name_may_come_any_number_of_times() -> None:
    found = rows([("a.jpg", b"")] * 1000 + pair("b"))
    assert Counter(row["problem"] for row in found) == {"no_caption": 1, "duplicate_key": 999, None: 1}


PARTS = st.tuples(
    st.sampled_from(["a", "b", "a.b", "a.b.c", "d/a", "d.e/a", "../a", "._a"]),
    st.sampled_from(["", ".jpg", ".png", ".JPG", ".txt", ".json", ".npy", ".seg.png"]),
)


@given(st.lists(PARTS, max_size=12))
def test_every_member_is_part_of_one_row(parts: list[tuple[str, str]]) -> None:
    members = [(name + extension, b"%d" % number) for number, (name, extension) in enumerate(parts)]
    found = rows(members)
    held = [member["data"] for row in found for member in row.get("members", [])]
    held += [row["image"] for row in found if row["image"]]
    held += [row["caption"].encode() for row in found if not row["problem"]]
    assert sorted(held) == sorted(data for _, data in members)


# --- texts and metadata


@pytest.mark.parametrize(
    ("members", "caption", "problem"),
    [
        ([("a.txt", "caf\u00e9".encode("latin-1"))], "caf\u00e9", None),
        ([("a.txt", "a dog".encode("utf-16"))], "a dog", None),
        ([("a.txt", b"\xef\xbb\xbfa dog")], "a dog", None),
        ([("a.txt", IMAGE)], None, "bad_caption"),
        ([("a.txt", b"nan")], None, "no_caption"),
        ([("a.txt", b"['a dog', 'a brown dog']")], "a dog", None),
        ([("a.txt", b""), ("a.json", b'{"TEXT": "a dog"}')], "a dog", None),
        ([("a.json", b'{"caption": ["a dog", "a brown dog"]}')], "a dog", None),
        ([("a.json", b'{"caption": NaN, "alt_text": "a dog"}')], "a dog", None),
        ([("a.json", b'{"caption": {"en": "a dog"}}')], None, "bad_caption"),
        ([("a.json", b'{"caption": NaN}')], None, "no_caption"),
        ([("a.json", '{"caption": "a dog"}'.encode("utf-16"))], "a dog", None),
        ([("a.json", '{"caption": "caf\u00e9"}'.encode("latin-1"))], "caf\u00e9", None),
        ([("a.txt", b"a dog"), ("a.json", IMAGE)], "a dog", "bad_metadata"),
    ],
)
def test_captions_are_texts_or_refused(members: Members, caption: str | None, problem: str | None) -> None:
    (row,) = rows([("a.jpg", IMAGE), *members])
    assert (row["caption"], row["problem"]) == (caption, problem)
    if problem:
        assert [member["data"] for member in row["members"]] == [data for _, data in members]


def test_names_of_captions_can_be_chosen() -> None:
    members = [("a.jpg", IMAGE), ("a.json", b'{"caption": "one", "vlm_caption": "two"}')]
    (row,) = rows(members, caption_keys=("VLM_caption",))
    assert row["caption"] == "two"


def test_metadata_goes_out_without_nan_and_with_names_in_lower_case() -> None:
    (row,) = rows([*pair("a"), ("a.json", b'{"PUNSAFE": "0.9", "Similarity": NaN, "LICENSE": "CC"}')])
    assert row["meta"] == '{"punsafe": "0.9", "similarity": null, "LICENSE": "CC"}'


# --- sizes


def test_what_is_too_large_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar_source, "MAX_IMAGE_BYTES", 100)
    monkeypatch.setattr(tar_source, "MAX_SAMPLE_BYTES", 150)
    large, many = (
        [("a.jpg", bytes(101)), ("a.txt", b"large")],
        [("b.jpg", bytes(90)), ("b.npy", bytes(90)), ("b.txt", b"many")],
    )
    found = rows([*large, *many, ("c.jpg", bytes(90)), ("c.txt", b"fits")])
    assert [row["problem"] for row in found] == ["oversized_member", "oversized_member", None]
    assert found[0]["members"][0] == {"name": "a.jpg", "extension": "jpg", "size": 101, "data": None}
    assert [member["size"] for member in found[1]["members"]] == [90, 4]
