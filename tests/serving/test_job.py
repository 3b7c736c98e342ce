"""``jobs/serve.py`` as its user runs it: a process of its own, until it is told to stop."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest
import yaml

from instella_ray.serving.config import ModelArgs

from ..kit.endpoint import HEADERS, generate, make_folders, serve_args
from ..kit.project import ROOT


@pytest.mark.ray
@pytest.mark.slow
def test_the_job_listens_where_it_says_and_ends_cleanly(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folders = make_folders(tmp_path)
    args = serve_args(folders, api_keys_file=folders["keys"], models={"ar": ModelArgs(path=folders["ar"])})
    config = tmp_path / "serve.yaml"
    config.write_text(yaml.safe_dump({"app": args.model_dump(mode="json"), "port": port}))
    command = [sys.executable, str(ROOT / "jobs" / "serve.py"), "--config", str(config)]
    # A Ray and a Serve of its own, because the job starts them; and this package from wherever it is started.
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    env.pop("RAY_ADDRESS", None)
    job = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    # Should nothing ever be printed, the loop below ends with the process.
    watchdog = threading.Timer(300, job.kill)
    watchdog.start()
    try:
        assert job.stdout is not None
        said = next((line for line in job.stdout if line.startswith("listening on ")), "nothing")
        assert said == f"listening on http://127.0.0.1:{port} (with API keys)\n"
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            assert generate(client).status_code == 401
            client.headers.update(HEADERS)
            assert generate(client, size="32x32").status_code == 200
        # What a supervisor sends; the job answers as it does to Ctrl-C.
        job.send_signal(signal.SIGTERM)
        rest = job.stdout.read()
        # Ray may have more to say while it stops.
        assert job.wait() == 0 and "stopping" in rest.splitlines()
    finally:
        watchdog.cancel()
        job.kill()
        job.wait()
    with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port), timeout=5):
        raise AssertionError("something listens on")
