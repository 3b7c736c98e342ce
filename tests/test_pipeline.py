"""The Python API: the bits of the endpoint and of bulk sampling, the field's conventions, folders that load anywhere."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from instella_ray import InstellaPipeline
from instella_ray.bulk.plan import Planned
from instella_ray.bulk.sampler import Sampler, SamplerOptions
from instella_ray.data.prompts import Prompt
from instella_ray.engine.slots import EngineOptions
from instella_ray.errors import UserError
from instella_ray.models.sampling import SamplingConfig
from instella_ray.models.text_encoder import TextEncoderConfig

from .kit.models import TEXT, make_generator, make_tokenizer, write_tokenizer
from .kit.project import ROOT

PROMPTS = ["a red circle", "a blue cross", "a red circle"]
MODEL = "demo/runs/diffusion/latest"
"""The model of the notebook."""
FEW: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 2.0, "temperature": 0.5}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random tokenizer, and a generator of each kind beside it that knows where that is."""
    root = tmp_path_factory.mktemp("models")
    tokenizer_hash = make_tokenizer(root / "bit")
    made = {"bit": root / "bit"}
    for kind in ("diffusion", "ar"):
        made[kind] = root / kind
        make_generator(made[kind], tokenizer_hash, kind)
        config = yaml.safe_load((made[kind] / "config.yaml").read_text())
        config["lineage"] = {"inputs": [{"role": "tokenizer", "path": str(root / "bit")}]}
        (made[kind] / "config.yaml").write_text(yaml.safe_dump(config))
    return made


@pytest.fixture(scope="module", params=["diffusion", "ar"])
def pipe(request: pytest.FixtureRequest, folders: dict[str, Path]) -> InstellaPipeline:
    return InstellaPipeline.from_pretrained(folders[request.param], device="cpu", batch_size=2)


def test_the_bits_are_those_of_bulk_sampling(pipe: InstellaPipeline) -> None:
    output = pipe(PROMPTS, seed=[5, 6, 5], output_type="codes", **FEW)
    encoder = TextEncoderConfig.model_validate(TEXT)
    options = SamplerOptions(str(pipe.source), encoder, EngineOptions(2, encoder.max_length), device="cpu")
    samples = [
        Planned(Prompt(str(i), text), 0, seed) for i, (text, seed) in enumerate(zip(PROMPTS, (5, 6, 5), strict=True))
    ]
    bulk = Sampler(options).run(samples, {"": SamplingConfig(**FEW)})[""]
    assert np.array_equal(output.codes, bulk) and output.images is None
    assert np.array_equal(output.codes[0], output.codes[2]) and not np.array_equal(output.codes[0], output.codes[1])


def test_seeds_repeat_an_image_alone_and_follow_one_another(pipe: InstellaPipeline) -> None:
    drawn = pipe("a red circle", num_images_per_prompt=3, output_type="np", **FEW)
    assert len(set(drawn.seeds)) == 3 and drawn.seeds[1] == drawn.seeds[0] + 1
    again = pipe("a red circle", seed=drawn.seeds[2], output_type="np", **FEW)
    assert np.array_equal(again.codes[0], drawn.codes[2])
    by_generator = [pipe("x", generator=torch.Generator().manual_seed(1), output_type="codes", **FEW) for _ in range(2)]
    assert by_generator[0].seeds == by_generator[1].seeds


def test_images_have_the_size_and_the_type_that_were_asked_for(pipe: InstellaPipeline) -> None:
    output = pipe(["a", "b"], seed=1, height=48, width=32, **FEW)
    assert [type(image) for image in output.images] == [Image.Image] * 2 and output.images[0].size == (32, 48)
    arrays = pipe(["a", "b"], seed=1, height=48, width=32, output_type="np", **FEW).images
    assert arrays.shape == (2, 48, 32, 3) and np.array_equal(arrays[1], np.asarray(output.images[1]))
    tensors = pipe("a", seed=1, output_type="pt", **FEW).images
    assert tensors.shape == (1, 3, 32, 32) and tensors.abs().max() <= 1


def test_codes_decode_to_the_image_again_and_images_encode(pipe: InstellaPipeline) -> None:
    output = pipe("a", seed=1, **FEW)
    assert np.array_equal(np.asarray(pipe.decode(output.codes[0])), np.asarray(output.images[0]))
    assert pipe.decode(output.codes, height=64, width=32, output_type="np").shape == (1, 64, 32, 3)
    codes = pipe.encode(output.images[0].resize((60, 40)))
    assert codes.shape == output.codes.shape[1:] and codes.dtype == np.uint8
    assert pipe.encode([np.zeros((40, 50, 3), np.uint8)] * 2).shape == (2, *codes.shape)


