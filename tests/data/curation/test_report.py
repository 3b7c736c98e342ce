"""The curation report: histograms as the filters decided, kept images with extreme scores, and the quarantine."""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instella_ray.data.curation.filters.base import Scale, ScoreLimits
from instella_ray.data.curation.filters.config import FilterConfig
from instella_ray.data.curation.job import CurateConfig, run_curate
from instella_ray.data.curation.report import QUARANTINE_EXAMPLES, REPORT, quarantined, svg_histogram
from instella_ray.data.curation.stats import BINS, BORDERLINE_EXAMPLES, histograms, most_extreme
from instella_ray.data.formats.names import find_shards
from instella_ray.data.formats.parts import Ledger, PartFolder, PartWriter
from instella_ray.data.formats.patterns import shard_label
from instella_ray.data.formats.rows import blocks
from instella_ray.data.formats.shards import write_tar
from instella_ray.data.formats.tar_source import read_samples

from ...kit.shards import HOSTILE, Members, bomb, contents, image_bytes, tar_bytes

FILTERS = {"resolution": {"target_size": 64}, "duplicates": {"max_distance": 0}}


def curate(shards: Path, output: Path, **more: object) -> Ledger:
    given = {"input": str(shards), "output": str(output), "filters": FILTERS, "local": True}
    return run_curate(CurateConfig.model_validate({**given, "abort": {"quarantined": 1}, **more}))


def section(page: str, title: str) -> str:
    """The HTML below a heading, up to the next one of its level."""
    return re.split("<h2", page.split(f">{title}</h2>", 1)[1])[0]


# --- Histograms


def test_a_histogram_draws_its_limits_and_what_lies_beyond() -> None:
    quarter = BINS // 4
    within, outside = (
        [0] * quarter + [1] * quarter + [0] * 2 * quarter,
        [1] * quarter + [0] * quarter + [1] * 2 * quarter,
    )
    svg = svg_histogram([within, outside], Scale(0, 1), ScoreLimits(minimum=0.25, maximum=0.5))
    assert svg.count('class="in"') == BINS // 4 and svg.count('class="out"') == BINS * 3 // 4
    assert svg.count("<line") == 2 and ">0.25<" in svg and ">0.5<" in svg
    one = [0] * (BINS - 1) + [3]
    assert "<line" not in svg_histogram([one, [0] * BINS], Scale(1, 100, log=True), ScoreLimits())


def test_a_bin_that_holds_the_limit_is_stacked() -> None:
    filters = FilterConfig.model_validate({"similarity": {"minimum": 0.2}})
    counts = histograms(filters, [{"similarity": value} for value in (0.2, 0.1999, 0.205)])["similarity"]
    svg = svg_histogram(counts, filters.scales()["similarity"], filters.limits()["similarity"])
    rect = r'<rect x="([\d.]+)" y="([\d.]+)" width="[\d.]+" height="([\d.]+)" class="(\w+)"><title>([^<]+)'
    (x, y, tall, kind, title), (x2, y2, tall2, kind2, title2) = re.findall(rect, svg)
    assert (kind, title, kind2, title2) == (
        "in", "0.195 to 0.21: 2 within the limits", "out", "0.195 to 0.21: 1 outside the limits"
    )  # fmt: skip
    assert x == x2 and float(y2) + float(tall2) == pytest.approx(float(y), abs=0.2)
    assert float(tall) == pytest.approx(2 * float(tall2), abs=0.2)


def test_images_of_exactly_the_limit_are_drawn_as_kept(tmp_path: Path) -> None:
    images = [(f"{i}", image_bytes(i, (32, 32)), "exactly", {"pwatermark": 0.8}) for i in range(3)]
    images.append(("small", image_bytes(9, (31, 31)), "too small", {}))
    write_tar(str(tmp_path / "in" / "a.tar"), images)
    assert curate(tmp_path / "in", tmp_path / "out").kept == 3
    charts = re.findall(r"<h3>(\w+)</h3><svg.*?</svg>", (tmp_path / "out" / REPORT).read_text())
    drawn = {name: dict[str, int]() for name in charts}
    for name in charts:
        svg = (tmp_path / "out" / REPORT).read_text().split(f"<h3>{name}</h3>")[1].split("</svg>")[0]
        drawn[name] = {where: int(n) for n, where in re.findall(r": (\d+) (within|outside) the limits", svg)}
    assert drawn == {
        "shorter_edge": {"within": 3, "outside": 1}, "aspect_ratio": {"within": 3}, "pwatermark": {"within": 3},
        "caption_chars": {"within": 3},
    }  # fmt: skip


