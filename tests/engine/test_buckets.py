"""Buckets: every one in use gives the same bits, with and without guidance, compiled and not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from instella_ray.engine.buckets import bucket_sizes, usable_buckets
from instella_ray.engine.engine import EngineOptions
from instella_ray.engine.kinds import build_engine
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
        assert alone.buckets[2][-1] == 6
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
        if half.buckets[1][-1:] != [4]:
            pytest.skip("one row a slot gives other bits on this processor, and is not used")
        whole.buckets = {**whole.buckets, 1: []}
        passes: list[tuple[int, int]] = []
        forward = half.forward
        half.forward = lambda rows, branches: passes.append((rows, branches)) or forward(rows, branches)  # type: ignore[func-returns-value]
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


def test_a_bucket_whose_numbers_differ_is_not_used() -> None:
    def network(rows: int, branches: int) -> Tensor:
        return torch.ones(branches * rows, 3) + (1e-7 if rows == 2 or (rows, branches) == (5, 1) else 0)

    assert usable_buckets(network, bucket_sizes(5)) == {2: [1, 3, 4, 5], 1: [1, 3, 4]}
    assert bucket_sizes(1) == [1] and bucket_sizes(16) == [1, 2, 3, 4, 6, 8, 12, 16]
    for slots in (1, 2, 3, 7, 16, 33):
        sizes = bucket_sizes(slots)
        assert all(next(size for size in sizes if size >= count) <= 1.5 * count for count in range(1, slots + 1))


@pytest.mark.nightly
def test_all_batch_sizes_are_compiled_once() -> None:
    """By default Dynamo runs a function without notice uncompiled after 8 variants; five batch sizes make 10."""
    from torch._dynamo import reset
    from torch._dynamo.utils import counters

    reset()
    before = counters["stats"]["unique_graphs"]
    for _ in range(2):  # the second engine, after a swap of weights, uses the code of the first
        torch.manual_seed(0)
        model = build_generator(GeneratorConfig(kind="diffusion", zero_init=False, **SIZES)).eval()
        build_engine(model, torch.zeros(2, 0, 8), EngineOptions(slots=16, text_length=6, compilation="compile"))
    assert counters["stats"]["unique_graphs"] - before == 2 * len(bucket_sizes(16)) == 10


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
