"""Modulations by schedule: a row's do not depend on the batch, and the cache stays small whatever clients ask for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from instella_ray.engine.engine import Request
from instella_ray.engine.kinds import DiffusionSlots, build_engine
from instella_ray.engine.modulations import CHUNK, ScheduleModulations
from instella_ray.engine.slots import EngineOptions
from instella_ray.models.generator import DiffusionGenerator, GeneratorConfig
from instella_ray.models.joint_attention import TextKV
from instella_ray.models.sampling import SamplingParams, generate, timestep

from ..kit.engines import SIZES, drain, images

SLOTS = 4
LIMIT = 1 << 20


def network(dtype: torch.dtype = torch.float32) -> DiffusionGenerator:
    torch.manual_seed(0)
    return DiffusionGenerator(GeneratorConfig(zero_init=False, **SIZES)).eval().to(dtype)


def counted(model: DiffusionGenerator) -> list[Tensor]:
    """The timesteps of each further computation of modulations."""
    calls, compute = list[Tensor](), model.modulations
    model.modulations = lambda t: calls.append(t) or compute(t)  # type: ignore[func-returns-value, assignment, method-assign]
    return calls


def loaded(rows: list[tuple[int, int, float]], dtype: torch.dtype = torch.float32) -> Tensor:
    """The table for rows of position, step count and rho."""
    modulations = ScheduleModulations(network(dtype), SLOTS, LIMIT)
    modulations.load([(steps, rho, position) for position, steps, rho in rows])
    return modulations.table[: len(rows)].clone()


STEPS = st.integers(1, 1000)
ROWS = st.lists(st.tuples(st.integers(0, 999), STEPS, st.sampled_from([0.5, 1.0, 2.7])), min_size=1, max_size=SLOTS)


@given(rows=ROWS, half=st.booleans())
@settings(max_examples=30)
def test_modulations_of_a_row_do_not_depend_on_the_others(rows: list[tuple[int, int, float]], half: bool) -> None:
    rows = [(position % steps, steps, rho) for position, steps, rho in rows]
    dtype = torch.bfloat16 if half else torch.float32
    together = loaded(rows, dtype)
    for row, found in zip(rows, together, strict=True):
        assert torch.equal(found, loaded([row], dtype)[0])
        params = SamplingParams.of(1, num_inference_steps=row[1], rho=row[2])
        with torch.no_grad():
            plain = network(dtype).modulations(timestep(torch.tensor(row[:1]), params).to(dtype))[0]
        assert found.dtype == dtype
        torch.testing.assert_close(found, plain)


def test_the_network_computes_the_same_with_given_modulations() -> None:
    model = network()
    z, t = torch.rand(3, 4, 6).round(), torch.tensor([1.0, 0.5, 0.01])
    text = model.text_kv(torch.randn(2, 3, 5, 8), torch.ones(3, 5, dtype=torch.bool))
    assert torch.equal(model(z, t, text), model(z, None, text, model.modulations(t)))


@pytest.mark.parametrize("limit", [1, LIMIT])
def test_schedules_longer_than_a_chunk_are_computed_chunk_by_chunk(limit: int) -> None:
    """Each chunk once, even if the slots' chunks together exceed the limit; slots move when shorter schedules end."""
    model = network()
    engine = build_engine(model, torch.zeros(2, 0, 8), EngineOptions(SLOTS, 6))
    assert isinstance(engine.slots, DiffusionSlots)
    engine.slots.modulations.chunks.limit = limit
    lengths = {"short": 3, "long": 2 * CHUNK + 5, "middle": CHUNK, "longer": 3 * CHUNK + 1, "late": CHUNK + 2}
    params = {name: SamplingParams.of(1, seed=n, num_inference_steps=n, rho=1 + n / 10) for name, n in lengths.items()}
    features = torch.randn(2, 3, 8)
    calls, done = counted(model), {}
    for name in lengths:
        engine.submit(Request(name, features, params[name]))
    while not engine.idle:
        done.update(images(engine))
    assert sorted(done) == sorted(lengths)
    assert [len(t) for t in calls] == [CHUNK] * sum(-(-n // CHUNK) for n in lengths.values())
    text, empty = (model.text_kv(torch.zeros(2, 1, 1, 8), torch.zeros(1, 1, dtype=torch.bool)) for _ in range(2))
    text = model.text_kv(features[:, None], torch.ones(1, 3, dtype=torch.bool))
    for name, codes in done.items():
        assert torch.equal(codes, generate(model, text, TextKV.cat([empty]), params[name])[0])


def test_images_of_the_same_schedule_share_its_modulations() -> None:
    model = network()
    engine = build_engine(model, torch.zeros(2, 0, 8), EngineOptions(SLOTS, 6))
    calls = counted(model)
    for number in range(3 * SLOTS):
        params = SamplingParams.of(1, seed=number, num_inference_steps=CHUNK + 5, guidance_scale=number)
        engine.submit(Request(str(number), torch.zeros(2, number % 6, 8), params))
    drain(engine)
    assert len(calls) == 2


def test_the_cache_stays_bounded_whatever_rho_clients_choose() -> None:
    modulations = ScheduleModulations(network(), SLOTS, LIMIT // 8)
    chunk = CHUNK * modulations.table[0].nbytes
    for number in range(200):
        modulations.load([(1000, 1 + (SLOTS * number + slot) / 1000, CHUNK * slot) for slot in range(SLOTS)])
        assert modulations.chunks.used <= LIMIT // 8 and len(modulations.in_use) == SLOTS
    assert modulations.chunks.used == len(modulations.chunks.items) * chunk > LIMIT // 8 - chunk
