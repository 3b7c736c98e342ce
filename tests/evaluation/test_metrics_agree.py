"""Our numbers equal torch-fidelity's, open_clip's, torchmetrics' and lpips' on the same images, within 1e-4.

The networks have random weights drawn on the spot, as the real ones cannot be had everywhere: what is checked is the way
from images to the number, and that such weights never carry the real metric's name.
"""

from __future__ import annotations

import types
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from instella_ray.data.scenes import render, scene_at
from instella_ray.errors import UserError
from instella_ray.evaluation.metrics import clip_score, fid, lpips_distance
from instella_ray.evaluation.metrics.base import Batch
from instella_ray.evaluation.metrics.features import inception
from instella_ray.evaluation.metrics.frechet import Gaussian, frechet_distance
from instella_ray.evaluation.metrics.images import ImageSettings
from instella_ray.evaluation.metrics.psnr import CEILING, image_psnr
from instella_ray.evaluation.metrics.ssim import image_ssim
from instella_ray.models.clip import load_clip

from ..kit.evaluation import random_inception

RTOL = 1e-4
RNG = np.random.default_rng(0)


def random_images(count: int, size: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    clean = np.stack([render(scene_at(seed, i), size) for i in range(count)]).astype(float)
    return np.clip(clean + rng.normal(0, 25, clean.shape), 0, 255).astype(np.uint8)


def planes(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).movedim(-1, 1)


# --- PSNR and SSIM


@settings(max_examples=20)
@given(st.integers(0, 1000), st.integers(11, 48), st.integers(11, 48), st.just(0) | st.floats(0, 60))
def test_psnr_and_ssim_equal_torchmetrics(seed: int, height: int, width: int, noise: float) -> None:
    """Image by image, to 1e-5 dB and 1e-6; an image that came back unchanged has our ceiling where theirs is infinite."""
    image = pytest.importorskip("torchmetrics.functional.image")
    rng = np.random.default_rng(seed)
    a = rng.integers(0, 256, (2, height, width, 3), np.uint8)
    b = np.clip(a + rng.normal(0, noise, a.shape), 0, 255).astype(np.uint8)
    x, y = planes(b).double(), planes(a).double()
    theirs = image.structural_similarity_index_measure(x, y, data_range=255.0, reduction="none")
    np.testing.assert_allclose(image_ssim(b, a), theirs.numpy(), rtol=0, atol=1e-6)
    theirs = image.peak_signal_noise_ratio(x, y, data_range=255.0, reduction="none", dim=(1, 2, 3)).clamp(max=CEILING)
    np.testing.assert_allclose(image_psnr(b, a), theirs.numpy(), rtol=0, atol=1e-5)


def test_psnr_equals_the_one_that_training_reports() -> None:
    from instella_ray.data.formats.images import to_tensor
    from instella_ray.training.tokenizer import psnr

    a, b = random_images(4, 32), random_images(4, 32, seed=1)
    np.testing.assert_allclose(image_psnr(a, b), psnr(to_tensor(a), to_tensor(b)).numpy(), rtol=1e-5)


def test_images_smaller_than_the_window_are_refused() -> None:
    with pytest.raises(UserError, match="at least 11"):
        image_ssim(random_images(1, 10), random_images(1, 10))


# --- FID


@settings(max_examples=15)
@given(st.integers(0, 1000), st.integers(2, 24))
def test_frechet_distance_equals_torch_fidelity_on_features(seed: int, width: int) -> None:
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(width, width))
    a, b = rng.normal(0, 1, (60, width)) @ mix, rng.normal(0.3, 1.5, (80, width)) @ mix
    stats = [fid_features_to_statistics(torch.from_numpy(x)) for x in (a, b)]
    theirs = fid_statistics_to_metric(*stats, verbose=False)["frechet_inception_distance"]
    ours = frechet_distance(*(Gaussian(x.mean(0), np.cov(x, rowvar=False)) for x in (a, b)))
    assert ours == pytest.approx(theirs, rel=RTOL)


