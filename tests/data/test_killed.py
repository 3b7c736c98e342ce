"""Kill -9 of the driver, of a worker and of an actor in the middle: the same output set, no row lost and none twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml

from instella_ray.data.curation.job import CurateConfig, run_curate
from instella_ray.data.encode import EncodeConfig, run_encode
from instella_ray.data.formats.shards import write_tar
from instella_ray.data.pipeline import run_rows
from instella_ray.data.stages import Pool, Stage

from ..kit.models import write_tokenizer
from ..kit.processes import descendants, wait_until
from ..kit.shards import contents, image_bytes

pytestmark = [pytest.mark.ray, pytest.mark.slow]
JOBS = Path(__file__).parents[2] / "jobs"
SHARDS, ROWS = 16, 40


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Images of which every shard has five from the shard before it, and one that is broken."""
    folder = tmp_path_factory.mktemp("in")
    for number in range(SHARDS):
        seeds = range(number * (ROWS - 6), number * (ROWS - 6) + ROWS - 1)
        samples = [(f"{n}-{seed}", image_bytes(seed, (400, 300)), f"image {seed}", {}) for n, seed in enumerate(seeds)]
        write_tar(str(folder / f"{number:03d}.tar"), [*samples, ("broken", b"junk", "broken", {})])
    return str(folder)


def curation(shards: str, output: Path, mode: str = "new") -> CurateConfig:
    filters = {"duplicates": {"max_distance": 0}}
    given = {"input": shards, "output": str(output), "filters": filters, "rows_per_shard": 10, "mode": mode}
    return CurateConfig.model_validate(given)


def start(job: str, cfg: CurateConfig | EncodeConfig, folder: Path) -> subprocess.Popen[str]:
    """The job as a driver of its own, which is to be killed, on the Ray that runs already."""
    import ray

    file = folder / f"{job}.yaml"
    file.write_text(yaml.safe_dump(cfg.model_dump(mode="json")))
    env = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address, "PYTHONPATH": str(JOBS.parent)}
    command = [sys.executable, str(JOBS / f"{job}.py"), "--config", str(file)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def kill(driver: subprocess.Popen[str]) -> None:
    driver.send_signal(signal.SIGKILL)
    driver.communicate(timeout=30)


def parts(output: Path) -> int:
    return len(list((output / "parts").glob("*.json")))


def kill_one(title: bytes, output: Path, killed: list[int]) -> threading.Thread:
    """A thread that kills a process of that title once the first parts are there."""

    def run() -> None:
        if wait_until(lambda: parts(output) >= 2 and descendants(title) != [], 120):
            killed.extend(descendants(title)[:1])
            for pid in killed:
                os.kill(pid, signal.SIGKILL)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


@pytest.fixture(scope="module")
def curated(shards: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a curation that nothing has disturbed."""
    output = tmp_path_factory.mktemp("curated") / "whole"
    whole = run_curate(curation(shards, output).model_copy(update={"local": True}))
    total = SHARDS * ROWS
    assert whole.to_json() == {
        "in": total,
        "kept": total - SHARDS - 5 * (SHARDS - 1),
        "dropped": {"exact_duplicate": 5 * (SHARDS - 1)},
        "quarantined": {"undecodable": SHARDS},
    }
    return contents(output)


def test_a_curation_killed_in_either_pass_makes_the_same_set(
    ray_session: None, shards: str, curated: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "driver"
    first = start("curate", curation(shards, out), tmp_path)
    assert wait_until(lambda: parts(out) >= 3, 120), first.communicate(timeout=10)
    kill(first)
    assert 3 <= parts(out) < SHARDS * 4 and not (out / "ledger.json").exists()
    second = start("curate", curation(shards, out, "resume"), tmp_path)
    # In the second pass: what is decided stands, and some parts have been written anew.
    assert wait_until(lambda: len(list(out.glob("*.????????.tar"))) >= 2, 120), second.communicate(timeout=10)
    kill(second)
    assert not (out / "ledger.json").exists()
    run_curate(curation(shards, out, "resume"))
    assert contents(out) == curated


@pytest.mark.nightly
def test_a_killed_worker_of_a_curation_is_replaced(
    ray_session: None, shards: str, curated: dict[str, bytes], tmp_path: Path
) -> None:
    killed: list[int] = []
    watcher = kill_one(b"MapBatches(Prefilter)", tmp_path / "worker", killed)
    run_curate(curation(shards, tmp_path / "worker"))
    watcher.join()
    assert killed and contents(tmp_path / "worker") == curated


def encoding(shards: str, tmp_path: Path, output: str, **more: Any) -> EncodeConfig:
    if not (tmp_path / "bit").exists():
        write_tokenizer(tmp_path / "bit")
    given = {"input": shards, "output": str(tmp_path / output), "tokenizer": str(tmp_path / "bit"), **more}
    return EncodeConfig.model_validate({**given, "rows_per_file": 10, "batch_size": 4, "actors": 1})


def test_a_killed_encoder_is_replaced_and_makes_the_same_codes(ray_session: None, shards: str, tmp_path: Path) -> None:
    whole = run_encode(encoding(shards, tmp_path, "whole", local=True))
    assert whole.rows == SHARDS * (ROWS - 1)
    killed: list[int] = []
    watcher = kill_one(b"MapWorker", tmp_path / "actor", killed)
    assert run_encode(encoding(shards, tmp_path, "actor")) == whole
    watcher.join()
    assert killed and killed[0] not in descendants(b"MapWorker")
    assert contents(tmp_path / "actor") == contents(tmp_path / "whole")


@pytest.mark.nightly
def test_a_killed_encoding_goes_on_to_the_same_codes(ray_session: None, shards: str, tmp_path: Path) -> None:
    whole = run_encode(encoding(shards, tmp_path, "whole", local=True))
    driver = start("encode", encoding(shards, tmp_path, "driver"), tmp_path)
    assert wait_until(lambda: parts(tmp_path / "driver") >= 3, 120), driver.communicate(timeout=10)
    kill(driver)
    assert not (tmp_path / "driver" / "manifest.json").exists()
    assert run_encode(encoding(shards, tmp_path, "driver", mode="resume")) == whole
    assert contents(tmp_path / "driver") == contents(tmp_path / "whole")


class Mortal:
    """Work whose first process ends in its first call."""

    def __init__(self, died: Path, ballast: bytes) -> None:
        self.died, self.ballast = died, ballast

    def __call__(self, table: pa.Table) -> pa.Table:
        if not self.died.exists():
            self.died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return pa.table({"bytes": [len(self.ballast)]})


@pytest.mark.parametrize("size", [0, 1 << 20], ids=["by_value", "by_reference"])
def test_a_killed_actor_is_replaced_whatever_the_size_of_its_stage(
    ray_session: None, size: int, tmp_path: Path
) -> None:
    stage = Stage(partial(Mortal, tmp_path / "died", bytes(size)), Pool(actors=1))
    assert list(run_rows([{"row": 0}], stage, local=False)) == [{"bytes": size}]
    assert (tmp_path / "died").exists()
