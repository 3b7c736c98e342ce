"""The generator in NumPy gives torch's numbers; tests/models/test_rng.py holds those against the published answers."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from instella_ray.models import rng
from instella_ray.models.philox import philox

WORD = st.integers(0, 2**32 - 1)


@example([(0,) * 6, (2**32 - 1,) * 6])
@given(st.lists(st.tuples(*[WORD] * 6), min_size=1, max_size=40))
def test_numpy_and_torch_give_the_same_words(rows: list[tuple[int, ...]]) -> None:
    c0, c1, c2, c3, k0, k1 = np.array(rows, np.int64).T
    words = np.stack(philox((c0, c1, c2, c3), (k0, k1)))
    t0, t1, t2, t3, u0, u1 = torch.tensor(rows).T
    assert np.array_equal(words, torch.stack(rng.philox((t0, t1, t2, t3), (u0, u1))).numpy())
    assert words.dtype == np.int64 and words.min() >= 0 and words.max() < 2**32
