"""The discriminator: a frozen backbone by name or path, heads that learn, and the hinge loss."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from instella_ray.errors import UserError
from instella_ray.models.discriminator import DiscriminatorConfig, DiscriminatorHeads, FrozenFeatures, hinge_loss

SMALL = DiscriminatorConfig(backbone="vit_tiny_patch16_224", weights="random", size=32, blocks=(1, 3), width=8)


def test_hinge_loss_by_hand() -> None:
    true, restored = torch.tensor([2.0, 0.0]), torch.tensor([-3.0, 0.5])
    # (0 + 1) / 2 of the true ones, (0 + 1.5) / 2 of the restored ones, halved together
    assert hinge_loss(true, restored).item() == pytest.approx((0.5 + 0.75) / 2)
    assert hinge_loss(torch.tensor([1.0]), torch.tensor([-1.0])).item() == 0


def test_features_are_frozen_and_pass_gradients_to_the_image_and_heads_learn() -> None:
    features = FrozenFeatures(SMALL)
    assert not features.train().training
    before = {name: value.clone() for name, value in features.state_dict().items()}
    heads = DiscriminatorHeads(features.channels, 2, 8)
    images = torch.rand(3, 3, 32, 32, requires_grad=True)
    maps = features(images)
    assert [tuple(x.shape) for x in maps] == [(3, 192, 2, 2)] * 2
    logits = heads(maps)
    assert logits.shape == (3, 8)
    logits.sum().backward()
    assert images.grad is not None and images.grad.abs().sum() > 0
    assert all(p.grad is not None for p in heads.parameters())
    assert all(p.grad is None and not p.requires_grad for p in features.parameters())
    assert all(torch.equal(value, before[name]) for name, value in features.state_dict().items())


def test_weights_are_those_of_a_file_where_one_is_named(tmp_path: Path) -> None:
    made = FrozenFeatures(SMALL, seed=1)
    torch.save(made.backbone.state_dict(), tmp_path / "vit.pth")
    named = SMALL.model_copy(update={"weights": str(tmp_path / "vit.pth")})
    images = torch.rand(1, 3, 32, 32)
    for a, b, c in zip(made(images), FrozenFeatures(named)(images), FrozenFeatures(SMALL)(images), strict=True):
        assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backbone": "no_such_vit"}, "discriminator: no_such_vit with weights random: Unknown model"),
        ({"backbone": "resnet18"}, "resnet18"),
        ({"weights": "nowhere.pth"}, r"weights nowhere\.pth: expected published, random or a local file"),
        ({"blocks": (1, 12)}, r"blocks \[1, 12\]: vit_tiny_patch16_224 has blocks 0\.\.11"),
        ({"size": 40}, "size 40: expected a multiple of vit_tiny_patch16_224's patch of 16"),
    ],
)
def test_what_cannot_be_a_discriminator_is_refused_in_one_line(change: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        FrozenFeatures(SMALL.model_copy(update=change))
