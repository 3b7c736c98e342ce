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
WEIGHT, LARGEST = "weight of ", "largest "


class Total(NamedTuple):
    """Weighted sum of a value and the sum of its weights."""

    sum: Tensor
    weight: Tensor


class Means:
    """Weighted means of named tensors, summed in float64 on their device, and over ranks by :meth:`totals`.

    A name may be missing in some steps: its mean is over the others.
    """

    def __init__(self, before: Mapping[str, Total] | None = None) -> None:
        """``before``: totals, the same on every rank, that the new ones are added to."""
        self._before = dict(before or {})
        self._rows: dict[tuple[tuple[str, Size], ...], Tensor] = {}

    def add(self, values: Mapping[str, Tensor], weight: Tensor | float = 1.0) -> None:
        """Add ``values``, which are on one device; with a ``weight`` of 0 they count for nothing, even if they are NaN."""
        # One row for all values, because each operation on a GPU costs the host a launch.
        row = torch.cat([value.detach().flatten() for value in values.values()]).double()
        weight = torch.as_tensor(weight, device=row.device).double()
        row = torch.where(weight > 0, torch.cat((row * weight, weight.reshape(1))), 0.0)
        layout = tuple((name, value.shape) for name, value in values.items())
        before = self._rows.get(layout)
        self._rows[layout] = row if before is None else before + row

    def totals(self) -> dict[str, Total]:
        """Return the totals on the CPU, of which each rank has the mean over ranks; collective.

        The one operation that waits for the GPU.
        """
        rows, (_, world) = dict(self._rows), ranks()
        if rows and world > 1:
            joint = torch.cat(list(rows.values()))
            torch.distributed.all_reduce(joint)
            parts = (joint / world).split([len(row) for row in rows.values()])
            rows = dict(zip(rows, parts, strict=True))
        found = dict(self._before)
        for layout, row in rows.items():
            *values, count = row.cpu().split([*(shape.numel() for _, shape in layout), 1])
            for (name, shape), value in zip(layout, values, strict=True):
                total = Total(value.view(shape), count.squeeze())
                if name in found:
                    total = Total(total.sum + found[name].sum, total.weight + found[name].weight)
                found[name] = total
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
        self._means = Means()
        self._largest: Tensor | None = None
        if folder is not None and (file := folder / SUMS).is_file():
            found = load_file(file)
            names = [name for name in found if WEIGHT + name in found]
            self._means = Means({name: Total(found[name], found[WEIGHT + name]) for name in names})
            self._largest = found[LARGEST + NORM]

    def clear(self) -> None:
        """Forget all steps."""
        self._means = Means()
        self._largest = None

    def add(self, means: Mapping[str, Tensor], norm: Tensor) -> None:
        """Add a step's ``means`` and gradient ``norm``; a step without means or a finite norm counts for nothing."""
        if not means:
            return
        device = next(iter(means.values())).device
        norm = norm.detach().to(device, torch.float32)
        finite = norm.isfinite()
        self._means.add({**means, NORM: norm}, finite)
        largest = torch.where(finite, norm, 0.0)
        self._largest = largest if self._largest is None else torch.maximum(largest, self._largest.to(device))

    def means(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Return the means of all parts over steps and ranks, and the gradient norm's mean and maximum; collective.

        Both are empty if no step counted.
        """
        if self._largest is None:
            return {}, {}
        means = self._means.means()
        norms = {NORM: float(means.pop(NORM)), f"{NORM}_max": float(self._largest)}
        return means, norms

    def save(self, folder: Path) -> None:
        """Write the sums to a checkpoint's ``folder`` on rank 0, unless a line has just been logged; collective."""
        if self._largest is None:
            return
        totals = self._means.totals()
        if ranks()[0] == 0:
            weights = {WEIGHT + name: total.weight for name, total in totals.items()}
            sums = {name: total.sum for name, total in totals.items()}
            # Cloned, because tensors of a file must not share memory.
            found = {**sums, **weights, LARGEST + NORM: self._largest.cpu()}
            save_file({name: value.clone() for name, value in found.items()}, folder / SUMS)
