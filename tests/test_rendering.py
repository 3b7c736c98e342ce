"""Numbers and goals as pages and terminals tell them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from instella_ray.rendering import Goal, digits


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"), (math.nan, "–"), (-math.inf, "–"), (0, "0"), (-0.0, "0"), (16000, "16,000"), (1234567.8, "1,234,568"),
        (24.137, "24.1"), (0.5, "0.5"), (0.123456, "0.123"), (-0.0012345, "-0.00123"), (9.996, "10"), (999.6, "1,000"),
        (1.2345e-9, "1.23e-9"), (1e-9, "1e-9"), (np.float32(0.25), "0.25"), (np.int64(1024), "1,024"), (True, "1"),
    ],
)  # fmt: skip
def test_numbers_are_short_and_grouped(value: float | None, text: str) -> None:
    assert digits(value) == text
    assert digits(value, "dB") == (text if text == "–" else f"{text} dB")


@given(st.floats(-1e300, 1e300), st.integers(1, 8))
def test_a_number_is_told_to_so_many_digits(value: float, significant: int) -> None:
    text = digits(value, significant=significant)
    assert float(text.replace(",", "")) == pytest.approx(value, rel=0.5 * 10 ** (1 - significant) * 1.0001, abs=1e-320)
    mantissa, _, exponent = text.partition("e")
    whole, _, decimals = mantissa.lstrip("-").partition(".")
    assert not decimals.endswith("0") and all(len(group) == 3 for group in whole.split(",")[1:])
    assert len(decimals) < significant + (4 if not exponent else 0)
    assert digits(-value, significant=significant).lstrip("-") == text.lstrip("-")


@given(st.integers(-(10**14), 10**14))
def test_whole_numbers_are_told_whole(value: int) -> None:
    assert digits(value) == digits(float(value)) == f"{value:,}"


def test_a_goal_is_one_line() -> None:
    assert Goal("psnr", 24.137, 24, ">=", "dB").text() == "met    psnr: 24.1 dB (goal >= 24 dB)"
    assert Goal("fid", 16.34, 16.33, "<=").text() == "MISSED fid: 16.3 (goal <= 16.33)"