def test_a_stream_ends_with_the_image_and_may_be_left(pipe: InstellaPipeline) -> None:
    whole = pipe("a", seed=3, **FEW)
    previews = list(pipe.stream("a", seed=3, **FEW))
    assert [preview.step for preview in previews] == [*range(1, previews[-1].steps), previews[-1].steps]
    assert np.array_equal(previews[-1].codes, whole.codes[0])
    assert np.array_equal(np.asarray(previews[-1].image), np.asarray(whole.images[0]))
    for _ in pipe.stream("b", **FEW):
        break
    assert pipe.engine.idle and np.array_equal(pipe("a", seed=3, **FEW).codes, whole.codes)


def test_a_callback_sees_every_step(pipe: InstellaPipeline) -> None:
    seen: list[tuple[int, int]] = []
    pipe(["a", "b"], callback_on_step_end=lambda _, image, step, values: seen.append((image, step)), **FEW)
    assert {image for image, _ in seen} == {0, 1} and (0, 1) in seen and (1, 2) in seen


def test_a_saved_pipeline_loads_from_anywhere(pipe: InstellaPipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "saved")
    shutil.move(tmp_path / "saved", tmp_path / "elsewhere")
    moved = InstellaPipeline.from_pretrained(tmp_path / "elsewhere", device="cpu", batch_size=2)
    assert moved.text_encoder.cfg.name == str(tmp_path / "elsewhere" / "text_encoder")
    asked: dict[str, Any] = {"seed": 1, "output_type": "codes", **FEW}
    assert np.array_equal(moved("a", **asked).codes, pipe("a", **asked).codes)
    with pytest.raises(UserError, match="already exists"):
        pipe.save_pretrained(tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompt": []}, "prompt: the list is empty"),
        ({"num_steps": 3}, "num_steps: unknown argument, expected one of num_inference_steps"),
        ({"num_inference_steps": 0}, "'num_inference_steps' = 0"),
        ({"height": 33}, "height 33, width 32: expected multiples of 8"),
        ({"seed": [1, 2]}, "seed: expected one or 1, got 2"),
        ({"output_type": "jpeg"}, "output_type 'jpeg': expected one of pil"),
    ],
)
def test_wrong_arguments_are_named(pipe: InstellaPipeline, given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        pipe(**{"prompt": "a", **FEW, **given})
    with pytest.raises(UserError, match="codes: expected 0/1 of shape"):
        pipe.decode(np.zeros((3, 3), np.uint8))


def test_folders_that_lack_a_part_say_what_to_pass(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds a tokenizer, expected a generator"):
        InstellaPipeline.from_pretrained(folders["bit"])
    with pytest.raises(UserError, match=r"no such model folder; expected a folder with config\.yaml"):
        InstellaPipeline.from_pretrained(tmp_path / "none")
    moved = shutil.copytree(folders["ar"], tmp_path / "moved")
    config = yaml.safe_load((moved / "config.yaml").read_text())
    config["lineage"]["inputs"][0]["path"] = "/gone/bit"
    (moved / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(
        UserError, match=r"tokenizer is missing \(it was at /gone/bit, which is not there\); pass tokenizer="
    ):
        InstellaPipeline.from_pretrained(moved)
    assert InstellaPipeline.from_pretrained(moved, tokenizer=folders["bit"], device="cpu").source == moved
    write_tokenizer(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match=r"not the tokenizer that .* was trained with"):
        InstellaPipeline.from_pretrained(moved, tokenizer=tmp_path / "other")


def test_importing_the_package_loads_nothing_heavy() -> None:
    import instella_ray

    with pytest.raises(AttributeError, match="no attribute 'Pipeline'"):
        _ = instella_ray.Pipeline


@pytest.mark.process
def test_the_examples_run(folders: dict[str, Path], tmp_path: Path) -> None:
    model = str(folders["diffusion"])
    out = run_python(tmp_path, str(ROOT / "examples" / "generate.py"), model, "a red circle", "b")
    assert out.startswith("out-0.png: 'a red circle', seed 7") and Image.open(tmp_path / "out-1.png").size == (32, 32)
    cells = json.loads((ROOT / "examples" / "pipeline.ipynb").read_text())["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    assert MODEL in code
    run_python(tmp_path, "-c", code.replace(MODEL, model))


def run_python(folder: Path, *arguments: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *arguments], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
