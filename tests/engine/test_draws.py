"""Numbers drawn ahead are the ones that would be drawn in time, whoever joins, leaves and moves."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from instella_ray.engine.draws import AHEAD, NUMBERS, Draws
from instella_ray.models import rng

SLOTS, TOKENS, BITS = 3, 2, 3


@given(
    moves=st.lists(st.tuples(st.integers(0, 2), st.booleans(), st.integers(1, SLOTS)), max_size=5 * AHEAD),
    stream=st.sampled_from([0, 1]),
    numbers=st.sampled_from([1, 3 * TOKENS * BITS, NUMBERS]),
)
def test_numbers_drawn_ahead_are_those_of_the_seed_and_the_draw(
    moves: list[tuple[int, bool, int]], stream: int, numbers: int
) -> None:
    seed, position = torch.tensor([5, -7, 2**40]), torch.zeros(SLOTS, dtype=torch.int64)
    draws = Draws(seed, TOKENS, BITS, stream, numbers)
    assert draws.ahead == {1: 1, 3 * TOKENS * BITS: 3, NUMBERS: AHEAD}[numbers]

    def expected(slot: int, draw: int) -> torch.Tensor:
        return rng.uniforms(seed[slot : slot + 1], torch.tensor([draw]), TOKENS, BITS, stream=stream)[0]

    def join(slot: int) -> None:
        seed[slot] += 1
        position[slot] = 0
        assert torch.equal(draws.start(slot), expected(slot, 0))

    for slot in range(SLOTS):
        join(slot)
    for other, joins, rows in moves:  # slots behind the rows pause
        if draws.due():
            draws.fill(position + 1)
        taken = draws.take(position[:rows] + 1)
        position[:rows] += 1
        assert len(taken) == rows
        assert all(torch.equal(taken[i], expected(i, int(position[i]))) for i in range(rows))
        if joins:
            join(other)
        else:  # the last one moves here, and somebody new takes the last slot
            for table in (seed, position, *draws.row_tables):
                table[other] = table[-1]
            join(SLOTS - 1)


def test_slots_that_nobody_has_may_stand_anywhere() -> None:
    draws = Draws(torch.arange(SLOTS), TOKENS, BITS, rng.AR)
    draws.fill(torch.tensor([3]))
    assert draws.take(torch.tensor([3])).shape == (1, TOKENS, BITS)
    assert draws.take(torch.tensor([4, 1000, 0])).shape == (SLOTS, TOKENS, BITS)
