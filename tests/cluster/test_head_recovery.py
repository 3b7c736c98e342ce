"""``components/head-recovery`` without Kubernetes: a killed head with its state in Redis comes back to its endpoint."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from instella_ray.serving.serve_settings import SETTINGS

from ..kit.endpoint import generate, make_folders
from ..kit.head import Head, end, free_port, of_session
from ..kit.kubernetes import program
from ..kit.processes import wait_until
from ..kit.project import ROOT

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.nightly]


@contextmanager
def redis(folder: Path, password: str) -> Iterator[int]:
    """The port of a Redis that writes as the component's does."""
    port, folder = free_port(), folder / "redis"
    folder.mkdir()
    command = [program("redis-server"), "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder)]
    command += ["--appendonly", "yes", "--appendfsync", "always", "--requirepass", password]
    # Where .ci/tools.sh has unpacked it, its libraries lie beside it.
    libraries = os.pathsep.join([str(ROOT / ".tools"), os.environ.get("LD_LIBRARY_PATH", "")])
    server = subprocess.Popen(command, env={**os.environ, "LD_LIBRARY_PATH": libraries}, stdout=subprocess.DEVNULL)
    try:
        yield port
    finally:
        server.terminate()
        server.wait()


class RecoverableHead(Head):
    """A head that takes no work, as the manifests' is, with its state in Redis, and a node with two CPUs."""

    def __init__(self, folder: Path, redis_port: int, password: str) -> None:
        super().__init__(folder)
        # What KubeRay gives pods with gcsFaultToleranceOptions.
        self.env |= {
            "RAY_REDIS_ADDRESS": f"127.0.0.1:{redis_port}",
            "REDIS_PASSWORD": password,
            "RAY_external_storage_namespace": "endpoint",
            "RAY_gcs_rpc_server_reconnect_timeout_s": "600",
        }
        self.env |= {**SETTINGS, "PYTHONPATH": str(ROOT)}
        self.client_port, self.password = free_port(), password

    def start_head(self) -> subprocess.Popen[Any]:
        places = [
            f"--temp-dir={self.folder}/t",
            f"--port={self.gcs_port}",
            f"--ray-client-server-port={self.client_port}",
        ]
        dashboard = ["--dashboard-host=127.0.0.1", f"--dashboard-port={self.port}"]
        return self.start_node("--head", f"--redis-password={self.password}", *places, *dashboard, cpus=0)

    def serve(self, method: str = "GET", **body: Any) -> dict[str, Any]:
        """What the head says of Serve, or is told; empty while it does not answer."""
        headers = {"authorization": f"Bearer {self.token}"}
        try:
            answer = httpx.request(
                method, f"{self.address}/api/serve/applications/", headers=headers, timeout=60, json=body or None
            )
            return answer.json() if answer.status_code == 200 and answer.content else {}
        except (httpx.HTTPError, ValueError):
            return {}

    def replicas(self) -> dict[str, int]:
        """Process ids by replica, of an endpoint that runs; empty before."""
        application = self.serve().get("applications", {}).get("endpoint", {})
        if application.get("status") != "RUNNING":
            return {}
        found = [r for deployment in application["deployments"].values() for r in deployment["replicas"]]
        return {replica["replica_id"]: replica["pid"] for replica in found if replica["state"] == "RUNNING"}


def test_a_head_that_is_killed_comes_back_to_the_replicas_of_its_endpoint() -> None:
    folder = Path(tempfile.mkdtemp(prefix="ir-"))  # a short path: Ray's sockets lie there
    folders, password, port = make_folders(folder), secrets.token_hex(16), free_port()
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        cluster = RecoverableHead(folder, stack.enter_context(redis(folder, password)), password)
        head = cluster.start_head()
        stack.callback(end, head)
        assert wait_until(cluster.has_a_node, 120), (folder / "node-0.log").read_text()
        assert wait_until((folder / "t" / "ray_current_cluster").exists, 60)  # written after the first answer
        node = cluster.join(cpus=2)
        stack.callback(end, node)
        cluster.serve(
            "PUT",
            proxy_location="EveryNode",
            http_options={"host": "127.0.0.1", "port": port},
            applications=[
                {
                    "name": "endpoint",
                    "route_prefix": "/",
                    "import_path": "instella_ray.serving.app:build",
                    "args": {
                        "tokenizer": folders["bit"],
                        "models": {"diffusion": {"path": folders["diffusion"]}},
                        "text_length": 24,
                        "sizes": [32],
                        "num_cpus": 0.1,
                    },
                }
            ],
        )
        assert wait_until(lambda: bool(cluster.replicas()), 180), cluster.serve()

        def answers() -> bool:
            """A connection of its own: those to the head's proxy go with it."""
            with suppress(httpx.HTTPError), httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10) as client:
                return generate(client, size="32x32", num_inference_steps=2).status_code == 200
            return False

        assert wait_until(answers, 60)
        # The ingress asks for no CPU and may be on the head; the stages with weights are not.
        on_node = {process.pid for process in of_session(node)}
        loaded = {replica: pid for replica, pid in cluster.replicas().items() if pid in on_node}
        assert len(loaded) >= 3
        killed = of_session(head)
        for process in killed:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        psutil.wait_procs(killed, timeout=20)
        head.wait()
        assert cluster.serve() == {}

        shutil.rmtree(folder / "t")  # a new pod finds nothing of the one before
        again = cluster.start_head()
        stack.callback(end, again)
        assert wait_until(lambda: bool(cluster.replicas()), 120), (folder / "node-0.log").read_text()
        assert wait_until(answers, 60)
        assert loaded.items() <= cluster.replicas().items()  # the same processes: no model was loaded again
        assert node.poll() is None
