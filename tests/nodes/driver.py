"""What happens on a simulated cluster, one thing after the other, written down for the tests: ``driver.py FOLDER``."""

from __future__ import annotations

import json
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from instella_ray.bulk.plan import SampleConfig
from instella_ray.bulk.sample import run_sample
from instella_ray.bulk.sample_set import find_sample_sets
from instella_ray.data.curation.job import CurateConfig, run_curate
from instella_ray.data.encode import EncodeConfig, run_encode
from instella_ray.serving.app import ModelArgs, ServeArgs

from ..kit.clusters import POOL, Nodes, beside, simulated
from ..kit.endpoint import images, serving
from ..kit.processes import wait_until
from ..kit.shards import contents

CPU_POOL = f"{POOL}=cpu"


def curation(output: Path) -> CurateConfig:
    filters = {"duplicates": {"max_distance": 0}}
    given = {"input": str(output.parent / "shards"), "output": str(output), "filters": filters, "cpu_pool": CPU_POOL}
    return CurateConfig.model_validate({**given, "rows_per_shard": 10})


def encoding(output: Path) -> EncodeConfig:
    given = {"input": str(output.parent / "shards"), "output": str(output), "cpu_pool": CPU_POOL}
    given |= {"tokenizer": str(output.parent / "models" / "bit")}
    spread = {"rows_per_file": 10, "batch_size": 4, "actors": 1, "gpus_per_actor": 1.0}
    return EncodeConfig.model_validate({**given, **spread})


def sampling(output: Path) -> SampleConfig:
    given = {"model": str(output.parent / "models" / "diffusion"), "prompts": str(output.parent / "prompts.txt")}
    few = {"samples_per_file": 4, "text_length": 24, "sampling": {"num_inference_steps": 50}, "actors": 2}
    return SampleConfig.model_validate({**given, **few, "output": str(output)})


def stages_land_where_they_should(nodes: Nodes, folder: Path) -> dict[str, Any]:
    with nodes.watched() as curated:
        run_curate(curation(folder / "curated"))
    with nodes.watched() as encoded:
        run_encode(encoding(folder / "codes"))
    return {"curate": _listed(curated), "encode": _listed(encoded)}


def a_cpu_node_is_lost_in_curation(nodes: Nodes, folder: Path) -> dict[str, Any]:
    output, hit = folder / "curated-again", list[int]()

    def lose() -> None:
        hit.extend(nodes.until_at_work("cpu-b", b"Prefilter", output / "parts"))
        nodes.lose("cpu-b")

    beside(lambda: run_curate(curation(output)), lose)
    return {"hit": len(hit), "same": contents(output) == contents(folder / "curated")}


def the_gpu_node_is_lost_in_encoding_and_another_joins(nodes: Nodes, folder: Path) -> dict[str, Any]:
    output, hit, went_on = folder / "codes-again", list[int](), list[bool]()

    def exchange() -> None:
        hit.extend(nodes.until_at_work("gpu-a", b"Encoder", output / "parts"))
        nodes.lose("gpu-a")
        nodes.join("gpu-b", gpus=1)
        went_on.append(wait_until(lambda: bool(nodes.running("gpu-b", b"Encoder")), 120))

    beside(lambda: run_encode(encoding(output)), exchange)
    return {"hit": len(hit), "went on": went_on, "same": contents(output) == contents(folder / "codes")}


def a_node_is_lost_in_bulk_sampling(nodes: Nodes, folder: Path) -> dict[str, Any]:
    run_sample(sampling(folder / "samples"))
    output, hit = folder / "samples-again", list[int]()
    nodes.join("cpu-c")

    def lose() -> None:
        hit.extend(nodes.until_at_work("cpu-a", b"Worker", output))
        nodes.lose("cpu-a")

    beside(lambda: run_sample(sampling(output)), lose)
    files = list(output.glob("samples-*.parquet"))
    return {"hit": len(hit), "files": len(files), "same": _bits(output) == _bits(folder / "samples")}


def a_node_is_lost_in_serving(nodes: Nodes, folder: Path) -> dict[str, Any]:
    nodes.join("cpu-d")
    model = ModelArgs(path=str(folder / "models" / "diffusion"), replicas=2, num_cpus=1)
    args = ServeArgs(
        tokenizer=str(folder / "models" / "bit"), models={"one": model}, sizes=(32,), num_cpus=0.1, text_length=24
    )
    answers: list[np.ndarray] = []
    errors: list[str] = []
    end = threading.Event()

    def ask(client: httpx.Client) -> None:
        while not end.is_set():
            try:
                answers.extend(images(client, seed=7, num_inference_steps=50))
            except Exception as error:
                errors.append(repr(error))

    with serving(args) as address, httpx.Client(base_url=address, timeout=120) as client:
        threads = [threading.Thread(target=ask, args=(client,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        assert wait_until(lambda: len(answers) >= 8, 120), errors
        of = {name: nodes.running(name, b"Generator-one") for name in nodes.nodes}
        # The ingress has one replica: who loses that has an endpoint that is away until there is another.
        free = [name for name, pids in of.items() if pids and not nodes.running(name, b":Ingress")]
        nodes.lose(free[0])
        lost_at = len(answers)

        def replaced() -> bool:
            return sum(len(nodes.running(name, b"Generator-one")) for name in nodes.nodes) == 2

        back = wait_until(lambda: replaced() and len(answers) >= lost_at + 16, 120)
        end.set()
        for thread in threads:
            thread.join()
    equal = all(np.array_equal(answer, answers[0]) for answer in answers)
    return {"nodes": sum(bool(pids) for pids in of.values()), "back": back, "equal": equal, "errors": errors}


def _listed(seen: dict[str, set[str]]) -> dict[str, list[str]]:
    return {name: sorted(titles) for name, titles in seen.items()}


def _bits(folder: Path) -> dict[str, tuple[int, bytes]]:
    blocks = [block for samples in find_sample_sets(str(folder)).values() for block in samples.blocks()]
    return {name: (block.seeds[i], block.codes[i].tobytes()) for block in blocks for i, name in enumerate(block.ids)}


SCENARIOS: tuple[Callable[[Nodes, Path], dict[str, Any]], ...] = (
    stages_land_where_they_should,
    a_cpu_node_is_lost_in_curation,
    the_gpu_node_is_lost_in_encoding_and_another_joins,
    a_node_is_lost_in_bulk_sampling,
    a_node_is_lost_in_serving,
)
"""In this order: each begins with the nodes that the one before it has left."""


def main(folder: Path) -> None:
    with simulated() as nodes:
        for name, gpus in (("cpu-a", 0), ("cpu-b", 0), ("gpu-a", 1)):
            nodes.join(name, gpus=gpus)
        for scenario in SCENARIOS:
            try:
                found = scenario(nodes, folder)
            except Exception:
                found = {"error": traceback.format_exc()}
            print(scenario.__name__, found, flush=True)
            (folder / f"{scenario.__name__}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
