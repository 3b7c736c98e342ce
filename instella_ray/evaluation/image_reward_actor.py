"""ImageReward's official network: in this process where its packages are installed, else as a Ray actor with its own."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pydantic

from ..config import InputPath
from ..errors import UserError
from .environments import EnvironmentConfig, start_actor
from .metrics.features import local_weights
from .metrics.image_reward import Scorer
from .metrics.image_reward_worker import MED_CONFIG, RELEASE, WEIGHTS, OfficialReward

PACKAGES = (
    "image-reward==1.5",
    "clip-anytorch==2.6.0",
    "fairscale==0.4.13",
    "transformers==4.47.1",
    "tokenizers==0.21.4",
    "huggingface-hub==0.36.0",
    "diffusers==0.31.0",
    "datasets==3.6.0",
    "dill==0.3.8",
    "multiprocess==0.70.16",
    "xxhash==4.1.0",
    "setuptools==80.9.0",
)
"""Packages installed over the cluster's, without their dependencies: the release of 2023 and the last versions that fit it.

Its timm 0.6.13 is left out, as the network also builds with the cluster's. clip-anytorch imports pkg_resources, which
setuptools 81 dropped.
"""
ASKER = "metric image_reward"


class ImageRewardConfig(EnvironmentConfig):
    """Weights and environment of the official network."""

    weights: InputPath | None = None
    """Path of ``ImageReward.pt``, the same on every node; none takes the release from the hub or its cache.

    No checksum of the file is published, so with a path the metric's name is ``image_reward_unverified``.
    """
    med_config: InputPath | None = None
    """Path of ``med_config.json``, which goes with the weights."""
    vocabulary: InputPath | None = None
    """Folder with BERT's ``vocab.txt``; none takes that of ``bert-base-uncased`` from the hub or its cache."""

    @pydantic.model_validator(mode="after")
    def _whole(self) -> ImageRewardConfig:
        if (self.weights is None) != (self.med_config is None):
            raise ValueError(f"expected weights and med_config, or neither for {RELEASE}")
        if self.image_uri and self.conda:
            raise ValueError("expected one of image_uri, conda, got both")
        return self


class RemoteReward:
    """A :class:`.metrics.image_reward.Scorer` that delegates to a Ray actor."""

    def __init__(self, actor: Any, about: dict[str, Any]) -> None:
        self._actor, self._about = actor, about

    def about(self) -> dict[str, Any]:
        return self._about

    def scores(self, prompts: Sequence[str], images: Sequence[np.ndarray]) -> list[float]:
        import ray

        found: list[float] = ray.get(self._actor.scores.remote(list(prompts), list(images)))
        return found

    def is_cut(self, prompts: Sequence[str]) -> list[bool]:
        import ray

        found: list[bool] = ray.get(self._actor.is_cut.remote(list(prompts)))
        return found


def runtime_env(cfg: ImageRewardConfig) -> dict[str, Any]:
    """Return Ray's ``runtime_env`` for the network's actor."""
    return cfg.runtime_env(PACKAGES, uv_pip_install_options=["--no-deps"])


def load_image_reward(cfg: ImageRewardConfig, *, device: str = "cpu") -> Scorer:
    """Load the network on ``device`` if its packages can be imported and no environment is named, else start its actor.

    Raises UserError for missing or wrong files, and if an environment is needed and cannot be set up.
    """
    if cfg.weights is not None:
        local_weights(cfg.weights, "image_reward", WEIGHTS)
        local_weights(cfg.med_config, "image_reward", MED_CONFIG)
    if cfg.vocabulary is not None:
        local_weights(f"{cfg.vocabulary}/vocab.txt", "image_reward", "BERT's vocab.txt")
    arguments = {name: getattr(cfg, name) for name in ("weights", "med_config", "vocabulary")}
    if not (cfg.image_uri or cfg.conda) and _is_installed():
        try:
            return OfficialReward(**arguments, device=device)
        except (ValueError, OSError) as error:
            raise UserError(f"{ASKER}: {error}") from None
    arguments["device"] = "cuda" if cfg.gpus else "cpu"
    return RemoteReward(
        *start_actor(OfficialReward, arguments, asker=ASKER, runtime_env=runtime_env(cfg), gpus=cfg.gpus)
    )


def _is_installed() -> bool:
    """Return whether the package can be imported, which it cannot be with transformers 5."""
    try:
        importlib.import_module("ImageReward.ImageReward")
    except ImportError:
        return False
    return True
