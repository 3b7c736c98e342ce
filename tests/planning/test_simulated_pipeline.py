"""Simulated data jobs and training runs: the slowest stage sets the pace and is named, and a run's time adds up."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from instella_ray import cli
from instella_ray.config import load_config
from instella_ray.errors import UserError
from instella_ray.planning.simulation.pipeline import CPUS, ENCODERS, STORAGE, LineStage, simulate_line
from instella_ray.planning.simulation.run import SimulateConfig, run_simulation
from instella_ray.planning.simulation.serving import Machine
from instella_ray.planning.simulation.sizing import size_cpus
from instella_ray.planning.simulation.training import (
    CHECKPOINTS,
    COMPUTE,
    DATA,
    FAILURES,
    NETWORK,
    STRAGGLERS,
    ClusterConditions,
    Run,
    simulate_training,
)

from ..kit.project import ROOT, SIMULATIONS

FAR = 1e18
QUIET = ClusterConditions(
    straggling=0.0,
    hop_s=0.0,
    storage_bytes_per_s=FAR,
    disk_bytes_per_s=FAR,
    upload_bytes_per_s=FAR,
    node_mtbf_days=1e9,
    restart_s=0.0,
    source="a test",
)
RUN = Run(
    gpus=16, steps=2000, step_s=1.0, sends_after=1.0, sent_bytes=0.0, batch_bytes=0.0, batch_s=0.0,
    checkpoint_bytes=1e9, checkpoint_every=100,
)  # fmt: skip


def cluster(**changes: float) -> ClusterConditions:
    return QUIET.model_copy(update=changes)


@pytest.mark.parametrize(
    ("workers", "block_s", "slowest"),
    [((1, 4, 2), (0.5, 1.0, 1.0), 0), ((1, 4, 2), (0.1, 4.0, 1.0), 1), ((1, 4, 2), (0.1, 1.0, 4.0), 2)],
)
def test_the_slowest_stage_sets_the_pace_and_is_named(
    workers: tuple[int, ...], block_s: tuple[float, ...], slowest: int
) -> None:
    stages = [
        LineStage(name, count, seconds)
        for name, count, seconds in zip((STORAGE, CPUS, ENCODERS), workers, block_s, strict=True)
    ]
    outcome = simulate_line(stages, blocks=2000)
    assert outcome.blocks_per_s == pytest.approx(min(stage.capacity for stage in stages), rel=0.01)
    assert outcome.bottleneck == stages[slowest].name
    for stage in stages:
        assert outcome.utilisation[stage.name] == pytest.approx(outcome.blocks_per_s / stage.capacity, rel=0.03)


def test_uneven_blocks_cost_throughput_that_buffers_give_back() -> None:
    stages = [LineStage("a", 1, 1.0), LineStage("b", 1, 1.0)]
    even, uneven, buffered = (
        simulate_line(stages, blocks=4000, variation=cv, buffer=buffer).blocks_per_s
        for cv, buffer in ((0.0, 1), (1.0, 1), (1.0, 50))
    )
    assert even == pytest.approx(1, rel=0.01) and uneven < 0.9 * even
    assert uneven < buffered <= 1.02 * even


def test_workers_that_share_cores_share_their_speed() -> None:
    stages = [LineStage("a", 2, 1.0), LineStage("b", 2, 1.0)]
    outcome = simulate_line(stages, blocks=400, machine=Machine(cores=2, together=0.75))
    assert outcome.blocks_per_s == pytest.approx(2 * 0.75 / 2, rel=0.02)


def test_cpus_are_the_fewest_that_keep_the_gpus_busy() -> None:
    jobs = _mi300x().data
    assert jobs is not None
    few = size_cpus(jobs, 4)
    assert few is not None
    busy = [
        simulate_line(jobs.encoding(4, count), variation=jobs.variation).utilisation[ENCODERS]
        for count in (few, few - 1)
    ]
    assert busy[0] >= 0.95 > busy[1]
    slow = jobs.model_copy(update={"storage": jobs.storage.model_copy(update={"bytes_per_s": 1e6})})
    assert size_cpus(slow, 4) is None


def test_a_run_without_trouble_computes_all_the_time() -> None:
    outcome = simulate_training(RUN, QUIET)
    assert outcome.seconds == pytest.approx(2000) and outcome.busy == pytest.approx(1)
    assert outcome.bottleneck == COMPUTE and outcome.failures == 0


@pytest.mark.parametrize(
    ("run", "changes", "name", "step_s"),
    [
        ({"batch_s": 1.5}, {}, DATA, 1.5),
        ({"batch_bytes": 3e9}, {"storage_bytes_per_s": 1e9}, DATA, 3.0),
        # Two thirds of a step hide what is sent.
        ({"sent_bytes": 1e9}, {"network_bytes_per_s": 1e9}, NETWORK, 1 + 1 / 3),
        ({"sent_bytes": 1e9, "sends_after": 0.25}, {"network_bytes_per_s": 1e9}, NETWORK, 1 + 5 / 6),
        ({}, {"hop_s": 0.1}, NETWORK, 1 + 3 - 2 / 3),
        ({}, {"disk_bytes_per_s": 1e9 / 50}, CHECKPOINTS, 1.5),
        # The next checkpoint waits until the last one is uploaded: 250 s for every 100 steps.
        ({}, {"upload_bytes_per_s": 1e9 / 250}, CHECKPOINTS, 2.5),
    ],
)
def test_what_a_step_waits_for_is_counted_and_named(
    run: dict[str, Any], changes: dict[str, float], name: str, step_s: float
) -> None:
    outcome = simulate_training(replace(RUN, **run), cluster(**changes))
    assert outcome.seconds / RUN.steps == pytest.approx(step_s, rel=0.06)
    assert outcome.bottleneck == name and sum(outcome.shares.values()) == pytest.approx(1)


def test_the_slowest_of_many_is_slower_than_the_slowest_of_few() -> None:
    few, many = (simulate_training(replace(RUN, gpus=n), cluster(straggling=0.1)) for n in (8, 512))
    assert many.seconds > few.seconds and many.bottleneck == STRAGGLERS
    # The largest of 512 standard normal numbers is 3.04 in the mean.
    assert many.seconds / RUN.steps == pytest.approx(2.718281828**0.304, rel=0.01)


def test_failures_cost_what_was_not_saved_and_the_restart() -> None:
    days = 1000 / 86400  # two nodes: one failure in 500 s
    outcome = simulate_training(replace(RUN, steps=20_000), cluster(node_mtbf_days=days, restart_s=60))
    assert outcome.failures == pytest.approx(outcome.seconds / 500, rel=0.3)
    assert outcome.shares[COMPUTE] * outcome.seconds == pytest.approx(20_000, rel=0.001)
    # Half an interval of a hundred steps, and the restart, in the mean.
    assert outcome.shares[FAILURES] * outcome.seconds / outcome.failures == pytest.approx(110, rel=0.25)
    late = simulate_training(
        replace(RUN, steps=20_000), cluster(node_mtbf_days=days, restart_s=60, upload_bytes_per_s=1e9 / 90)
    )
    assert late.shares[FAILURES] > outcome.shares[FAILURES]
    assert late.shares[COMPUTE] * late.seconds == pytest.approx(20_000, rel=0.001)


@pytest.mark.parametrize("path", SIMULATIONS, ids=lambda path: path.stem)
def test_every_simulation_of_the_house_loads(path: Any) -> None:
    assert load_config(SimulateConfig, str(path))


def test_the_command_prints_tables_and_what_was_assumed(
    tmp_path: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    words = ["simulate", "configs/simulation/mi300x.yaml", "--set", "serving=null", "--set", "training=null"]
    words += ["--set", "data.curate_cpus=8"]
    assert cli.main([*words, "--set", "gpus=2", "--output", str(tmp_path / "out.md")]) == 0
    text = capsys.readouterr().out
    assert text == (tmp_path / "out.md").read_text()
    assert "CPU workers keep them busy" in text and "data.decode: " in text and "| curation" in text
    assert cli.main([*words, "--set", "gpus=2", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["data"]["encoding"]["bottleneck"] in (CPUS, ENCODERS) and figures["gpus"] == 2


def test_without_simpy_the_command_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "simpy", None)
    assert cli.main(["simulate", str(ROOT / "configs" / "simulation" / "mi300x.yaml")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: instella-ray simulate: ") and error.count("\n") == 1
    assert error.endswith("; pip install 'instella-ray[simulate]'\n")


@pytest.mark.process
def test_without_simpy_the_other_commands_work() -> None:
    """A package that is not installed is one that a fresh interpreter does not find."""
    code = "import sys; sys.modules['simpy'] = None; from instella_ray.cli import main; sys.exit(main(sys.argv[1:]))"
    script = subprocess.run(
        [sys.executable, "-c", code, "completion", "bash"], cwd=ROOT, capture_output=True, text=True
    )
    assert script.returncode == 0 and "_shtab_instella_ray_simulate" in script.stdout, script.stderr
    bench = [sys.executable, "-c", code, "bench", "--set", "suites=[caching, simulation]"]
    done = subprocess.run(bench, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: suite simulation: ") and done.stderr.count("\n") == 1


def test_a_configuration_with_nothing_to_simulate_is_refused() -> None:
    with pytest.raises(UserError, match="at least one of serving, data, training"):
        run_simulation(SimulateConfig())


def _mi300x() -> SimulateConfig:
    return load_config(SimulateConfig, str(ROOT / "configs" / "simulation" / "mi300x.yaml"))
