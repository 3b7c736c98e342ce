"""Training on real workers of Ray Train: a run is the same run in a worker, in two of them, and in the calling process."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import psutil
import pytest

from instella_ray import storage
from instella_ray.config import load_config
from instella_ray.errors import UserError
from instella_ray.models.checkpoint import load_model, read_checkpoint_config
from instella_ray.models.folders import finished_checkpoints, latest_checkpoint
from instella_ray.models.generator import ARGenerator, DiffusionGenerator
from instella_ray.runs import read_record
from instella_ray.training import generator as module
from instella_ray.training.generator import GeneratorRunConfig, complete_config
from instella_ray.training.ray_train import check_resources
from instella_ray.training.run_dir import read_metrics
from instella_ray.training.settings import WorkersConfig
from instella_ray.training.tokenizer import run_tokenizer

from ..kit.project import job
from ..kit.training import TWO, generator_config, stop_a_generator_run, tokenizer_config, untimed

pytestmark = pytest.mark.ray
WORKER, HERE = "worker", "here"


def train(name: str, recipe: str, folder: Path, count: int, **settings: Any) -> Path:
    """Run the job ``name`` in its smallest form for six steps; returns its run directory."""
    intervals = {"steps": 6, "log_every": 1, "checkpoint_every": 3, "preview_every": 3, "keep_checkpoints": 2}
    given = {**{f"train.{key}": value for key, value in intervals.items()}, "train.run_dir": str(folder)}
    given |= {"train.workers.count": count, "train.workers.cpus": 0.5, **settings}
    sets = [word for key, value in given.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    assert job(name)(["--config", f"configs/{recipe}/tiny.yaml", *sets]) == 0
    return folder


def assert_same(one: Path, other: Path) -> None:
    """The same files, losses, weights, optimizer state and images in two run directories, and nothing else but times."""

    def files(run: Path) -> list[str]:
        return sorted(str(f.relative_to(run)) for f in run.rglob("*") if f.is_file() and "tfevents" not in f.name)

    assert files(one) == files(other)
    assert untimed(read_metrics(one)) == untimed(read_metrics(other))
    assert [row["step"] for row in read_metrics(one)] == [1, 2, 3, 4, 5, 6]
    exact = [name for name in files(one) if name.endswith((".safetensors", ".png", "state.json", "validation.json"))]
    assert {"model.safetensors", "ema.safetensors", "optimizer.safetensors", "step-0000006.png"} <= {
        Path(name).name for name in exact
    }
    for name in exact:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    for run in (one, other):
        assert len(list(run.glob("tensorboard/*tfevents*"))) == 1
        record = read_record(str(run))
        assert record is not None and record.attempts[-1].status == "finished"
        about = read_checkpoint_config(latest_checkpoint(run))["lineage"]
        assert (about["step"], about["run"], about["job"]) == (6, record.run, record.job)


def said(file: Path, of: Path, fields: Sequence[str]) -> list[tuple[Any, ...]]:
    """The fields of the records about a run's checkpoints."""
    records = [json.loads(line) for line in file.read_text().splitlines()]
    return [tuple(r.get(name) for name in fields) for r in records if str(of / "checkpoints") in r["message"]]


