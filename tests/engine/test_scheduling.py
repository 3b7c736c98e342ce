"""Scheduling policies: every request ends, none is passed over forever, and more of them are in time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from instella_ray.engine.draws import AHEAD
from instella_ray.engine.engine import Request, StepEngine
from instella_ray.engine.events import Expired, Finished
from instella_ray.engine.kinds import build_engine
from instella_ray.engine.scheduling import (
    ALLOWANCE,
    OVERDUE,
    POLICIES,
    Policy,
    Schedulable,
    StepTimes,
    by_deadline,
    fifo,
)
from instella_ray.engine.slots import EngineOptions
from instella_ray.models.generator import GeneratorConfig, build_generator
from instella_ray.models.sampling import SamplingParams

from ..kit.engines import SIZES, drain, engine, images, request

SLOTS = 16
PROCESSOR = {1: 5.5, 2: 5.5, 3: 6.6, 4: 7.4, 6: 9.1, 8: 11.0, 12: 14.4, 16: 18.0}
"""Seconds of a step by bucket, nearly proportional to the rows."""
ACCELERATOR = {rows: 8.0 + 0.2 * rows for rows in PROCESSOR}
"""Seconds of a step by bucket, nearly independent of the rows."""


def simulate(
    policy: Policy, arrivals: list[tuple[float, int]], seconds: Mapping[int, float], slots: int = SLOTS
) -> list[tuple[Schedulable, float]]:
    """Return the jobs with their latencies, in order of completion; checks what an engine expects of each decision."""
    now, rest, done = 0.0, [Schedulable(s, at, s * seconds[min(seconds)]) for at, s in arrivals][::-1], []
    running: list[Schedulable] = []
    waiting: list[Schedulable] = []
    while rest or running or waiting:
        if not running and not waiting:
            now = max(now, rest[-1].arrival)
        while rest and rest[-1].arrival <= now:
            waiting.append(rest.pop())
        chosen = policy([*running, *waiting], now, seconds, slots)
        rows = next(bucket for bucket in sorted(seconds) if bucket >= len(chosen))
        assert chosen and len(set(map(id, chosen))) == len(chosen)
        assert len(chosen) == rows or all(job in chosen for job in running)
        for job in chosen:
            job.in_slot = True
            job.left -= 1
        running += [job for job in waiting if job.in_slot]
        waiting = [job for job in waiting if not job.in_slot]
        assert len(running) <= slots
        now += seconds[rows]
        done += [(job, now - job.arrival) for job in running if not job.left]
        running = [job for job in running if job.left]
    return done


def poisson(load: float, seconds: Mapping[int, float], count: int, seed: int) -> list[tuple[float, int]]:
    rng, capacity = np.random.default_rng(seed), SLOTS / seconds[SLOTS] / 27.5
    times = np.cumsum(rng.exponential(1 / (load * capacity), count))
    return list(zip(times.tolist(), rng.integers(5, 50, count, endpoint=True).tolist(), strict=True))


def in_time(done: list[tuple[Schedulable, float]]) -> float:
    return float(np.mean([latency <= ALLOWANCE * job.alone for job, latency in done]))


def slowdown(done: list[tuple[Schedulable, float]], share: float) -> float:
    return float(np.percentile([latency / job.alone for job, latency in done], share))


ARRIVALS = st.lists(st.tuples(st.floats(0, 300), st.integers(1, 30)), min_size=1, max_size=60).map(sorted)


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@given(arrivals=ARRIVALS, slots=st.integers(1, 9))
@settings(max_examples=40)
def test_every_request_ends_and_decisions_fit_the_slots(
    policy: Policy, arrivals: list[tuple[float, int]], slots: int
) -> None:
    sizes = {rows: PROCESSOR[rows] for rows in PROCESSOR if rows < slots} | {slots: 4.2 + 0.86 * slots}
    done = simulate(policy, arrivals, sizes, slots)
    assert sorted((job.arrival, job.steps) for job, _ in done) == arrivals


def test_a_long_request_ends_although_short_ones_in_time_never_cease() -> None:
    """With two slots and a load above capacity, the others alone would occupy every row forever."""
    seconds = {1: 1.0, 2: 1.9}
    crowd = [(2.0 * i, 3) for i in range(1, 2000)]
    done = simulate(by_deadline, [(0.0, 40), *crowd], seconds, slots=2)
    (patient,) = [latency for job, latency in done if job.steps == 40]
    # Once overdue it is in every step: its steps at the slowest bucket, and the wait for a slot.
    assert patient <= (OVERDUE * ALLOWANCE + 2 * 1.9) * 40


def test_those_that_can_be_in_time_come_first_by_deadline() -> None:
    seconds = {1: 1.0, 2: 1.5}
    early, later = Schedulable(4, 0.0, 4.0), Schedulable(5, 0.0, 5.0)
    hopeless = Schedulable(9, -19.0, 9.0)
    assert by_deadline([hopeless, later, early], 0.0, seconds, 3) == [early, later]
    assert by_deadline([hopeless], 0.0, seconds, 3) == [hopeless]
    assert by_deadline([later, early], 3.5, {1: 1.0, 2: 1.2}, 3) == [early, later]
    # A deadline of the request itself counts where it is earlier than the soft one.
    later.deadline = 11.0
    assert by_deadline([early, later], 0.0, seconds, 3)[0] is later
    assert fifo([later, early, hopeless], 0.0, {}, 2) == [later, early]


def test_steps_are_narrow_when_wide_ones_would_make_all_late() -> None:
    """At two rows no request would be in time; at one row each has its turn."""
    jobs = [Schedulable(4, 0.0, 4.0, in_slot=True) for _ in range(2)]
    assert len(by_deadline(jobs, 0.0, {1: 1.0, 2: 1.5}, 2)) == 2
    assert len(by_deadline(jobs, 0.0, {1: 1.0, 2: 3.2}, 2)) == 1


def test_an_overdue_request_takes_a_free_slot_before_all_others() -> None:
    seconds = {1: 1.0, 2: 1.5}
    overdue = Schedulable(20, -OVERDUE * ALLOWANCE * 20 - 1, 20.0)
    fresh = [Schedulable(4, 0.0, 4.0), Schedulable(4, 0.0, 4.0)]
    assert by_deadline([*fresh, overdue], 0.0, seconds, 2)[0] is overdue
    for job in fresh:
        job.in_slot = True
    assert by_deadline([*fresh, overdue], 0.0, seconds, 2) == fresh  # no slot is free


@pytest.mark.parametrize(
    ("seconds", "load", "least", "gain"),
    [(PROCESSOR, 0.7, 0.93, 0.05), (PROCESSOR, 0.9, 0.5, 0.1), (ACCELERATOR, 0.9, 0.99, 0.01)],
)
def test_more_requests_are_in_time_than_first_in_first_out(
    seconds: dict[int, float], load: float, least: float, gain: float
) -> None:
    runs = {policy: simulate(policy, poisson(load, seconds, 1500, 0), seconds) for policy in (fifo, by_deadline)}
    assert in_time(runs[by_deadline]) >= max(least, in_time(runs[fifo]) + gain)
    assert slowdown(runs[by_deadline], 100) <= slowdown(runs[fifo], 100)


def test_the_mean_time_of_a_step_follows_its_measurements() -> None:
    times = StepTimes()
    assert times.alone(guided=True) == 0
    for rows, seconds in ((4, 2.0), (2, 1.0), (2, 2.0)):
        times.observe(2, rows, seconds)
    assert times.seconds == {1: {}, 2: {4: 2.0, 2: pytest.approx(1.1)}}
    assert times.alone(guided=True) == times.alone(guided=False) == pytest.approx(1.1)
    times.observe(1, 1, 0.0)  # a clock that did not advance
    assert 0 < times.alone(guided=False) < 1e-6


def deadline_engine(kind: str, slots: int) -> StepEngine:
    torch.manual_seed(0)
    model = build_generator(GeneratorConfig(kind=kind, zero_init=False, **SIZES)).eval()  # type: ignore[arg-type]
    options = EngineOptions(slots, text_length=6, scheduling="deadline")
    return build_engine(model, torch.zeros(2, 0, 8), options)


def random_policy(seed: int) -> Policy:
    """Return a policy that chooses any jobs that it may choose."""
    rng = np.random.default_rng(seed)

    def choose(jobs: Sequence[Schedulable], now: float, seconds: Mapping[int, float], slots: int) -> list[Schedulable]:
        if not jobs:
            return []
        rows, free = int(rng.choice(list(seconds))), slots - sum(job.in_slot for job in jobs)
        order: list[Schedulable] = [jobs[i] for i in rng.permutation(len(jobs))]
        admitted = [job for job in order if not job.in_slot][:free]
        chosen = [job for job in order if job.in_slot or job in admitted][:rows]
        return chosen if len(chosen) == rows else [*chosen, *(job for job in jobs if job.in_slot and job not in chosen)]

    return choose


@pytest.mark.parametrize("kind", ["diffusion", "ar"])
@given(
    numbers=st.lists(st.integers(0, 40), min_size=4, max_size=14, unique=True),
    late=st.integers(0, 6),
    seed=st.one_of(st.none(), st.integers(0, 100)),
)
@settings(max_examples=20)
def test_no_order_of_the_steps_changes_a_bit(kind: str, numbers: list[int], late: int, seed: int | None) -> None:
    together, done = deadline_engine(kind, 6), {}
    if seed is not None:
        together.policy = random_policy(seed)
    for number in numbers[late:]:
        together.submit(request(number))
    for number in numbers[:late]:
        done.update(images(together))
        together.submit(request(number))
    done.update(drain(together))
    expected = engine(kind, 6)
    for number in numbers:
        expected.submit(request(number))
    wanted = drain(expected)
    assert done.keys() == wanted.keys()
    assert all(torch.equal(done[name], wanted[name]) for name in wanted)


def test_more_steps_than_are_drawn_ahead_survive_pauses() -> None:
    """Random numbers are drawn for many steps at once, also for the slots that pause at that moment."""
    params = [SamplingParams.of(1, seed=seed, num_inference_steps=3 * AHEAD + seed) for seed in range(6)]
    both = deadline_engine("diffusion", 6), engine("diffusion", 6)
    both[0].policy = random_policy(0)
    for e in both:
        for each in params:
            e.submit(Request(str(int(each.seed[0])), torch.zeros(2, 1, 8), each))
    paused, expected = drain(both[0]), drain(both[1])
    assert both[0].steps > both[1].steps
    assert all(torch.equal(paused[name], expected[name]) for name in expected)


def test_a_paused_request_can_be_cancelled_and_expires() -> None:
    e = deadline_engine("diffusion", 4)
    narrow = e.slots.buckets[2][0]
    if narrow == 4:
        pytest.skip("only the full table gives the same bits on this processor")

    def submit(name: str, deadline: float = float("inf")) -> None:
        params = SamplingParams.of(1, num_inference_steps=30, guidance_scale=1.0)
        e.submit(Request(name, torch.zeros(2, 1, 8), params, deadline))

    for name in "abcd":
        submit(name)
    e.policy = fifo
    e.step()
    e.policy = lambda jobs, now, seconds, slots: list(jobs)[-narrow:]  # those in the last slots
    e.step()
    front = {r.id for r in e.requests[:narrow]}
    assert front == set("abcd"[-narrow:]) and e.active == 4
    e.cancel("a")
    e.step()
    assert {r.id for r in e.requests} == set("bcd")
    e.policy = fifo
    submit("e", e.clock() - 1)
    events = []
    while not e.idle:
        events += e.step()
    assert [event.id for event in events if isinstance(event, Expired)] == ["e"]
    assert {event.id for event in events if isinstance(event, Finished)} == set("bcd")
