"""A head of Ray's own making with token authentication, in processes of its own, and submissions to it."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import requests
from ray.job_submission import JobSubmissionClient

from .processes import wait_until
from .project import ROOT

RAY = [sys.executable, "-c", "import sys; from ray.scripts.scripts import main; sys.argv[0] = 'ray'; sys.exit(main())"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def of_session(process: subprocess.Popen[Any]) -> list[psutil.Process]:
    """What lives of a process that was started in a session of its own, and of all that it has started."""
    found = {}
    for each in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, ProcessLookupError):
            if os.getsid(each.pid) == process.pid:
                found |= {below.pid: below for below in (each, *each.children(recursive=True))}
    return list(found.values())


def end(process: subprocess.Popen[Any]) -> None:
    """End a process of a session of its own and all that it has started, and nothing else."""
    with_children = of_session(process)
    for each in with_children:
        with suppress(psutil.NoSuchProcess):
            each.terminate()
    # Processes of Ray wait for one another before they end; nobody needs what they would still write down.
    _, alive = psutil.wait_procs(with_children, timeout=3)
    for left in alive:
        with suppress(psutil.NoSuchProcess):
            left.kill()
    psutil.wait_procs(alive, timeout=20)
    process.wait()


class Submitted:
    """One ``jobs/submit.py`` that runs, or has run."""

    def __init__(self, pid: int, path: Path) -> None:
        self.pid, self.path, self._code = pid, path, Path(f"{path}.code")

    @property
    def output(self) -> str:
        return self.path.read_text() if self.path.exists() else ""

    @property
    def job(self) -> str:
        """The id that it was submitted under, known once it has been."""
        return next((line.split(":")[0] for line in self.output.splitlines() if ": submitted to " in line), "")

    @property
    def ended(self) -> bool:
        return self._code.exists()

    def wait(self, seconds: float = 600) -> int:
        assert wait_until(lambda: self.ended, seconds), self.output
        return int(self._code.read_text())

    def interrupt(self) -> None:
        os.kill(self.pid, signal.SIGINT)


class Head:
    """A cluster of one node with four logical CPUs, and a process that submits to it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.token = folder, secrets.token_hex(32)
        self.port, self.gcs_port, self.count = free_port(), free_port(), 0
        self.address = f"http://127.0.0.1:{self.port}"
        self.env = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("RAY_A", "PYTHONPATH", "INSTELLA_RAY"))
        }
        self.env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}
        # Jobs say python, and mean the one with the packages.
        self.env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        self.client: JobSubmissionClient
        self.submitter: subprocess.Popen[Any] | None = None

    def start_node(self, *arguments: str, cpus: int) -> subprocess.Popen[Any]:
        command = [*RAY, "start", "--block", f"--num-cpus={cpus}", "--object-store-memory=150000000"]
        command += [
            "--min-worker-port=0",
            "--max-worker-port=0",
            "--dashboard-agent-listen-port=0",
            "--include-log-monitor=false",
            *arguments,
        ]
        with (self.folder / f"node-{cpus}.log").open("w") as log:
            return subprocess.Popen(
                command, env=self.env, stdout=log, stderr=log, cwd=self.folder, start_new_session=True
            )

    def start_head(self) -> subprocess.Popen[Any]:
        places = [f"--temp-dir={self.folder}/t", f"--port={self.gcs_port}", f"--ray-client-server-port={free_port()}"]
        dashboard = ["--dashboard-host=127.0.0.1", f"--dashboard-port={self.port}"]
        return self.start_node("--head", *places, *dashboard, cpus=4)

    def join(self, cpus: int) -> subprocess.Popen[Any]:
        """Another node, which on a machine of its own would have a folder of its own too."""
        return self.start_node(f"--address={self.gcs_address}", f"--temp-dir={self.folder}/n", cpus=cpus)

    @property
    def gcs_address(self) -> str:
        return f"{(self.folder / 't' / 'ray_current_cluster').read_text().strip()}"

    def has_a_node(self) -> bool:
        time.sleep(0.5)  # a head that starts has better things to do than to answer
        headers = {"authorization": f"Bearer {self.token}"}
        try:
            answer = requests.get(f"{self.address}/api/v0/nodes", headers=headers, timeout=10)
            return answer.status_code == 200 and answer.json()["data"]["result"]["total"] > 0
        except requests.RequestException:
            return False

    def submit(self, *argv: str, address: str | None = None, **env: str) -> Submitted:
        """``jobs/submit.py --address HEAD ARGV``."""
        self.count += 1
        output = self.folder / f"submit-{self.count}"
        given = {"argv": ["--address", address or self.address, *argv], "env": env, "output": str(output)}
        assert self.submitter and self.submitter.stdin and self.submitter.stdout
        self.submitter.stdin.write(json.dumps(given) + "\n")
        self.submitter.stdin.flush()
        return Submitted(int(self.submitter.stdout.readline()), output)

    def run(self, *argv: str, **more: str) -> tuple[int, str]:
        """Exit code and output of :meth:`submit`."""
        order = self.submit(*argv, **more)
        return order.wait(), order.output

    @contextmanager
    def started(self) -> Iterator[Head]:
        command = [sys.executable, "-m", "tests.kit.submitter"]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        env = self.env | {"PYTHONPATH": str(ROOT)}
        heads = [self.start_head()]

        def up() -> bool:
            # On a busy machine a node may give up before it has begun.
            if heads[-1].poll() is not None:
                end(heads[-1])
                heads.append(self.start_head())
            return self.has_a_node()

        try:
            assert wait_until(up, 300), (self.folder / "node-4.log").read_text()
            self.submitter = subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=True, **pipes)
            self.client = JobSubmissionClient(self.address, headers={"Authorization": f"Bearer {self.token}"})
            yield self
        finally:
            if self.submitter:
                end(self.submitter)
            end(heads[-1])


@contextmanager
def token_head() -> Iterator[Head]:
    """Under a short path: Ray's sockets lie there."""
    folder = Path(tempfile.mkdtemp(prefix="ir-"))
    try:
        with Head(folder).started() as head:
            yield head
    finally:
        shutil.rmtree(folder, ignore_errors=True)