# --- Possibly wrong


@given(
    st.lists(
        st.tuples(st.sampled_from("ab"), st.sampled_from(["minimum", "maximum"]), st.integers(0, 9)), max_size=150
    ),
    st.integers(0, 150),
)
def test_the_extremes_of_parts_are_those_of_all(given: list[tuple[str, str, int]], cut: int) -> None:
    rows = [{"score": s, "side": side, "value": v, "key": f"{n}"} for n, (s, side, v) in enumerate(given)]
    found = most_extreme(rows)
    for score in "ab":
        for side, sign in (("minimum", 1), ("maximum", -1)):
            own = [row for row in rows if (row["score"], row["side"]) == (score, side)]
            expected = sorted(own, key=lambda row: sign * int(str(row["value"])))[:BORDERLINE_EXAMPLES]
            assert [row for row in found if (row["score"], row["side"]) == (score, side)] == expected
    by_key = sorted(
        most_extreme([*most_extreme(rows[:cut]), *most_extreme(rows[cut:])]), key=lambda row: int(row["key"])
    )
    assert by_key == sorted(found, key=lambda row: int(row["key"]))


def test_the_kept_images_with_extreme_scores_are_shown(tmp_path: Path) -> None:
    shards, out = tmp_path / "in", tmp_path / "out"
    for shard in range(2):
        images = [
            (
                f"{shard}-{i:02d}",
                image_bytes(100 * shard + i, (40, 40)),
                "x" * (3 + i),
                {"pwatermark": i / 36 + shard / 99},
            )
            for i in range(36)
        ]
        if shard:  # copies, which would be the most extreme if they were kept
            images += [(f"copy-{i}", image_bytes(i, (40, 40)), "copied", {"pwatermark": 0.799}) for i in range(10)]
        write_tar(str(shards / f"{shard}.tar"), images)
    assert curate(shards, out).dropped == {"exact_duplicate": 10, "watermark": 14}
    kept = [
        (json.loads(row["meta"])["scores"], row["key"], row["caption"])
        for url in find_shards(str(out))
        for row in read_samples(io.BytesIO(Path(url).read_bytes()), url)
    ]
    shown = section((out / REPORT).read_text(), "Possibly wrong")
    groups = dict(re.findall(r"<h3>(\w+ <span class=\"kind\">\w+).*?</h3>(.*?)(?=<h3>|$)", shown, re.S))
    assert [re.sub("<.*>", "", name) for name in groups] == [
        "shorter_edge lowest", "aspect_ratio highest", "pwatermark highest", "caption_chars lowest",
        "caption_chars highest",
    ]  # fmt: skip
    for name, html in groups.items():
        score, side = re.sub("<.*>", "", name).split()
        figures = re.findall(r'title="([^"]+)".*?<img src="data:image.*?<figcaption>([\d.]+): (\w+)', html, re.S)
        own = sorted((row for row in kept if score in row[0]), key=lambda row: row[0][score], reverse=side == "highest")
        expected = own[:BORDERLINE_EXAMPLES]
        assert [float(value) for _, value, _ in figures] == [pytest.approx(row[0][score], rel=1e-3) for row in expected]
        if score == "pwatermark":
            assert [(key, caption) for key, _, caption in figures] == [row[1:] for row in expected]
    # A resumed job writes the same files.
    before = contents(out)
    for name in ("ledger.json", REPORT, f"parts/{shard_label(f'{shards}/1.tar')}-0000000.json", "duplicates.parquet"):
        (out / name).unlink()
    curate(shards, out, mode="resume")
    assert contents(out) == before


# --- Quarantine


