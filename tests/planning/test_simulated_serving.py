"""The simulated endpoint: nobody is lost, queueing theory holds where it has a formula, and batches do what batches do."""

from __future__ import annotations

import inspect
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from instella_ray.errors import UserError
from instella_ray.planning.simulation import serving as simulated
from instella_ray.planning.simulation.serving import Machine, simulate_serving
from instella_ray.planning.simulation.sizing import Slo, size_serving
from instella_ray.serving import app as real_app
from instella_ray.serving import deployments
from instella_ray.serving.batching import MicroBatcher
from instella_ray.serving.config import DecoderArgs

from ..kit.simulation import seconds, serving

STEP = {1: 0.01, 4: 0.016}
STAGES: dict[str, Any] = {"ingress": 0.002, "text": 0.004, "admit": 0.001, "step": STEP, "decode": {1: 0.02, 8: 0.05}}


def test_constants_are_those_of_the_real_deployments() -> None:
    def default(function: Any, name: str) -> object:
        return inspect.signature(function).parameters[name].default

    assert simulated.CALLS == real_app.CALLS
    assert simulated.DECODER_BATCH == deployments.DECODE_BATCH == default(deployments.DecoderStage.__init__, "batch")
    assert default(deployments.DecoderStage.__init__, "file_threads") == DecoderArgs().file_threads
    assert default(MicroBatcher.__init__, "wait_s") == simulated.WAIT_S
    assert simulated.TEXT_BATCH == deployments.ENCODE_BATCH


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rate=st.floats(1, 400),
    images=st.integers(1, 4),
    steps=st.integers(1, 6),
    replicas=st.integers(1, 3),
    queue=st.integers(0, 20),
    variation=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 3),
)
def test_every_request_is_answered_or_refused_once(
    tmp_path: Path, rate: float, images: int, steps: int, replicas: int, queue: int, variation: float, seed: int
) -> None:
    cfg = serving(
        tmp_path,
        {"rate": rate, "seconds": 1.0, "warm_up_s": 0.2},
        app={"queue": queue},
        kind={"images": images, "steps": (1, steps)},
        variation=variation,
        file=0.003,
        hop_s=0.001,
        **STAGES,
    )
    outcome = simulate_serving(cfg.model_copy(update={"replicas": {"g": replicas, "decoder": replicas}}), seed)
    assert outcome.arrived == outcome.answered + outcome.refused
    assert len(outcome.latencies) <= outcome.answered
    assert all(0 <= share <= 1 + 1e-9 for share in outcome.utilisation.values())
    assert all(waiting >= -1e-9 for waiting in outcome.waiting.values())


def test_a_stage_of_one_call_at_a_time_is_an_m_m_1_queue(tmp_path: Path) -> None:
    cfg = serving(tmp_path, {"rate": 7.0, "seconds": 2500, "warm_up_s": 100}, variation=1.0, text=0.1)
    outcome = simulate_serving(cfg)
    assert outcome.utilisation["text"] == pytest.approx(0.7, rel=0.03)
    # Time in the system 1 / (mu - lambda), waiting rho^2 / (1 - rho).
    assert outcome.latencies.mean() == pytest.approx(1 / 3, rel=0.12)
    assert outcome.waiting["text"] == pytest.approx(0.49 / 0.3, rel=0.2)


def test_requests_inside_are_arrivals_a_second_times_the_time_of_each(tmp_path: Path) -> None:
    load = {"rate": 40.0, "seconds": 40, "warm_up_s": 5}
    outcome = simulate_serving(serving(tmp_path, load, variation=0.5, kind={"steps": (3, 9)}, **STAGES))
    assert outcome.inside == pytest.approx(outcome.images_per_s * outcome.latencies.mean(), rel=0.04)


