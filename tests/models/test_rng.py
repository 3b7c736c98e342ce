"""Counter-based uniforms: the generator is Philox, its numbers are uniform, and a row depends on itself alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from instella_ray.models import rng

INT64 = st.integers(-(2**63), 2**63 - 1)
EXTREME_SEEDS = torch.tensor([0, 1, -1, 2**31, 2**32, 2**63 - 1, -(2**63)])


def draws(seed: int, count: int, tokens: int = 32, bits: int = 16) -> Tensor:
    """``count`` consecutive draws of one seed, ``[count, tokens, bits]``."""
    return rng.uniforms(torch.full((count,), seed), torch.arange(count), tokens, bits)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_known_answers(
    counter: tuple[int, int, int, int], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    c0, c1, c2, c3 = map(torch.tensor, counter)
    words = rng.philox((c0, c1, c2, c3), (torch.tensor(key[0]), torch.tensor(key[1])))
    assert tuple(map(int, words)) == expected


def test_numbers_never_change() -> None:
    """A seed that a user has kept gives the same image for ever."""
    u = rng.uniforms(torch.tensor([7, -1]), torch.tensor([0, 3]), 1, 5)
    words = rng.philox(
        (torch.tensor(1), torch.tensor(3), torch.tensor(0), torch.tensor(0)),
        (torch.tensor(0xFFFFFFFF), torch.tensor(0xFFFFFFFF)),
    )
    assert u[1, 0, 4] == (int(words[0]) >> 8) * 2.0**-24
    assert u[0, 0].tolist() == [
        0.9545971155166626,
        0.7501521706581116,
        0.11417734622955322,
        0.08565783500671387,
        0.4069603681564331,
    ]


@pytest.mark.parametrize("seed", EXTREME_SEEDS.tolist())
def test_uniform_on_the_unit_interval_for_any_seed(seed: int) -> None:
    u = draws(seed, 64)
    assert u.dtype == torch.float32 and u.min() >= 0 and u.max() < 1
    assert stats.kstest(u.flatten().numpy(), "uniform").pvalue > 1e-3
    counts = torch.histc(u, 64, 0, 1)
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3


@pytest.mark.parametrize("axis", [0, 1, 2], ids=["draws", "tokens", "bits"])
def test_neighbours_are_independent(axis: int) -> None:
    u = draws(11, 64)
    first, second = u.narrow(axis, 0, u.shape[axis] - 1), u.narrow(axis, 1, u.shape[axis] - 1)
    table = torch.histogramdd(torch.stack((first.flatten(), second.flatten()), 1), [8, 8], [0.0, 1.0, 0.0, 1.0])
    assert stats.chisquare(table.hist.flatten().numpy()).pvalue > 1e-3


def test_neighbouring_seeds_are_independent() -> None:
    u = rng.uniforms(torch.arange(256), torch.zeros(256, dtype=torch.int64), 16, 16).flatten(1)
    correlation = torch.corrcoef(u) - torch.eye(256)
    # 32,640 pairs of 256 numbers each: the largest of so many normal deviates stays under 6 of them.
    assert correlation.abs().max() < 6 / 256**0.5


def test_draws_streams_and_seeds_share_no_number() -> None:
    one, zero = torch.ones(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    parts = [rng.uniforms(seed, draw, 8, 8, stream=s) for seed in (zero, one) for draw in (zero, one) for s in range(3)]
    for i, a in enumerate(parts):
        assert all((a != b).float().mean() > 0.99 for b in parts[:i])
    far = rng.uniforms(EXTREME_SEEDS, torch.zeros_like(EXTREME_SEEDS), 8, 8).flatten(1)
    assert len(far.unique(dim=0)) == len(EXTREME_SEEDS)


@given(st.lists(st.tuples(INT64, st.integers(0, 2**32 - 1)), min_size=1, max_size=6), st.integers(1, 5))
def test_a_row_is_the_same_alone_and_in_any_batch(rows: list[tuple[int, int]], bits: int) -> None:
    seed, draw = torch.tensor(rows).T
    together = rng.uniforms(seed, draw, 3, bits)
    for i in range(len(rows)):
        assert torch.equal(together[i], rng.uniforms(seed[i : i + 1], draw[i : i + 1], 3, bits)[0])


@given(INT64, st.integers(0, 2**40), st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=8, unique=True))
def test_a_samples_seed_in_a_step_is_its_own_and_the_same_on_any_worker(
    seed: int, step: int, positions: list[int]
) -> None:
    together = rng.sample_seeds(seed, step, torch.tensor(positions))
    alone = [rng.sample_seeds(seed, step, torch.tensor([position])).item() for position in positions]
    assert together.tolist() == alone and len(set(alone)) == len(alone)
    for other in ((seed, step + 1), (seed ^ 1, step)):
        assert not set(alone) & set(rng.sample_seeds(*other, torch.tensor(positions)).tolist())


def test_more_tokens_leave_the_first_ones_as_they_are() -> None:
    seed, draw = torch.tensor([5]), torch.tensor([2])
    assert torch.equal(rng.uniforms(seed, draw, 4, 6), rng.uniforms(seed, draw, 9, 6)[:, :4])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")
def test_every_device_gives_the_same_numbers() -> None:
    draw = torch.arange(len(EXTREME_SEEDS))
    assert torch.equal(
        rng.uniforms(EXTREME_SEEDS, draw, 16, 64), rng.uniforms(EXTREME_SEEDS.cuda(), draw.cuda(), 16, 64).cpu()
    )
