"""Prompts come from any of the files that people have, and each has a number and a seed of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from instella_ray.errors import UserError
from instella_ray.evaluation.plan import Sweep, plan_samples, sample_seed
from instella_ray.evaluation.prompts import Prompt, prompts_hash, read_prompts
from instella_ray.sampling_config import SamplingConfig

GENEVAL = {"tag": "colors", "include": [{"class": "bus", "count": 1, "color": "red"}], "prompt": "a photo of a red bus"}
TEXTS = st.text(min_size=1, max_size=8)


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
        ("a.jsonl", '{"id": 3}', "line 1: no prompt, expected one of prompt, caption"),
        ("a.jsonl", '{"id": 3, "prompt": "a"}\n{"id": "3", "prompt": "b"}', "id '3' comes twice"),
        ("a.json", "{}", "expected COCO's captions file"),
        ("a.json", '{"annotations": [{"id": 1}]}', "without id, image_id and caption"),
        ("a.parquet", "no", "not a parquet file"),
        ("a.csv", "no", "expected a .txt, .jsonl, .parquet"),
    ],
)
def test_bad_prompts_are_one_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as refused:
        read_prompts(str(tmp_path / name))
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_more_prompts_than_there_are_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo")
    with pytest.raises(UserError, match="2 there, count asks for 3"):
        read_prompts(str(tmp_path / "a.txt"), count=3)
    with pytest.raises(UserError, match="no such file"):
        read_prompts(str(tmp_path / "none.txt"))


@given(texts=st.lists(TEXTS, min_size=1, max_size=12), images=st.integers(1, 4), seed=st.integers(0, 2**62))
def test_a_sample_is_a_function_of_text_number_and_seed(texts: list[str], images: int, seed: int) -> None:
    prompts = [Prompt(str(i), text) for i, text in enumerate(texts)]
    planned = list(plan_samples(prompts, images, seed))
    assert len(planned) == len(texts) * images
    assert all(s.seed == sample_seed(seed, s.prompt.text, s.index) and 0 <= s.seed < 2**63 for s in planned)
    # No two are the same picture, not even where a text comes again, and the order of prompts changes no seed.
    assert len({s.seed for s in planned}) == len(planned)
    assert {s.seed for s in plan_samples(prompts[::-1], images, seed)} == {s.seed for s in planned}


def test_a_sweep_is_every_combination() -> None:
    base = SamplingConfig(temperature=0.5)
    assert Sweep().settings(base) == {"": base}
    found = Sweep(num_inference_steps=(5, 10), guidance_scale=(1.0, 2.5, 1.0)).settings(base)
    assert list(found) == [f"num_inference_steps={n}+guidance_scale={g}" for n in (5, 10) for g in (1.0, 2.5)]
    assert found["num_inference_steps=10+guidance_scale=2.5"] == SamplingConfig(
        num_inference_steps=10, guidance_scale=2.5, temperature=0.5
    )
