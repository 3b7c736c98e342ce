"""Names that readers of tars stumble over, for property tests."""

from __future__ import annotations

from hypothesis import strategies as st

PIECES = st.one_of(
    st.sampled_from(
        ["/", "//", ".", "..", "./", "../", "_", "__", "%", "%2E", "%2F", "%_", " ", "\n", "\t", "\0", "~", "\\"]
    ),
    st.sampled_from(
        ["a", "A", "1", "jpg", ".jpg", ".seg.png", "\u00e9", "e\u0301", "\u2028", "\u72ac", "\U0001f600", "\x85"]
    ),
    st.sampled_from(["x" * 90, "\u72ac" * 60, "d/" * 60]),
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=4),
)
IDS = st.lists(PIECES, min_size=1, max_size=8).map("".join)
"""Ids of rows: text."""
NAMES = st.lists(PIECES | st.sampled_from(["\udc80", "\udcff"]), min_size=1, max_size=8).map("".join)
"""Names of members, with bytes that are not UTF-8."""
