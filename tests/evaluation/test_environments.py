"""Environments of the metrics whose packages do not fit this project's: they can be installed, and do what they are for."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from instella_ray.evaluation import geneval_actor, image_reward_actor
from instella_ray.evaluation.evaluate import EvaluateConfig, run_evaluate
from instella_ray.evaluation.metrics.samples import SampleMetric
from instella_ray.evaluation.results import Evaluation

from ..kit.evaluation import numbers
from ..kit.project import ROOT

pytestmark = [pytest.mark.process, pytest.mark.nightly]

BERT = {
    "hidden_size": 768,
    "num_hidden_layers": 2,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "vocab_size": 64,
    "encoder_width": 1024,
    "add_cross_attention": True,
}
"""``med_config.json`` of the release with fewer layers and words."""
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "circle", "square"]
PROMPTS = ["a red circle", "a blue square", "a red square", " ".join(["red"] * 40)]
DIRECT = """
import importlib, json, os, sys
import torch
from PIL import Image

network = importlib.import_module("ImageReward.ImageReward").ImageReward(med_config="med_config.json").eval()
torch.manual_seed(0)
for weights in network.mlp.parameters():  # as they begin, the score would be the same to the last digit
    torch.nn.init.normal_(weights, std=0.1)
torch.save(network.state_dict(), "ImageReward.pt")
with torch.no_grad():
    images = [Image.open(f"images/{i}.png") for i in range(len(sys.argv) - 1)]
    scores = [network.score(prompt, image) for prompt, image in zip(sys.argv[1:], images)]

# In this process the packages can be imported, so no actor is started.
from instella_ray.evaluation.image_reward_actor import ImageRewardConfig, load_image_reward
import numpy as np

files = {"weights": "ImageReward.pt", "med_config": "med_config.json", "vocabulary": "vocabulary"}
here = load_image_reward(ImageRewardConfig(**files))
assert here.scores(sys.argv[1:], [np.asarray(image) for image in images]) == scores
assert here.about()["weights"] == "ImageReward.pt"

# The release, as the hub's client finds it in its cache.
commit, repository = "0" * 40, os.path.join(os.environ["HF_HOME"], "hub", "models--THUDM--ImageReward")
for folder in ("refs", f"snapshots/{commit}"):
    os.makedirs(os.path.join(repository, folder))
with open(os.path.join(repository, "refs", "main"), "w") as file:
    file.write(commit)
for name in ("ImageReward.pt", "med_config.json"):
    os.symlink(os.path.abspath(name), os.path.join(repository, "snapshots", commit, name))
release = load_image_reward(ImageRewardConfig(vocabulary="vocabulary"))
assert release.scores(sys.argv[1:2], [np.asarray(images[0])]) == scores[:1]
assert release.about()["weights"] == "ImageReward-v1.0"
print(json.dumps(scores))
"""


def uv() -> str:
    """The package manager of this project's own set-up."""
    found = shutil.which("uv", path=os.pathsep.join([str(ROOT / ".uv" / "bin"), os.environ["PATH"]]))
    if found is None:
        pytest.skip("uv is not installed")
    return found


@pytest.fixture
def cloned(ray_session: None) -> Iterator[None]:
    """Remove the environments that Ray has made: each is a clone of this one, with gigabytes of packages."""
    import ray

    yield
    session = Path(ray._private.worker._global_node.get_session_dir_path())
    shutil.rmtree(session / "runtime_resources" / "uv")


@pytest.mark.ray
def test_image_reward_in_rays_environment_scores_as_its_package_does(cloned: None, tmp_path: Path) -> None:
    """The official network with random weights: none are shipped with any package."""
    rng, images = np.random.default_rng(0), tmp_path / "images"
    images.mkdir()
    for number, prompt in enumerate(PROMPTS):
        pixels = rng.integers(0, 256, (64, 64, 3), np.uint8)  # each metric takes the centre square
        Image.fromarray(pixels).save(images / f"{number}.png")
        (images / f"{number}.txt").write_text(prompt)
    # The package asks for a vocabulary of this name; this project's setting names a folder.
    for folder in ("bert-base-uncased", "vocabulary"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    (tmp_path / "med_config.json").write_text(json.dumps(BERT))

    target = tmp_path / "packages"
    install = [uv(), "pip", "install", "--python", sys.executable, "--no-deps", "--target", str(target)]
    subprocess.run([*install, *image_reward_actor.PACKAGES], check=True)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(target), str(ROOT)])}
    environment["HF_HOME"] = str(tmp_path / "hub")
    command = [sys.executable, "-c", DIRECT, *PROMPTS]
    done = subprocess.run(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    expected = json.loads(done.stdout.splitlines()[-1])
    assert len(set(expected)) == len(PROMPTS)

    files = {"weights": "ImageReward.pt", "med_config": "med_config.json", "vocabulary": "vocabulary"}
    metrics = {"image_reward": {name: str(tmp_path / file) for name, file in files.items()}}
    given = {
        "images": str(images),
        "size": 64,
        "output": str(tmp_path / "o"),
        "actors": 1,
        "show": {"prompts": 0, "extremes": 0},
    }
    run_evaluate(EvaluateConfig.model_validate({**given, "metrics": metrics}))
    found = Evaluation(str(tmp_path / "o")).metric("", "image_reward")
    assert isinstance(found, SampleMetric)
    assert list(found.scores().values()) == pytest.approx(expected, abs=1e-5)
    result = numbers(tmp_path / "o")[""]["image_reward"]
    assert result["name"] == "image_reward_unverified" and result["implementation"] == "image-reward 1.5"
    assert result["settings"]["truncated_prompts"] == 1
    assert result["settings"]["environment"]["transformers"] == "4.47.1" != version("transformers")
    assert result["settings"]["vocabulary"].startswith("vocab.txt (sha256 ")


@pytest.mark.parametrize(("python", "fits"), [("3.11", True), ("3.12", False)])
def test_the_detectors_packages_fit_together_on_the_python_of_its_image(
    python: str, fits: bool, tmp_path: Path
) -> None:
    """If they also fit a newer Python, GenEval needs no image of its own."""
    (tmp_path / "packages.in").write_text("\n".join(geneval_actor.PACKAGES))
    wheels = ["--only-binary", "torch", "--only-binary", "numpy"]
    command = [uv(), "pip", "compile", "--quiet", "--python-version", python, *wheels, "packages.in"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode == 0) == fits, done.stderr
    if fits:
        base = (ROOT / "cluster" / "docker" / "Dockerfile.cpu").read_text()
        assert f"ARG BASE=python:{python}." in base
