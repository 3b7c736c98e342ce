"""What reconstructions are judged by: crops, augmentations, and the watch over the bits."""

from __future__ import annotations

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from instella_ray.training.losses import (
    DRAWS,
    AugmentConfig,
    CollapseWatch,
    PerceptualConfig,
    ReconstructionLoss,
    TokenizerLossConfig,
    augment,
    bit_summary,
    color,
    cropped,
    cutout,
    resized,
    translate,
)

OFF = AugmentConfig(color=0, translation=0, cutout=0)


@settings(max_examples=30)
@given(st.integers(4, 12), st.integers(4, 12), st.integers(1, 4), st.integers(0, 99))
def test_both_crops_come_from_the_same_place_within_the_image(height: int, width: int, size: int, seed: int) -> None:
    torch.manual_seed(seed)
    # Every pixel holds its own place.
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    images = torch.stack((rows, columns, rows * width + columns)).float().expand(5, -1, -1, -1)
    places = torch.rand(5, 2)
    made = cropped(images, size, places)
    assert made.shape == (5, 3, size, size)
    for crop, (y, x) in zip(made, places.tolist(), strict=True):
        top, left = int(y * (height - size + 1)), int(x * (width - size + 1))
        assert torch.equal(crop, images[0, :, top : top + size, left : left + size])
    assert torch.equal(cropped(-images, size, places), -made)


def test_crops_reach_both_ends_and_resizing_keeps_plain_images() -> None:
    images = torch.arange(8.0).view(1, 1, 1, 8).expand(1, 3, 8, 8)
    assert cropped(images, 4, torch.tensor([[0.0, 0.0]]))[0, 0, 0, 0] == 0
    assert cropped(images, 4, torch.tensor([[1.0, 0.9999]]))[0, 0, 0, -1] == 7
    assert torch.allclose(resized(torch.full((1, 3, 8, 8), 0.3), 5), torch.tensor(0.3))
    assert torch.equal(resized(images, 8), images)


def test_the_perceptual_loss_looks_at_the_whole_and_at_one_crop_of_both() -> None:
    look = PerceptualConfig(weights="random", size=24, crop=16)
    loss = ReconstructionLoss(TokenizerLossConfig(perceptual=look))
    assert loss.perceptual is not None
    a, b = torch.rand(2, 2, 3, 32, 32) * 2 - 1
    places = torch.rand(2, 2)
    parts = loss(a, b, places)[1]
    whole = loss.perceptual(resized(a, 24), resized(b, 24)).mean()
    details = loss.perceptual(cropped(a, 16, places), cropped(b, 16, places)).mean()
    assert parts["lpips_vgg_random"] == whole and parts["lpips_vgg_random_crop"] == details
    assert set(
        ReconstructionLoss(TokenizerLossConfig(perceptual=PerceptualConfig(network="none")))(a, b, places)[1]
    ) == {
        "reconstruction",
        "psnr",
    }


@settings(max_examples=20)
@given(st.integers(0, 999))
def test_augmentation_is_the_identity_at_strength_0_and_differentiable_at_any(seed: int) -> None:
    torch.manual_seed(seed)
    images, draws = (torch.rand(2, 3, 8, 8) * 2 - 1).requires_grad_(), torch.rand(2, DRAWS)
    assert torch.equal(augment(images, draws, OFF), images)
    made = augment(images, draws, AugmentConfig())
    made.square().sum().backward()
    assert images.grad is not None and torch.isfinite(images.grad).all() and images.grad.abs().sum() > 0
    assert torch.equal(made, augment(images, draws, AugmentConfig()))


def test_translation_shifts_by_whole_pixels_and_fills_with_grey() -> None:
    images = torch.rand(1, 3, 4, 4) + 0.5
    down_left = translate(images, torch.tensor([[0.99, 0.0]]), 0.25)
    assert torch.equal(down_left[:, :, 1:, :-1], images[:, :, :-1, 1:])
    assert down_left[:, :, 0].abs().max() == 0 and down_left[:, :, :, -1].abs().max() == 0
    assert torch.equal(translate(images, torch.tensor([[0.5, 0.5]]), 0.25), images)


def test_cutout_makes_a_square_grey_and_color_moves_brightness() -> None:
    images = torch.ones(1, 3, 8, 8)
    assert (cutout(images, torch.tensor([[0.5, 0.5]]), 0.5)[0, 0] == 0).sum() == 16
    # A grey image has no saturation and no contrast.
    assert torch.allclose(color(images, torch.tensor([[1.0, 0.0, 0.0]]), 0.5), torch.tensor(1.25))


def test_bits_are_summed_up_by_position() -> None:
    share = torch.tensor([[0.5, 0.5], [0.0, 1.0], [0.25, 0.0]])
    facts = {name: float(value) for name, value in bit_summary(share).items()}
    assert facts["dead_bits"] == 0.5 and facts["dead_bits_worst"] == 1
    assert facts["bit_mean_lowest"] == 0.125 and facts["bit_mean_highest"] == 0.5
    assert facts["bit_mean"] == pytest.approx(1.125 / 3)
    assert facts["bit_entropy_worst"] == 0 and facts["bit_entropy"] == pytest.approx((1 + 0.8112781 / 2) / 3)


def test_collapse_is_reported_once_and_with_numbers(caplog: pytest.LogCaptureFixture) -> None:
    watch = CollapseWatch(0.25)
    alive, dead = torch.full((4, 2), 0.5), torch.tensor([[0.5, 0.5], [0.5, 1.0], [0.0, 0.0], [1.0, 0.0]])
    with caplog.at_level(logging.WARNING):
        watch.look(1, bit_summary(alive), alive)
        assert not caplog.records
        watch.look(2, bit_summary(dead), dead)
        watch.look(3, bit_summary(dead), dead)
    (record,) = caplog.records
    assert record.getMessage().startswith("step 3: code collapse: 62.5 % of all bits are constant over all images")
    assert "all bits are constant at 2 of 4 positions" in record.getMessage()
