"""The forward process, its losses and its times."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from instella_ray.models.diffusion import (
    ar_loss,
    bit_accuracy,
    diffusion_loss,
    flip_noise,
    noise_probability,
    timesteps,
    x0_logits,
)


@given(st.floats(0, 1), st.sampled_from([0.0, 1.0]))
def test_noise_goes_from_the_bit_to_a_coin(t: float, bit: float) -> None:
    p = noise_probability(torch.tensor([[[bit]]]), torch.tensor([t]))
    assert p.item() == pytest.approx(0.5 * t + (1 - t) * bit, abs=1e-6)


def test_noised_bits_have_the_stated_marginals() -> None:
    z = torch.tensor([0.0, 1.0]).repeat(5, 20_000)[:, :, None]
    t = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    z_t = flip_noise(z, t, torch.rand(z.shape, generator=torch.Generator().manual_seed(0)))
    assert set(z_t.unique().tolist()) == {0.0, 1.0}
    for bit in (0, 1):
        mean = z_t[:, bit::2].mean((1, 2))
        assert (mean - (0.5 * t + (1 - t) * bit)).abs().max() < 5 * 0.5 / 20_000**0.5
    assert torch.equal(z_t[0], z[0])


def test_noise_is_monotonous_in_time() -> None:
    """With the same uniforms more time flips a superset of the bits."""
    generator = torch.Generator().manual_seed(1)
    z, u = torch.randint(0, 2, (1, 64, 8), generator=generator).float(), torch.rand(1, 64, 8, generator=generator)
    flipped = [(flip_noise(z, torch.tensor([t]), u) != z) for t in (0.2, 0.5, 0.9)]
    assert not (flipped[0] & ~flipped[1]).any() and not (flipped[1] & ~flipped[2]).any()


def test_flip_target_is_exclusive_or_with_the_noisy_bit() -> None:
    out, z_t = torch.tensor([[3.0, 3.0, -3.0, -3.0]]), torch.tensor([[0.0, 1.0, 0.0, 1.0]])
    assert x0_logits(out, z_t).tolist() == [[3, -3, -3, 3]]
    assert x0_logits(out, z_t, "x0").tolist() == out.tolist()


def test_loss_is_the_cross_entropy_of_the_xored_prediction() -> None:
    generator = torch.Generator().manual_seed(2)
    out = torch.randn(3, 4, 5, generator=generator)
    z, z_t = (torch.randint(0, 2, (3, 4, 5), generator=generator).float() for _ in range(2))
    flip = out.sigmoid()
    q = z_t * (1 - flip) + (1 - z_t) * flip
    by_hand = -(z * q.log() + (1 - z) * (1 - q).log()).mean()
    torch.testing.assert_close(diffusion_loss(out, z_t, z), by_hand)
    q = flip
    torch.testing.assert_close(diffusion_loss(out, z_t, z, "x0"), -(z * q.log() + (1 - z) * (1 - q).log()).mean())
    torch.testing.assert_close(ar_loss(out, z), diffusion_loss(out, z_t, z, "x0"))


def test_bit_accuracy_is_per_row() -> None:
    z = torch.tensor([[[1.0, 0.0]], [[1.0, 1.0]]])
    assert bit_accuracy(torch.tensor([[[2.0, -1.0]], [[2.0, -1.0]]]), z).tolist() == [1.0, 0.5]


@pytest.mark.parametrize("kind", ["logit_normal", "uniform"])
def test_timesteps_follow_their_distribution(kind: str) -> None:
    u = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    u[:2] = torch.tensor([0.0, 1 - 2**-24])  # the ends of what uniforms can be
    t = timesteps(u, kind)
    assert t.shape == (20_000,) and t.min() > 0 and t.max() < 1
    value, name = (t.logit(), "norm") if kind == "logit_normal" else (t, "uniform")
    assert stats.kstest(value.numpy(), name).pvalue > 1e-3
    assert torch.equal(t.sort().values, timesteps(u.sort().values, kind))
    shifted = timesteps(u, kind, shift=2.0)
    torch.testing.assert_close(shifted / (1 - shifted), 2 * t / (1 - t), rtol=1e-3, atol=0)
    assert torch.equal(timesteps(u, kind, shift=1.0), t)
