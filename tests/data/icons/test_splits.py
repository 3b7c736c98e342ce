"""Splits by name: deterministic, disjoint, and without copies on both sides."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import NamedTuple

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from instella_ray.data.curation.dedup import Fingerprints
from instella_ray.data.curation.filters.duplicates import DuplicateConfig
from instella_ray.data.icons.splits import ALONE, COPY, PAIRS, SPLITS, TRAIN, HoldOutConfig, split_all, split_by_names

SHARES = HoldOutConfig(concepts=0.2, pairs=0.3, drawings=0.2)
SAME = DuplicateConfig(max_distance=2, max_color_difference=8)


class Name(NamedTuple):
    style: str
    concept: str
    key: str
    looks: int
    """Drawings of the same number look the same."""


NAMES = st.lists(
    st.builds(
        Name, st.sampled_from("abc"), st.sampled_from("pqrstuvwxyz"), st.text("kl", max_size=4), st.integers(0, 40)
    ),
    unique_by=lambda name: name[:3],
    min_size=1,
)


def prints(names: Sequence[Name]) -> Fingerprints:
    rng = [np.random.default_rng(name.looks) for name in names]
    near = np.array([each.integers(0, 2**64, dtype=np.uint64) for each in rng])
    exact = np.array([f"{name.looks:02d}{number:014d}" for number, name in enumerate(names)], "S16")
    colors = np.array([each.integers(0, 256, 48) for each in rng], np.uint8)
    return Fingerprints(exact, near, colors, np.ones(len(names), np.int64))


def split(names: Sequence[Name]) -> dict[Name, str]:
    return dict(zip(names, split_all(names, prints(names), SHARES, SAME), strict=True))


@given(NAMES, st.randoms(use_true_random=False))
@settings(deadline=None)
def test_order_makes_no_difference(names: list[Name], random: Random) -> None:
    shuffled = list(names)
    random.shuffle(shuffled)
    assert split(names) == split(shuffled)


@given(NAMES)
@settings(deadline=None)
def test_no_concept_pair_or_copy_is_on_both_sides(names: list[Name]) -> None:
    found = split(names)
    assert set(found.values()) <= {*SPLITS, COPY, ALONE}
    train = [name for name in names if found[name] == TRAIN]
    held = [name for name in names if found[name] in SPLITS[1:]]
    concepts, pairs = {name.concept for name in train}, {name[:2] for name in train}
    assert not concepts & {name.concept for name in names if found[name] == "held-out-concepts"}
    assert not pairs & {name[:2] for name in names if found[name] == PAIRS}
    assert not {name.looks for name in train} & {name.looks for name in held}


@given(NAMES)
@settings(deadline=None)
def test_training_shows_the_concept_and_the_style_of_a_held_out_pair_apart(names: list[Name]) -> None:
    found = split(names)
    train = {name[:2] for name in names if found[name] == TRAIN}
    for style, concept in (name[:2] for name in names if found[name] == PAIRS):
        assert any(s != style and c == concept for s, c in train)
        assert any(s == style and c != concept for s, c in train)


@given(NAMES)
@settings(deadline=None)
def test_other_sets_move_no_drawing_into_another_split(names: list[Name]) -> None:
    for name, where in split(names).items():
        assert where in (split_by_names(name, SHARES), COPY, ALONE)


def test_capital_letters_make_no_other_concept() -> None:
    names = [Name("a", f"Saint {letter}", "k", number) for number, letter in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZ")]
    shares = HoldOutConfig(concepts=0.5)
    found = [split_by_names(name, shares) for name in names]
    assert found == [split_by_names(name._replace(concept=name.concept.lower()), shares) for name in names]
    assert len(set(found)) > 1


def test_a_training_drawing_that_is_a_copy_of_a_held_out_one_is_left_out() -> None:
    names = [Name("a", f"c{number}", "k", number) for number in range(40)]
    held = next(name for name in names if split_by_names(name, SHARES) == "held-out-concepts")
    free = next(name for name in names if split_by_names(name, SHARES) == TRAIN)
    assert split([held, free])[free] == TRAIN
    twin = free._replace(looks=held.looks)
    assert split([held, twin]) == {held: "held-out-concepts", twin: COPY}


def test_shares_are_about_what_was_asked_for() -> None:
    names = [Name("a", f"c{number}", "k", number) for number in range(4000)]
    share = np.mean([split_by_names(name, HoldOutConfig()) == "held-out-concepts" for name in names])
    assert 0.02 < share < 0.04
