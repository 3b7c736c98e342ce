"""Freed memory is kept by every process that computes, unless its environment says otherwise."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from instella_ray import errors
from instella_ray.data import ray_data
from instella_ray.data.stages import Pool, Stage
from instella_ray.serving import deployments
from instella_ray.training import loop
from instella_ray.training.distributed import SingleProcess
from instella_ray.training.settings import TrainConfig

from .kit.models import TEXT, make_generator, make_tokenizer
from .kit.stages import EMPTY, OPTIONS

FAULTS = """
import resource, sys
from instella_ray.memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
sizes = 5 * [30 << 20]
for turn in range(20):
    if turn == 5:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [bytearray(size) for size in sizes]
    del held
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
KEPT, RETURNED = 500, 5000
"""Page faults of 15 turns of 150 MiB: 576,000 if all memory is returned to the system each time."""


def faults(mode: str, **environment: str) -> int:
    free = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", FAULTS, mode]
    done = subprocess.run(command, env={**free, **environment}, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.process
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc alone")
def test_freed_memory_is_reused_without_page_faults() -> None:
    assert faults("keep") < KEPT
    assert faults("default") > RETURNED


@pytest.mark.process
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc alone")
@pytest.mark.parametrize(
    "environment",
    [{"MALLOC_MMAP_THRESHOLD_": "65536"}, {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=65536"}],
)
def test_settings_of_the_environment_are_kept(environment: dict[str, str]) -> None:
    assert faults("keep", **environment) > RETURNED


def _text(folders: dict[str, str]) -> Any:
    return deployments.TextEncoderStage(deployments.TextEncoderConfig(**TEXT))


def _generator(folders: dict[str, str]) -> Any:
    return deployments.GeneratorStage(folders["generator"], EMPTY, OPTIONS, device="cpu")


def _decoder(folders: dict[str, str]) -> Any:
    return deployments.DecoderStage(folders["bit"], device="cpu")


def _actor(_: dict[str, str]) -> Any:
    return ray_data.StageActor(Stage(lambda: lambda table: table, Pool()))


def _command(_: dict[str, str]) -> Any:
    return errors.run_main(lambda: 0)


def _worker(_: dict[str, str]) -> Any:
    def no_task(device: torch.device) -> Any:
        raise errors.UserError("as far as this")

    with pytest.raises(errors.UserError, match="as far"):
        loop.train_worker(no_task, TrainConfig(run_dir="none"), None, SingleProcess(torch.device("cpu")))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("memory")
    return {"generator": make_generator(root / "generator", make_tokenizer(root / "bit")), "bit": str(root / "bit")}


@pytest.mark.parametrize(
    ("module", "begin"),
    [
        (deployments, _text),
        (deployments, _generator),
        (deployments, _decoder),
        (ray_data, _actor),
        (errors, _command),
        (loop, _worker),
    ],
)
def test_processes_that_compute_keep_freed_memory(
    folders: dict[str, str], monkeypatch: pytest.MonkeyPatch, module: Any, begin: Callable[[dict[str, str]], Any]
) -> None:
    calls, threads = list[int](), torch.get_num_threads()
    monkeypatch.setattr(module, "keep_freed_memory", lambda: calls.append(1))
    try:
        begin(folders)
    finally:
        torch.set_num_threads(threads)
    assert calls == [1]
