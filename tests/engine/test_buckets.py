"""Buckets: every one in use gives the same bits, with and without guidance, compiled and not."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from instella_ray.engine import slots
from instella_ray.engine.buckets import (
    agreeing_sizes,
    bucket_sizes,
    buckets_of,
    described,
    each_by_itself,
    plan_passes,
)
from instella_ray.engine.kinds import build_engine
from instella_ray.engine.slots import EngineOptions
from instella_ray.errors import UserError
from instella_ray.models.generator import GeneratorConfig, build_generator

from ..kit.engines import SIZES, drain, engine, images, request


@pytest.mark.parametrize("kind", ["diffusion", "ar"])
@pytest.mark.parametrize("threads", [1, 2])
def test_every_bucket_in_use_gives_the_same_bits(kind: str, threads: int) -> None:
    """One request alone takes the smallest bucket; among five others it passes through all of them."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        alone = engine(kind, slots=6)
        assert alone.slots.buckets[2][-1] == 6
        alone.submit(request(4))
        expected = drain(alone)["4"]
        crowd, done = engine(kind, slots=6), {}
        for number in (1, 2, 3, 4, 0, 5):
            crowd.submit(request(number))
            done.update(images(crowd))
        done.update(drain(crowd))
        assert torch.equal(done["4"], expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", ["diffusion", "ar"])
@pytest.mark.parametrize("threads", [1, 2])
def test_without_guidance_half_of_the_rows_give_the_same_bits(kind: str, threads: int) -> None:
    """Steps of a batch with and without a request with guidance have two and one row a slot."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        whole, half = engine(kind, slots=4), engine(kind, slots=4)
        if half.slots.buckets[1][-1:] != [4]:
            pytest.skip("one row a slot gives other bits on this processor, and is not used")
        whole.slots.buckets = {**whole.slots.buckets, 1: []}
        passes: list[tuple[int, int]] = []
        advance = half.slots.advance
        half.slots.advance = lambda rows, branches: passes.append((rows, branches)) or advance(rows, branches)  # type: ignore[func-returns-value]
        # 3 and 9 have no guidance, 13 has some; whatever is drawn is drawn as in a batch of two rows a slot.
        for numbers in ([3, 9], [3, 13, 9], [9]):
            for number in numbers:
                whole.submit(request(number))
                half.submit(request(number))
            expected, done = drain(whole), drain(half)
            assert done.keys() == expected.keys() and all(torch.equal(done[name], expected[name]) for name in done)
        assert {branches for _, branches in passes} == {1, 2} and passes[0][1] == passes[-1][1] == 1
    finally:
        torch.set_num_threads(before)


def test_sizes_are_grouped_by_the_bits_of_every_row() -> None:
    def network(rows: int, branches: int) -> Tensor:
        return torch.ones(branches * rows, 3) + (1e-7 if rows == 2 or (rows, branches) == (5, 1) else 0)

    groups = agreeing_sizes(network, bucket_sizes(5), 3)
    # Sizes without guidance go with those whose rows with a prompt have the same bits.
    assert groups == [[(5, 2), (4, 2), (4, 1), (3, 2), (3, 1), (1, 2), (1, 1)], [(5, 1), (2, 2), (2, 1)]]
    # Two slots as two passes of one, and five without guidance as four and one.
    passes = plan_passes(groups, bucket_sizes(5), 8)
    assert buckets_of(passes) == {2: [1, 2, 3, 4, 5], 1: [1, 2, 3, 4, 5]}
    assert {size: parts for size, parts in passes.items() if len(parts) > 1} == {
        (2, 1): (1, 1),
        (2, 2): (1, 1),
        (5, 1): (4, 1),
    }
    assert described(passes) == "with guidance 1 (2 = 1 + 1) 3 4 5, without 1 (2 = 1 + 1) 3 4 (5 = 4 + 1)"


def test_kernels_that_change_with_the_rows_of_both_branches_make_two_groups() -> None:
    """(8, 1) has the kernels of (4, 2): a group may begin with a size without guidance."""
    sizes = bucket_sizes(32)
    groups = agreeing_sizes(lambda rows, branches: torch.full((branches * rows, 2), rows * branches >= 9), sizes, 3)
    assert sorted(map(sorted, groups)) == sorted(
        [sorted(sizes_below(sizes, 9)), [(r, b) for r in sizes for b in (1, 2) if r * b >= 9]]
    )


def test_a_size_whose_rows_depend_on_their_position_is_not_used() -> None:
    def network(rows: int, branches: int) -> Tensor:
        content = torch.arange(rows) % 3
        tile = torch.arange(rows) // 4 if rows == 8 else torch.zeros(rows)
        return (content + 1e-5 * tile).repeat_interleave(branches)[:, None]

    (group,) = agreeing_sizes(network, bucket_sizes(12), 3)
    assert {rows for rows, _ in group} == {1, 2, 3, 4, 6, 12}
    # Where that is so of every size, the largest remains.
    everywhere = agreeing_sizes(lambda rows, branches: torch.rand(branches * rows, 9), bucket_sizes(12)[4:], 3)
    assert everywhere == [[(12, 2)]]


def test_sizes_leave_few_rows_unused() -> None:
    assert bucket_sizes(1) == [1] and bucket_sizes(16) == [1, 2, 3, 4, 6, 8, 12, 16]
    for count_of_slots in (1, 2, 3, 7, 16, 33):
        sizes = bucket_sizes(count_of_slots)
        assert all(
            next(size for size in sizes if size >= count) <= 1.5 * count for count in range(1, count_of_slots + 1)
        )


def sizes_below(sizes: list[int], end: int) -> list[tuple[int, int]]:
    return [(rows, branches) for rows in sizes for branches in (1, 2) if rows * branches < end]


def test_where_every_size_has_its_own_bits_a_single_image_does_not_cost_a_full_table() -> None:
    """The largest size alone would make a single picture cost as much as 32."""
    sizes = bucket_sizes(32)
    alone = [[(rows, branches)] for rows in sizes for branches in (2, 1)]
    passes = plan_passes(alone, sizes, tokens=128)
    assert buckets_of(passes)[2][0] <= 4 and len(passes[32, 2]) >= 8
    # AR's passes read the weights for one token of each slot: 32 of them would cost 32 times one.
    tokens_of_ar = plan_passes(alone, sizes, tokens=1)
    assert tokens_of_ar == {(32, 2): (32,)} and buckets_of(tokens_of_ar) == {2: [32], 1: []}


def test_the_group_is_chosen_that_makes_all_sizes_fastest() -> None:
    sizes = bucket_sizes(32)
    small, large = sizes_below(sizes, 9), [(r, b) for r in sizes for b in (1, 2) if r * b >= 9]
    passes = plan_passes([large, small], sizes, tokens=128)
    assert passes[1, 2] == (1,) and passes[32, 2] == (4,) * 8 and passes[32, 1] == (8,) * 4
    assert plan_passes([large, small], sizes, tokens=1)[32, 2] == (32,)
    whole = [[(rows, branches) for rows in sizes for branches in (2, 1)]]
    assert plan_passes(whole, sizes, tokens=128) == each_by_itself(sizes)


@given(st.integers(1, 40), st.data())
def test_passes_cover_their_slots_with_sizes_of_one_group(slots: int, data: st.DataObject) -> None:
    sizes = bucket_sizes(slots)
    keys = [(rows, branches) for rows in sizes for branches in (1, 2)]
    colors = data.draw(st.lists(st.integers(0, 3), min_size=len(keys), max_size=len(keys)))
    groups = [[key for key, color in zip(keys, colors, strict=True) if color == each] for each in range(4)]
    passes = plan_passes(groups, sizes, data.draw(st.sampled_from([1, 8, 128])))
    used = {(part, branches) for (_, branches), parts in passes.items() for part in parts}
    assert any(used <= set(group) for group in groups)
    assert all(sum(parts) == rows for (rows, _), parts in passes.items())
    assert (slots, 2) in passes  # whatever is asked has a bucket


@pytest.mark.parametrize("kind", ["diffusion", "ar"])
def test_a_bucket_of_several_passes_gives_the_same_images(kind: str) -> None:
    split, whole = engine(kind, slots=6), engine(kind, slots=6)
    split.slots.passes = plan_passes([sizes_below(bucket_sizes(6), 5)], bucket_sizes(6), 128)
    split.slots.buckets = buckets_of(split.slots.passes)
    assert split.slots.passes[6, 2] == (2, 2, 2)
    for number in range(9):
        split.submit(request(number))
        whole.submit(request(number))
    expected, done = drain(whole), drain(split)
    assert len(done) == 9 and all(torch.equal(done[name], expected[name]) for name in expected)


def test_the_buckets_are_logged_and_a_single_one_is_warned_of(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO")
    engine("diffusion", slots=2)
    assert "buckets of 2 slots: with guidance " in caplog.text and "only one" not in caplog.text
    monkeypatch.setattr(slots, "agreeing_sizes", lambda forward, sizes, period: [[(sizes[-1], 2)]])
    engine("ar", slots=1)
    assert "only one" not in caplog.text
    engine("ar", slots=2)
    assert "only one bucket: every step, also of a single image, costs as much as 2 images" in caplog.text


@pytest.mark.nightly
def test_all_batch_sizes_are_compiled_once() -> None:
    """By default Dynamo runs a function without notice uncompiled after 8 variants; eight batch sizes make 16."""
    from torch._dynamo import reset
    from torch._dynamo.utils import counters

    reset()
    before = counters["stats"]["unique_graphs"]
    for _ in range(2):  # the second engine, after a swap of weights, uses the code of the first
        torch.manual_seed(0)
        model = build_generator(GeneratorConfig(kind="diffusion", zero_init=False, **SIZES)).eval()
        build_engine(model, torch.zeros(2, 0, 8), EngineOptions(slots=16, text_length=6, compilation="compile"))
    assert counters["stats"]["unique_graphs"] - before == 2 * len(bucket_sizes(16))


@pytest.mark.nightly
def test_a_compiled_engine_gives_the_same_images() -> None:
    torch.manual_seed(0)
    model = build_generator(GeneratorConfig(kind="diffusion", zero_init=False, **SIZES)).eval()
    options = EngineOptions(slots=1, text_length=6, compilation="compile")
    compiled = build_engine(model, torch.zeros(2, 0, 8), options)
    compiled.submit(request(4))
    plain = engine("diffusion", slots=1)
    plain.submit(request(4))
    assert torch.equal(drain(compiled)["4"], drain(plain)["4"])
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no GPU"):
            build_engine(model, torch.zeros(2, 0, 8), EngineOptions(text_length=6, compilation="graphs"))


@pytest.mark.nightly
@pytest.mark.parametrize("kind", ["diffusion", "ar"])
def test_compiled_code_copies_no_keys_and_values(kind: Literal["diffusion", "ar"]) -> None:
    """Long prompts and a narrow network: all that a step computes is smaller than the keys of a block."""
    torch.manual_seed(0)
    model = build_generator(GeneratorConfig(kind=kind, zero_init=False, **SIZES)).eval()
    options = EngineOptions(slots=2, text_length=2048, compilation="compile", batch_invariant=False)
    table = build_engine(model, torch.zeros(2, 0, 8), options).slots
    table.forward(2, 2)
    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profiler:
        table.forward(2, 2)
    assert profiler.profiler and profiler.profiler.kineto_results
    allocated = [event.nbytes() for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert 0 < max(allocated) < table.cache.keys[0].nbytes
