"""Synthesizing: an image is a function of seed, prompt and model; every prompt is accounted for, by every model.

The pipelines are FLUX, Stable Diffusion 3 and 1 of one block with random weights, loaded as the large ones are.
"""

from __future__ import annotations

import importlib.util
import io
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from instella_ray.config import dump_yaml
from instella_ray.data.formats.images import decode_rgb
from instella_ray.data.formats.names import find_shards
from instella_ray.data.formats.parts import PartFolder, PartWriter
from instella_ray.data.formats.shards import write_samples
from instella_ray.data.formats.tar_source import read_samples
from instella_ray.data.generation.diffusers_pipeline import PipelineConfig, checked
from instella_ray.data.generation.synthesize import (
    SynthesizeConfig,
    Synthesizer,
    chunks,
    image_key,
    image_seed,
    run_synthesize,
    synthesize_settings,
)
from instella_ray.data.prompts import read_prompts
from instella_ray.demo.stand_ins import save_flux, save_stable_diffusion_3
from instella_ray.errors import UserError

from ...kit.pretrained import save_prudish_stable_diffusion
from ...kit.shards import contents, tar_bytes

TEXTS = ["a red ball", "a blue box on a round box.", "under", "a square ball beside a box", "what no tokenizer knows"]
SIZES = {"num_inference_steps": 2, "height": 32, "width": 32, "batch_size": 2, "actors": 1}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    pytest.importorskip("diffusers", reason="the extra 'synthesize' is not installed")
    folder = tmp_path_factory.mktemp("pipelines")
    made = {"flux": save_flux, "sd3": save_stable_diffusion_3, "prudish": save_prudish_stable_diffusion}
    return {name: save(folder / name) for name, save in made.items()}


def config(models: Mapping[str, Path], names: Sequence[str], output: Path, **more: Any) -> SynthesizeConfig:
    """A job of :data:`TEXTS`; ``more`` goes to the job or else to all its pipelines."""
    prompts = output.with_name("prompts.txt")
    prompts.write_text("\n".join(TEXTS))
    of_job = {key: more.pop(key) for key in list(more) if key in SynthesizeConfig.model_fields}
    guidance = {"flux": 0.0, "sd3": 3.0, "prudish": 3.0}
    pipelines = {
        name: PipelineConfig(**{"pipeline": str(models[name]), "guidance_scale": guidance[name], **SIZES, **more})
        for name in names
    }
    places = {"prompts": str(prompts), "output": str(output), "models": pipelines}
    return SynthesizeConfig(**{**places, "prompts_per_shard": 2, "format": "png", **of_job})


def made(cfg: SynthesizeConfig, name: str) -> list[dict[str, Any]]:
    return list(Synthesizer(cfg, name).rows("shard", [str(i) for i in range(len(TEXTS))], TEXTS))


