"""Prompts come from any of the files that people have, however many they hold, and bad ones are named in one line."""

from __future__ import annotations

import csv
import datetime
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from instella_ray.data.prompts import Prompt, prompts_hash, read_prompts
from instella_ray.errors import UserError

GENEVAL = {"tag": "colors", "include": [{"class": "bus", "count": 1, "color": "red"}], "prompt": "a photo of a red bus"}


def test_every_format_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a cat\n\n  a dog \n")
    (tmp_path / "a.jsonl").write_text(
        json.dumps(GENEVAL) + "\n\n" + json.dumps({"caption": "x", "id": 7, "n": 1}) + "\n"
    )
    pq.write_table(pa.table({"key": ["k"], "caption_long": ["long"], "width": [3]}), tmp_path / "a.parquet")
    annotations = [{"id": i, "image_id": 10 + i, "caption": f"caption {i}"} for i in range(50)]
    (tmp_path / "a.json").write_text(json.dumps({"annotations": annotations}))
    assert read_prompts(str(tmp_path / "a.txt")) == [Prompt("00000", "a cat"), Prompt("00001", "a dog")]
    bus, x = read_prompts(str(tmp_path / "a.jsonl"))
    assert (bus.id, bus.text, bus.category) == ("00000", "a photo of a red bus", "colors")
    assert bus.meta == {"tag": "colors", "include": GENEVAL["include"]}
    assert x == Prompt("7", "x", meta={"n": 1})
    assert read_prompts(str(tmp_path / "a.parquet")) == [Prompt("k", "long", meta={"width": 3})]
    coco = read_prompts(str(tmp_path / "a.json"))
    assert len(coco) == 50 and coco[3] == Prompt("3", "caption 3", meta={"image_id": 13})
    (tmp_path / "b.json").write_text(json.dumps([{"id": "000904-0035", "prompt": "a bird"}]))
    assert read_prompts(str(tmp_path / "b.json")) == [Prompt("000904-0035", "a bird")]


def test_each_text_can_be_taken_once(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["a", "b", "a", "c", "b"], "seed": [1, 2, 3, 4, 5]}), tmp_path / "a.parquet")
    every, once = (read_prompts(str(tmp_path / "a.parquet"), distinct=distinct) for distinct in (False, True))
    assert [p.text for p in every] == ["a", "b", "a", "c", "b"]
    assert [(p.id, p.text, p.meta["seed"]) for p in once] == [("00000", "a", 1), ("00001", "b", 2), ("00003", "c", 4)]
    assert {p.text for p in read_prompts(str(tmp_path / "a.parquet"), distinct=True, count=3)} == {"a", "b", "c"}


def test_a_draw_depends_on_seed_and_id_and_not_on_the_file(tmp_path: Path) -> None:
    rows = [{"id": f"p{i}", "prompt": f"text {i}"} for i in range(30)]
    for name, order in (("a", rows), ("b", rows[::-1])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, order)))
    a, b = (read_prompts(str(tmp_path / f"{n}.jsonl"), count=10, seed=4) for n in "ab")
    assert {p.id for p in a} == {p.id for p in b} and len(a) == 10
    assert {p.id for p in read_prompts(str(tmp_path / "a.jsonl"), count=10, seed=5)} != {p.id for p in a}
    assert {p.id for p in a} < {p.id for p in read_prompts(str(tmp_path / "a.jsonl"), count=20, seed=4)}
    assert prompts_hash(a) != prompts_hash(b) and prompts_hash(a) == prompts_hash(b[::-1])


def test_scenes_take_from_all_categories_alike() -> None:
    prompts = read_prompts("scenes", count=14, seed=1)
    assert len({p.category for p in prompts[:6]}) == 6 and len(prompts) == 14
    assert len(read_prompts("scenes")) == 240


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "\n\n", "none found"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": ', "a.jsonl, line 2: not valid JSON"),
        ("a.jsonl", "[1]", "line 1: expected an object"),
        ("a.json", "[1]", "entry 0: expected an object with a prompt, got int"),
        ("a.jsonl", '{"id": 3}', "line 1: no prompt, expected one of prompt, caption"),
        ("a.jsonl", '{"id": 3, "prompt": "a"}\n{"id": "3", "prompt": "b"}', "duplicate id '3'"),
        ("a.json", "{}", "expected COCO's captions file"),
        ("a.json", '{"annotations": [{"id": 1}]}', "without id, image_id and caption"),
        ("a.parquet", "no", "not a parquet file"),
        ("a.doc", "no", "expected a .txt, .jsonl, .csv, .tsv, .parquet, .json file"),
    ],
)
def test_bad_prompts_are_one_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as refused:
        read_prompts(str(tmp_path / name))
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_more_prompts_than_there_are_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo")
    with pytest.raises(UserError, match="2 found, expected at least count=3"):
        read_prompts(str(tmp_path / "a.txt"), count=3)
    with pytest.raises(UserError, match="no such file"):
        read_prompts(str(tmp_path / "none.txt"))


