"""Evaluations as the paper's tables: its columns and rows, numbers only under earned names, and what they are not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from instella_ray import cli, storage
from instella_ray.data.prompts import read_prompts
from instella_ray.evaluation.evaluate import EvaluateConfig, run_evaluate
from instella_ray.evaluation.paper_tables import DASH, paper_tables
from instella_ray.models.sampling import SamplingConfig

from ..kit.models import write_tokenizer
from ..kit.sample_sets import noise, write_samples

PROMPTS = read_prompts("scenes", count=6)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Evaluations of one set of samples, with the presets of tables 1 and 3, and without one."""
    root = tmp_path_factory.mktemp("tables")
    tokenizer = write_tokenizer(root / "bit")
    sampling = SamplingConfig(sampler="simplified", guidance_scale=4.0, temperature=0.6, num_inference_steps=20)
    samples = write_samples(root / "samples", PROMPTS, noise(6, 1), tokenizer, sampling=sampling)
    given: dict[str, Any] = {"samples": str(samples), "tokenizer": tokenizer, "local": True}
    found = {}
    for name, preset in (("one", "paper-table1"), ("three", "paper-table3"), ("none", None)):
        found[name] = str(root / name)
        metrics = {"scene_score": {}, "bit_usage": {}}
        run_evaluate(
            EvaluateConfig.model_validate({**given, "output": found[name], "preset": preset, "metrics": metrics})
        )
    return found


WEIGHTS: dict[str, Any] = {
    "geneval": {"weights": "mask2former.pth", "weights_hash": "c9d0c4f2" + "0" * 56},
    "clip_score": {"weights": "ViT-bigG-14, laion2b_s39b_b160k", "weights_hash": "0" * 64},
}
"""Those that the names stand for."""


def renamed(folder: str, to: Path, key: str, name: str) -> str:
    """A copy of an evaluation whose scene score has the name, the weights and the parts of a metric of the paper."""
    results = storage.read_json(f"{folder}/results.json")
    (setting,) = results["settings"]
    result = setting["metrics"].pop("scene_score")
    settings = {**result["settings"], "color_classifier": "ViT-L-14 openai"}
    own = {**WEIGHTS.get(name, {}), "settings": settings}
    named = zip(result["parts"], ("colors", "counting"), strict=False)
    parts = [{**part, **own, "name": f"{name}/{task}"} for part, task in named]
    setting["metrics"][key] = {**result, **own, "name": name, "value": 0.1234567, "parts": parts}
    to.mkdir()
    storage.write_json(str(to / "results.json"), results)
    return str(to)


def test_the_paper_s_rows_and_columns_are_there() -> None:
    one, two, three = paper_tables([])
    assert list(one.rows[0]) == [
        *("Model", "Size", "Reso.", "Single Obj.", "Two Obj.", "Counting", "Colors", "Color Attr.", "Position"),
        *("Overall ↑", "CLIP ↑", "IR ↑"),
    ]
    assert list(one.rows[0].values()) == [
        *("Instella AR (paper)", "0.8B", 1024, "0.96", "0.43", "0.40", "0.80", "0.14", "0.08", "0.46", "0.313", "0.538")
    ]
    assert one.rows[1]["Overall ↑"] == "0.64" and one.rows[1]["IR ↑"] == "0.900"
    (bit,) = two.rows
    assert list(bit.values()) == ["BIT (paper)", "397M", 128, "1.32", "22.25", "0.704", "7.14", "21.59", "0.690"]
    assert [list(row.values()) for row in three.rows] == [
        ["Diffusion BIT (paper)", "1B", 20, "16.33", "0.38", "177 MI300X"],
        ["Diffusion BIT (paper)", "1B", 50, "15.10", "1.32", "177 MI300X"],
    ]
    assert not one.notes and not three.notes


def test_stand_ins_and_other_protocols_are_told_below(evaluated: dict[str, str]) -> None:
    one, two, three = paper_tables([evaluated["one"], evaluated["three"]])
    ours = one.rows[2]
    assert len(one.rows) == 3 and len(two.rows) == 1 and len(three.rows) == 3
    assert str(ours["Model"]).startswith("ours (diffusion ") and ours["Reso."] == 32
    # The scene score has GenEval's categories, and is not GenEval.
    assert {ours[name] for name in list(ours)[3:]} == {DASH}
    notes = "\n".join(one.notes)
    assert "scene_score" in notes and "images of 32 px, the paper's 1024" in notes and "sampler simplified" in notes
    assert three.rows[2]["Steps"] == 20 and three.rows[2]["FID-30K ↓"] == DASH


def test_metrics_of_one_model_share_a_row(evaluated: dict[str, str], tmp_path: Path) -> None:
    geneval = renamed(evaluated["one"], tmp_path / "g", "geneval", "geneval")
    clip = renamed(evaluated["one"], tmp_path / "c", "clip_score", "clip_score")
    stand_in = renamed(evaluated["one"], tmp_path / "s", "image_reward", "image_reward_other")
    one, *_ = paper_tables([geneval, clip, stand_in])
    ours = one.rows[2]
    assert len(one.rows) == 3 and (ours["Overall ↑"], ours["CLIP ↑"], ours["IR ↑"]) == ("0.12", "0.123", DASH)
    assert ours["Colors"] != DASH and ours["Position"] == DASH
    assert any("IR was not measured, but image_reward_other 0.123" in note for note in one.notes)


def test_the_command_prints_and_writes_them(evaluated: dict[str, str], tmp_path: Path, capsys: Any) -> None:
    assert cli.main(["compare", "--paper-tables", evaluated["one"], "--output", str(tmp_path / "t.md")]) == 0
    printed, written = capsys.readouterr().out, (tmp_path / "t.md").read_text()
    assert "## Table 1" in printed and printed.strip() in written
    assert cli.main(["compare", "--paper-tables", evaluated["one"], "--json"]) == 0
    assert [table["title"][:7] for table in json.loads(capsys.readouterr().out)] == ["Table 1", "Table 2", "Table 3"]
    assert cli.main(["compare", "--paper-tables", evaluated["none"]]) == 2
    assert "evaluated without a preset, expected one of paper-table1" in capsys.readouterr().err


def test_settings_of_prompts_are_in_the_citation_and_are_no_protocol_of_the_paper(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "bit")
    sampling = SamplingConfig(sampler="simplified", guidance_scale=4.0, temperature=0.6, num_inference_steps=20)
    own = {"sampling": sampling, "by_prompt": ("guidance_scale", "temperature")}
    samples = write_samples(tmp_path / "samples", PROMPTS, noise(6, 1), tokenizer, **own)
    given: dict[str, Any] = {"samples": samples, "tokenizer": tokenizer, "local": True, "preset": "paper-table3"}
    run_evaluate(EvaluateConfig.model_validate({**given, "output": str(tmp_path / "o"), "metrics": {"bit_usage": {}}}))
    (setting,) = storage.read_json(str(tmp_path / "o" / "results.json"))["settings"]
    assert "guidance_scale, temperature by prompt" in setting["citations"]["bit_usage"]
    assert any("guidance_scale, temperature by prompt" in note for note in paper_tables([str(tmp_path / "o")])[2].notes)
