"""Transport suite: what Ray Serve and the API cost around the engine, by load, against one process of the same models."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from pydantic import Field

from ..config import Config
from ..data.scenes import scene_prompts
from ..errors import UserError
from ..rendering import Cell, Goal
from ..serving.access import free_port
from .load import Load, closed_loop
from .report import SuiteResult
from .serving import GRAPH, ServingBench, endpoints, graph_args, save_models
from .usage import command_of, cpu_seconds, private_mb, processes, with_descendants

LOCAL, PLAIN = "serve --local", "plain FastAPI"
FRONT = (":Ingress", "ray::ProxyActor")
"""Parts of the titles of the processes between client and stages."""
FRONT_MS = 8.0
START_S = 120.0


class TransportBench(Config):
    """Models with random weights and the loads."""

    models: ServingBench = ServingBench(text_length=48)
    in_flight: dict[int, tuple[int, ...]] = Field({20: (1, 4, 16, 32, 64, 128), 1: (16, 64)}, min_length=1)
    """Loads by the number of steps of each request."""
    seconds: float = Field(4.0, gt=0)
    """Window (s) of each contestant, load and round."""
    rounds: int = Field(2, ge=1)


@dataclass(frozen=True)
class Contestant:
    """One contestant, ready for requests."""

    url: str
    pid: int | None
    """Its process; None for Ray and all that it started."""
    started_s: float

    def pids(self) -> list[int]:
        """Return the pids of its processes."""
        return with_descendants(self.pid) if self.pid else processes(with_ray=True)[1:]


@dataclass(frozen=True)
class Window:
    """One contestant under one load."""

    load: Load
    cpu_s: float
    """CPU seconds of the server's processes."""
    front_s: float
    """CPU seconds of the ingress and the proxies alone."""


def run_transport(cfg: TransportBench) -> SuiteResult:
    """Measure all contestants at every load; they take turns."""
    windows: dict[tuple[int, int, str], list[Window]] = {}
    with tempfile.TemporaryDirectory() as folder, servers(cfg, Path(folder)) as found:
        start = {name: server.started_s for name, server in found.items()}
        for server in found.values():
            closed_loop(server.url, requests(cfg, next(iter(cfg.in_flight))), 4, cfg.seconds)
        for _ in range(cfg.rounds):
            for steps, in_flight in [(steps, n) for steps, loads in cfg.in_flight.items() for n in loads]:
                for name, server in found.items():
                    window = measure(server, requests(cfg, steps), in_flight, cfg.seconds)
                    windows.setdefault((steps, in_flight, name), []).append(window)
        memory = {name: sum(map(private_mb, server.pids())) for name, server in found.items()}
    joined = {key: _joined(parts) for key, parts in windows.items()}
    rows = [_row(*key, window) for key, window in joined.items()]
    rows += [{"contestant": name, "start s": start[name], "memory MB": memory[name]} for name in found]
    return SuiteResult("Transport around the engine", cfg.model_dump(mode="json"), rows, _goals(joined))


def requests(cfg: TransportBench, steps: int) -> list[dict[str, Any]]:
    """Return bodies that differ in prompt and seed alone."""
    side, prompts = cfg.models.sizes[0], [expected.caption for expected in scene_prompts(64, 0)]
    fixed = {"size": f"{side}x{side}", "num_inference_steps": steps, "guidance_scale": 2.0, "temperature": 0.5}
    return [{"prompt": prompts[i % 64], "seed": i, "sampler": "simplified", **fixed} for i in range(512)]


def measure(server: Contestant, bodies: list[dict[str, Any]], in_flight: int, seconds: float) -> Window:
    """Run a closed loop and count the CPU time of the server's processes over all of it."""
    before = cpu_seconds(server.pids())
    load = closed_loop(server.url, bodies, in_flight, seconds)
    used = {pid: after - before.get(pid, 0.0) for pid, after in cpu_seconds(server.pids()).items()}
    front = sum(seconds for pid, seconds in used.items() if any(name in command_of(pid) for name in FRONT))
    return Window(load, sum(used.values()), front)


