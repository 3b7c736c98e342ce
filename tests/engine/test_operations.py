"""What a step asks of the device beside the network's pass: few operations, and nothing that the host would wait for."""

from __future__ import annotations

from collections import Counter
from typing import Literal

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from instella_ray.engine import slots
from instella_ray.engine.compilation import Compilation
from instella_ray.engine.engine import Request, StepEngine
from instella_ray.engine.events import Finished, Outbox
from instella_ray.engine.kinds import build_engine
from instella_ray.engine.slots import EngineOptions
from instella_ray.models.generator import GeneratorConfig, build_generator
from instella_ray.models.sampling import SamplingParams

from ..kit.engines import SIZES, drain, images, request
from ..kit.operations import counted
from ..kit.recording import RecordedOnCPU

SLOTS = 4
Kind = Literal["diffusion", "ar"]
OUTSIDE = {"diffusion": 60, "ar": 25}
"""Most operations of a step outside the network, as launched on a GPU one by one."""
OTHER_SAMPLERS = 60
"""Most further operations of a step in which an image has another sampler than ``simplified``."""
RECORDED = {"diffusion": 2, "ar": 1}
"""Launches of a step with graphs: its recording, and for diffusion the modulations of each slot's timestep."""
ADMITTED = 150
"""Most operations of an admission beside the projection of the prompt."""


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines with graphs on a machine without a GPU."""
    monkeypatch.setattr(slots, "Recorded", RecordedOnCPU)
    monkeypatch.setattr(slots, "check_compilation", lambda compilation: None)


def busy(kind: Kind, compilation: Compilation = "none", sampler: str = "simplified") -> StepEngine:
    """An engine whose slots are all occupied by images that go on, the last one with another ``sampler``."""
    torch.manual_seed(0)
    sizes = {**SIZES, "num_tokens": 40}
    model = build_generator(GeneratorConfig(kind=kind, zero_init=False, **sizes)).eval()
    engine = build_engine(model, torch.zeros(2, 0, 8), EngineOptions(SLOTS, 6, compilation))
    for number in range(SLOTS):
        engine.submit(going_on(number, sampler if number == SLOTS - 1 else "simplified"))
    for _ in range(3):
        engine.step()
    return engine


def going_on(number: int, sampler: str = "simplified") -> Request:
    params = SamplingParams.of(1, seed=number, num_inference_steps=40, guidance_scale=2.0, sampler=sampler)
    return Request(str(number), torch.randn(2, 3, 8), params, prompt="a prompt")


def of_the_network(engine: StepEngine) -> Counter[str]:
    with counted() as (operations, _), torch.no_grad():
        engine.slots.forward(SLOTS, 2)
    return operations


@pytest.mark.parametrize("kind", ["diffusion", "ar"])
def test_a_step_reads_nothing_back_and_launches_little_beside_the_network(kind: Kind) -> None:
    engine = busy(kind)
    inside = sum(of_the_network(engine).values())
    found = []
    # One of these steps also computes draws or modulations ahead; the others do not.
    for _ in range(8):
        with counted() as (operations, reads):
            engine.step()
        assert not reads
        found.append(sum(operations.values()) - inside)
    print(f"{kind}: {min(found)} operations a step outside the network, {max(found)} at most, {inside} inside")
    assert min(found) <= OUTSIDE[kind]


def test_only_who_asks_for_another_sampler_pays_for_it() -> None:
    found = {}
    for sampler in ("simplified", "ancestral"):
        engine = busy("diffusion", sampler=sampler)
        with counted() as (operations, reads):
            engine.step()
        assert not reads
        found[sampler] = sum(operations.values())
    print(f"operations of a step: {found}")
    assert found["simplified"] < found["ancestral"] <= found["simplified"] + OTHER_SAMPLERS


@pytest.mark.parametrize("kind", ["diffusion", "ar"])
@pytest.mark.usefixtures("graphs")
def test_with_graphs_a_step_is_one_launch(kind: Kind) -> None:
    engine = busy(kind, "graphs")
    recordings = [engine.slots.advance, engine.slots.draw_ahead]
    assert all(isinstance(each, RecordedOnCPU) for each in recordings)
    found = []
    for _ in range(20):
        before = sum(each.launches for each in recordings)  # type: ignore[attr-defined]
        with counted() as (operations, reads):
            engine.step()
        assert not reads
        launches = sum(each.launches for each in recordings) - before  # type: ignore[attr-defined]
        found.append(sum(operations.values()) + launches)
    print(f"{kind}: {found} launches a step")
    assert min(found) == RECORDED[kind]
    # Draws ahead are one more launch. Modulations are computed once for 16 steps of all images of a schedule.
    assert sum(count > RECORDED[kind] + 1 for count in found) <= (2 if kind == "diffusion" else 0)


@pytest.mark.parametrize("kind", ["diffusion", "ar"])
@pytest.mark.usefixtures("graphs")
def test_a_finished_image_gives_its_slot_to_the_next_without_moving_others(
    kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = busy(kind, "graphs")
    monkeypatch.setattr(engine.slots, "move", lambda sources, targets: pytest.fail(f"moved {sources} to {targets}"))
    for slot in (1, 3, 0):
        engine.submit(going_on(10 + slot))
        engine.cancel(engine.requests[slot].id)
        with counted() as (operations, _):
            engine.step()
        assert engine.requests[slot].id == str(10 + slot) and engine.active == SLOTS
        print(f"{kind}: {sum(operations.values())} operations of an admission")
        assert sum(operations.values()) <= ADMITTED


@pytest.mark.parametrize("kind", ["diffusion", "ar"])
@pytest.mark.usefixtures("graphs")
@given(numbers=st.lists(st.integers(0, 40), min_size=1, max_size=9, unique=True), late=st.integers(0, 4))
@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_recorded_steps_give_the_same_images(kind: Kind, numbers: list[int], late: int) -> None:
    def run(compilation: Compilation) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = build_generator(GeneratorConfig(kind=kind, zero_init=False, **SIZES)).eval()
        engine, done = build_engine(model, torch.zeros(2, 0, 8), EngineOptions(3, 6, compilation)), {}
        for number in numbers[late:]:
            engine.submit(request(number))
        for number in numbers[:late]:  # these join between steps
            done.update(images(engine))
            engine.submit(request(number))
        return {**done, **drain(engine)}

    recorded, plain = run("graphs"), run("none")
    assert sorted(recorded) == sorted(plain) == sorted(map(str, numbers))
    assert all(torch.equal(recorded[name], plain[name]) for name in plain)


def test_late_events_come_one_step_later_and_none_stays_behind() -> None:
    outbox, bits = Outbox(late=True), torch.ones(2, 3)

    def put(name: str) -> None:
        outbox.put(bits, lambda codes: Finished(name, codes))

    def names(*, everything: bool = False) -> list[str]:
        return [event.id for event in outbox.take(everything=everything)]

    put("first")
    assert names() == [] and outbox.pending
    put("second")
    bits.zero_()  # the slot's next image
    assert names() == ["first"]
    assert names() == ["second"] and not outbox.pending
    put("third")
    assert names(everything=True) == ["third"]
    put("fourth")
    (event,) = [*outbox.take(everything=False), *outbox.take(everything=True)]
    assert isinstance(event, Finished) and event.codes.dtype == torch.uint8 and not event.codes.any()


@pytest.mark.parametrize("kind", ["diffusion", "ar"])
def test_an_engine_with_late_events_ends_with_the_same_images(kind: Kind) -> None:
    def run(late: bool) -> dict[str, torch.Tensor]:
        engine = busy(kind)
        engine.outbox = Outbox(late=late)
        done = {}
        while not engine.idle:
            done.update({event.id: event.codes for event in engine.step() if isinstance(event, Finished)})
        return done

    late, at_once = run(True), run(False)
    assert sorted(late) == sorted(at_once) == [str(number) for number in range(SLOTS)]
    assert all(torch.equal(late[name], at_once[name]) for name in late)
