"""ImageReward: the environment of its network, its actor, and what results say of it; the real network is nightly."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from instella_ray.errors import UserError
from instella_ray.evaluation.environments import start_actor
from instella_ray.evaluation.image_reward_actor import (
    PACKAGES,
    ImageRewardConfig,
    RemoteReward,
    load_image_reward,
    runtime_env,
)
from instella_ray.evaluation.metric_settings import MetricsConfig
from instella_ray.evaluation.metrics.base import Batch
from instella_ray.evaluation.metrics.image_reward import image_reward
from instella_ray.evaluation.metrics.image_reward_worker import RELEASE

WORKER = '''
"""A network whose score is the length of the prompt times the mean of the image."""
import numpy as np

class Length:
    def __init__(self, weights, scale=1.0):
        if scale < 0:
            raise ValueError("a negative scale")
        self.weights, self.scale = weights, scale

    def about(self):
        about = {"implementation": "length 1", "weights": self.weights, "weights_hash": "ab" * 32}
        return {**about, "settings": {"text_limit": 35, "vocabulary": "bert-base-uncased"}}

    def scores(self, prompts, images):
        return [self.scale * len(p) * float(np.mean(x)) for p, x in zip(prompts, images, strict=True)]

    def is_cut(self, prompts):
        return [len(prompt) > 3 for prompt in prompts]
'''
"""A worker of a module that the actor cannot import."""
IMAGES = [np.full((8, 8, 3), value, np.uint8) for value in (1, 2, 3)]
BATCH = Batch(["a", "b", "c"], images=IMAGES, prompts=["long prompt", "cat", "another"])


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type:
    (tmp_path / "length_worker.py").write_text(WORKER)
    spec = importlib.util.spec_from_file_location("length_worker", tmp_path / "length_worker.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "length_worker", module)
    spec.loader.exec_module(module)
    found: type = module.__dict__["Length"]
    return found


def start(worker: type, **arguments: Any) -> RemoteReward:
    return RemoteReward(*start_actor(worker, arguments, asker="metric image_reward", runtime_env={}, gpus=0))


def test_ray_accepts_the_environment() -> None:
    from ray.runtime_env import RuntimeEnv

    assert RuntimeEnv(**runtime_env(ImageRewardConfig()))["uv"] == {
        "packages": list(PACKAGES),
        "uv_check": False,
        "uv_pip_install_options": ["--no-deps"],
    }
    assert RuntimeEnv(**runtime_env(ImageRewardConfig(conda="reward")))["conda"] == "reward"
    assert runtime_env(ImageRewardConfig(image_uri="reward:1")) == {"image_uri": "reward:1"}


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"conda": "a", "image_uri": "b"}, "one of image_uri, conda"),
        ({"weights": "ImageReward.pt"}, "weights and med_config, or neither"),
        ({"med_config": "med_config.json"}, "weights and med_config, or neither"),
        ({"gpus": -1}, "gpus"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(given: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        MetricsConfig.model_validate({"image_reward": given})


def test_missing_files_and_a_missing_ray_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"weights nothing\.pt: expected a local file, ImageReward\.pt"):
        load_image_reward(ImageRewardConfig(weights="nothing.pt", med_config="med_config.json"))
    with pytest.raises(UserError, match=r"vocab\.txt: expected a local file"):
        load_image_reward(ImageRewardConfig(vocabulary=str(tmp_path)))
    monkeypatch.setitem(sys.modules, "ImageReward.ImageReward", None)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with pytest.raises(UserError, match=r"metric image_reward: needs packages of its own, .* not with local"):
        load_image_reward(ImageRewardConfig())


@pytest.mark.ray
def test_an_actor_scores_as_its_worker_does_here(ray_session: None, worker: type) -> None:
    metric = image_reward(start(worker, weights="ImageReward.pt", scale=2.0))
    metric.update(BATCH)
    here = worker("ImageReward.pt", 2.0).scores(BATCH.prompts, BATCH.images)
    assert list(metric.scores().values()) == here == [22, 12, 42]
    result = type(metric).from_state(metric.state()).result()
    assert result.settings["truncated_prompts"] == 2 and "cut to the text model's 35 tokens" in result.cautions[0]
    assert json.loads(json.dumps(result.to_json()))["cautions"] == list(result.cautions)
    assert (result.implementation, result.weights, result.weights_hash) == ("length 1", "ImageReward.pt", "ab" * 32)


@pytest.mark.ray
def test_a_worker_that_cannot_start_gives_its_reason_in_one_line(ray_session: None, worker: type) -> None:
    with pytest.raises(UserError, match=r": its actor could not start: ValueError: a negative scale$") as found:
        start(worker, weights="w", scale=-1.0)
    assert "\n" not in str(found.value)


def test_only_the_release_is_called_image_reward(worker: type) -> None:
    assert image_reward(worker(RELEASE)).info.name == "image_reward"
    assert image_reward(worker("ImageReward.pt")).info.name == "image_reward_unverified"
