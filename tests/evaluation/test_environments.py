"""Environments of the metrics whose packages do not fit this project's: they can be installed, and do what they are for."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from instella_ray.evaluation.geneval_actor import PACKAGES

from ..kit.project import ROOT

pytestmark = [pytest.mark.process, pytest.mark.nightly]

BERT = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "vocab_size": 30524,
    "encoder_width": 1024,
    "add_cross_attention": True,
}
"""``med_config.json`` of the release."""
SCORE = """
import importlib
import numpy as np
import torch
from instella_ray.evaluation.metrics.image_reward import load_image_reward

network = importlib.import_module("ImageReward.ImageReward").ImageReward(med_config="med_config.json")
torch.manual_seed(0)
for weights in network.mlp.parameters():  # as they begin, the score would be the same to the last digit
    torch.nn.init.normal_(weights, std=0.1)
torch.save(network.state_dict(), "ImageReward.pt")
score = load_image_reward("ImageReward.pt", "med_config.json")
image = np.full((64, 64, 3), (255, 0, 0), np.uint8)
values = [score(prompt, image) for prompt in ("a red circle", "a blue square", "a red circle")]
assert values[0] == values[2] != values[1], values
"""


def uv() -> str:
    """The package manager of this project's own set-up."""
    found = shutil.which("uv", path=os.pathsep.join([str(ROOT / ".uv" / "bin"), os.environ["PATH"]]))
    if found is None:
        pytest.skip("uv is not installed")
    return found


def test_image_reward_scores_with_the_packages_of_its_image(tmp_path: Path) -> None:
    """The official network with random weights: none are shipped with any package."""
    target, requirements = tmp_path / "packages", ROOT / "cluster" / "docker" / "image-reward.txt"
    install = [uv(), "pip", "install", "--python", sys.executable, "--no-deps", "--target", str(target)]
    subprocess.run([*install, "--requirement", str(requirements)], check=True)
    (tmp_path / "bert-base-uncased").mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "circle", "square"]
    (tmp_path / "bert-base-uncased" / "vocab.txt").write_text("\n".join(words) + "\n")
    (tmp_path / "med_config.json").write_text(json.dumps(BERT))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(target), str(ROOT)])}
    subprocess.run([sys.executable, "-c", SCORE], cwd=tmp_path, env=environment, check=True)


@pytest.mark.parametrize(("python", "fits"), [("3.11", True), ("3.12", False)])
def test_the_detectors_packages_fit_together_on_the_python_of_its_image(
    python: str, fits: bool, tmp_path: Path
) -> None:
    """If they also fit a newer Python, GenEval needs no image of its own."""
    (tmp_path / "packages.in").write_text("\n".join(PACKAGES))
    wheels = ["--only-binary", "torch", "--only-binary", "numpy"]
    command = [uv(), "pip", "compile", "--quiet", "--python-version", python, *wheels, "packages.in"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode == 0) == fits, done.stderr
    if fits:
        base = (ROOT / "cluster" / "docker" / "Dockerfile.cpu").read_text()
        assert f"ARG BASE=python:{python}." in base