def pixels(rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
    return np.stack([np.asarray(decode_rgb(row["image"])).astype(int) for row in rows])


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_an_image_depends_on_seed_and_prompt_and_not_on_what_shares_its_batch(
    models: dict[str, Path], tmp_path: Path, name: str
) -> None:
    rows = made(config(models, [name], tmp_path / "out"), name)
    assert rows == made(config(models, [name], tmp_path / "out"), name)
    assert [row["verdict"] for row in rows] == ["kept"] * 5 and rows[-1]["last"] and not rows[0]["last"]
    images = pixels(rows)
    for size in (1, 5):
        # Another batch rounds otherwise in the last bits, which may be a step of one in 255.
        assert np.abs(pixels(made(config(models, [name], tmp_path / "out", batch_size=size), name)) - images).max() <= 1
    assert np.abs(np.diff(images, axis=0)).mean(axis=(1, 2, 3)).min() > 5
    other = pixels(made(config(models, [name], tmp_path / "out", seed=1), name))
    assert np.abs(other - images).mean(axis=(1, 2, 3)).min() > 5


def test_metadata_tells_what_made_an_image(models: dict[str, Path], tmp_path: Path) -> None:
    row = made(config(models, ["sd3"], tmp_path / "out", format="jpeg", quality=80, width=48), "sd3")[1]
    assert row["key"] == "1-sd3" and row["caption"] == TEXTS[1] and row["image"].startswith(b"\xff\xd8")
    assert json.loads(row["meta"]) == {
        "prompt_id": "1",
        "model": "sd3",
        "pipeline": "sd3",
        "seed": image_seed(0, "1", "sd3"),
        "num_inference_steps": 2,
        "guidance_scale": 3.0,
        "width": 48,
        "height": 32,
    }


def test_seeds_differ_by_prompt_model_and_seed() -> None:
    asked = [(seed, prompt, model) for seed in (0, 1) for prompt in ("1", "11", "a") for model in ("m", "n")]
    assert len({image_seed(*what) for what in asked}) == len(asked)
    assert all(0 <= image_seed(*what) < 2**63 for what in asked)


@given(st.lists(st.text(max_size=8), unique=True, max_size=6), st.sampled_from(["a", "a_b", "B2"]))
def test_keys_of_any_prompt_ids_are_names_of_members_and_never_the_same(ids: list[str], model: str) -> None:
    ids = [text.encode("utf-8", "replace").decode() for text in ids]
    keys = [image_key(prompt_id, model) for prompt_id in dict.fromkeys(ids)]
    assert len(set(keys)) == len(keys)
    found = read_samples(io.BytesIO(tar_bytes([(f"{key}.txt", b"x") for key in keys])), "shard")
    assert [row["key"] for row in found if row["key"]] == keys


def test_what_came_out_broken_or_flagged_is_no_image(models: dict[str, Path], tmp_path: Path) -> None:
    assert np.array_equal(checked(np.array([[[0.0, 0.5, 1.0]]]), False), [[[0, 128, 255]]])
    assert checked(np.array([[[0.0, np.nan, 1.0]]]), False) == "quarantined:not_finite"
    assert checked(np.zeros((2, 2, 3)), False) == "quarantined:blank"
    rows = made(config(models, ["prudish"], tmp_path / "out"), "prudish")
    assert [(row["verdict"], row["image"]) for row in rows] == [("dropped:flagged", None)] * 5


def make_parts(cfg: SynthesizeConfig, labels: Sequence[str] | None = None) -> None:
    """What a run leaves that was killed when it had come so far (or had ended, but for its ledger), without Ray."""
    prompts = read_prompts(cfg.prompts)
    PartFolder(cfg.output).open("new", synthesize_settings(cfg, prompts))
    write = PartWriter(cfg.output, ".tar", write_samples)
    for name in cfg.models:
        worker = Synthesizer(cfg, name)
        for label, chunk in chunks(cfg, prompts, name).items():
            if labels is None or label in labels:
                row = {"shard": label, "ids": [p.id for p in chunk], "texts": [p.text for p in chunk]}
                write(worker(pa.Table.from_pylist([row])))


def test_a_killed_run_goes_on_to_the_same_files(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names, out = ["flux", "sd3"], tmp_path / "out"
    make_parts(config(models, names, tmp_path / "whole"))
    cfg = config(models, names, out, mode="resume")
    make_parts(cfg, ["flux-000000", "flux-000001", "flux-000002", "sd3-000001"])
    (out / "sd3-000002-0000000.tar").write_bytes(b"half")
    for change in ({"mode": "new"}, {"seed": 4}, {"num_inference_steps": 3}):
        with pytest.raises(UserError, match=r"exists already|made with (seed|models\.flux\.num_inference_steps)="):
            run_synthesize(config(models, names, out, **{"mode": "resume", **change}))

    path = Path(__file__).parents[3] / "jobs" / "synthesize.py"
    spec = importlib.util.spec_from_file_location("synthesize_job", path)
    assert spec is not None and spec.loader is not None
    job = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(job)
    (tmp_path / "job.yaml").write_text(dump_yaml(cfg))
    assert job.job.main(["--config", str(tmp_path / "job.yaml"), "--local"]) == 0
    assert f"{out}: 10 of 10 kept" in capsys.readouterr().out
    after = contents(out)
    assert len(json.loads(after.pop("shards.json"))["shards"]) == len([name for name in after if name.endswith(".tar")])
    assert json.loads(after.pop("ledger.json")) == {"in": 10, "kept": 10, "dropped": {}, "quarantined": {}}
    assert after == contents(tmp_path / "whole")
    rows = [row for url in find_shards(str(out)) for row in read_samples(io.BytesIO(Path(url).read_bytes()), "")]
    assert {(row["key"], row["caption"]) for row in rows} == {
        (f"{i:05d}-{name}", text) for i, text in enumerate(TEXTS) for name in names
    }


def _spoil_weights(model: Path) -> None:
    for path in model.rglob("*.safetensors"):
        path.rename(path.with_suffix(".bin"))


def _rename_class(name: Any) -> Any:
    def spoil(model: Path) -> None:
        index = json.loads((model / "model_index.json").read_text())
        (model / "model_index.json").write_text(json.dumps(index | {"_class_name": name}))

    return spoil


@pytest.mark.parametrize(
    ("spoil", "more", "message"),
    [
        (shutil.rmtree, {}, "prudish': cannot be loaded"),
        (_spoil_weights, {}, "prudish': no weights found; expected .safetensors files"),
        (_rename_class(["mine", "MyPipeline"]), {}, "no other code is run"),
        (_rename_class("StableDiffusionImg2ImgPipeline"), {}, "expected a text-to-image pipeline"),
        (None, {"max_sequence_length": 77}, "a StableDiffusionPipeline has no max_sequence_length"),
        (None, {"count": 6}, "5 found, expected at least count=6"),
    ],
)
def test_a_job_that_cannot_be_done_is_a_user_error_before_any_work(
    models: dict[str, Path], tmp_path: Path, spoil: Any, more: dict[str, Any], message: str
) -> None:
    place = {"prudish": shutil.copytree(models["prudish"], tmp_path / "prudish")}
    if spoil:
        spoil(place["prudish"])
    with pytest.raises(UserError) as refused:
        run_synthesize(config(place, ["prudish"], tmp_path / "out", **more))
    assert message in str(refused.value) and "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_without_diffusers_the_job_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UserError, match=r"diffusers is not installed \(pip install 'instella-ray\[synthesize\]'\)"):
        run_synthesize(config({"flux": tmp_path}, ["flux"], tmp_path / "out"))


@pytest.mark.parametrize(
    ("models", "message"),
    [({}, "at least 1"), ({"sd-3": {}}, "pattern"), ({"a": {"pipeline": "p", "num_inference_steps": 0}}, "greater")],
)
def test_models_have_plain_names_and_settings(models: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SynthesizeConfig(prompts="p.txt", output="out", models=models)