def test_diffusiondb_is_read_as_it_is(tmp_path: Path) -> None:
    moment = datetime.datetime(2022, 8, 20, 12, 30, tzinfo=datetime.UTC)
    columns = {
        "image_name": ["a.png", "b.png", "c.png"],
        "prompt": ["a cat ", " ", "a cat"],
        "seed": pa.array([1, 2, 3], pa.uint32()),
        "step": pa.array([50, 50, 50], pa.uint16()),
        "cfg": pa.array([7.0, 7.5, 8.0], pa.float32()),
        "sampler": pa.array([8, 8, 8], pa.uint8()),
        "width": pa.array([512, 512, 512], pa.uint16()),
        "timestamp": pa.array([moment] * 3, pa.timestamp("ns", "UTC")),
        "image_nsfw": pa.array([0.0, 2.0, 0.5], pa.float32()),
    }
    pq.write_table(pa.table(columns), tmp_path / "metadata.parquet")
    first, last = read_prompts(str(tmp_path / "metadata.parquet"))
    # The blank one is passed over, and takes no number from the others.
    assert (first.id, first.text, last.id, last.text) == ("00000", "a cat", "00002", "a cat")
    assert first.meta["timestamp"] == moment.isoformat()
    assert first.meta["cfg"] == 7.0 and first.meta["image_name"] == "a.png"
    assert len(prompts_hash([first, last])) == 64


def test_what_no_file_can_hold_is_cleaned_away_and_what_a_line_may_hold_stays(tmp_path: Path) -> None:
    line = json.dumps({"prompt": "a\u2028b"}, ensure_ascii=False)
    (tmp_path / "a.jsonl").write_text('{"prompt": "half \\ud83d", "id": "\\ud83d"}\n' + line, encoding="utf-8")
    assert [(p.id, p.text) for p in read_prompts(str(tmp_path / "a.jsonl"))] == [("?", "half ?"), ("00001", "a\u2028b")]
    (tmp_path / "a.txt").write_bytes(b"fine\n\xff\xfe\n")
    with pytest.raises(UserError, match=r"a\.txt, line 2: not UTF-8 text"):
        read_prompts(str(tmp_path / "a.txt"))


def test_the_first_key_that_holds_a_text_is_the_prompt(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "text": 7}, {"prompt": 7, "caption": "b"}, {"prompt": ["", "c"]}, {"prompt": None}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert [p.text for p in read_prompts(str(tmp_path / "a.jsonl"))] == ["a", "b", "c"]
    (tmp_path / "b.jsonl").write_text('{"prompt": {"en": "a"}}')
    with pytest.raises(UserError, match=r"line 1: no prompt \('prompt' is a object, expected text\), expected one of"):
        read_prompts(str(tmp_path / "b.jsonl"))


def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa cat\n")
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "a cat"}')
    assert [read_prompts(str(tmp_path / name))[0].text for name in ("a.txt", "a.jsonl")] == ["a cat", "a cat"]


def test_parquet_prompts_are_read_as_far_as_they_are_utf8(tmp_path: Path) -> None:
    texts = pa.Array.from_buffers(pa.string(), 1, pa.array([b"caf\xe9"]).buffers())
    pq.write_table(pa.table({"prompt": texts, "n": [1]}), tmp_path / "a.parquet")
    (prompt,) = read_prompts(str(tmp_path / "a.parquet"))
    assert prompt.text == "caf\ufffd" and prompt.meta == {"n": 1}


