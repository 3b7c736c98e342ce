"""The curation job on Ray Data: the ledger adds up, output is complete or absent, nothing is overwritten unasked."""

from __future__ import annotations

import gzip
import io
import json
import math
import tarfile
import threading
from collections import Counter
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from instella_ray.data.curation.filters.config import FilterConfig
from instella_ray.data.curation.filters.samples import Resolution
from instella_ray.data.curation.job import CurateConfig, run_curate
from instella_ray.data.curation.prefilter import Prefilter
from instella_ray.data.formats import sources
from instella_ray.data.formats.images import decode_rgb
from instella_ray.data.formats.names import find_shards
from instella_ray.data.formats.patterns import shard_label
from instella_ray.data.formats.tar_source import read_samples
from instella_ray.errors import UserError, run_main

from ...kit.curation import curated_keys
from ...kit.project import job
from ...kit.shards import HOSTILE, Members, contents, image_bytes, sample, tar_bytes

LIMITS = FilterConfig(resolution=Resolution(target_size=64))


def config(shards: Path | str, output: Path, **more: Any) -> CurateConfig:
    return CurateConfig(
        **{
            "input": str(shards),
            "output": str(output),
            "filters": LIMITS,
            "rows_per_shard": 5,
            "abort": {"quarantined": 1},
            "local": True,
        }
        | more
    )


@pytest.mark.parametrize("name", HOSTILE)
def test_every_hostile_sample_gets_its_verdict(name: str) -> None:
    everything = tar_bytes([member for members, _ in HOSTILE.values() for member in members])
    row = list(read_samples(io.BytesIO(everything), "shard"))[list(HOSTILE).index(name)]
    assert Prefilter(LIMITS).verdict(row)[0] == HOSTILE[name][1]