def test_frechet_distance_of_singular_covariances() -> None:
    """Fewer samples than dimensions: the closed form for commuting covariances still holds."""
    a, b = (np.diag([scale, 4 * scale, 0.0]) for scale in (1.0, 9.0))
    assert frechet_distance(Gaussian(np.zeros(3), a), Gaussian(np.ones(3), b)) == pytest.approx(3 + 4 + 16)


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    return random_inception(tmp_path_factory.mktemp("inception") / "random.pth")


class ImageSet(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __init__(self, images: np.ndarray) -> None:
        self.images = planes(images)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.images[index]


@pytest.mark.nightly  # 280 images through Inception, twice
def test_fid_equals_torch_fidelity_on_images(inception_weights: str) -> None:
    """Early features of the network, as those are as many as a test has images for."""
    import torch_fidelity

    ours, theirs = random_images(70, 40), random_images(70, 40, seed=5)
    expected = torch_fidelity.calculate_metrics(
        input1=ImageSet(ours),
        input2=ImageSet(theirs),
        fid=True,
        feature_layer_fid="64",
        feature_extractor_weights_path=inception_weights,
        cuda=False,
        batch_size=7,
        cache=False,
        save_cpu_ram=True,
        verbose=False,
    )["frechet_inception_distance"]
    features = inception(inception_weights, layer="64")
    raw = ImageSettings()
    gather = fid.frechet(features, images=raw)
    for start in range(0, 70, 7):
        gather.update(Batch([str(i) for i in range(start, start + 7)], images=theirs[start : start + 7]))
    metric = fid.frechet(features, reference=gather.gaussian(), images=raw)
    for start in range(0, 70, 7):
        metric.update(Batch([str(i) for i in range(start, start + 7)], images=ours[start : start + 7]))
    result = metric.result()
    assert result.value == pytest.approx(expected, rel=RTOL)
    assert result.name == "frechet_inception_unverified"  # random weights are not FID
    assert result.weights_hash and result.weights == "random.pth" and "torch-fidelity" in result.implementation
    paired = fid.frechet(features, reconstruction=True, images=raw)
    paired.update(Batch([str(i) for i in range(70)], images=ours, references=theirs))
    assert paired.result().value == pytest.approx(expected, rel=RTOL)


def test_the_pooled_features_are_torch_fidelitys(inception_weights: str) -> None:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    images = random_images(3, 48)
    network = FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048"], feature_extractor_weights_path=inception_weights
    )
    expected = network(planes(images).contiguous())[0].numpy()
    metric = fid.fid(inception_weights, images=ImageSettings())
    assert metric.features is not None
    np.testing.assert_allclose(metric.features(images), expected, rtol=1e-5, atol=1e-6)
    assert fid.rfid(inception_weights).info.name == "rfrechet_inception_unverified"
    assert metric.info.settings["images"]["filter"] is None and "TensorFlow 1" in metric.info.settings["network_input"]


def test_reference_statistics_are_stored_and_foreign_files_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "coco.npz")
    Gaussian(np.arange(3.0), np.eye(3), 50).save(path)
    loaded = Gaussian.load(path)
    assert loaded.count == 50 and loaded.sha256 and (loaded.mean == np.arange(3.0)).all()
    np.savez(tmp_path / "other.npz", mean=np.zeros(3))
    with pytest.raises(UserError, match=r"other.npz: no statistics"):
        Gaussian.load(str(tmp_path / "other.npz"))


def test_weights_that_are_missing_or_hold_code_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="6726825d"):
        inception(None)
    torch.save({"a": types.SimpleNamespace()}, tmp_path / "code.pth")
    with pytest.raises(UserError, match="not a file of tensors"):
        inception(str(tmp_path / "code.pth"))
    with pytest.raises(UserError, match="vgg16-397923af"):
        lpips_distance.load_lpips("nowhere.pth")


# --- LPIPS


