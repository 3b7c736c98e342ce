"""``jobs/serve.py`` as its user runs it: a process of its own, until it is told to stop."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from instella_ray.bench.usage import command_of, with_descendants
from instella_ray.serving.config import ModelArgs, RequestLimits

from ..kit.endpoint import HEADERS, events, generate, make_folders, serve_args
from ..kit.head import free_port
from ..kit.project import ROOT
from ..kit.serve_process import rest_until_the_end, serve_process


def killed_ingress_loses_nothing(client: httpx.Client, pid: int, steps: dict[str, Any]) -> None:
    """Requests of a dead ingress replica are answered by the other one, with the same images."""
    alone = [generate(client, seed=seed, **steps) for seed in range(2)]
    with ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(generate, client, seed=seed % 2, **steps) for seed in range(4)]
        streams = [pool.submit(lambda: list(events(client, n=2, **steps))) for _ in range(2)]
        while not all(future.running() for future in (*asked, *streams)):
            time.sleep(0.01)
        time.sleep(0.3)  # on their way, if not at the ingress
        victim = next(each for each in with_descendants(pid) if ":Ingress" in command_of(each))
        os.kill(victim, signal.SIGKILL)
        answers = [future.result() for future in asked]
        streamed = [future.result() for future in streams]
    assert [response.status_code for response in answers] == [200] * 4
    for found in streamed:
        ends = {event["index"]: event["seed"] for event in found if event["type"].endswith("completed")}
        assert sorted(ends) == [0, 1] and ends[1] == ends[0] + 1 and "error" not in {event["type"] for event in found}
        reported = [(event["index"], event["step"]) for event in found if event["type"].endswith("progress")]
        assert len(reported) == len(set(reported))
    for number, response in enumerate(answers):
        assert response.json()["data"] == alone[number % 2].json()["data"]


@pytest.mark.parametrize(
    "local",
    [
        pytest.param(True, marks=pytest.mark.process, id="in-one-process"),
        pytest.param(False, marks=[pytest.mark.ray, pytest.mark.slow, pytest.mark.nightly], id="on-ray"),
    ],
)
def test_the_job_listens_where_it_says_and_ends_after_its_last_request(tmp_path: Path, local: bool) -> None:
    port, folders = free_port(), make_folders(tmp_path)
    models = {"diffusion": ModelArgs(path=folders["diffusion"])}
    limits = RequestLimits(steps=4000)
    args = serve_args(folders, api_keys_file=folders["keys"], models=models, limits=limits)
    config = tmp_path / "serve.yaml"
    config.write_text(yaml.safe_dump({"app": args.model_dump(mode="json"), "port": port, "local": local}))
    command = [sys.executable, str(ROOT / "jobs" / "serve.py"), "--config", str(config)]
    # A Ray and a Serve of its own, because the job starts them; and this package from wherever it is started.
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    env.pop("RAY_ADDRESS", None)
    with serve_process(command, env, tmp_path) as (process, said):
        assert said == f"listening on http://127.0.0.1:{port} (with API keys)\n"
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            assert generate(client).status_code == 401
            client.headers.update(HEADERS)
            assert generate(client, size="32x32").status_code == 200
            steps = {"num_inference_steps": limits.steps, "size": "32x32"}
            if not local:
                killed_ingress_loses_nothing(client, process.pid, steps)
            streams = [events(client, seed=seed, **steps) for seed in range(4)]
            assert [next(stream)["type"] for stream in streams] == ["image_generation.progress"] * 4
            # What a supervisor sends; the job answers as it does to Ctrl-C.
            process.send_signal(signal.SIGTERM)
            assert [list(stream)[-1]["type"] for stream in streams] == ["image_generation.completed"] * 4
        # Ray may have more to say while it stops.
        assert "stopping" in rest_until_the_end(process)
    with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port), timeout=5):
        raise AssertionError("something listens on")