def test_hostile_shards_are_accounted_for_to_the_row(hostile_shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ledger = run_curate(config(hostile_shards, out)).to_json()
    assert ledger == json.loads((out / "ledger.json").read_text())
    verdicts = Counter(verdict for _, verdict in HOSTILE.values())
    dropped = {v.partition(":")[2]: n for v, n in verdicts.items() if v.startswith("dropped")}
    bad = Counter({v.partition(":")[2]: n for v, n in verdicts.items() if v.startswith("quarantined")})
    bad.update({"truncated_shard": 2, "empty_shard": 1})
    assert ledger["dropped"] == dropped
    assert ledger["quarantined"] == bad
    assert ledger["in"] == ledger["kept"] + sum(dropped.values()) + bad.total()
    assert len(curated_keys(out)) == ledger["kept"]
    aside = [row for path in (out / "quarantine").iterdir() for row in pq.read_table(path).to_pylist()]
    assert Counter(row["reason"] for row in aside) == bad
    assert next(row for row in aside if row["key"] == "html")["image"] == b"<html>gone</html>"


def test_a_second_run_refuses_resumes_or_starts_over(
    hostile_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    monkeypatch.chdir(tmp_path)
    run_curate(config(hostile_shards, Path("out")))  # by a relative name, as people give it
    before = contents(out)
    with pytest.raises(UserError, match="exists already"):
        run_curate(config(hostile_shards, out))
    with pytest.raises(UserError, match=r"made with rows_per_shard=5, now 6"):
        run_curate(config(hostile_shards, out, rows_per_shard=6, mode="resume"))
    assert contents(out) == before

    # As a kill would leave it: one shard half written, one part whose entry is missing, no ledger.
    (out / "ledger.json").unlink()
    first, last = (shard_label(str(hostile_shards / f"0000{number}.tar")) for number in (0, 4))
    (out / "parts" / f"{first}-0000005.json").unlink()
    (out / "parts" / f"{last}-0000005.json").unlink()
    (out / f"{last}-0000005.tar").unlink()
    (out / f"{last}-0000005.tar.1234.tmp").write_bytes(b"half")
    for pattern in (out, out / "*.tar"):
        with pytest.raises(UserError, match="unfinished output"):
            find_shards(str(pattern))
    run_curate(config(hostile_shards, out, mode="resume"))
    assert contents(out) == before

    run_curate(config(hostile_shards, out, mode="fresh"))
    assert contents(out) == before


def test_a_folder_of_something_else_is_never_touched(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    (tmp_path / "a.tar").write_bytes(tar_bytes(sample("x")))
    for mode in ("new", "resume", "fresh"):
        with pytest.raises(UserError, match="out: "):
            run_curate(config(tmp_path / "a.tar", out, mode=mode))
    assert contents(out) == {"thesis.txt": b"mine"}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("input={tmp}/none.tar", "none.tar: no shard found"),
        ("input={tmp}/mute.tar", "mute.tar: shard without captions"),
        ("filters.resolution.target_sice=3", "did you mean 'target_size'?"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], setting: str, message: str
) -> None:
    (tmp_path / "mute.tar").write_bytes(tar_bytes([("a.jpg", image_bytes()), ("b.jpg", image_bytes(1))]))
    argv = ["--set", "input=x.tar", "--set", f"output={tmp_path}/out", "--set", setting.format(tmp=tmp_path)]
    assert run_main(lambda: job("curate")(argv)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def write_tar_of(path: Path, members: Members) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(tar_bytes(members))
    return path


def test_every_member_is_kept_dropped_or_in_quarantine_with_its_bytes(tmp_path: Path) -> None:
    members = [
        ("README", b"read me"),
        *sample("kept", 1),
        ("kept.npy", b"features"),
        ("._kept.jpg", b"attributes"),
        *sample("../out", 2),
        ("late.jpg", image_bytes(3)),
        ("alone.txt", b"no image"),
        ("binary.jpg", image_bytes(4)),
        ("binary.txt", image_bytes(5)),
        *sample("kept", 6),
        ("late.txt", b"a late caption"),
        *(member for i in range(20) for member in sample(f"v{i // 10}.{i % 10}", 10 + i)),
    ]
    ledger = run_curate(config(write_tar_of(tmp_path / "a.tar", members), tmp_path / "out", rows_per_shard=50))
    reasons = ("bad_name", "unsafe_name", "no_image", "bad_caption", "duplicate_key")
    assert ledger.to_json() == {
        "in": 28,
        "kept": 22,
        "dropped": {"apple_double": 1},
        "quarantined": dict.fromkeys(sorted(reasons), 1),
    }
    found = Counter[bytes]()
    for path in (tmp_path / "out").glob("*.tar"):
        with tarfile.open(path) as tar:
            found.update(content.read() for member in tar if (content := tar.extractfile(member)))
    for path in (tmp_path / "out" / "quarantine").iterdir():
        for row in pq.read_table(path).to_pylist():
            found.update([row["image"] or b"", *(member["data"] for member in row["members"])])
    # Metadata goes out with the scores of curation, so it is another file.
    lost = Counter(data for name, data in members if not name.endswith(".json")) - found
    assert lost == {b"attributes": 1}


@pytest.mark.parametrize("kind", ["tar", "parquet"])
@pytest.mark.parametrize("name", ["punsafe", "PUNSAFE", "PunSafe"])
def test_a_score_filters_alike_from_tars_and_parquet(tmp_path: Path, kind: str, name: str) -> None:
    for number, (value, stays) in enumerate(
        [(0.9, False), ("0.9", False), (0.1, True), ("0.1", True), (math.nan, True), ("NaN", True), (None, True)]
    ):
        path, out = tmp_path / f"{number}.{kind}", tmp_path / f"{number}-out"
        if kind == "tar":
            write_tar_of(path, sample("a", **{name: value}))
        else:
            pq.write_table(pa.table({"image": [image_bytes()], "caption": ["a smooth image"], name: [value]}), path)
        if not stays:
            with pytest.raises(UserError, match=r"no sample was kept \(0 of 1 kept \(1 unsafe\)\)"):
                run_curate(config(path, out))
            continue
        assert run_curate(config(path, out)).kept == 1
        with tarfile.open(next(out.glob("*.tar"))) as tar:
            content = tar.extractfile(next(member for member in tar if member.name.endswith("json")))
            assert content is not None
            assert "NaN" not in content.read().decode().replace('"NaN"', "")


def test_decimals_and_bytes_are_scores_too(tmp_path: Path) -> None:
    scores = pa.array([Decimal("0.9"), Decimal("0.1")]), pa.array([b"0.9", b"0.1"])
    for number, column in enumerate(scores):
        path = tmp_path / f"{number}.parquet"
        images = {"image": [image_bytes(1), image_bytes(2)], "caption": ["one", "two"]}
        pq.write_table(pa.table({**images, "PUNSAFE": column}), path)
        ledger = run_curate(config(path, tmp_path / f"{number}-out"))
        assert (ledger.kept, ledger.dropped) == (1, {"unsafe": 1})


def test_names_of_captions_are_those_of_the_configuration(tmp_path: Path) -> None:
    shards = write_tar_of(tmp_path / "a.tar", [("a.jpg", image_bytes()), ("a.json", b'{"vlm": "a smooth image"}')])
    with pytest.raises(UserError, match=r"a\.tar: shard without captions; expected KEY\.txt .*, or one of caption, "):
        run_curate(config(shards, tmp_path / "out"))
    assert run_curate(config(shards, tmp_path / "out", caption_keys=("VLM",))).kept == 1
    pq.write_table(pa.table({"image": [image_bytes()], "Vlm": ["a smooth image"]}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"b\.parquet: no column with captions"):
        run_curate(config(tmp_path / "b.parquet", tmp_path / "other"))
    assert run_curate(config(tmp_path / "b.parquet", tmp_path / "other", caption_keys=("vlm",))).kept == 1


def test_damaged_tars_cost_their_rest_and_not_the_job(tmp_path: Path) -> None:
    whole = tar_bytes([member for i in range(4) for member in sample(f"{i}", i)])
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.tar").write_bytes(whole)
    (tmp_path / "in" / "b.tar").write_bytes(whole.replace(b"2.jpg", b"7.jpg"))  # a wrong checksum
    ledger = run_curate(config(tmp_path / "in", tmp_path / "out"))
    assert ledger.to_json()["kept"] == 5 and ledger.quarantined == {"damaged_shard": 1}


def test_a_shard_that_takes_longer_than_its_limit_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tar_of(tmp_path / "in" / "a.tar", sample("a"))
    write_tar_of(tmp_path / "in" / "b.tar", sample("b"))
    forever, read = threading.Event(), sources.read_samples

    def hanging(stream: IO[bytes], shard: str, *rest: Any) -> Iterator[dict[str, Any]]:
        if shard == shard_label(f"{tmp_path}/in/b.tar"):
            forever.wait()
        yield from read(stream, shard, *rest)

    monkeypatch.setattr(sources, "read_samples", hanging)
    ledger = run_curate(config(tmp_path / "in", tmp_path / "out", shard_time_limit_s=0.5))
    forever.set()
    assert (ledger.kept, ledger.quarantined) == (1, {"time_limit": 1})


@pytest.mark.ray
def test_a_compressed_shard_among_many_is_one_line_on_ray_too(ray_session: None, tmp_path: Path) -> None:
    write_tar_of(tmp_path / "in" / "a.tar", sample("a"))  # has captions, so no other is opened before the job starts
    (tmp_path / "in" / "b.tar").write_bytes(gzip.compress(tar_bytes(sample("b"))))
    with pytest.raises(UserError, match=r"^\S*b\.tar: a tar compressed with gzip; decompress it first, [^\n]*$"):
        run_curate(config(tmp_path / "in", tmp_path / "out", local=False))


@pytest.mark.process  # a second for every two hundred images
def test_real_shards(emoji_shards: str, tmp_path: Path) -> None:
    ledger = run_curate(config(emoji_shards, tmp_path / "out", rows_per_shard=500))
    assert ledger.to_json()["in"] == 1601
    assert ledger.kept == len(curated_keys(tmp_path / "out")) > 1500
    url = next(iter(find_shards(str(tmp_path / "out"))))
    row = next(read_samples(io.BytesIO(Path(url).read_bytes()), ""))
    assert min(decode_rgb(row["image"]).size) >= 256
