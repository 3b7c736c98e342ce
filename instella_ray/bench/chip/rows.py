"""Rows of the benchmark: a measurement against what the chip can do, and what bounds it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...accelerator import device_label
from ...flops import Accelerator, DeviceWork, find_accelerator
from ...rendering import Cell, Goal, digits
from ...training.metrics_log import peak_memory
from ..measure import Spread, race
from .settings import GpuBenchConfig

NEAR = 2.0
"""Multiple of a bound's seconds within which a measurement counts as bound by it."""
LAUNCHES = "launches (host)"
NONE = "-"
"""Cell without a value: on a chip without data sheet in :mod:`...flops`, or where nothing is computed."""


def bound_by(seconds: float, work: DeviceWork, chip: Accelerator | None, launches: float | None = None) -> str:
    """Return what bounds ``work`` that took ``seconds``.

    ``compute`` or ``memory`` (bandwidth) where it took at most :data:`NEAR` times what the chip needs at least, else
    :data:`LAUNCHES` where it took at most :data:`NEAR` times ``launches``: the seconds of the same launches with the least
    work, None for recorded graphs, which the host doesn't launch one by one. Else ``other``: kernels far from the peaks.
    """
    if chip is None:
        return NONE
    least, bound = chip.least_seconds(work)
    if seconds <= NEAR * least:
        return bound
    return LAUNCHES if launches is not None and seconds <= NEAR * launches else "other"


@dataclass(frozen=True)
class ChipRow:
    """Measurement of one setting."""

    what: str
    seconds: Spread | None = None
    """Seconds of one run, or of one training step."""
    images_per_second: float | None = None
    flop_per_second: float | None = None
    share_of_peak: float | None = None
    """Share of the chip's bf16 FLOP/s; MFU in training."""
    bytes_per_second: float | None = None
    """From the bytes that must be moved at least, without activations."""
    share_of_bandwidth: float | None = None
    bound: str = NONE
    memory_gb: float | None = None
    """Peak memory of the row: on the GPU, or of the process so far on a CPU."""
    forecast_gb: float | None = None
    """Peak memory that ``instella-ray plan`` predicts."""
    note: str = ""
    digests: Mapping[str, str] = field(default_factory=dict)
    """Digests of codes, by bucket."""
    goal: Goal | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the fields that have a value, for JSON."""
        return {name: value for name, value in asdict(self).items() if value not in (None, "", {})}


def cells(row: Mapping[str, Any]) -> dict[str, Cell]:
    """Return the cells of a row from JSON."""

    def number(name: str, scale: float = 1.0, unit: str = "") -> str:
        return digits(row[name] / scale, unit) if name in row else NONE

    return {
        "what": row["what"],
        "ms": Spread(**row["seconds"]).text(1000) if "seconds" in row else NONE,
        "images/s": number("images_per_second"),
        "TFLOP/s": number("flop_per_second", 1e12),
        "of peak": number("share_of_peak", 0.01, "%"),
        "TB/s": number("bytes_per_second", 1e12),
        "of bandwidth": number("share_of_bandwidth", 0.01, "%"),
        "bound by": row["bound"],
        "memory GB": number("memory_gb"),
        "plan GB": number("forecast_gb"),
        "note": row.get("note", ""),
    }


class Bench:
    """What a part needs: settings, device, rows of earlier parts, and where its own rows and files go."""

    def __init__(
        self,
        cfg: GpuBenchConfig,
        device: torch.device,
        emit: Callable[[ChipRow], None],
        earlier: Mapping[str, Sequence[Mapping[str, Any]]],
        folder: Path,
    ) -> None:
        """``emit`` takes each row as it is measured; ``earlier`` has the rows of the parts before, as JSON, by part.

        ``folder`` is empty, for files of this part.
        """
        self.cfg, self.device, self.emit, self.earlier, self.folder = cfg, device, emit, earlier, folder
        self.chip = find_accelerator(device_label(device))

    def fresh(self) -> None:
        """Release unused memory and count the peak anew; called before the models of a row are built."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def time(self, run: Callable[[], object]) -> Spread:
        """Measure the seconds of ``run`` on the device, after one run to warm up."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        return Spread.of(race({"": run}, repeats=self.cfg.repeats)[""].wall)

    def add(
        self,
        what: str,
        seconds: Spread,
        work: DeviceWork,
        *,
        images: int = 1,
        launches: float | None = None,
        forecast: float | None = None,
        note: str = "",
        goal: Goal | None = None,
    ) -> None:
        """Emit a row of ``work`` on ``images`` that took ``seconds``.

        Other arguments as :func:`bound_by` and :class:`ChipRow`; ``forecast`` is in bytes. Small sizes have no goals.
        """
        flop, moved = work.flop / seconds.median, work.bytes / seconds.median
        self.emit(
            ChipRow(
                what,
                seconds,
                images / seconds.median,
                flop,
                flop / self.chip.peak if self.chip else None,
                moved,
                moved / self.chip.bandwidth if self.chip else None,
                bound_by(seconds.median, work, self.chip, launches),
                peak_memory(self.device) / 1e9,
                forecast / 1e9 if forecast else None,
                note,
                goal=None if self.cfg.tiny else goal,
            )
        )
