"""Runs that are continued: with more shards, with fewer, after a loss, with another try of failed downloads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from instella_ray.data.curation.job import CurateConfig, run_curate
from instella_ray.data.formats.names import find_shards
from instella_ray.data.formats.sources import read_rows
from instella_ray.errors import UserError

from ...kit.curation import curated_keys
from ...kit.image_server import GOOD, ImageServer, serving
from ...kit.shards import contents, sample, tar_bytes


def config(pattern: Any, output: Path, **more: Any) -> CurateConfig:
    filters = {"resolution": {"target_size": 16}, "duplicates": None}
    given = {"input": pattern, "output": str(output), "filters": filters, "rows_per_shard": 3, "local": True}
    return CurateConfig.model_validate({**given, **more})


def write(path: Path, first: int, count: int = 4) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_bytes([m for i in range(first, first + count) for m in sample(f"k{i}", i)]))
    return path


@pytest.mark.parametrize("local", [True, pytest.param(False, marks=pytest.mark.ray)])
def test_a_shard_in_another_folder_is_added_to_what_is_done(
    local: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if not local:
        request.getfixturevalue("ray_session")
    for number in range(2):
        write(tmp_path / "in" / "a" / f"{number}.tar", 4 * number)
    out = tmp_path / "out"
    run_curate(config(f"{tmp_path}/in/*/*.tar", out, local=local))
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}

    write(tmp_path / "in" / "b" / "0.tar", 100)
    ledger = run_curate(config(f"{tmp_path}/in/*/*.tar", out, local=local, mode="resume"))
    assert ledger.to_json() == {"in": 12, "kept": 12, "dropped": {}, "quarantined": {}}
    assert sorted(curated_keys(out)) == sorted(f"k{i}" for i in (*range(8), *range(100, 104)))
    assert {path: path.stat().st_mtime_ns for path in before} == before
    run_curate(config(f"{tmp_path}/in/*/*.tar", tmp_path / "fresh", local=local))
    assert contents(tmp_path / "fresh") == contents(out)


def test_the_pattern_may_change_if_it_names_no_fewer_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        write(tmp_path / "in" / f"{number}.tar", 4 * number)
    out = tmp_path / "out"
    run_curate(config(f"{tmp_path}/in/[01].tar", out))
    monkeypatch.chdir(tmp_path)
    assert run_curate(config(["in/0.tar", "in/{1..2}.tar"], out, mode="resume")).kept == 12


def test_a_shard_that_is_missing_is_named_and_nothing_is_touched(tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path / "in" / f"{number}.tar", 4 * number)
    out = tmp_path / "out"
    run_curate(config(f"{tmp_path}/in", out))
    before = contents(out)
    (tmp_path / "in" / "1.tar").rename(tmp_path / "1.tar")
    with pytest.raises(
        UserError, match=r"out: made from .*/in/1\.tar, which the input no longer has; put back"
    ) as error:
        run_curate(config(f"{tmp_path}/in", out, mode="resume"))
    assert "\n" not in str(error.value)
    (tmp_path / "in").rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"made from .*/in/0\.tar and 2 more, which"):
        run_curate(config(f"{tmp_path}/moved", out, mode="resume"))
    assert contents(out) == before


def test_outputs_with_the_labels_of_an_older_version_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "in" / "0.tar", 0)
    out = tmp_path / "out"
    run_curate(config(f"{tmp_path}/in", out))
    (out / "inputs.json").unlink()
    with pytest.raises(UserError, match=r"labels of an older version, .*; use mode=fresh or another folder"):
        run_curate(config(f"{tmp_path}/in", out, mode="resume"))
    assert run_curate(config(f"{tmp_path}/in", out, mode="fresh")).kept == 4


@pytest.mark.parametrize("pattern", ["in/**/*.tar", "in/**.tar", "in/*/*.tar,in/*.tar"])
def test_an_output_below_its_input_is_not_read(pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "in" / "0.tar", 0)
    write(tmp_path / "in" / "below" / "1.tar", 4)
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "in" / "curated"
    for mode in ("new", "resume", "fresh"):
        assert run_curate(config(pattern, Path("in/curated"), mode=mode)).to_json()["in"] == 8
    before = contents(out)
    (out / "ledger.json").unlink()  # as a kill would leave it
    assert run_curate(config(pattern, Path("in/curated"), mode="resume")).kept == 8 and contents(out) == before
    (tmp_path / "link").symlink_to(out)
    assert run_curate(config(pattern, Path("link"), mode="resume")).kept == 8
    with pytest.raises(UserError, match="only the output of this job"):
        run_curate(config("in/curated", Path("in/curated"), mode="resume"))


def test_an_unfinished_output_of_another_job_is_refused_wherever_a_pattern_meets_it(tmp_path: Path) -> None:
    write(tmp_path / "in" / "0.tar", 0)
    run_curate(config(f"{tmp_path}/in/0.tar", tmp_path / "in" / "curated"))
    (tmp_path / "in" / "curated" / "ledger.json").unlink()
    with pytest.raises(UserError, match="in/curated: unfinished output of a data job"):
        run_curate(config(f"{tmp_path}/in/**/*.tar", tmp_path / "out"))


# --- losses


@pytest.mark.parametrize("local", [True, pytest.param(False, marks=pytest.mark.ray)])
def test_a_shard_that_is_gone_when_its_turn_comes_is_counted_and_read_when_it_is_back(
    local: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if not local:
        request.getfixturevalue("ray_session")
    for number in range(3):
        write(tmp_path / "in" / f"{number}.tar", 4 * number)
    (tmp_path / "in" / "3.tar").symlink_to(tmp_path / "away.tar")
    limits = {"abort": {"quarantined": 0.5}, "local": local}
    out = tmp_path / "out"
    ledger = run_curate(config(f"{tmp_path}/in", out, **limits))
    assert ledger.to_json() == {"in": 13, "kept": 12, "dropped": {}, "quarantined": {"lost_shard": 1}}
    write(tmp_path / "away.tar", 12)
    assert run_curate(config(f"{tmp_path}/in", out, mode="resume", **limits)).kept == 16
    run_curate(config(f"{tmp_path}/in", tmp_path / "fresh", **limits))
    assert contents(tmp_path / "fresh") == contents(out)


def test_a_lost_shard_may_also_stay_away(tmp_path: Path) -> None:
    write(tmp_path / "in" / "0.tar", 0)
    (tmp_path / "in" / "1.tar").symlink_to(tmp_path / "away.tar")
    run_curate(config(f"{tmp_path}/in", tmp_path / "out", abort={"quarantined": 0.5}))
    (tmp_path / "in" / "1.tar").unlink()
    assert run_curate(config(f"{tmp_path}/in", tmp_path / "out", mode="resume")).to_json()["quarantined"] == {}


def test_folders_that_are_called_like_shards_are_passed_over(tmp_path: Path) -> None:
    write(tmp_path / "in" / "0.tar", 0)
    (tmp_path / "in" / "1.tar").mkdir()
    assert run_curate(config(f"{tmp_path}/in", tmp_path / "out")).to_json()["in"] == 4


# --- downloads


@pytest.fixture
def server() -> Any:
    made = ImageServer()
    with serving(made.handle) as made.port:
        yield made


def test_only_what_the_network_failed_is_tried_again(server: ImageServer, tmp_path: Path) -> None:
    paths = ["good/0", "status/404", "recovers/503", "html", "recovers/429", "robots/plain", "good/1", "status/500"]
    columns = {"URL": [server.url(path) for path in paths], "TEXT": [f"caption {i}" for i in range(8)]}
    pq.write_table(pa.table(columns), tmp_path / "laion.parquet")
    download = {"allow_private": True, "backoff_s": 0.01, "retries": 0}
    given = {"pattern": str(tmp_path / "laion.parquet"), "output": tmp_path / "out", "download": download}
    first = run_curate(config(**given))
    asked = server.requests.copy()
    final = {"download_content_type": 1, "download_http_404": 1, "download_opt_out": 1}
    assert first.dropped == final | {"download_http_429": 1, "download_http_500": 1, "download_http_503": 1}
    assert run_curate(config(**given, mode="resume")).to_json() == first.to_json() and server.requests == asked

    second = run_curate(config(**given, mode="resume", retry="network"))
    assert second.to_json() == {
        "in": 8,
        "kept": 4,
        "dropped": final | {"download_http_500": 1},
        "quarantined": {},
    }
    assert server.requests - asked == {"recovers/503": 1, "recovers/429": 1, "status/500": 1}
    rows = [row for url in find_shards(str(tmp_path / "out")) for row in read_rows(url, "x")]
    assert sorted(row["caption"] for row in rows) == [f"caption {i}" for i in (0, 2, 4, 6)]
    assert all(row["image"] == GOOD for row in rows) and len({row["key"] for row in rows}) == 4
    assert json.loads((tmp_path / "out" / "ledger.json").read_text()) == second.to_json()

    # Once more: only what failed again. And without another try, the run stays as it is.
    third = run_curate(config(**given, mode="resume", retry="network"))
    assert third.to_json() == second.to_json() and server.requests["status/500"] == 3
    before, asked = contents(tmp_path / "out"), server.requests.copy()
    assert run_curate(config(**given, mode="resume")).to_json() == second.to_json()
    assert contents(tmp_path / "out") == before and server.requests == asked


def test_another_try_that_is_killed_is_made_again(server: ImageServer, tmp_path: Path) -> None:
    columns = {"URL": [server.url(f"recovers/{i}") for i in range(500, 505)], "TEXT": ["an image"] * 5}
    pq.write_table(pa.table(columns), tmp_path / "laion.parquet")
    download = {"allow_private": True, "backoff_s": 0.01, "retries": 0, "batch_size": 2}
    given = {"pattern": str(tmp_path / "laion.parquet"), "output": tmp_path / "out", "download": download}
    given["abort"] = {"failed_downloads": 1}
    with pytest.raises(UserError, match="no sample was kept"):
        run_curate(config(**given))
    assert run_curate(config(**given, mode="resume", retry="network")).kept == 5
    (part,) = (tmp_path / "out" / "parts").glob("*-retry1-0000002.json")
    part.unlink()
    (tmp_path / "out" / "ledger.json").unlink()
    assert run_curate(config(**given, mode="resume", retry="network")).kept == 5
    assert len(curated_keys(tmp_path / "out")) == 5


def test_another_try_needs_a_run_to_continue(tmp_path: Path) -> None:
    write(tmp_path / "0.tar", 0)
    with pytest.raises(UserError, match="retry=network: needs mode=resume"):
        run_curate(config(str(tmp_path / "0.tar"), tmp_path / "out", retry="network"))
