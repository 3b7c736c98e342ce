"""The curation job on Ray Data: the ledger adds up, output is complete or absent, nothing is overwritten unasked."""

from __future__ import annotations

import importlib.util
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from instella_ray.data.curation.filters.config import FilterConfig
from instella_ray.data.curation.filters.samples import Resolution
from instella_ray.data.curation.job import CurateConfig, run_curate
from instella_ray.data.curation.prefilter import Prefilter
from instella_ray.data.formats.images import decode_rgb
from instella_ray.data.formats.names import find_shards
from instella_ray.data.formats.tar_source import read_samples
from instella_ray.errors import UserError, run_main

from ...kit.curation import curated_keys
from ...kit.shards import HOSTILE, contents, image_bytes, sample, tar_bytes

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
    (out / "parts" / "00000-0000005.json").unlink()
    (out / "parts" / "00004-0000005.json").unlink()
    (out / "00004-0000005.tar").unlink()
    (out / "00004-0000005.tar.1234.tmp").write_bytes(b"half")
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
    spec = importlib.util.spec_from_file_location("curate_job", Path(__file__).parents[3] / "jobs" / "curate.py")
    assert spec is not None and spec.loader is not None
    job = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(job)
    argv = ["--set", "input=x.tar", "--set", f"output={tmp_path}/out", "--set", setting.format(tmp=tmp_path)]
    assert run_main(lambda: job.job.main(argv)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.process  # a second for every two hundred images
def test_real_shards(emoji_shards: str, tmp_path: Path) -> None:
    ledger = run_curate(config(emoji_shards, tmp_path / "out", rows_per_shard=500))
    assert ledger.to_json()["in"] == 1601
    assert ledger.kept == len(curated_keys(tmp_path / "out")) > 1500
    url = next(iter(find_shards(str(tmp_path / "out"))))
    row = next(read_samples(io.BytesIO(Path(url).read_bytes()), ""))
    assert min(decode_rgb(row["image"]).size) >= 256
