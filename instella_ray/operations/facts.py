"""Facts of a machine, gathered in one place so that :mod:`.checks` are pure functions."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import psutil
import torch
from packaging.requirements import Requirement

DISTRIBUTION = "instella-ray"
WATCHED = ("RAY_", "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
"""Prefixes of the environment variables that are checked."""


@dataclass(frozen=True)
class MachineFacts:
    """Facts of one machine, as seen by this process; sizes in bytes."""

    host: str
    python: str
    requires_python: str
    requirements: tuple[str, ...]
    """Requirements in the package's metadata, including extras."""
    versions: Mapping[str, str]
    """Versions of installed required packages."""
    memory: int
    memory_free: int
    shm: int
    """Size of /dev/shm, which holds Ray's object store."""
    temp_dir: str
    disk: int
    """Size of the file system of ``temp_dir``."""
    disk_free: int
    open_files: int
    """Limit of open files of this process."""
    torch_build: str = "cpu"
    """Accelerator platform of PyTorch: ``cpu``, ``cuda 12.8``, ``rocm 7.0``."""
    nvidia: int = 0
    """Number of NVIDIA GPU device files."""
    nvidia_driver: str | None = None
    amd: int = 0
    """Number of GPUs known to AMD's driver."""
    devices: tuple[tuple[str, int], ...] = ()
    """Name and memory of each GPU that PyTorch sees."""
    device_error: str | None = None
    """PyTorch's error if it cannot initialize its GPUs."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Environment variables with the prefixes :data:`WATCHED`, without the token."""
    token: bool = False
    """Whether there is a token for Ray's cluster."""


def gather() -> MachineFacts:
    """Gather the facts of this machine."""
    requires, wants = _distribution()
    names = {Requirement(text).name for text in requires}
    temp_dir = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    disk, memory = shutil.disk_usage(temp_dir), psutil.virtual_memory()
    limit = _container_memory() or memory.total
    devices, error = _devices()
    return MachineFacts(
        host=platform.node(),
        python=platform.python_version(),
        requires_python=wants,
        requirements=requires,
        versions={name: version for name in names if (version := _version(name))},
        memory=min(memory.total, limit),
        memory_free=min(memory.available, limit),
        shm=shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else 0,
        temp_dir=temp_dir,
        disk=disk.total,
        disk_free=disk.free,
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        torch_build=_torch_build(),
        nvidia=len(list(Path("/dev").glob("nvidia[0-9]*"))),
        nvidia_driver=_nvidia_driver(Path("/proc/driver/nvidia/version")),
        amd=_amd_gpus(Path("/sys/class/kfd/kfd/topology/nodes")),
        devices=devices,
        device_error=error,
        environment={k: v for k, v in os.environ.items() if k.startswith(WATCHED) and k != "RAY_AUTH_TOKEN"},
        token=_has_token(),
    )


def _distribution() -> tuple[tuple[str, ...], str]:
    """Return the installed package's requirements and Python versions; both empty if it is not installed."""
    try:
        about = metadata.metadata(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return (), ""
    return tuple(about.get_all("Requires-Dist") or ()), " ".join(about.get_all("Requires-Python") or ())


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _container_memory() -> int | None:
    """Return the container's memory limit in bytes; None without a limit."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            text = Path("/sys/fs/cgroup", name).read_text().strip()
        except OSError:
            continue
        return int(text) if text.isdigit() else None
    return None


def _torch_build() -> str:
    if torch.version.hip:
        return f"rocm {torch.version.hip}"
    return f"cuda {torch.version.cuda}" if torch.version.cuda else "cpu"


def _devices() -> tuple[tuple[tuple[str, int], ...], str | None]:
    if _torch_build() == "cpu":
        return (), None
    try:
        torch.cuda.init()
        found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    except (RuntimeError, AssertionError) as error:
        return (), str(error).splitlines()[0]
    return tuple((each.name, each.total_memory) for each in found), None


def _nvidia_driver(path: Path) -> str | None:
    """Return the driver's version: the first word of its description that starts with a digit."""
    try:
        words = path.read_text().partition("\n")[0].split()
    except OSError:
        return None
    return next((word for word in words if word[0].isdigit()), None)


def _amd_gpus(nodes: Path) -> int:
    """Count the nodes of the driver's topology that have compute units; the others are CPUs."""
    found = 0
    for file in nodes.glob("*/properties"):
        lines = dict(line.split(maxsplit=1) for line in file.read_text().splitlines() if " " in line)
        found += int(lines.get("simd_count", "0")) > 0
    return found


def _has_token() -> bool:
    path = os.environ.get("RAY_AUTH_TOKEN_PATH") or str(Path.home() / ".ray" / "auth_token")
    return bool(os.environ.get("RAY_AUTH_TOKEN")) or Path(path).is_file()
