"""The encoding job: codes are the tokenizer's own, rows keep their lineage, foreign sizes and outputs are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from instella_ray.data.encode import EncodeConfig, run_encode
from instella_ray.data.formats.codes import CodesReader
from instella_ray.data.formats.images import decode_rgb, fit_square, to_tensor
from instella_ray.data.formats.patterns import shard_label
from instella_ray.data.formats.shards import write_tar
from instella_ray.data.views import ViewDecoder
from instella_ray.errors import UserError
from instella_ray.models.bit import BIT
from instella_ray.models.checkpoint import load_model, save_model, weight_hash
from instella_ray.runs import read_record

from ..kit.models import ONE_LAYER_BIT, write_tokenizer
from ..kit.shards import image_bytes, tar_bytes


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    return Path(write_tokenizer(tmp_path / "bit"))


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    folder = tmp_path / "shards"
    for number in range(2):
        samples = [
            (f"{number}{i}", image_bytes(10 * number + i, (48, 32)), f"long {i}", {"caption_short": f"short {i}"})
            for i in range(5)
        ]
        write_tar(str(folder / f"{number}.tar"), [*samples, (f"{number}bad", b"no image", "caption", {})])
    return folder


def config(shards: Path, tokenizer: Path, output: Path, **more: Any) -> EncodeConfig:
    places = {"input": str(shards), "tokenizer": str(tokenizer), "output": str(output)}
    return EncodeConfig(**{**places, "rows_per_file": 3, "batch_size": 4, "source": "test", "local": True, **more})


def test_codes_are_the_tokenizers_own_and_a_second_run_refuses_or_resumes(
    shards: Path, tokenizer: Path, tmp_path: Path
) -> None:
    out = tmp_path / "codes"
    manifest = run_encode(config(shards, tokenizer, out))
    reader = CodesReader(str(out), tokenizer_hash=weight_hash(tokenizer))
    assert manifest.rows == len(reader) == 10
    assert json.loads((out / "ledger.json").read_text())["quarantined"] == {"undecodable": 2}
    record = read_record(str(out))
    assert record is not None and record.attempts[-1].status == "finished"
    assert [(each.role, each.facts.get("files")) for each in record.inputs] == [("shards", 2), ("tokenizer", None)]
    assert record.inputs[1].identity == manifest.tokenizer_hash and record.outputs[0].facts["kept"] == 10
    index = np.arange(10)
    assert reader.column(index, "key") == [f"{n}{i}" for n in range(2) for i in range(5)]
    assert reader.column(index, "caption_short") == [f"short {i}" for _ in range(2) for i in range(5)]
    bit = load_model(tokenizer)
    pixels = [
        fit_square(decode_rgb(image_bytes(10 * n + i, (48, 32)), at_least=64), 32) for n in range(2) for i in range(5)
    ]
    expected = bit.encode(to_tensor(np.stack(pixels))).numpy()
    assert np.array_equal(reader.codes(index), expected)
    labels = [shard_label(str(shards / f"{number}.tar")) for number in range(2)]
    row = pq.read_table(out / manifest.files[0].name).to_pylist()[1]
    assert {k: row[k] for k in ("key", "shard", "row", "width", "height", "source")} == {
        "key": "01", "shard": labels[0], "row": 1, "width": 48, "height": 32, "source": "test"
    }  # fmt: skip

    with pytest.raises(UserError, match="exists already"):
        run_encode(config(shards, tokenizer, out))
    (out / "manifest.json").unlink()
    (out / "parts" / f"{labels[1]}-0000003.json").unlink()
    assert run_encode(config(shards, tokenizer, out, mode="resume")) == manifest
    save_model(tokenizer, BIT(ONE_LAYER_BIT))
    with pytest.raises(UserError, match="made with tokenizer_hash="):
        run_encode(config(shards, tokenizer, out, mode="resume"))


def test_crops_and_flips_are_views_of_one_decode() -> None:
    row = {"image": image_bytes(1, (64, 32)), "problem": None, "key": "a", "shard": "s", "row": 0, "last": True}
    table = ViewDecoder(32, crops=3, flips=True)(pa.Table.from_pylist([row | {"caption": "c", "meta": "{}"}]))
    views = np.frombuffer(table["views"][0].as_py(), np.uint8).reshape(6, 32, 32, 3)
    whole = np.asarray(decode_rgb(row["image"], at_least=64))
    for number, left in enumerate((0, 16, 32)):
        assert np.array_equal(views[number], whole[:, left : left + 32])
        assert np.array_equal(views[3 + number], views[number][:, ::-1])


def test_a_size_that_does_not_fit_the_tokenizer_is_a_user_error(shards: Path, tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="size 36: not a multiple of 8"):
        run_encode(config(shards, tokenizer, tmp_path / "codes", size=36))
    with pytest.raises(UserError, match="not a model folder"):
        run_encode(config(shards, tmp_path, tmp_path / "codes"))
    assert not (tmp_path / "codes").exists()


def test_links_without_images_are_a_user_error_that_says_to_curate_first(tokenizer: Path, tmp_path: Path) -> None:
    pq.write_table(pa.table({"URL": ["http://a/b.jpg"], "TEXT": ["c"]}), tmp_path / "laion.parquet")
    with pytest.raises(UserError, match=r"laion\.parquet: links without images; curate first"):
        run_encode(config(tmp_path / "laion.parquet", tokenizer, tmp_path / "codes"))
    assert not (tmp_path / "codes").exists()


def test_names_of_captions_are_those_of_the_configuration(tokenizer: Path, tmp_path: Path) -> None:
    members = [("a.b.jpg", image_bytes()), ("a.b.json", b'{"vlm": "two", "caption": "one"}')]
    (tmp_path / "a.tar").write_bytes(tar_bytes(members))
    for keys, caption in ((None, "one"), (("vlm",), "two")):
        out = tmp_path / caption
        more = {} if keys is None else {"caption_keys": keys}
        run_encode(config(tmp_path / "a.tar", tokenizer, out, **more))
        reader = CodesReader(str(out))
        assert (reader.column([0], "key"), reader.column([0], "caption_long")) == (["a%2Eb"], [caption])
