"""Process of one part: ``python -m instella_ray.bench.chip.part NAME``, started by :mod:`.run`.

The first line of standard input is a JSON object with ``settings``, the ``rows`` of earlier parts and an empty ``folder``.
Its end means that the starting process has ended, so this one ends too. Each line of standard output is a JSON object with
a ``row``, or with the reason for which the part ``failed``.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import threading
import traceback
from pathlib import Path
from textwrap import shorten
from typing import cast

import torch

from ... import logs
from ...accelerator import pick_device
from ...memory import keep_freed_memory
from .rows import Bench, ChipRow
from .settings import GpuBenchConfig, Part

FUNCTIONS: dict[Part, tuple[str, str]] = {
    "diffusion": ("sampling", "measure_diffusion"),
    "ar": ("sampling", "measure_ar"),
    "bits": ("sampling", "measure_bits"),
    "restart": ("sampling", "measure_restart"),
    "mixed": ("stages", "measure_mixed"),
    "stages": ("stages", "measure_stages"),
    "training": ("generators", "measure_training"),
    "tokenizer": ("tokenizers", "measure_tokenizer"),
    "compiled_sampling": ("sampling", "measure_compiled_sampling"),
    "compiled_training": ("generators", "measure_compiled_training"),
    "precisions": ("sampling", "measure_precisions"),
    "sharding": ("generators", "measure_sharding"),
    "loop": ("generators", "measure_loop"),
}
"""Module and function of each part; only those of the part are imported."""


def main(name: Part) -> int:
    """Measure the part ``name`` and return the exit code."""
    # Libraries print: their lines go to standard error.
    lines = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    request = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    logs.set_up({"job": "bench_gpu", "part": name})
    keep_freed_memory()

    def emit(row: ChipRow) -> None:
        print(json.dumps({"row": row.as_dict()}), file=lines)

    try:
        cfg = GpuBenchConfig.model_validate(request["settings"])
        torch.set_num_threads(cfg.threads)
        device = pick_device(cfg.device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        module, function = FUNCTIONS[name]
        measure = getattr(importlib.import_module(f".{module}", __package__), function)
        measure(Bench(cfg, device, emit, request["rows"], Path(request["folder"])))
    except Exception as error:
        traceback.print_exc()
        print(json.dumps({"failed": _one_line(error)}), file=lines)
        return 1
    return 0


def _one_line(error: Exception) -> str:
    return shorten(f"{type(error).__name__}: {error}", 160)


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(cast(Part, sys.argv[1])))