def _joined(parts: list[Window]) -> Window:
    load = Load.joined([part.load for part in parts])
    return Window(load, sum(part.cpu_s for part in parts), sum(part.front_s for part in parts))


def _row(steps: int, in_flight: int, name: str, window: Window) -> dict[str, Cell]:
    load = window.load
    return {
        "contestant": name,
        "steps": steps,
        "in flight": in_flight,
        "images/s": load.rate,
        "p50 ms": load.percentile(50) * 1000,
        "p99 ms": load.percentile(99) * 1000,
        "CPU ms an image": window.cpu_s * 1000 / max(load.total, 1),
        "of these ingress and proxy": window.front_s * 1000 / max(load.total, 1) if name == GRAPH else "",
    }


def _goals(windows: Mapping[tuple[int, int, str], Window]) -> list[Goal]:
    goals = []
    for (steps, in_flight, name), window in windows.items():
        if name == PLAIN or in_flight < 16:
            continue
        share = window.load.rate / max(windows[steps, in_flight, PLAIN].load.rate, 1e-9)
        least = 0.6 if steps == 1 else 0.85
        goals.append(Goal(f"{name}, {steps} steps, {in_flight} in flight, rate against {PLAIN}", share, least, ">="))
    for (steps, in_flight, name), window in windows.items():
        if name == GRAPH and in_flight == 16:
            spent = window.front_s * 1000 / max(window.load.total, 1)
            goals.append(Goal(f"{name}, {steps} steps, CPU ms an image of ingress and proxy", spent, FRONT_MS, "<="))
        if name == GRAPH and in_flight > 16 and (steps, 16, name) in windows:
            share = windows[steps, in_flight, name].load.rate / max(windows[steps, 16, name].load.rate, 1e-9)
            goals.append(Goal(f"{name}, {steps} steps, {in_flight} in flight, rate against 16", share, 0.95, ">="))
    return goals


@contextmanager
def servers(cfg: TransportBench, folder: Path) -> Iterator[dict[str, Contestant]]:
    """Start all contestants and yield them by name; idle ones use almost no CPU."""
    # Room for the largest load.
    bench = cfg.models.model_copy(update={"queue": 2 * max(map(max, cfg.in_flight.values()))})
    args = graph_args(bench, save_models(bench, folder))
    plain, local = folder / "plain.json", folder / "local.json"
    plain.write_text(json.dumps(args))
    local.write_text(json.dumps({"app": args, "local": True}))
    with ExitStack() as stack:
        found = {}
        for name, command in {
            PLAIN: ["instella_ray.bench.plain", str(plain), "{port}"],
            LOCAL: ["instella_ray", "serve", "--config", str(local), "--set", "port={port}"],
        }.items():
            found[name] = stack.enter_context(_process(command))
        (on_ray := folder / "graph").mkdir()
        began = time.perf_counter()
        urls = stack.enter_context(endpoints(bench, on_ray, (GRAPH,)))
        yield {GRAPH: Contestant(urls[GRAPH], None, time.perf_counter() - began), **found}


@contextmanager
def _process(command: list[str]) -> Iterator[Contestant]:
    port = free_port()
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", *(part.format(port=port) for part in command)])
    try:
        url = f"http://127.0.0.1:{port}"
        while not _answers(url):
            if process.poll() is not None or time.perf_counter() - began > START_S:
                raise UserError(f"{command[0]}: did not start")
            time.sleep(0.05)
        yield Contestant(url, process.pid, time.perf_counter() - began)
    finally:
        process.terminate()
        process.wait()


def _answers(url: str) -> bool:
    try:
        httpx.get(url + "/openapi.json")
    except httpx.TransportError:
        return False
    return True
