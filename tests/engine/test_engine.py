"""The step engine: a request's bits do not depend on its company, admission is fair, cancelling frees the slot."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from instella_ray.engine.engine import Request
from instella_ray.engine.events import Expired, Finished, Progress
from instella_ray.engine.kinds import build_engine
from instella_ray.engine.slots import EngineOptions
from instella_ray.errors import UserError
from instella_ray.models.generator import GeneratorConfig, build_generator
from instella_ray.models.joint_attention import TextKV
from instella_ray.models.sampling import SamplingParams, generate
from instella_ray.serving.batching import MicroBatcher
from instella_ray.serving.runner import DeadlineExceeded, EngineFailed, EngineRunner

from ..kit.engines import SIZES, SLOTS, drain, engine, images, request


@pytest.mark.parametrize("kind", ["diffusion", "ar"])
@given(numbers=st.lists(st.integers(0, 40), min_size=1, max_size=9, unique=True), late=st.integers(0, 4))
@settings(max_examples=15)
def test_a_request_gives_the_same_bits_alone_and_in_any_company(kind: str, numbers: list[int], late: int) -> None:
    together, done = engine(kind), {}
    for number in numbers[late:]:
        together.submit(request(number))
    for number in numbers[:late]:  # these join between steps
        done.update(images(together))
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
    model = e.slots.model
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
    assert [r.id for r in e.requests] == ["3"] or e.idle
    assert set(drain(e)) <= {"3"}


def test_a_prompt_too_long_for_the_slots_is_refused() -> None:
    with pytest.raises(UserError, match="7 tokens, the limit is 6"):
        engine("ar").submit(Request("x", torch.zeros(2, 7, 8), SamplingParams.of(1)))


def test_many_callers_await_their_own_images() -> None:
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

    asyncio.run(run()).check(60)


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


class Clock:
    """Time that passes when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Model:
    """What the scheduler promises, as simply as it can be said: first come, first served, one step for all at a time."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.waiting: list[tuple[str, int, float]] = []
        self.running: dict[str, int] = {}
        self.deadlines: dict[str, float] = {}

    def step(self, now: float) -> tuple[set[str], set[str]]:
        late = {name for name, _, deadline in self.waiting if deadline <= now}
        late |= {name for name in self.running if self.deadlines[name] <= now}
        self.waiting = [entry for entry in self.waiting if entry[0] not in late]
        self.running = {name: left for name, left in self.running.items() if name not in late}
        while self.waiting and len(self.running) < self.slots:
            name, steps, deadline = self.waiting.pop(0)
            self.running[name], self.deadlines[name] = steps, deadline
        self.running = {name: left - 1 for name, left in self.running.items()}
        done = {name for name, left in self.running.items() if left == 0}
        self.running = {name: left for name, left in self.running.items() if left}
        return done, late


ACTIONS = st.one_of(
    st.tuples(st.just("submit"), st.integers(1, 6), st.sampled_from([3.0, 8.0, float("inf")])),
    st.tuples(st.just("cancel"), st.integers(0, 30)),
    st.tuples(st.just("step")),
)


@given(actions=st.lists(ACTIONS, max_size=60))
@settings(max_examples=60)
def test_the_scheduler_does_what_a_simple_model_says(actions: list[tuple[object, ...]]) -> None:
    """Who is done, and who is too late, at every step; no slot is lost, whatever is submitted, cancelled or expires."""
    clock = Clock()
    torch.manual_seed(0)
    network = build_generator(GeneratorConfig(kind="diffusion", zero_init=False, **SIZES)).eval()
    options = EngineOptions(slots=SLOTS, text_length=6, batch_invariant=False)
    e, model, names = build_engine(network, torch.zeros(2, 0, 8), options, clock=clock), Model(SLOTS), []

    def one_step() -> None:
        clock.now += 1
        events = e.step()
        done = {event.id for event in events if isinstance(event, Finished)}
        late = {event.id for event in events if isinstance(event, Expired)}
        assert (done, late) == model.step(clock.now)
        assert {r.id for r in e.requests} == set(model.running)

    for action, *values in actions:
        if action == "submit":
            steps, patience = values
            names.append(str(len(names)))
            params = SamplingParams.of(1, num_inference_steps=steps)
            e.submit(Request(names[-1], torch.zeros(2, 1, 8), params, clock.now + patience))  # type: ignore[operator]
            model.waiting.append((names[-1], steps, clock.now + patience))  # type: ignore[arg-type, operator]
        elif action == "cancel" and names:
            name = names[values[0] % len(names)]  # type: ignore[operator]
            e.cancel(name)
            model.waiting = [entry for entry in model.waiting if entry[0] != name]
            model.running.pop(name, None)
        else:
            one_step()
    for _ in range(200):
        one_step()
    assert e.idle


@pytest.mark.parametrize("kind", ["diffusion", "ar"])
def test_progress_comes_as_often_as_asked_and_ends_in_the_image(kind: str) -> None:
    e, length = engine(kind), {"diffusion": 5, "ar": 4}[kind]
    params = SamplingParams.of(1, seed=3, num_inference_steps=5)
    e.submit(Request("x", torch.zeros(2, 1, 8), params, preview_every=2))
    e.submit(Request("quiet", torch.zeros(2, 1, 8), params))
    events = []
    while not e.idle:
        events += [event for event in e.step() if event.id == "x"]
    told = [event for event in events if isinstance(event, Progress)]
    assert [(event.step, event.steps) for event in told] == [(s, length) for s in range(2, length, 2)]
    assert all(event.estimate.shape == (4, 6) and event.estimate.max() <= 1 for event in told)
    assert isinstance(events[-1], Finished)
    if kind == "ar":  # what has been drawn stays
        assert torch.equal(told[0].estimate[:2], events[-1].codes[:2]) and not told[0].estimate[2:].any()


def test_an_empty_prompt_longer_than_a_slot_is_refused() -> None:
    model = build_generator(GeneratorConfig(kind="ar", **SIZES)).eval()
    with pytest.raises(UserError, match="empty prompt alone has 9 tokens"):
        build_engine(model, torch.zeros(2, 9, 8), EngineOptions(text_length=6))


def test_a_deadline_ends_the_wait_and_frees_the_slot() -> None:
    async def run() -> None:
        runner = EngineRunner(engine("diffusion", slots=1))
        long = SamplingParams.of(1, num_inference_steps=10_000_000)
        with pytest.raises(DeadlineExceeded, match=r"0\.2 s"):
            await runner.generate(torch.zeros(2, 1, 8), long, timeout_s=0.2)
        codes = await runner.generate(request(4).features, request(4).params, timeout_s=60)
        assert codes.shape == (4, 6)
        assert runner.stats.active == 0 and runner.stats.images == 1

    asyncio.run(run())


def test_callers_follow_their_image_step_by_step() -> None:
    async def run() -> list[object]:
        runner = EngineRunner(engine("diffusion"))
        params = SamplingParams.of(1, num_inference_steps=4)
        return [event async for event in runner.follow(torch.zeros(2, 1, 8), params, preview_every=1)]

    events = asyncio.run(run())
    assert [type(event) for event in events] == [Progress] * 3 + [Finished]


def test_when_the_engine_breaks_everybody_hears_now_and_later(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        broken = engine("diffusion")
        monkeypatch.setattr(broken, "step", lambda: 1 / 0)
        monkeypatch.setattr(threading, "excepthook", lambda _: None)
        runner = EngineRunner(broken)
        for _ in range(2):
            with pytest.raises(EngineFailed, match="division by zero"):
                await runner.generate(torch.zeros(2, 1, 8), SamplingParams.of(1))
        with pytest.raises(EngineFailed):
            runner.check(60)

    asyncio.run(run())


def test_a_stalled_engine_is_noticed() -> None:
    async def run() -> None:
        stalled, release = engine("diffusion"), threading.Event()
        real = stalled.step
        stalled.step = lambda: (release.wait(), real())[1]  # type: ignore[method-assign]
        runner = EngineRunner(stalled)
        runner.check(0.0)
        task = asyncio.create_task(runner.generate(torch.zeros(2, 1, 8), SamplingParams.of(1)))
        while runner.stats.silence_s < 0.05:
            await asyncio.sleep(0.01)
        with pytest.raises(EngineFailed, match="not completed a step"):
            runner.check(0.01)
        release.set()
        await task

    asyncio.run(run())


def test_a_drained_engine_finishes_what_it_has_and_takes_no_more() -> None:
    async def run() -> None:
        runner = EngineRunner(engine("diffusion"))
        jobs = [asyncio.create_task(runner.generate(request(n).features, request(n).params)) for n in range(5)]
        await asyncio.sleep(0)
        await runner.drain()
        assert len([await job for job in jobs]) == 5
        with pytest.raises(EngineFailed, match="ended"):
            await runner.generate(torch.zeros(2, 1, 8), SamplingParams.of(1))

    asyncio.run(run())


def test_a_run_takes_one_batch_of_requests_ahead_and_may_be_left() -> None:
    e, taken = engine("diffusion"), list[int]()

    def requests(count: int) -> Iterator[Request]:
        for number in range(count):
            taken.append(number)
            yield request(number)

    events = e.run(requests(6 * SLOTS))
    next(event for event in events if isinstance(event, Finished))
    assert len(taken) <= 3 * SLOTS + 1
    events.close()
    assert e.idle
    assert len([event for event in e.run(requests(5)) if isinstance(event, Finished)]) == 5 and e.idle
