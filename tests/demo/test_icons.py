"""The demo of icons: what it trains unless told otherwise, what it is measured on, and what is refused before it begins."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from instella_ray import cli
from instella_ray.config import load_config
from instella_ray.data.curation.job import CurateConfig
from instella_ray.data.formats.names import find_shards
from instella_ray.data.formats.sources import read_rows
from instella_ray.data.icons import build
from instella_ray.data.icons.build import IconsConfig
from instella_ray.demo import stages
from instella_ray.demo.images import demo_prompts, icon_images
from instella_ray.demo.recipe import (
    ICONS,
    TINY,
    DemoConfig,
    curate_config,
    generator_config,
    icons_config,
    serve_args,
    tokenizer_config,
)
from instella_ray.demo.state import DemoState, read_demo
from instella_ray.errors import UserError
from instella_ray.models.sampling import SamplingConfig

from ..kit.icons import listed, write_sets


def icons(**given: Any) -> DemoConfig:
    return DemoConfig.model_validate({"data": "icons", **given})


def test_icons_have_defaults_of_their_own() -> None:
    assert DemoConfig().draws_scenes and not icons().draws_scenes
    differing = {key for key in DemoConfig.model_fields if getattr(icons(), key) != getattr(DemoConfig(), key)}
    assert differing == {"data", *ICONS}
    model = tokenizer_config(icons(), "").model
    assert (model.num_tokens, model.bits_per_token, model.encoder_width) == (32, 64, 192)
    assert generator_config(icons(), "diffusion", "", ()).model.target == "x0"
    assert generator_config(icons(), "ar", "", ()).model.bit_head_width
    args = serve_args(icons(), "", {"diffusion": "", "ar": ""})
    assert args.models["diffusion"].defaults.guidance_scale == 3.0 != DemoConfig().sampling.diffusion.guidance_scale


def test_what_is_given_takes_precedence_key_by_key() -> None:
    demo = load_config(DemoConfig, None, ["width=64", "steps.ar=7"], flags={"data": "icons", "size": 32})
    assert (demo.width, demo.size, demo.steps.ar, demo.num_tokens) == (64, 32, 7, 32)
    assert demo.steps.tokenizer == icons().steps.tokenizer != DemoConfig().steps.tokenizer
    sampling = icons(sampling={"ar": {"temperature": 0.1}}).sampling
    assert sampling.ar == SamplingConfig(guidance_scale=icons().sampling.ar.guidance_scale, temperature=0.1)
    tiny = load_config(DemoConfig, None, flags={**TINY, "data": "icons"})
    assert (tiny.width, tiny.steps.diffusion, len(tiny.icons.sets)) == (32, 20, 2)


def test_a_demo_of_icons_is_read_as_it_was_written(tmp_path: Path) -> None:
    demo = icons(folder=str(tmp_path / "demo"), width=64)
    DemoState(demo, "new").begin()
    assert read_demo(demo.folder) == demo
    with pytest.raises(UserError, match="other settings"):
        DemoState(DemoConfig(folder=demo.folder, width=64), "resume")


def test_icons_are_built_and_curated_as_by_their_recipes() -> None:
    given = ["input=a", "output=b", "filters.resolution.target_size=64"]
    assert curate_config(icons(), "a").filters == load_config(CurateConfig, "icons/curate", given).filters
    built = load_config(IconsConfig, "icons/build", ["output=demo/icons", "size=64"])
    assert icons_config(icons()) == built


@pytest.fixture
def sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Two small sets, as what ``icons`` of a demo is."""
    pytest.importorskip("resvg_py", reason="the extra 'icons' is not installed")
    write_sets(tmp_path / "packages", "one", "two", drawings=60)
    here = listed(tmp_path / "packages")
    monkeypatch.setattr(build, "set_list", lambda: here)
    return {"sets": ["one", "two"], "sources": str(tmp_path / "packages")}


def test_single_drawings_are_held_out_and_are_the_prompts(sets: dict[str, Any], tmp_path: Path) -> None:
    demo = icons(folder=str(tmp_path / "demo"), icons=sets, size=32, prompts_per_category=2)
    table = stages.build_icons(demo, "new")["sets"]
    assert {name: about["licence"] for name, about in table.items()} == {"one": "MIT", "two": "MIT"}
    images = icon_images(demo)
    held_out = sum(about["splits"]["held-out"] for about in table.values())
    assert len(images.captions) == held_out > 0 and images.pixels.shape == (held_out, 32, 32, 3)
    trained = {row["caption"] for url in find_shards(images.train) for row in read_rows(url, "")}
    assert trained and trained.isdisjoint(images.captions)
    prompts = demo_prompts(demo, images)
    assert prompts == [(caption, "captions") for caption in images.captions[:2]]
    assert all(prompt.endswith((", style one style", ", style two style")) for prompt, _ in prompts)
    assert stages.build_icons(demo, "resume")["sets"] == table


def test_a_set_of_which_nothing_is_held_out_is_refused(
    sets: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_sets(tmp_path / "packages", "one", drawings=3)
    demo = icons(folder=str(tmp_path / "demo"), icons={**sets, "sets": ["one"]}, size=32)
    here = listed(tmp_path / "packages")
    monkeypatch.setattr(build, "set_list", lambda: here)
    with pytest.raises(UserError, match="demo/icons: no single drawing is held out"):
        stages.build_icons(demo, "new")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--images", "a"], "data icons: builds its own images, expected neither shards nor images"),
        (["--shards", "a"], "data icons: builds its own images, expected neither shards nor images"),
        (["--table", "--seeds", "0"], "--table: only images of the scenes are scored, expected neither icons"),
        (["--size", "2048"], "less than or equal to 1024"),
        (["--set", "icons.sets=[notto]"], "sets: no set 'notto', did you mean 'noto'?"),
        (["--set", "icons.sources=nowhere"], "sources nowhere: no folder emojibase-data"),
        ([], "npm: not installed, and sources is not set"),
    ],
)
def test_icons_that_cannot_be_built_are_refused_first(
    flags: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("resvg_py", reason="the extra 'icons' is not installed")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.main(["demo", "--data", "icons", "--folder", str(tmp_path / "d"), *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "d").exists()


def test_the_missing_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    assert cli.main(["demo", "--data", "icons", "--folder", str(tmp_path / "d")]) == 2
    assert "pip install 'instella-ray[icons]'" in capsys.readouterr().err
    assert not (tmp_path / "d").exists()
