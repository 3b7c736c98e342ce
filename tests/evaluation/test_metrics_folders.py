"""Our numbers of two folders are torch-fidelity's and clean-fid's, for PNG and JPEG and both resizes of the network.

Over early features of a network with random weights, since the published ones cannot be had everywhere: what is checked is
the way from files to the number.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from instella_ray.data.scenes import render, scene_at
from instella_ray.evaluation import feature_settings
from instella_ray.evaluation.evaluate import EvaluateConfig, run_evaluate
from instella_ray.evaluation.metric_settings import MetricsConfig
from instella_ray.evaluation.metrics.features import clean_resize, inception

from ..kit.evaluation import numbers, random_inception

LAYER, COUNT, SIZE = "64", 10, 72
METRICS = ("fid", "kid", "precision_recall")


def write_folder(folder: Path, seed: int, ending: str) -> str:
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for i in range(COUNT):
        noisy = render(scene_at(seed, i), SIZE) + rng.normal(0, 12 * seed, (SIZE, SIZE, 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{i:02d}.{ending}")
    return str(folder)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    return random_inception(tmp_path_factory.mktemp("inception") / "random.pth")


def ours(tmp_path: Path, weights: str, resize: str, a: str, b: str) -> dict[str, Any]:
    options = {"weights": weights, "network_resize": resize, "reference": b, "images": {"size": SIZE}}
    metrics = MetricsConfig.model_validate(dict.fromkeys(METRICS, options))
    output = tmp_path / f"out-{resize}"
    run_evaluate(EvaluateConfig(images=a, size=SIZE, output=str(output), local=True, metrics=metrics, batch_size=6))
    found = numbers(output)[""]
    parts = {part["name"]: part["value"] for part in found["precision_recall"]["parts"]}
    recall = parts["recall_inception_unverified"]
    return {**{name: found[name]["value"] for name in METRICS}, "recall": recall}


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> tuple[str, str]:
    monkeypatch.setattr(feature_settings, "inception", partial(inception, layer=LAYER))
    return write_folder(tmp_path / "a", 1, request.param), write_folder(tmp_path / "b", 2, request.param)


@pytest.mark.process
@pytest.mark.parametrize("folders", ["png", pytest.param("jpg", marks=pytest.mark.nightly)], indirect=True)
def test_folders_give_torch_fidelitys_numbers(tmp_path: Path, weights: str, folders: tuple[str, str]) -> None:
    import torch_fidelity

    layers = {f"feature_layer_{name}": LAYER for name in ("fid", "kid", "prc")}
    layers["feature_extractor"] = "inception-v3-compat"
    sizes = {"kid_subsets": 1, "kid_subset_size": COUNT, "batch_size": 6}
    expected = torch_fidelity.calculate_metrics(
        **dict(zip(("input1", "input2"), folders, strict=True)),
        **{**layers, **sizes, "fid": True, "kid": True, "prc": True, "feature_extractor_weights_path": weights},
        **{"cuda": False, "cache": False, "save_cpu_ram": True, "verbose": False},
    )
    found = ours(tmp_path, weights, "legacy", *folders)
    assert found["fid"] == pytest.approx(expected["frechet_inception_distance"], rel=1e-3)
    # Theirs is computed with the features' 32 bits, a small difference of large numbers.
    assert found["kid"] == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-3, abs=1e-6)
    assert found["precision_recall"] == pytest.approx(expected["precision"], abs=1e-6)
    assert found["recall"] == pytest.approx(expected["recall"], abs=1e-6)


@pytest.mark.process
@pytest.mark.parametrize("folders", ["jpg", pytest.param("png", marks=pytest.mark.nightly)], indirect=True)
def test_folders_give_clean_fids_numbers(tmp_path: Path, weights: str, folders: tuple[str, str]) -> None:
    """With both of its resizes: its files are read, resized and compared by itself, over the same network."""
    theirs = pytest.importorskip("cleanfid.fid", reason="clean-fid is not installed: pip install clean-fid")
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    network = FeatureExtractorInceptionV3("inception-v3-compat", [LAYER], feature_extractor_weights_path=weights)

    def of_resized(pixels: torch.Tensor) -> torch.Tensor:
        x = (pixels - 128) / 128
        for layer in (network.Conv2d_1a_3x3, network.Conv2d_2a_3x3, network.Conv2d_2b_3x3, network.MaxPool_1):
            x = layer(x)
        return x.mean((2, 3))

    def of_bytes(pixels: torch.Tensor) -> torch.Tensor:
        return network(pixels.to(torch.uint8))[0]

    for mode, model, resize in (("clean", of_resized, "clean"), ("legacy_tensorflow", of_bytes, "legacy")):
        features = [
            theirs.get_files_features(
                sorted(map(str, Path(folder).iterdir())),
                model=model,
                mode=mode,
                num_workers=0,
                batch_size=6,
                device="cpu",
                verbose=False,
            )
            for folder in folders
        ]
        found = ours(tmp_path, weights, resize, *folders)
        assert found["fid"] == pytest.approx(theirs.fid_from_feats(*features), rel=1e-3)
        double = [rows.astype(np.float64) for rows in features]  # KID is a small difference of large numbers
        kid = theirs.kernel_distance(*double, num_subsets=1, max_subset_size=COUNT)
        assert found["kid"] == pytest.approx(kid, rel=1e-3)


def test_clean_resize_is_clean_fids() -> None:
    resizer = pytest.importorskip("cleanfid.resize").build_resizer("clean")
    images = np.random.default_rng(0).integers(0, 256, (2, 40, 56, 3), np.uint8)
    np.testing.assert_array_equal(clean_resize(images, 299), np.stack([resizer(image) for image in images]))