def test_quarantined_samples_are_shown_by_reason(hostile_shards: Path, tmp_path: Path) -> None:
    ledger = curate(hostile_shards, tmp_path / "out", rows_per_shard=5)
    html = section((tmp_path / "out" / REPORT).read_text(), "Quarantine")
    groups = {
        reason: (int(count), below)
        for reason, count, below in re.findall(
            r"<h3>(\w+) <span class=\"kind\">(\d+)</span></h3>(.*?)(?=<h3>|$)", html, re.S
        )
    }
    assert {reason: count for reason, (count, _) in groups.items()} == ledger.quarantined
    for reason, (count, below) in groups.items():
        assert below.count("<figure") == count, reason
    seen = {reason: below.count('src="data:image') for reason, (_, below) in groups.items()}
    # All that are whole.
    assert {reason: n for reason, n in seen.items() if n} == {
        "bad_metadata": 2, "duplicate_key": 1, "no_caption": 1, "truncated_shard": 1, "unsafe_name": 1
    }  # fmt: skip
    assert "html: image 17 bytes<" in groups["undecodable"][1]
    assert "noimage: noimage.txt 8 bytes<" in groups["no_image"][1]


def test_a_truncated_jpeg_is_shown(tmp_path: Path) -> None:
    data = image_bytes(1, (128, 128))
    cut = data[: len(data) // 2] + b"\xff\xd9"
    write_tar(
        str(tmp_path / "in" / "a.tar"), [("cut", cut, "cut off", {}), ("ok", image_bytes(2, (64, 64)), "whole", {})]
    )
    assert curate(tmp_path / "in", tmp_path / "out").quarantined == {"truncated_image": 1}
    html = section((tmp_path / "out" / REPORT).read_text(), "Quarantine")
    label = shard_label(f"{tmp_path}/in/a.tar")
    assert html.count('src="data:image') == 1 and f'title="shard {label}: cut off"' in html and "cut: image " in html


def write_parts(folder: Path, samples: list[tuple[Members, str]], rows_per_part: int) -> Ledger:
    """Write rows with given reasons for quarantine, as jobs do."""
    rows = []
    for number, (members, reason) in enumerate(samples):
        row = next(read_samples(io.BytesIO(tar_bytes(members)), "shard"))
        rows.append({**row, "row": number, "problem": reason})
    writer = PartWriter(str(folder), ".tar", lambda url, rows: len(rows))
    for table in blocks(rows, rows_per_part):
        verdicts = [f"quarantined:{reason}" for reason in table["problem"].to_pylist()]
        writer(table.append_column("verdict", [verdicts]))
    return PartFolder(str(folder)).close(["shard"])


def test_examples_alternate_between_parts_and_are_limited(tmp_path: Path) -> None:
    reasons = ["often"] * 75 + ["rare"] * 5
    ledger = write_parts(
        tmp_path, [([(f"{n}.txt", b"no image")], reason) for n, reason in enumerate(reasons)], rows_per_part=25
    )
    found = dict(quarantined(str(tmp_path), PartFolder(str(tmp_path)).parts(), ledger))
    assert list(found) == ["often", "rare"] and len(found["rare"]) == 5
    assert len(found["often"]) == QUARANTINE_EXAMPLES
    assert Counter(int(row["key"]) // 25 for row in found["often"]) == {0: 7, 1: 7, 2: 6}


@cache
def hostile_images() -> list[bytes]:
    whole = [image_bytes(3, kind=kind) for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP")]
    return [*whole, bomb(), b"", b"\xff\xd8\xff", *(data for members, _ in HOSTILE.values() for _, data in members[:1])]


@settings(max_examples=25)
@given(data=st.data())
def test_no_bytes_in_quarantine_keep_the_report_from_being_written(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    base = bytearray(hostile_images()[data.draw(st.integers(0, len(hostile_images()) - 1))])
    for _ in range(data.draw(st.integers(0, 8))):
        if base:
            base[data.draw(st.integers(0, len(base) - 1))] = data.draw(st.integers(0, 255))
    image = bytes(base[: data.draw(st.integers(0, len(base)))]) if data.draw(st.booleans()) else bytes(base)
    folder = tmp_path_factory.mktemp("quarantine")
    key = data.draw(
        st.text(st.characters(exclude_characters="./\0", exclude_categories=["Cs"]), min_size=1, max_size=20)
    )
    ledger = write_parts(folder, [([(f"{key}.jpg", image), (f"{key}.txt", b"<b>")], "undecodable")], 5)
    ((reason, (row,)),) = quarantined(str(folder), PartFolder(str(folder)).parts(), ledger)
    assert reason == "undecodable" and row["files"] == f"image {len(image):,} bytes"
    assert row["image"] is None or row["image"].startswith((b"\x89PNG", b"\xff\xd8"))