def test_images_beside_prompts_are_no_metadata(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["a"], "image": [b"\x89PNG"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"row 0: value that JSON cannot represent in one of image"):
        read_prompts(str(tmp_path / "a.parquet"))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_texts_of_any_encoding_with_a_mark_and_any_line_ends_are_the_same_prompts(
    tmp_path: Path, encoding: str, end: str
) -> None:
    (tmp_path / "a.txt").write_bytes(end.join(["a red cat", "", "a blue dog", ""]).encode(encoding))
    (tmp_path / "a.CSV").write_bytes(end.join(["Prompt,n", '"a red cat",1', "", "a blue dog,2"]).encode(encoding))
    for name in ("a.txt", "a.CSV"):
        found = [(p.id, p.text) for p in read_prompts(str(tmp_path / name))]
        assert found == [("00000", "a red cat"), ("00001", "a blue dog")]


def test_tables_of_benchmarks_are_read_as_published(tmp_path: Path) -> None:
    (tmp_path / "parti.tsv").write_text("Prompt\tCategory\tChallenge\tNote\nbond\tAbstract\tBasic\tx\n")
    assert read_prompts(str(tmp_path / "parti.tsv")) == [
        Prompt("00000", "bond", "Abstract", {"Challenge": "Basic", "Note": "x"})
    ]
    (tmp_path / "drawbench.csv").write_text('Prompts,Category\n"a red car, parked",Colors\n')
    assert read_prompts(str(tmp_path / "drawbench.csv")) == [Prompt("00000", "a red car, parked", "Colors")]
    (tmp_path / "long.csv").write_text("prompt\n" + "word " * 50_000)
    limit = csv.field_size_limit()
    assert len(read_prompts(str(tmp_path / "long.csv"))[0].text) == 249_999
    assert csv.field_size_limit() == limit


def test_rows_without_a_prompt_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.csv").write_text("id,prompt\n1,\n2,nan\n3,\"['a cat', 'a pet']\"\n4,7\n")
    assert [(p.id, p.text) for p in read_prompts(str(tmp_path / "a.csv"))] == [("3", "a cat"), ("4", "7")]
    assert "2 of 4 rows have none and are passed over, first: " in caplog.text and "a.csv, line 2" in caplog.text
    rows = {"prompt": [["a", "b"], None, []], "id": [1.0, float("nan"), 2.0], "tags": [["x"], None, ["y"]]}
    pq.write_table(pa.table({**rows, "place": [{"x": float("nan")}] * 3}), tmp_path / "a.parquet")
    assert read_prompts(str(tmp_path / "a.parquet")) == [Prompt("1.0", "a", meta={"tags": ["x"], "place": {"x": None}})]
    assert "2 of 3 rows" in caplog.text
    annotations = [{"id": 1, "image_id": 2, "caption": text} for text in (None, ["", "x"])]
    (tmp_path / "a.json").write_bytes(json.dumps({"annotations": annotations}).encode("utf-8-sig"))
    assert read_prompts(str(tmp_path / "a.json")) == [Prompt("1", "x", meta={"image_id": 2})]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"ok\n" * 9000 + b"\x89PNG\n", "line 9001: not UTF-8 text"),
        ("a.txt", b"one\ntwo\0\n", "line 2: a NUL character, expected text"),
        ("a.txt", b"\xff\xfea\0\x00\xd8", "not UTF-16 text"),
        ("a.csv", b"id;prompt\n1;x\n", "line 2: no prompt, expected one of prompt, .*; found id;prompt"),
        ("a.csv", b"id,prompt\n1,a,b\n", "line 2: 3 values, expected at most 2"),
        ("a.csv", b'id,prompt\n1,"a\n2,b\n', "line 3: not a row of a table"),
        ("a.tsv", b"", "none found"),
        ("a.jsonl", b'{"prompt": "a", "id": {"n": 1}}', "line 1: 'id' is a object, expected text or a number"),
        ("a.jsonl", b'{"prompt": ' + b"[" * 100_000, "line 1: not valid JSON"),
        ("a.json", b'{"annotations": ' + b"[" * 100_000, "not valid JSON"),
        (
            "a.json",
            b'{"annotations": [{"id": 1, "image_id": 1, "caption": 5}]}',
            "annotation 0: .*'caption' is a number",
        ),
        ("a.parquet", b"", "not a parquet file"),
    ],
)
def test_what_holds_no_prompts_is_named_with_its_place(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message) as refused:
        read_prompts(str(tmp_path / name))
    assert "\n" not in str(refused.value) and name in str(refused.value)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet", "a.json"])
def test_a_folder_is_no_file_of_prompts(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match="a folder, expected a file"):
        read_prompts(str(tmp_path / name))


def test_categories_and_metadata_can_be_written_whatever_they_hold(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "category": ["x", "y"], "odd": "\ud83d", "n": [float("nan")]},
        {"prompt": "b", "category": {"n": 1}, "tag": None},
        {"prompt": "c", "tag": "\ud83d"},
        {"prompt": "\ufeffd", "tag": 7},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    a, b, c, d = read_prompts(str(tmp_path / "a.jsonl"))
    assert (a.category, a.meta) == ("x", {"odd": "?", "n": [None]})
    assert (b.category, b.meta) == (None, {"category": {"n": 1}, "tag": None})
    assert (c.category, c.meta) == ("?", {"tag": "?"}) and (d.text, d.category) == ("d", "7")
