"""Runner of the benchmark of one GPU: each part in a process of its own, within its time.

A fault of the GPU or a lack of memory ends one part only, and so does a part that hangs.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

from ...accelerator import pick_device
from ...errors import UserError
from .results import CUT, FAILED, WHOLE, GpuBenchResults
from .settings import GpuBenchConfig, Part

ENDING_S = 10.0
"""Seconds to wait for a killed process: one that hangs in the GPU's driver may never end."""


def run_gpu_bench(cfg: GpuBenchConfig) -> bool:
    """Measure the parts that ``cfg.output`` lacks, print the table, and return whether all parts are whole.

    Raises UserError for an unavailable device, for full size without a GPU unless ``cfg.device`` is cpu, and for a file
    with other measurements.
    """
    device = pick_device(cfg.device)
    if device.type == "cpu" and cfg.device == "auto" and not cfg.tiny:
        raise UserError(
            "device auto: PyTorch sees no GPU on this machine; expected --tiny, or device=cpu for full size"
        )
    results = GpuBenchResults(cfg, device)
    missing = [part for part in cfg.parts if not results.is_whole(part)]
    began = time.monotonic()
    for number, part in enumerate(missing, start=1):
        limit = min(cfg.part_limit_s, cfg.limit_s - (time.monotonic() - began))
        if limit <= 0:
            print(f"{', '.join(missing[number - 1 :])}: not measured, the {cfg.limit_s:g} s are over", flush=True)
            break
        print(f"{part} (part {number} of {len(missing)}): at most {limit:.0f} s", flush=True)
        _measure(part, cfg, results, limit)
        found = results.parts[part]
        why = f", {found['reason']}" if "reason" in found else ""
        rest = max(0.0, cfg.limit_s - (time.monotonic() - began))
        left = f"{len(missing) - number} parts left, {rest:.0f} s"
        print(f"  {found['state']} after {found['seconds']:.0f} s: {len(found['rows'])} rows{why} ({left})", flush=True)
    print(f"\n{results.text(cfg)}", flush=True)
    return all(results.is_whole(part) for part in cfg.parts)


def _measure(part: Part, cfg: GpuBenchConfig, results: GpuBenchResults, limit: float) -> None:
    """Run one part's process for at most ``limit`` seconds; its standard error is appended to a file beside the results."""
    began = time.monotonic()
    rows = {name: found["rows"] for name, found in results.parts.items()}
    results.begin(part)
    failures: list[str] = []

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            said = json.loads(line)
            if "row" in said:
                results.add(part, said["row"])
            else:
                failures.append(said["failed"])

    state, reason = CUT, "interrupted"
    # A process that is ended leaves its files, a checkpoint of many GB among them: the folder is this process's.
    with tempfile.TemporaryDirectory() as folder, Path(cfg.output).with_suffix(".log").open("a") as log:
        request = {"settings": cfg.model_dump(mode="json"), "rows": rows, "folder": folder}
        process = subprocess.Popen(
            [sys.executable, "-m", "instella_ray.bench.chip.part", part],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,  # its processes can be ended together
        )
        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        try:
            assert process.stdin is not None
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()  # kept open: its end is the end of this process
            code = process.wait(limit)
            state, reason = (FAILED, "") if code else (WHOLE, "")
        except subprocess.TimeoutExpired:
            state, reason = CUT, f"cut after {limit:.0f} s"
        except BrokenPipeError:
            code, state, reason = process.wait(), FAILED, ""
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):
                process.wait(ENDING_S)
            reader.join(ENDING_S)
            if state == FAILED:
                reason = failures[0] if failures else f"ended with code {process.returncode}, see {log.name}"
            results.end(part, state, time.monotonic() - began, reason)