def test_an_engine_that_is_full_makes_slots_images_every_so_many_steps(tmp_path: Path) -> None:
    cfg = serving(tmp_path, {"in_flight": 12, "seconds": 20, "warm_up_s": 5}, kind={"steps": (5, 5)}, step=STEP)
    outcome = simulate_serving(cfg)
    assert outcome.images_per_s == pytest.approx(4 / (5 * STEP[4]), rel=0.01)
    assert outcome.utilisation["g"] == pytest.approx(1, abs=0.01) and outcome.bottleneck == "g"
    # Six rounds of twelve clients through four slots: each waits for two tables before its own.
    assert outcome.percentile(50) == pytest.approx(3 * 5 * STEP[4], rel=0.02)


def test_a_step_costs_what_its_bucket_costs(tmp_path: Path) -> None:
    alone = serving(tmp_path, {"in_flight": 1, "seconds": 10}, kind={"steps": (5, 5)}, step=STEP)
    # The decoder waits for others to come.
    assert simulate_serving(alone).percentile(50) == pytest.approx(5 * STEP[1] + simulated.WAIT_S)
    one_bucket = alone.model_copy(update={"buckets": (4,)})
    assert simulate_serving(one_bucket).percentile(50) == pytest.approx(5 * STEP[4] + simulated.WAIT_S)


def test_image_files_are_written_in_as_many_threads_as_are_set(tmp_path: Path) -> None:
    load = {"in_flight": 32, "seconds": 10, "warm_up_s": 5}
    cfg = serving(tmp_path, load, app={"slots": 16}, file=0.1)
    more = cfg.model_copy(update={"overrides": ("decoder.file_threads=6",)})
    assert simulate_serving(cfg).images_per_s == pytest.approx(2 / 0.1, rel=0.05)
    assert simulate_serving(more).images_per_s == pytest.approx(6 / 0.1, rel=0.05)


def test_batches_raise_what_a_decoder_can_do(tmp_path: Path) -> None:
    load = {"in_flight": 32, "seconds": 10, "warm_up_s": 5}
    flat, batched = (
        simulate_serving(serving(tmp_path, load, app={"slots": 16}, decode=decode))
        for decode in ({1: 0.05, 8: 0.4}, {1: 0.05, 8: 0.1})
    )
    assert flat.images_per_s == pytest.approx(1 / 0.05, rel=0.05)
    assert batched.images_per_s == pytest.approx(8 / 0.1, rel=0.1)


def test_files_are_written_while_the_next_batch_decodes(tmp_path: Path) -> None:
    outcome = simulate_serving(
        serving(
            tmp_path,
            {"in_flight": 32, "seconds": 10, "warm_up_s": 5},
            app={"slots": 16},
            decode={1: 0.05, 8: 0.4},
            file=0.09,
        )
    )
    # Two threads make 22 a second, one batch after another 20.
    assert outcome.images_per_s == pytest.approx(20, rel=0.05)


@pytest.mark.parametrize("deployment", ["ingress", "text", "decoder", "g"])
def test_more_replicas_never_give_less(tmp_path: Path, deployment: str) -> None:
    cfg = serving(
        tmp_path,
        {"in_flight": 24, "seconds": 6, "warm_up_s": 2},
        kind={"steps": (2, 8)},
        ingress=0.01,
        text=0.01,
        step=STEP,
        decode=0.01,
    )
    rates = [simulate_serving(cfg.model_copy(update={"replicas": {deployment: n}})).images_per_s for n in (1, 2, 4)]
    assert all(more >= 0.99 * fewer for fewer, more in pairwise(rates))


def test_images_beyond_the_room_are_refused(tmp_path: Path) -> None:
    load = {"rate": 100.0, "seconds": 20, "warm_up_s": 5}
    outcome = simulate_serving(serving(tmp_path, load, app={"queue": 2}, step={1: 0.1}, kind={"steps": (1, 1)}))
    # Four slots of 0.4 s a step: a step costs in proportion, so ten images a second are made.
    assert outcome.images_per_s == pytest.approx(10, rel=0.05)
    assert outcome.refused_share == pytest.approx(0.9, abs=0.02)
    assert outcome.latencies.max() <= (2 * 4 + 2) / 10 + 0.5


