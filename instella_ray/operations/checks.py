"""Machine checks: pure functions from :class:`.facts.MachineFacts` to findings with advice."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from ..config import Config
from .facts import MachineFacts

Level = Literal["ok", "warning", "problem"]
DRIVERS = {11: 450, 12: 525, 13: 580}
"""Oldest supported NVIDIA driver by CUDA major version."""
GIB = 1 << 30
OBJECT_STORE = 0.3
"""Ray's default share of the memory for the object store."""
FULL = 0.95
"""Used share of the memory above which Ray kills workers, and of a disk above which it spills no objects."""
FEW_FILES, TOO_FEW_FILES = 16_384, 4096


class Finding(Config):
    """Result of one check, a line of the doctor's report."""

    name: str
    level: Level
    found: str
    advice: str = ""


def check_machine(facts: MachineFacts) -> list[Finding]:
    """Run all checks of a machine; findings are in the order of the report."""
    checks = (python, packages, extras, accelerators, visible_devices, shared_memory, memory, disk, open_files, auth)
    return [finding for check in checks for finding in check(facts)]


def python(facts: MachineFacts) -> Iterator[Finding]:
    """Check that the package supports the Python version."""
    if facts.python not in SpecifierSet(facts.requires_python):
        yield Finding(name="python", level="problem", found=facts.python, advice=f"use one {facts.requires_python}")
        return
    yield Finding(name="python", level="ok", found=facts.python)


def packages(facts: MachineFacts) -> Iterator[Finding]:
    """Check that all required packages are installed in supported versions."""
    needed = [each for text in facts.requirements if not (each := Requirement(text)).marker]
    if not needed:
        advice = "install the package (pip install -e .), so that its requirements are known"
        yield Finding(name="packages", level="warning", found="instella-ray is not installed", advice=advice)
        return
    for each in needed:
        version = facts.versions.get(each.name)
        if version is None or not each.specifier.contains(version, prereleases=True):
            found = f"{each.name} {version or 'is not installed'}"
            yield Finding(name="packages", level="problem", found=found, advice=f"pip install '{each}'")
    shown = ", ".join(f"{name} {facts.versions.get(name, 'missing')}" for name in ("ray", "torch", "transformers"))
    yield Finding(name="versions", level="ok", found=f"{shown} (PyTorch for {facts.torch_build})")


def extras(facts: MachineFacts) -> Iterator[Finding]:
    """Check which extras are installed; warn about partially installed ones."""
    parts: dict[str, list[Requirement]] = defaultdict(list)
    for text in facts.requirements:
        each = Requirement(text)
        if each.marker is not None:
            name = str(each.marker).rpartition("extra == ")[2].strip("'\"")
            parts[name].append(each)
    whole, absent = [], []
    for name, wanted in sorted(parts.items()):
        missing = [each.name for each in wanted if each.name not in facts.versions]
        if not missing:
            whole.append(name)
        elif len(missing) == len(wanted):
            absent.append(name)
        elif name != "dev":
            advice = f"pip install 'instella-ray[{name}]', if you use it"
            yield Finding(name="extras", level="warning", found=f"{name} without {', '.join(missing)}", advice=advice)
    found = f"{', '.join(whole) or 'none'}{f'; not installed: {chr(44).join(absent)}' if absent else ''}"
    yield Finding(name="extras", level="ok", found=found)


def accelerators(facts: MachineFacts) -> Iterator[Finding]:
    """Check that PyTorch is built for the machine's GPUs, sees them, and that the driver is new enough."""
    kind, _, version = facts.torch_build.partition(" ")
    hardware = {"cuda": facts.nvidia, "rocm": facts.amd}
    there = ", ".join(f"{n} {'NVIDIA' if k == 'cuda' else 'AMD'} GPU(s)" for k, n in hardware.items() if n)

    def problem(found: str, advice: str) -> Finding:
        return Finding(name="accelerators", level="problem", found=found, advice=advice)

    if there and not hardware.get(kind):
        builds = " or ".join("CUDA" if k == "cuda" else "ROCm" for k, n in hardware.items() if n)
        yield problem(f"{there}, PyTorch built for {facts.torch_build}", f"install PyTorch's build for {builds}")
    elif there and not facts.devices:
        why = f": {facts.device_error}" if facts.device_error else ""
        advice = "check *_VISIBLE_DEVICES, the container's devices (--gpus, /dev/kfd and /dev/dri) and the driver"
        yield problem(f"{there}, PyTorch sees none{why}", advice)
    elif facts.devices:
        shown = ", ".join(f"{name} {memory / GIB:.0f} GiB" for name, memory in facts.devices)
        yield Finding(name="accelerators", level="ok", found=shown)
    else:
        yield Finding(name="accelerators", level="ok", found="no GPU; everything runs on the CPU")
    oldest = DRIVERS.get(int(version.split(".")[0])) if kind == "cuda" else None
    if oldest and facts.nvidia_driver and Version(facts.nvidia_driver).major < oldest:
        found = f"driver {facts.nvidia_driver}, PyTorch built for {facts.torch_build}"
        yield problem(found, f"install driver {oldest} or newer, or a PyTorch for an older CUDA")


