"""The step engine: a request's bits do not depend on its company, admission is fair, cancelling frees the slot."""

from __future__ import annotations

import asyncio

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from instella_ray.errors import UserError
from instella_ray.models.generator import GeneratorConfig, build_generator
from instella_ray.models.joint_attention import TextKV
from instella_ray.sampling import SamplingParams, generate
from instella_ray.serving.batching import MicroBatcher
from instella_ray.serving.engine import Request, StepEngine, build_engine
from instella_ray.serving.runner import EngineRunner

SIZES = {"num_tokens": 4, "bits_per_token": 6, "width": 32, "layers": 2, "heads": 2, "text_width": 8}
SLOTS = 3


def engine(kind: str, slots: int = SLOTS) -> StepEngine:
    torch.manual_seed(0)
    model = build_generator(GeneratorConfig(kind=kind, zero_init=False, **SIZES)).eval()
    return build_engine(model, torch.zeros(2, 0, 8), slots=slots, text_length=6)


def request(number: int) -> Request:
    """Requests that differ in everything."""
    features = torch.randn(2, number % 6, 8, generator=torch.Generator().manual_seed(number))
    params = SamplingParams.of(
        1,
        seed=number * 7919,
        num_inference_steps=1 + number % 5,
        guidance_scale=float(number % 3),
        temperature=(0.0, 0.5, 1.0)[number % 3],
        sampler=("posterior", "simplified")[number % 2],
        final_draw=number % 2 == 0,
    )
    return Request(str(number), features, params)


def drain(e: StepEngine) -> dict[str, Tensor]:
    done = {}
    while not e.idle:
        done.update({item.id: item.codes for item in e.step()})
    return done


@pytest.mark.parametrize("kind", ["diffusion", "ar"])
@given(numbers=st.lists(st.integers(0, 40), min_size=1, max_size=9, unique=True), late=st.integers(0, 4))
@settings(max_examples=15, deadline=None)
def test_a_request_gives_the_same_bits_alone_and_in_any_company(kind: str, numbers: list[int], late: int) -> None:
    together, done = engine(kind), {}
    for number in numbers[late:]:
        together.submit(request(number))
    for number in numbers[:late]:  # these join between steps
        done.update({item.id: item.codes for item in together.step()})
        together.submit(request(number))
    done.update(drain(together))
    for number in numbers:
        alone = engine(kind)
        alone.submit(request(number))
        assert torch.equal(drain(alone)[str(number)], done[str(number)])


@pytest.mark.parametrize("kind", ["diffusion", "ar"])
def test_the_engine_samples_what_the_plain_loop_samples(kind: str) -> None:
    e = engine(kind)
    wanted = request(4)
    e.submit(wanted)
    model = e.model
    kv = model.text_kv(wanted.features[:, None], torch.ones(1, wanted.features.shape[1], dtype=torch.bool))
    empty = model.text_kv(torch.zeros(2, 1, 1, 8), torch.zeros(1, 1, dtype=torch.bool))
    assert torch.equal(drain(e)["4"], generate(model, kv, TextKV.cat([empty]), wanted.params)[0])


@pytest.mark.parametrize("kind", ["diffusion", "ar"])
def test_slots_are_given_in_the_order_of_submission(kind: str) -> None:
    e = engine(kind, slots=1)
    for number in (4, 3, 9, 1):
        e.submit(request(number))
    assert list(drain(e)) == ["4", "3", "9", "1"]


@pytest.mark.parametrize("kind", ["diffusion", "ar"])
def test_a_cancelled_request_frees_its_slot_at_the_next_step(kind: str) -> None:
    e = engine(kind, slots=1)
    e.submit(request(4))
    e.submit(request(9))
    e.submit(request(3))
    e.step()
    e.cancel("4")
    e.cancel("9")
    e.cancel("unknown")
    e.step()
    assert e.ids == ["3"] or e.idle
    assert set(drain(e)) <= {"3"}


def test_a_prompt_too_long_for_the_slots_is_refused() -> None:
    with pytest.raises(UserError, match="7 tokens, the limit is 6"):
        engine("ar").submit(Request("x", torch.zeros(2, 7, 8), SamplingParams.of(1)))


def test_many_callers_await_their_own_pictures() -> None:
    async def run() -> list[Tensor]:
        runner = EngineRunner(engine("diffusion"))
        jobs = [runner.generate(request(n).features, request(n).params) for n in range(8)]
        return list(await asyncio.gather(*jobs))

    for number, codes in enumerate(asyncio.run(run())):
        alone = engine("diffusion")
        alone.submit(request(number))
        assert torch.equal(codes, drain(alone)[str(number)])


def test_a_cancelled_caller_leaves_nothing_behind_and_a_bad_one_hears_why() -> None:
    async def run() -> EngineRunner:
        runner = EngineRunner(engine("diffusion"))
        long = SamplingParams.of(1, num_inference_steps=10_000_000)
        task = asyncio.create_task(runner.generate(torch.zeros(2, 1, 8), long))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        with pytest.raises(UserError, match="limit"):
            await runner.generate(torch.zeros(2, 7, 8), SamplingParams.of(1))
        await runner.generate(request(4).features, request(4).params)
        while not runner.engine.idle:
            await asyncio.sleep(0.01)
        return runner

    assert asyncio.run(run()).alive


def test_calls_that_arrive_together_share_a_batch_and_errors_reach_all() -> None:
    sizes = []

    def call(items: list[int]) -> list[int]:
        sizes.append(len(items))
        if -1 in items:
            raise ValueError("bad item")
        return [item * 2 for item in items]

    async def run() -> None:
        batcher: MicroBatcher[int, int] = MicroBatcher(call, size=4, wait_s=0.05)
        assert await asyncio.gather(*map(batcher, range(6))) == [0, 2, 4, 6, 8, 10]
        results = await asyncio.gather(batcher(-1), batcher(5), return_exceptions=True)
        assert all(isinstance(result, ValueError) for result in results)
        assert await batcher(7) == 14

    asyncio.run(run())
    assert sizes[:2] == [4, 2]
