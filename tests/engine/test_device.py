"""An engine on a GPU, by its shapes and devices alone: everything is where it belongs, and no step waits for the device.

PyTorch's fake tensors know the device of a GPU that isn't there. They refuse to be read and to be mixed across devices.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from instella_ray.engine.engine import Request, StepEngine
from instella_ray.engine.events import Finished
from instella_ray.engine.kinds import build_engine
from instella_ray.engine.scheduling import POLICIES, Scheduling
from instella_ray.engine.slots import EngineOptions
from instella_ray.models import rng
from instella_ray.models.generator import GeneratorConfig, build_generator
from instella_ray.models.sampling import SamplingParams

from ..kit.engines import SIZES

ATEN = torch.ops.aten


class Transfers(TorchDispatchMode):
    """Operations on two devices that the host waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[str] = []
        self.copies = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        if len({tensor.device for tensor in tensors}) > 1:
            late = kwargs.get("non_blocking") or (func is ATEN.copy_.default and args[2:] == (True,))
            self.copies += bool(late)
            # A number of the host becomes an argument of the kernel that fills.
            if not late and func is not ATEN.fill_.Tensor:
                self.waiting.append(f"{func} {[(tensor.device.type, list(tensor.shape)) for tensor in tensors]}")
        return result


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTensorMode]:
    of = SamplingParams.of

    def on_host(*given: Any, **named: Any) -> SamplingParams:
        with unset_fake_temporarily():  # checked by their values
            return of(*given, **named)

    monkeypatch.setattr(SamplingParams, "of", on_host)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)  # needs a driver
    rng._constants.cache_clear()
    yield FakeTensorMode(allow_non_fake_inputs=True)
    rng._constants.cache_clear()


def fake_engine(gpu: FakeTensorMode, kind: Literal["diffusion", "ar"], scheduling: Scheduling) -> StepEngine:
    with gpu, torch.device("cuda"):
        model = build_generator(GeneratorConfig(kind=kind, zero_init=False, **SIZES)).eval()
    with gpu:
        engine = build_engine(model, torch.zeros(2, 0, 8), EngineOptions(3, 6, batch_invariant=False))
        engine.slots.draws.start(0)  # the first one in a process copies constants
    engine.policy = POLICIES[scheduling]
    for branches, buckets in engine.slots.buckets.items():
        for rows in buckets:
            engine.times.observe(branches, rows, 0.1 + 0.01 * rows)
    return engine


@pytest.mark.parametrize("kind", ["diffusion", "ar"])
@pytest.mark.parametrize("scheduling", ["fifo", "deadline"])
def test_no_step_waits_for_the_device(
    gpu: FakeTensorMode, kind: Literal["diffusion", "ar"], scheduling: Scheduling
) -> None:
    engine = fake_engine(gpu, kind, scheduling)
    for number in range(9):
        params = SamplingParams.of(1, seed=number, num_inference_steps=3 + number % 4, guidance_scale=number % 2)
        engine.submit(Request(str(number), torch.randn(2, 3, 8), params, preview_every=2 * (number % 2)))
    engine.submit(Request("cancelled", torch.randn(2, 3, 8), SamplingParams.of(1)))
    events = []
    with gpu, Transfers() as transfers:
        while not engine.idle:
            events += engine.step()
            engine.cancel("cancelled")
    assert not transfers.waiting, "\n".join(transfers.waiting)
    done = [event for event in events if isinstance(event, Finished)]
    assert len(done) == 9 and all(event.codes.device.type == "cpu" for event in done)
    assert transfers.copies >= 9 + len(events)  # the features of each prompt, and what was shown of images


def test_a_blocking_copy_would_be_noticed(gpu: FakeTensorMode) -> None:
    with gpu, Transfers() as transfers:
        on_device = torch.zeros(3, device="cuda")
        on_device[0] = 1
        torch.zeros(3).to("cuda")
        assert len(transfers.waiting) == 2
        with pytest.raises(RuntimeError):
            on_device + torch.ones(3)
        with pytest.raises(RuntimeError):
            on_device.sum().item()
