"""A node taken away with notice: a checkpoint at once, and the run goes on with as many workers as there is room for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from instella_ray.models.folders import latest_checkpoint
from instella_ray.training.run_dir import read_metrics

from ..kit.chaos import effective_history, notes_of
from ..kit.project import ROOT

DRIVER = """
import json, sys, threading, time
from pathlib import Path
from ray._raylet import GcsClient
from ray.core.generated import autoscaler_pb2
from tests.kit.chaos import fragile_run, notes_of
from tests.kit.clusters import simulated
from tests.kit.processes import wait_until

given = json.loads(sys.argv[1])
run, notes = Path(given["run_dir"]), Path(given["notes"])

def take_away(cluster, nodes):
    begun = lambda: {note["rank"]: note for note in notes_of(notes) if note["step"] > 2}
    assert wait_until(lambda: len(begun()) == 2, 120)
    lost, process = begun()[1]["node"], begun()[1]["pid"]
    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    accepted, why = GcsClient(address=cluster.address).drain_node(lost, reason, "", int((time.time() + 90) * 1000))
    assert accepted, why
    assert wait_until(lambda: any((run / "checkpoints").glob("*/state.json")), 60)
    (notes / "drained").touch()
    assert wait_until(lambda: not Path(f"/proc/{process}").exists(), 60)
    cluster.remove_node(nodes[lost])

with simulated() as simulation:
    cluster = simulation.cluster
    nodes = {node.node_id: node for node in (cluster.add_node(num_cpus=1), cluster.add_node(num_cpus=1))}
    thread = threading.Thread(target=take_away, args=(cluster, nodes))
    thread.start()
    fragile_run(**given)
    thread.join()
"""
"""Two nodes of one worker each; that of rank 1 is drained, and gone once its worker is, after a checkpoint."""
STEPS = 400


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.ray
def test_a_node_taken_away_costs_no_step_and_the_run_goes_on_with_one_worker(shards: str, tmp_path: Path) -> None:
    workers = {"count": 2, "min_count": 1, "cpus": 1, "max_failures": 0}
    # There is no checkpoint before the last step but for the notice.
    train = {"steps": STEPS, "checkpoint_every": STEPS, "preview_every": STEPS, "workers": workers}
    run, notes = tmp_path / "run", tmp_path / "notes"
    given = {"shards": shards, "run_dir": str(run), "notes": str(notes), "train": train, "slow_on_first": True}
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {
        "PYTHONPATH": str(ROOT),
        "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",
    }
    # A cluster of its own, of which a node goes.
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(given)],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert Path(latest_checkpoint(run)).name == f"step-{STEPS:07d}"
    assert [row["step"] for row in read_metrics(run)] == list(range(1, STEPS + 1))
    # Rank 0's steps on either side of the notice: each was done once.
    steps = [note["step"] for note in notes_of(notes) if note["rank"] == 0]
    assert steps == list(range(STEPS))
    shares = [len(note["keys"]) for note in notes_of(notes) if note["rank"] == 0]
    assert shares[0] == 8 and shares[-1] == 16
    assert all(len(keys) == 16 for keys in effective_history(notes).values())
