"""What a step asks of the device beside the network's pass: few operations, and nothing that the host would wait for."""

from __future__ import annotations

from collections import Counter
from typing import Literal

import pytest
import torch

from instella_ray.engine.engine import EngineOptions, Request, StepEngine
from instella_ray.engine.events import Finished, Outbox
from instella_ray.engine.kinds import build_engine
from instella_ray.models.generator import GeneratorConfig, build_generator
from instella_ray.models.sampling import SamplingParams

from ..kit.engines import SIZES
from ..kit.operations import counted

SLOTS = 4
Kind = Literal["diffusion", "ar"]
OUTSIDE = {"diffusion": 75, "ar": 25}
"""Most operations of a step outside the network, as launched on a GPU one by one."""


def busy(kind: Kind) -> StepEngine:
    """An engine whose slots are all occupied by images that go on."""
    torch.manual_seed(0)
    sizes = {**SIZES, "num_tokens": 40}
    model = build_generator(GeneratorConfig(kind=kind, zero_init=False, **sizes)).eval()
    engine = build_engine(model, torch.zeros(2, 0, 8), EngineOptions(SLOTS, 6))
    for number in range(SLOTS):
        params = SamplingParams.of(1, seed=number, num_inference_steps=40, guidance_scale=2.0)
        engine.submit(Request(str(number), torch.randn(2, 3, 8), params))
    for _ in range(3):
        engine.step()
    return engine


def of_the_network(engine: StepEngine) -> Counter[str]:
    with counted() as (operations, _), torch.no_grad():
        engine.forward(SLOTS, 2)
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
