"""Means of logged values over steps and ranks, summed on the device so that no step waits for the GPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Size, Tensor

from .distributed import ranks

SUMS = "running_means.safetensors"
"""File of a checkpoint with the sums since the last logged line; absent if there are none."""
NORM = "gradient_norm"
SUM, WEIGHT, LARGEST = "sum of ", "weight of ", "largest "
AT_ONCE = 64
"""Steps that are summed in one operation."""


class Total(NamedTuple):
    """Weighted sum of a value, the sum of its weights, and the largest value of this rank."""

    sum: Tensor
    weight: Tensor
    largest: Tensor

    def plus(self, other: Total) -> Total:
        """Return the total of both."""
        largest = torch.maximum(self.largest, other.largest)
        return Total(self.sum + other.sum, self.weight + other.weight, largest)


Layout = tuple[tuple[str, Size], ...]
"""Names and shapes of values that are added together."""


class Means:
    """Weighted means of named tensors, summed in float64 on their device, and over ranks by :meth:`totals`.

    A name may be missing in some steps: its mean is over the others.
    """

    def __init__(self, before: Mapping[str, Total] | None = None) -> None:
        """``before``: totals, the same on every rank, that the new ones are added to."""
        self._before = dict(before or {})
        self._pending: dict[Layout, list[tuple[list[Tensor], Tensor]]] = {}
        self._sums: dict[Layout, Total] = {}

    def add(self, values: Mapping[str, Tensor], weight: Tensor) -> None:
        """Add ``values`` on one device; with a ``weight`` (a scalar) of 0 they count for nothing, even if they are NaN."""
        layout = tuple((name, value.shape) for name, value in values.items())
        pending = self._pending.setdefault(layout, [])
        pending.append(([value.detach() for value in values.values()], weight))
        # Several at once, because each operation on a GPU costs the host a launch.
        if len(pending) == AT_ONCE:
            self._sum(layout)

    def _sum(self, layout: Layout) -> None:
        pending = self._pending.pop(layout)
        rows = torch.cat([value.flatten() for values, _ in pending for value in values]).view(len(pending), -1).double()
        weights = torch.stack([weight for _, weight in pending]).to(rows.device).double()[:, None]
        total = Total(
            torch.where(weights > 0, rows * weights, 0.0).sum(0),
            weights.sum(0),
            torch.where(weights > 0, rows, -torch.inf).amax(0),
        )
        self._sums[layout] = self._sums[layout].plus(total) if layout in self._sums else total

    def totals(self) -> dict[str, Total]:
        """Return the totals on the CPU, of which each rank has the mean over ranks; collective.

        The one operation that waits for the GPU.
        """
        for layout in list(self._pending):
            self._sum(layout)
        sums, (_, world) = dict(self._sums), ranks()
        if sums and world > 1:
            joint = torch.cat([part for total in sums.values() for part in total[:2]])
            torch.distributed.all_reduce(joint)
            parts = iter((joint / world).split([len(part) for total in sums.values() for part in total[:2]]))
            sums = {layout: Total(next(parts), next(parts), total.largest) for layout, total in sums.items()}
        found = dict(self._before)
        for layout, total in sums.items():
            lengths = [shape.numel() for _, shape in layout]
            pairs = zip(total.sum.cpu().split(lengths), total.largest.cpu().split(lengths), strict=True)
            weight = total.weight.cpu().squeeze()
            for (name, shape), (value, largest) in zip(layout, pairs, strict=True):
                new = Total(value.view(shape), weight, largest.view(shape))
                found[name] = found[name].plus(new) if name in found else new
        return found

    def means(self) -> dict[str, Tensor]:
        """Return the means, float32 on the CPU; NaN where all weights were 0. Collective."""
        return {name: (total.sum / total.weight).float() for name, total in self.totals().items()}


class StepMeans:
    """Means over the steps since the last logged line, and the largest gradient norm.

    They are part of a checkpoint: a resumed run logs the same line as an uninterrupted one, also where the checkpoint
    lies between two lines. Lines are not cut at checkpoints, because those before a preemption come at any step.
    """

    def __init__(self, folder: Path | None) -> None:
        """Start with the sums in the checkpoint ``folder``; None: a new run."""
        found = load_file(folder / SUMS) if folder is not None and (folder / SUMS).is_file() else {}
        names = [name.removeprefix(SUM) for name in found if name.startswith(SUM)]
        before = {name: Total(*(found[part + name] for part in (SUM, WEIGHT, LARGEST))) for name in names}
        self._means, self._empty = Means(before), not before

    def clear(self) -> None:
        """Forget all steps."""
        self._means, self._empty = Means(), True

    def add(self, means: Mapping[str, Tensor], norm: Tensor) -> None:
        """Add a step's ``means`` and gradient ``norm``; a step without means or a finite norm counts for nothing."""
        if means:
            norm = norm.to(next(iter(means.values())).device)
            self._means.add({**means, NORM: norm}, norm.isfinite())
            self._empty = False

    def means(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Return the means of all parts over steps and ranks, and the gradient norm's mean and maximum; collective.

        Both are empty if no step counted.
        """
        if self._empty:
            return {}, {}
        totals = self._means.totals()
        means = {name: (total.sum / total.weight).float() for name, total in totals.items()}
        return means, {NORM: float(means.pop(NORM)), f"{NORM}_max": float(totals[NORM].largest)}

    def save(self, folder: Path) -> None:
        """Write the sums to a checkpoint's ``folder`` on rank 0, unless a line has just been logged; collective."""
        if self._empty:
            return
        totals = self._means.totals()
        if ranks()[0] == 0:
            parts = (SUM, WEIGHT, LARGEST)
            # Cloned, because tensors of a file must not share memory.
            found = {
                p + name: value.clone() for name, total in totals.items() for p, value in zip(parts, total, strict=True)
            }
            save_file(found, folder / SUMS)
