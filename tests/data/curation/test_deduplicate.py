"""Curation's second pass and its report: copies leave, the ledger still adds up, the page shows what happened."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from instella_ray.data.curation.filters.config import FilterConfig
from instella_ray.data.curation.job import CurateConfig, run_curate
from instella_ray.data.curation.report import funnel
from instella_ray.data.formats.parts import Ledger
from instella_ray.data.formats.patterns import shard_label
from instella_ray.data.formats.shards import write_tar
from instella_ray.data.job import AbortConfig
from instella_ray.errors import UserError

from ...kit.curation import COPY_FILTERS, curated_keys, shards_with_copies
from ...kit.shards import contents, image_bytes


def config(shards: Path, output: Path, **more: Any) -> CurateConfig:
    given = {"input": str(shards), "output": str(output), "filters": COPY_FILTERS, "rows_per_shard": 5, "local": True}
    return CurateConfig.model_validate({**given, **more})


def test_copies_leave_the_output_and_the_report_shows_them(tmp_path: Path) -> None:
    shards, out = shards_with_copies(tmp_path / "in"), tmp_path / "out"
    ledger = run_curate(config(shards, out))
    # 9 was dropped for its watermark; 3 of the first shard is the smaller one of its pair.
    assert ledger.to_json() == {
        "in": 21, "kept": 16, "dropped": {"exact_duplicate": 2, "near_duplicate": 2, "watermark": 1}, "quarantined": {}
    }  # fmt: skip
    assert curated_keys(out) == [*"0124", *"5678", *"0134", *"6789"]
    decided = pq.read_table(out / "duplicates.parquet").to_pylist()
    a, b, c = (shard_label(str(shards / f"{name}.tar")) for name in "abc")
    assert [(row["part"], row["key"], row["reason"], row["of_part"], row["of_key"]) for row in decided] == [
        (f"{a}-0000000", "3", "near_duplicate", f"{b}-0000005", "7"),
        (f"{b}-0000000", "2", "exact_duplicate", f"{a}-0000000", "4"),
        (f"{b}-0000005", "5", "near_duplicate", f"{a}-0000000", "1"),
        (f"{c}-0000000", "0", "exact_duplicate", f"{a}-0000000", "0"),
    ]
    page = (out / "curation.html").read_text()
    assert "16 of 21 samples kept" in page and "near_duplicate" in page and "squeezed" in page
    assert "<b>other</b>" not in page and "&lt;b&gt;other" in page
    assert page.count("<svg viewBox") == 4  # of the scores that anything had: edge, aspect ratio, watermark, length
    assert page.count('class="pair"') == 2 and "http" not in page.replace("http-equiv", "")

    before = contents(out)
    # As kills would leave it: before the decisions, while they are carried out, after that and before the ledger.
    for gone in (["duplicates.parquet"], ["ledger.json"], ["ledger.json", "curation.html"]):
        for name in gone:
            (out / name).unlink()
        (out / f"{a}-0000000.tar").write_bytes(b"what an entry no longer names")
        run_curate(config(shards, out, mode="resume"))
        assert contents(out) == before

    # The set grows: what was decided is decided anew.
    write_tar(
        str(shards / "d.tar"), [("0", image_bytes(56, (96, 96)), "late copy", {}), ("1", image_bytes(99), "new", {})]
    )
    grown = run_curate(config(shards, out, mode="resume")).to_json()
    assert (grown["in"], grown["kept"], grown["dropped"]["exact_duplicate"]) == (23, 17, 3)
    fresh = run_curate(config(shards, tmp_path / "other")).to_json()
    assert fresh == grown and curated_keys(tmp_path / "other") == curated_keys(out)


def test_too_much_damage_stops_the_job_and_says_how_to_go_on(tmp_path: Path) -> None:
    good = [(f"g{i}", image_bytes(i, (96, 96)), "fine", {}) for i in range(4)]
    write_tar(str(tmp_path / "in" / "a.tar"), [*good, *((f"b{i}", b"junk", "broken", {}) for i in range(4))])
    cfg = config(tmp_path / "in", tmp_path / "out")
    with pytest.raises(
        UserError, match=r"out: stopped, 4 of 8 samples quarantined .*4 undecodable.*limit is abort\.quar"
    ):
        run_curate(cfg)
    assert not (tmp_path / "out" / "ledger.json").exists()
    assert len(list((tmp_path / "out" / "quarantine").iterdir())) == 2
    again = config(tmp_path / "in", tmp_path / "out", mode="resume", abort={"quarantined": 0.5})
    assert run_curate(again).to_json() == json.loads((tmp_path / "out" / "ledger.json").read_text())


def test_a_limit_is_asked_only_of_enough_samples_or_at_the_end() -> None:
    limits = AbortConfig(quarantined=0.1, failed_downloads=0.5, after_rows=10)
    few = Ledger().count(["quarantined:undecodable"] * 3 + ["kept"] * 6)
    limits.check(few, "out")
    with pytest.raises(UserError, match="3 of 9 samples quarantined"):
        limits.check(few, "out", at_end=True)
    with pytest.raises(UserError, match="3 of 10 samples quarantined"):
        limits.check(few.count(["kept"]), "out")
    links = Ledger().count(["dropped:download_http_404"] * 6 + ["dropped:small"] * 6)
    limits.check(links, "out")
    with pytest.raises(UserError, match="7 of 13 samples failed downloads"):
        limits.check(links.count(["dropped:download_dns"]), "out")


def test_the_funnel_ends_with_what_is_kept() -> None:
    verdicts = ["kept"] * 5 + [
        "dropped:watermark",
        "dropped:download_dns",
        "dropped:near_duplicate",
        "quarantined:undecodable",
    ]
    ledger = Ledger().count(verdicts)
    steps = list(funnel(ledger, FilterConfig.model_validate(COPY_FILTERS)))
    assert steps[0] == {"step": "undecodable", "kind": "quarantined", "lost": 1, "left": 8}
    assert [row["step"] for row in steps[1:3]] == ["download_dns", "small"]
    assert steps[-1] == {"step": "near_duplicate", "kind": "dropped", "lost": 1, "left": 5}