def test_shared_cores_bound_what_all_stages_do_together(tmp_path: Path) -> None:
    cfg = serving(
        tmp_path,
        {"in_flight": 24, "seconds": 6, "warm_up_s": 2},
        text=0.02,
        decode={1: 0.02, 8: 0.16},
        step={1: 0.005, 4: 0.02},
    )
    alone = simulate_serving(cfg).images_per_s
    two, slower = (
        simulate_serving(cfg.model_copy(update={"machine": Machine(cores=2, together=speed)})).images_per_s
        for speed in (1.0, 0.5)
    )
    work = 0.02 + 0.02 + 0.005
    assert alone == pytest.approx(1 / 0.02, rel=0.05)
    assert two == pytest.approx(2 / work, rel=0.08)
    assert slower == pytest.approx(1 / work, rel=0.08)


def test_the_same_seed_gives_the_same_and_another_does_not(tmp_path: Path) -> None:
    cfg = serving(tmp_path, {"rate": 30.0, "seconds": 10}, variation=0.5, **STAGES)
    first, again, other = (simulate_serving(cfg, seed).latencies.tolist() for seed in (0, 0, 1))
    assert first == again != other


def test_a_sized_endpoint_meets_its_limits_and_one_replica_fewer_does_not(tmp_path: Path) -> None:
    load = {"rate": 60.0, "seconds": 15, "warm_up_s": 5}
    cfg, slo = serving(tmp_path, load, kind={"steps": (5, 10)}, variation=0.2, **STAGES), Slo(p99_s=0.4)
    layout = size_serving(cfg, slo)
    assert slo.met(layout.outcome) and layout.outcome.refused_share <= slo.refused
    for name, count in layout.replicas.items():
        if count > 1:
            fewer = cfg.model_copy(update={"replicas": {**layout.replicas, name: count - 1}})
            assert not slo.met(simulate_serving(fewer)), name
    assert max(layout.replicas.values()) > 1


def test_limits_that_no_number_of_replicas_meets_are_told(tmp_path: Path) -> None:
    cfg = serving(tmp_path, {"rate": 5.0, "seconds": 10}, step={1: 0.2})
    with pytest.raises(UserError, match=r"p99 within 0\.1 s"):
        size_serving(cfg, Slo(p99_s=0.1))
    with pytest.raises(UserError, match="needs a rate"):
        size_serving(serving(tmp_path, {"in_flight": 2}), Slo(p99_s=1))


def test_a_mix_that_the_endpoint_cannot_serve_is_refused(tmp_path: Path) -> None:
    cases = {
        "serving.models: no 'h'": serving(tmp_path, {"rate": 1.0}, kind={"model": "h"}),
        "serving.times.decode: no '32x32'": serving(tmp_path, {"rate": 1.0}, kind={"size": "32x32"}),
        "200000 images per request": serving(tmp_path, {"rate": 1.0}, kind={"images": 200_000}),
        "serving.replicas.x": serving(tmp_path, {"rate": 1.0}).model_copy(update={"replicas": {"x": 1}}),
        "serving.buckets": serving(tmp_path, {"rate": 1.0}).model_copy(update={"buckets": (1, 2)}),
    }
    for message, cfg in cases.items():
        with pytest.raises(UserError, match=message):
            simulate_serving(cfg)


def test_a_time_follows_its_measurements_or_the_flop_model() -> None:
    measured = seconds({1: 1.0, 4: 2.5, 8: 3.5})
    assert [measured.of(n) for n in (1, 2, 4, 6, 8, 12)] == pytest.approx([1, 1.5, 2.5, 3, 3.5, 4.5])
    assert seconds(0.1).of(5) == pytest.approx(0.5)
    step = simulated.StageTime(work="diffusion_step", fixed_s=0.01, mfu=0.1, source="a test")
    assert step.of(2) - step.of(1) == pytest.approx(2 * (262.89e9 - 51.54e9) / 130.74e12, rel=1e-3)
    with pytest.raises(ValueError, match="either seconds or work"):
        simulated.StageTime(source="a test")
