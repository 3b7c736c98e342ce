"""The suite samplers: what the search chooses, a stopped run that goes on, and rows over models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from instella_ray.bench.samplers import Measured, Measurements, SamplerArm, SamplersBench, Setting, run_samplers, search
from instella_ray.errors import UserError

from ..kit.models import make_generator, make_tokenizer

RELEASE, EXACT = SamplerArm(sampler="posterior_release"), SamplerArm(sampler="ancestral", redraw=0.5)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three random diffusion generators that know their tokenizer."""
    root = tmp_path_factory.mktemp("models")
    tokenizer_hash = make_tokenizer(root / "bit")
    for seed in range(3):
        make_generator(root / str(seed), tokenizer_hash, "diffusion", seed)
        config = yaml.safe_load((root / str(seed) / "config.yaml").read_text())
        config["lineage"] = {"inputs": [{"role": "tokenizer", "path": str(root / "bit")}]}
        (root / str(seed) / "config.yaml").write_text(yaml.safe_dump(config))
    return [str(root / str(seed)) for seed in range(3)]


def settings(folders: list[str]) -> SamplersBench:
    return SamplersBench(
        search=folders[0],
        models=(folders[1], folders[2]),
        arms=(RELEASE, EXACT),
        steps=(1, 2, 4),
        searched_steps=2,
        temperatures=(0.5, 1.0),
        guidance_scales=(0.0,),
        prompts_per_category=1,
    )


def test_a_stopped_run_measures_only_what_is_missing(folders: list[str], tmp_path: Path) -> None:
    cfg = settings(folders)
    file = tmp_path / "measurements.json"
    rows = run_samplers(cfg, str(file)).rows
    assert [(row["sampler"], row["steps"]) for row in rows] == [
        ("true images", ""),
        *((arm.label, steps) for arm in cfg.arms for steps in cfg.steps),
    ]
    entries = json.loads(file.read_text())
    # True images, then two arms at two numbers of steps and two temperatures; the others measure what was found, and
    # temperature 1 where that was not it.
    assert sum(entry["what"]["model"] == folders[0] for entry in entries) == 1 + 2 * 2 * 2
    assert len({json.dumps(entry["what"]) for entry in entries}) == len(entries)
    file.write_text(json.dumps(entries[:-3]))
    assert run_samplers(cfg, str(file)).rows == rows
    assert json.loads(file.read_text()) == entries


def test_the_search_keeps_the_diversity_of_the_data(tmp_path: Path) -> None:
    cfg = settings(["a", "b", "c"])
    measurements = Measurements(cfg, str(tmp_path / "measurements.json"))
    known = {
        None: Measured(1.0, 0.30),
        Setting(RELEASE, 1, 0.5, 0.0): Measured(0.9, 0.20),  # better, but all images alike
        Setting(RELEASE, 1, 1.0, 0.0): Measured(0.8, 0.29),
        Setting(RELEASE, 2, 0.5, 0.0): Measured(0.9, 0.29),
        Setting(RELEASE, 2, 1.0, 0.0): Measured(0.8, 0.31),
        Setting(EXACT, 1, 0.5, 0.0): Measured(0.9, 0.10),  # none is diverse enough
        Setting(EXACT, 1, 1.0, 0.0): Measured(0.5, 0.20),
        Setting(EXACT, 2, 0.5, 0.0): Measured(0.8, 0.29),  # equal scores
        Setting(EXACT, 2, 1.0, 0.0): Measured(0.8, 0.30),
    }
    measurements.of = lambda folder, setting: known[setting]  # type: ignore[method-assign]
    found = search(cfg, "a", measurements)
    assert {place: setting.temperature for place, setting in found.items()} == {
        ("posterior_release", 1): 1.0,
        ("posterior_release", 2): 0.5,
        ("posterior_release", 4): 0.5,
        ("ancestral, redraw 0.5", 1): 1.0,
        ("ancestral, redraw 0.5", 2): 1.0,
        ("ancestral, redraw 0.5", 4): 1.0,
    }
    assert found["posterior_release", 4].steps == 4


def test_missing_models_are_named_before_anything_is_measured(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at least two models"):
        run_samplers(SamplersBench(search="x", models=("y",)), str(tmp_path / "m.json"))
    assert not (tmp_path / "m.json").exists()