def test_lpips_equals_the_package_with_a_trunk_given_by_path(tmp_path: Path) -> None:
    import lpips
    import torchvision

    torch.manual_seed(3)
    network = torchvision.models.alexnet(weights=None)
    torch.save(network.state_dict(), tmp_path / "trunk.pth")
    theirs = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False).eval()
    for index, layer in enumerate(network.features):
        for part in (theirs.net.slice1, theirs.net.slice2, theirs.net.slice3, theirs.net.slice4, theirs.net.slice5):
            if str(index) in dict(part.named_children()):
                part[list(dict(part.named_children())).index(str(index))].load_state_dict(layer.state_dict())
    a, b = random_images(3, 64), random_images(3, 64, seed=2)
    with torch.no_grad():
        expected = theirs(planes(a) / 127.5 - 1, planes(b) / 127.5 - 1).flatten().numpy()
    model = lpips_distance.load_lpips(str(tmp_path / "trunk.pth"), net="alex")
    metric = lpips_distance.lpips_distance(model)
    metric.update(Batch(["a", "b", "c"], images=a, references=b))
    np.testing.assert_allclose(list(metric.scores().values()), expected, rtol=RTOL)
    assert metric.info.name == "lpips_alex_unverified" and metric.info.weights == "trunk.pth"


def test_lpips_without_a_trunk_says_so() -> None:
    model = lpips_distance.load_lpips(None, net="alex")
    assert model.name == "lpips_alex_random_trunk" and model.weights is None
    a, b = random_images(4, 64), random_images(4, 64, seed=2)
    assert model(a, a) == pytest.approx(0, abs=1e-9) and (model(a, b) > 0).all()
    metric = lpips_distance.lpips_diversity(model, images=ImageSettings(), per_prompt=4)
    metric.update(Batch(["p/0", "p/1"], images=a[:2], groups=["p", "p"]))
    other = lpips_distance.lpips_diversity(model, images=ImageSettings(), per_prompt=4)
    other.update(Batch(["p/2", "p/3"], images=a[2:], groups=["p", "p"]))
    metric.merge(type(other).from_state(other.state()))
    first, second = np.triu_indices(4, 1)
    assert metric.result().value == pytest.approx(float(model(a[first], a[second]).mean()), rel=RTOL)
    assert metric.result().name == "diversity_lpips_alex_random_trunk" and len(metric.arrays()["open_ids"]) == 0


# --- CLIP score

ASKED = {"asker": "metric clip_score", "extra": "eval"}


def test_clip_score_equals_open_clip(tiny_clip: tuple[str, str]) -> None:
    import open_clip

    name, weights = tiny_clip
    images, prompts = random_images(6, 64), [scene_at(0, i).caption for i in range(6)]
    network, _, preprocess = open_clip.create_model_and_transforms(name, pretrained=weights)
    network.eval()
    with torch.no_grad():
        resized = [Image.fromarray(x).resize((56, 56), Image.Resampling.BICUBIC) for x in images]
        x = network.encode_image(torch.stack([preprocess(image) for image in resized]))
        y = network.encode_text(open_clip.get_tokenizer(name)(["A photo depicts " + p for p in prompts]))
        expected = torch.nn.functional.cosine_similarity(x, y).numpy()
    clip = load_clip(name, weights, **ASKED)
    metric = clip_score.clip_score(clip, images=ImageSettings(size=56), prefix="A photo depicts ")
    metric.update(Batch([str(i) for i in range(6)], images=images, prompts=prompts))
    np.testing.assert_allclose(list(metric.scores().values()), expected, rtol=RTOL, atol=1e-6)
    assert metric.result().value == pytest.approx(float(expected.mean()), rel=RTOL)
    assert metric.info.name == "clip_score_tiny_test" and metric.info.settings["images"]["size"] == 56
    assert metric.info.weights_hash and metric.info.weights == "tiny-test, tiny.pt"


def test_clip_models_and_weights_that_are_not_there_are_named(tiny_clip: tuple[str, str]) -> None:
    assert clip_score.metric_name(load_clip(tiny_clip[0], None, **ASKED)) == "clip_score_random_tiny_test"
    with pytest.raises(UserError, match="no model 'ViT-other'"):
        load_clip("ViT-other", None, **ASKED)
    with pytest.raises(UserError, match=r"nowhere.pt: expected a local file"):
        load_clip("ViT-bigG-14", "nowhere.pt", **ASKED)
