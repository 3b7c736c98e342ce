"""Runs whose output the tests read, in processes of their own with a Ray of their own: ``python -m tests.kit.output``."""

from __future__ import annotations

import json
import logging
import socket
import sys
import time
from functools import partial
from pathlib import Path

import httpx
import pyarrow as pa
import ray
from ray import serve

from instella_ray import logs
from instella_ray.data.formats.shards import write_webdataset
from instella_ray.data.pipeline import run_rows
from instella_ray.data.ray_data import start_local_ray
from instella_ray.data.scenes import scene_rows
from instella_ray.data.stages import Pool, Stage
from instella_ray.errors import run_main
from instella_ray.serving.shutdown import shut_down_serve

from .project import job

LINES = 20


def beside_a_bar(folder: Path) -> None:
    """A progress bar, while a worker prints lines; until the file ``seen`` is there."""
    start_local_ray(num_cpus=1)

    @ray.remote
    def talk() -> None:
        for number in range(LINES):
            print(f"line {number} of a worker")
            time.sleep(0.1)

    with logs.progress_bar(total=1000, desc="train", unit="step", mininterval=0.02) as bar:
        talking = talk.remote()
        while not (folder / "seen").exists():
            bar.update()
            time.sleep(0.03)
        ray.get(talking)
        print("a line", "in pieces")
        logging.getLogger("instella_ray.tests").warning("a record")


class Speaker:
    """A stage's work that says what it does, and fails on a row that says so."""

    def __init__(self) -> None:
        logs.set_up_worker({})

    def __call__(self, table: pa.Table) -> pa.Table:
        (row,) = table.to_pylist()
        logging.getLogger("instella_ray.tests").warning("row %s", row["name"])
        if row["name"] == "bad":
            raise ZeroDivisionError("of a worker")
        return table


class Echo:
    """An endpoint."""

    async def __call__(self, request: object) -> str:
        return "echo"


def one_of_each(folder: Path) -> None:
    """A training run, a data job on a pool of actors and an endpoint, as in the demo; then a data job that fails."""
    start_local_ray(num_cpus=4)
    list(write_webdataset(scene_rows(64, 0, 32), str(folder), 32))
    settings = {"data": f"{folder}/*.tar", "stages": {}, "train.run_dir": str(folder / "run"), "train.steps": 4}
    settings |= {"train.workers.count": 1, "train.checkpoint_every": 2, "train.preview_every": 4}
    sets = [word for key, value in settings.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    assert job("train_tokenizer")(["--config", "configs/tokenizer/tiny.yaml", *sets]) == 0
    stage = Stage(Speaker, Pool(actors=2))
    assert len(list(run_rows([{"name": "good"}], stage, local=False))) == 1
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    try:
        serve.run(serve.deployment(Echo, ray_actor_options={"num_cpus": 0.1}).bind(), name="echo")
        assert httpx.get(f"http://127.0.0.1:{port}").text == "echo"
    finally:
        shut_down_serve()
    list(run_rows([{"name": "bad"}], stage, local=False))


if __name__ == "__main__":
    run = {"beside_a_bar": beside_a_bar, "one_of_each": one_of_each}[sys.argv[1]]
    sys.exit(run_main(partial(run, Path(sys.argv[2]))))