def visible_devices(facts: MachineFacts) -> Iterator[Finding]:
    """Check that no environment variable prevents Ray from assigning GPUs to workers."""
    hip, cuda, rocr = (facts.environment.get(f"{name}_VISIBLE_DEVICES") for name in ("HIP", "CUDA", "ROCR"))
    if rocr is not None and hip is None:
        advice = "unset it, or set HIP_VISIBLE_DEVICES: Ray does not start with ROCR_VISIBLE_DEVICES alone"
        yield Finding(
            name="visible devices", level="problem", found=f"ROCR_VISIBLE_DEVICES={rocr} alone", advice=advice
        )
    if facts.amd and hip is not None and cuda is not None and hip != cuda:
        found = f"HIP_VISIBLE_DEVICES={hip} and CUDA_VISIBLE_DEVICES={cuda}"
        yield Finding(
            name="visible devices", level="warning", found=found, advice="unset CUDA_VISIBLE_DEVICES: HIP ignores it"
        )
    for name, value in sorted(facts.environment.items()):
        if name.startswith("RAY_EXPERIMENTAL_NOSET_") and value not in ("", "0"):
            advice = "unset it (some ROCm images set it): replicas and actors would all use the first GPU"
            yield Finding(name="visible devices", level="warning", found=f"{name}={value}", advice=advice)


def shared_memory(facts: MachineFacts) -> Iterator[Finding]:
    """Check that Ray's object store fits into /dev/shm; otherwise Ray places it on a disk."""
    wanted = int(OBJECT_STORE * facts.memory)
    found = f"/dev/shm {_gib(facts.shm)}, Ray's object store takes up to {_gib(wanted)}"
    if facts.shm < wanted:
        advice = "give the container more (--shm-size, or an emptyDir with medium: Memory): Ray would use the disk"
        yield Finding(name="shared memory", level="warning", found=found, advice=advice)
        return
    yield Finding(name="shared memory", level="ok", found=found)


def memory(facts: MachineFacts) -> Iterator[Finding]:
    """Check the free memory: Ray kills workers when it is nearly exhausted."""
    found = f"{_gib(facts.memory_free)} of {_gib(facts.memory)} free"
    if facts.memory_free < (1 - FULL) * facts.memory:
        advice = "stop other processes: Ray kills workers at 95 % of memory"
        yield Finding(name="memory", level="problem", found=found, advice=advice)
    elif facts.memory_free < 2 * GIB:
        advice = "stop other processes: each worker of a small run needs about 1 GiB"
        yield Finding(name="memory", level="warning", found=found, advice=advice)
    else:
        yield Finding(name="memory", level="ok", found=found)


def disk(facts: MachineFacts) -> Iterator[Finding]:
    """Check the free disk space for Ray's logs, spilled objects and temporary checkpoints."""
    found = f"{facts.temp_dir}: {_gib(facts.disk_free)} of {_gib(facts.disk)} free"
    if facts.disk_free < (1 - FULL) * facts.disk:
        advice = "free disk space, or set RAY_TMPDIR: above 95 % Ray spills no objects"
        yield Finding(name="disk", level="problem", found=found, advice=advice)
    elif facts.disk_free < 10 * GIB:
        advice = "set RAY_TMPDIR to a larger disk: checkpoints and spilled objects are stored there temporarily"
        yield Finding(name="disk", level="warning", found=found, advice=advice)
    else:
        yield Finding(name="disk", level="ok", found=found)


def open_files(facts: MachineFacts) -> Iterator[Finding]:
    """Check the limit of open files: each Ray process has many connections."""
    few = facts.open_files < FEW_FILES
    level: Level = "problem" if facts.open_files < TOO_FEW_FILES else "warning" if few else "ok"
    advice = "ulimit -n 65536 (in a container: --ulimit nofile=65536)" if few else ""
    yield Finding(name="open files", level=level, found=f"at most {facts.open_files}", advice=advice)


def auth(facts: MachineFacts) -> Iterator[Finding]:
    """Check authentication: without a token, anyone who can reach Ray's ports can run code."""
    mode = facts.environment.get("RAY_AUTH_MODE", "")
    if mode == "disabled":
        advice = "set RAY_AUTH_MODE=token if other machines can reach Ray's ports: they could run code"
        yield Finding(name="authentication", level="warning", found="RAY_AUTH_MODE=disabled", advice=advice)
    elif mode == "token" and not facts.token:
        advice = "ray get-auth-token --generate, or RAY_AUTH_TOKEN_PATH=FILE with the cluster's"
        yield Finding(name="authentication", level="problem", found="token mode without a token", advice=advice)
    else:
        yield Finding(name="authentication", level="ok", found=mode or "Ray's default")


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