def test_a_tokenizer_is_the_same_in_a_worker_and_in_its_jobs_own_process(
    ray_session: None, shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INSTELLA_RAY_LOG_FILE", str(tmp_path / "log.jsonl"))
    monkeypatch.setenv("INSTELLA_RAY_RUN_ID", "night-7")
    validation = {"data": shards, "count": 8, "every_steps": 3}
    settings = {"data": shards, "stages": {}, "validation": validation}
    worker, here = (
        train("train_tokenizer", "tokenizer", tmp_path / name, count, **settings)
        for name, count in ((WORKER, 1), (HERE, 0))
    )
    assert_same(worker, here)
    assert storage.read_json(str(worker / "validation" / "best.json"))["metrics"]["psnr"]["value"] > 0
    fields = ("level", "job", "run", "rank", "attempt", "step")
    expected = [("info", "train_tokenizer", "night-7", 0, 1, step) for step in (3, 6)]
    assert said(tmp_path / "log.jsonl", worker, fields) == said(tmp_path / "log.jsonl", here, fields) == expected
    # Begun on Ray, the run goes on in the job's own process.
    shutil.copytree(worker, tmp_path / "moved")
    shutil.rmtree(finished_checkpoints(tmp_path / "moved")[-1])
    shutil.rmtree(tmp_path / "moved" / "validation")
    moved = train("train_tokenizer", "tokenizer", tmp_path / "moved", 0, **settings, **{"train.resume": True})
    assert untimed(read_metrics(moved)) == untimed(read_metrics(worker))
    for file in ("model", "ema", "optimizer"):
        a, b = (Path(latest_checkpoint(run), f"{file}.safetensors").read_bytes() for run in (worker, moved))
        assert a == b, file


@pytest.mark.nightly
def test_a_generator_is_the_same_in_a_worker_and_in_its_jobs_own_process(
    ray_session: None, codes: str, tokenizer: str, tmp_path: Path
) -> None:
    prompts = ["image number 1", ""]
    settings = {"codes": codes, "tokenizer": tokenizer, "text_encoder.layers": 2, "preview.prompts": prompts}
    assert_same(
        *(
            train("train_generator", "generator", tmp_path / name, count, **settings)
            for name, count in ((WORKER, 1), (HERE, 0))
        )
    )


@pytest.mark.parametrize(
    ("kind", "sharding"), [("diffusion", "fsdp2"), pytest.param("ar", "zero2", marks=pytest.mark.nightly)]
)
def test_a_run_begun_in_one_process_goes_on_spread_over_two_workers(
    kind: Literal["diffusion", "ar"],
    sharding: str,
    ray_session: None,
    codes: str,
    tokenizer: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stop_a_generator_run(generator_config(kind, codes, tokenizer, tmp_path / "run"))

    spread = {"workers": TWO, "sharding": sharding, "resume": True}
    going_on = generator_config(kind, codes, tokenizer, tmp_path / "run", **spread)
    folder = module.run_generator(going_on)
    metrics = read_metrics(tmp_path / "run")
    assert [row["step"] for row in metrics] == [1, 2, 3, 4, 5, 6]
    assert all(0 < row["loss"] < 2 and 0 <= row["bit_accuracy"] <= 1 for row in metrics)
    model = load_model(folder)
    assert isinstance(model, {"diffusion": DiffusionGenerator, "ar": ARGenerator}[kind])
    previews = sorted(path.name for path in (tmp_path / "run" / "previews").iterdir())
    assert previews == ["step-0000003.png", "step-0000006.png"]
    # What the run directory says is the run: all settings, and sizes as they were filled in.
    assert load_config(GeneratorRunConfig, str(tmp_path / "run" / "config.yaml")) == complete_config(going_on)


def test_a_run_that_cannot_be_placed_says_so(ray_session: None, shards: str, tmp_path: Path) -> None:
    cfg = tokenizer_config(shards, tmp_path / "run", workers=WorkersConfig(count=2, cpus=50))
    with pytest.raises(UserError, match="2 workers need 100 CPU, the cluster has 4"):
        run_tokenizer(cfg)
    assert not (tmp_path / "run").exists()
    fewer = WorkersConfig(count=2, min_count=1, cpus=50, gpu=True)
    with pytest.raises(UserError, match="1 workers need 1 GPU, the cluster has 0"):
        check_resources(fewer, {"CPU": 64})


CONTROLLER_IMPORTS = """
import sys
import ray.train.torch
before = set(sys.modules)
import instella_ray.training.ray_train
print(sorted({name.partition(".")[0] for name in set(sys.modules) - before}), "torch.distributed.tensor" in sys.modules)
print(*sorted(name for name in sys.modules if name.startswith("instella_ray.training.")))
"""


def test_ray_trains_controller_imports_nothing_of_what_is_trained() -> None:
    run = subprocess.run([sys.executable, "-c", CONTROLLER_IMPORTS], capture_output=True, text=True, check=True)
    outside, ours = run.stdout.splitlines()
    assert not any(name in outside for name in ("scipy", "transformers", "sympy", "True")), outside
    assert not {"instella_ray.training.loop", "instella_ray.training.trainer"} & set(ours.split())


def test_a_local_run_has_no_process_beside_workers_controller_and_their_synchronization(
    ray_session: None, shards: str, tmp_path: Path
) -> None:
    def actors() -> set[str]:
        found: set[str] = set()
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                found.update(part.partition(".")[0] for part in process.cmdline()[:1] if part.startswith("ray::"))
        return found

    before = actors()  # of data jobs that other tests have run
    seen: set[str] = set()
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.1):
            seen.update(actors())

    thread = threading.Thread(target=watch)
    thread.start()
    run_tokenizer(tokenizer_config(shards, tmp_path / "run", steps=2, workers=WorkersConfig(count=1, cpus=0.5)))
    ended.set()
    thread.join()
    assert {"ray::RayTrainWorker", "ray::LocalController"} <= seen
    assert not [name for name in seen - before if "Autoscaling" in name or "DatasetManager" in name], seen
