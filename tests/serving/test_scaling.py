"""The autoscaling policy: rows per slot, as a pure function and as Serve carries it."""

from __future__ import annotations

import math
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instella_ray.serving.scaling import RowsPolicy, desired_replicas, generator_scaling, stage_scaling

ROWS = st.integers(0, 10_000)
SLOTS = st.integers(1, 64)
UTILISATION = st.sampled_from([0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 1.0])


@given(ROWS, SLOTS, UTILISATION)
def test_just_enough_replicas_are_asked_for(rows: int, slots: int, utilisation: float) -> None:
    replicas = desired_replicas(rows, slots, utilisation)
    assert replicas >= 1
    assert rows <= replicas * slots * utilisation + 1e-6
    assert replicas == 1 or rows > (replicas - 1) * slots * utilisation - 1e-6


@given(ROWS, SLOTS, UTILISATION, st.integers(0, 100))
def test_more_rows_never_need_fewer_replicas(rows: int, slots: int, utilisation: float, more: int) -> None:
    assert desired_replicas(rows + more, slots, utilisation) >= desired_replicas(rows, slots, utilisation)


def context(replicas: list[tuple[float, float]], *, slots: int = 8, queued: float | None = 0, target: int = 3) -> Any:
    """What Serve tells a policy; ``replicas`` are (waiting, active)."""
    metrics = {
        "waiting_rows": {i: waiting for i, (waiting, _) in enumerate(replicas)},
        "active_rows": {i: active for i, (_, active) in enumerate(replicas)},
        "slots": {i: float(slots) for i in range(len(replicas))},
    }
    return SimpleNamespace(aggregated_metrics=metrics, total_queued_requests=queued, target_num_replicas=target)


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 8)), min_size=1, max_size=9), st.integers(0, 99))
def test_all_rows_count_wherever_they_wait(replicas: list[tuple[int, int]], queued: int) -> None:
    rows = sum(map(sum, replicas)) + queued
    decision, state = RowsPolicy(0.5)(context(replicas, queued=queued))
    assert decision == max(1, math.ceil(rows / 4)) and state == {}


@pytest.mark.parametrize("metrics", [None, {}, {"slots": {}}, {"slots": {0: 0.0}}, {"running_requests": {0: 3.0}}])
def test_without_a_report_nothing_changes(metrics: Any) -> None:
    silent = SimpleNamespace(aggregated_metrics=metrics, total_queued_requests=None, target_num_replicas=3)
    assert RowsPolicy()(silent) == (3, {})


@pytest.mark.parametrize("utilisation", [0, -1, 1.01])
def test_a_utilisation_that_cannot_be_is_refused(utilisation: float) -> None:
    with pytest.raises(ValueError, match="expected more than 0"):
        RowsPolicy(utilisation)


def test_serve_takes_the_configurations() -> None:
    config = generator_scaling(1, 4, utilisation=0.7)
    assert config.policy.get_policy()(**config.policy.policy_kwargs).utilisation == 0.7
    assert (config.min_replicas, config.max_replicas) == (1, 4)
    assert stage_scaling(0, 2, ongoing=8).target_ongoing_requests == 8
    with pytest.raises(ValueError):
        generator_scaling(3, 2)


@pytest.mark.process
def test_the_controller_needs_no_model_code_to_run_the_policy() -> None:
    """Serve's controller unpickles the policy: in a process without our package, and without torch."""
    policy = generator_scaling(1, 2).policy.get_serialized_policy_def()
    code = (
        "import sys, cloudpickle\n"
        "sys.modules['instella_ray'] = None\n"
        f"policy = cloudpickle.loads({policy!r})(utilisation=0.5)\n"
        "from types import SimpleNamespace as S\n"
        "metrics = {'slots': {0: 4.0}, 'active_rows': {0: 4.0}, 'waiting_rows': {0: 1.0}}\n"
        "print(policy(S(aggregated_metrics=metrics, total_queued_requests=0, target_num_replicas=1)))\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "(3, {})", done.stderr
