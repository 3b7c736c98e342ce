"""GenEval's official detector as a Ray actor in an isolated runtime environment.

It cannot run offline and is not run by the tests: the environment installs mmdet 2.27 and compiles or downloads mmcv-full
1.7, the weights are downloaded from their hosts, and the detector needs a GPU. The tests check that Ray accepts the
environment and that detections are returned in the format of the rules.

Ray requires the cluster's Python and Ray versions in every worker, so the official environment (Python 3.9, torch 1.12)
cannot be used unchanged: the packages below are the official ones with a torch that has wheels for Python 3.11. The worker
reports its package versions, and results include them. mmcv-full has no wheel for that Python. Build one on a machine with
the same torch and GPU architecture (9.0 is Hopper), or name a container image or conda environment with all packages:

    TORCH_CUDA_ARCH_LIST=9.0 MMCV_WITH_OPS=1 pip wheel --no-build-isolation --no-deps mmcv-full==1.7.2
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pydantic

from ..config import InputPath
from .environments import EnvironmentConfig, start_actor
from .metrics.geneval import Detector, DetectorInfo, colored_classes
from .metrics.geneval_rules import COLORS, Detection
from .metrics.geneval_worker import OfficialDetector

PACKAGES = (
    "torch==2.0.1",
    "torchvision==0.15.2",
    "numpy==1.23.5",
    "mmdet==2.27.0",
    "open-clip-torch==2.20.0",
    "clip-benchmark==1.5.0",
    "timm==0.9.2",
    "transformers==4.36.1",
    "pandas==1.5.3",
    "pycocotools==2.0.6",
    "opencv-python-headless==4.7.0.72",
    "yapf==0.33.0",
)
"""Packages installed in addition to mmcv-full: the official versions, except torch, torchvision, numpy and clip-benchmark
(officially 1.12.1, 0.13.1, 1.23.1 and 1.4.0, which excludes torch 2; the functions used here are the same)."""


class GenEvalConfig(EnvironmentConfig):
    """Weights and environment of the official detector."""

    weights: InputPath
    """Path of ``mask2former_swin-s-p4-w7-224_8xb2-lsj-50e_coco_20220504_001756-c9d0c4f2.pth``, the same on every node."""
    color_weights: str = "openai"
    """CLIP ViT-L-14 weights: a local file, or an open_clip tag, which is downloaded."""
    mmcv_wheel: InputPath | None = None
    """Path or URL of an mmcv-full 1.7 wheel, which Ray installs together with its other packages."""
    gpus: float = pydantic.Field(default=1, gt=0)
    """GPUs of the actor, or a share of one."""

    @pydantic.model_validator(mode="after")
    def _one_environment(self) -> GenEvalConfig:
        given = [name for name in ("mmcv_wheel", "image_uri", "conda") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(f"expected one of mmcv_wheel, image_uri, conda, got {', '.join(given) or 'none'}")
        return self


def runtime_env(cfg: GenEvalConfig) -> dict[str, Any]:
    """Return Ray's ``runtime_env`` for the detector's actor."""
    return cfg.runtime_env([f"mmcv-full @ {_address(str(cfg.mmcv_wheel))}", *PACKAGES])


def _address(wheel: str) -> str:
    return wheel if "://" in wheel else f"file://{wheel}"


class RemoteDetector:
    """A :class:`.metrics.geneval.Detector` that delegates to a Ray actor."""

    def __init__(self, actor: Any, info: DetectorInfo) -> None:
        self._actor, self.info = actor, info

    def detect(self, images: np.ndarray, meta: Sequence[Mapping[str, Any]]) -> list[list[Detection]]:
        import ray

        calls = [self._actor.detect.remote(x, colored_classes(m)) for x, m in zip(images, meta, strict=True)]
        return [[detection(found) for found in image] for image in ray.get(calls)]


def detection(data: Mapping[str, Any]) -> Detection:
    """Convert a worker's plain dict to a :class:`.metrics.geneval_rules.Detection`."""
    return Detection(data["label"], float(data["score"]), tuple(data["box"]), data.get("color"))


def start_detector(cfg: GenEvalConfig, worker: type = OfficialDetector) -> Detector:
    """Start the actor and wait until it has loaded; raises UserError if its environment cannot be set up."""
    arguments = {"weights": cfg.weights, "colors": list(COLORS), "color_weights": cfg.color_weights}
    actor, about = start_actor(worker, arguments, asker="metric geneval", runtime_env=runtime_env(cfg), gpus=cfg.gpus)
    return RemoteDetector(actor, DetectorInfo(**about))
