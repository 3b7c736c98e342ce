"""Several nodes on one machine, each with a raylet of its own: which of them does what, and one that is lost."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

from .processes import descendants, wait_until

POOL = "instella-ray/pool"
QUICK = {"health_check_initial_delay_ms": 500, "health_check_period_ms": 500, "health_check_failure_threshold": 3}


class Nodes:
    """Worker nodes by name, below a head that takes no work."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster, self.nodes = cluster, dict[str, Any]()

    def join(self, name: str, *, gpus: int = 0) -> None:
        """A node of two logical CPUs and as many pretended GPUs, in the pool that its name begins with."""
        labels = {POOL: name.split("-")[0]}
        self.nodes[name] = self.cluster.add_node(num_cpus=2, num_gpus=gpus, labels=labels)

    def lose(self, name: str) -> None:
        """SIGKILL for every process of the node."""
        self.cluster.remove_node(self.nodes.pop(name), allow_graceful=False)

    def raylet(self, name: str) -> int:
        return int(self.nodes[name].all_processes["raylet"][0].process.pid)

    def running(self, name: str, title: bytes) -> list[int]:
        """Processes of a node whose title has ``title`` in it: Ray names workers by what they run."""
        return descendants(title, self.raylet(name))

    @contextmanager
    def watched(self) -> Iterator[dict[str, set[str]]]:
        """What ran on each node within the block, by the titles of its workers; complete behind it."""
        seen: dict[str, set[str]] = {name: set() for name in self.nodes}
        end = threading.Event()

        def look() -> None:
            while not end.is_set():
                for name, titles in seen.items():
                    titles |= {_title(pid) for pid in self.running(name, b"ray::")}
                time.sleep(0.02)

        thread = threading.Thread(target=look)
        thread.start()
        try:
            yield seen
        finally:
            end.set()
            thread.join()

    def until_at_work(self, name: str, title: bytes, parts: Path) -> list[int]:
        """Waits until two files lie in ``parts`` and the node runs ``title``; returns its processes that do."""
        assert wait_until(lambda: len(list(parts.glob("*"))) >= 2 and bool(self.running(name, title)), 120)
        return self.running(name, title)


def beside(work: Callable[[], object], harm: Callable[[], None]) -> None:
    """``work`` in a thread while ``harm`` is done in this one, in which alone nodes can be started; returns after both."""
    with ThreadPoolExecutor(1) as thread:
        future = thread.submit(work)
        try:
            harm()
        finally:
            future.result()


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0 ").decode()
    except OSError:
        return ""


@contextmanager
def simulated() -> Iterator[Nodes]:
    """A cluster of a head alone that this process is connected to."""
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, "_system_config": QUICK}
    )
    ray._common.utils.reset_ray_address()  # or whoever else starts a Ray on this machine would land in this one
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        yield Nodes(cluster)
    finally:
        ray.shutdown()
        cluster.shutdown()
