"""Steps whose loss or gradient is not finite: all ranks agree on them, and skip them or stop the run."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import storage
from ..errors import UserError
from .distributed import ranks
from .settings import TrainConfig

UNCHECKED = 20
"""Steps of a GPU after which it is asked at the latest whether they were finite, where nothing is logged before."""
log = logging.getLogger(__name__)


class NonFiniteLoss(UserError):
    """Error for a loss or gradient that is NaN or infinite; nothing of that step is saved."""


class Unchecked(NamedTuple):
    """A step that the device may still be computing."""

    step: int
    finite: Tensor
    """bool scalar of this rank, on the device."""
    keys: list[str]
    """Keys of this rank's samples."""


class FiniteCheck:
    """Check of every step's loss and gradient. All methods are collective.

    With ``on_nonfinite: skip`` a step is checked before its update, which makes the CPU wait for a GPU once a step. With
    ``stop`` a GPU is asked at the latest where something is logged or saved, because nothing has to be kept by then.
    """

    def __init__(self, cfg: TrainConfig, device: torch.device, skipped: int) -> None:
        """Continue from ``skipped`` batches, the number that the run's checkpoint holds."""
        self.cfg, self.skipped = cfg, skipped
        self.skips = cfg.on_nonfinite == "skip"
        self.at_once = self.skips or device.type == "cpu"
        self.pending: list[Unchecked] = []

    def passed(self, step: int, values: Sequence[Tensor], keys: list[str]) -> bool:
        """Return whether the scalars ``values`` of ``step`` are finite on all ranks, as far as it has to be known now.

        False means that the batch is to be skipped, and counts it. Raises :class:`NonFiniteLoss` if the run is to stop at
        it, or has skipped too many; the batch's keys are in a file of each rank.
        """
        place = values[0].device
        finite = torch.stack([value.detach().float().to(place) for value in values]).isfinite().all()
        self.pending.append(Unchecked(step, finite, keys))
        cfg, done = self.cfg, step + 1
        shown = done == cfg.steps or not all(
            done % every for every in (cfg.log_every, cfg.checkpoint_every, cfg.preview_every)
        )
        return self.check() if self.at_once or shown or len(self.pending) == UNCHECKED else True

    def check(self) -> bool:
        """Wait for the steps that are not checked yet, as :meth:`passed`; called before anything is saved."""
        if not self.pending:
            return True
        flags = torch.stack([each.finite for each in self.pending]).float()
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MIN)
        pending, self.pending = self.pending, []
        failed = next((each for each, flag in zip(pending, flags.tolist(), strict=True) if not flag), None)
        if failed is None:
            return True
        rank, _ = ranks()
        path = storage.join(self.cfg.run_dir, f"nonfinite-step{failed.step}-rank{rank}.json")
        storage.write_json(path, {"step": failed.step, "keys": failed.keys})
        found = f"step {failed.step}: loss or gradient is not finite; the batch's keys are in {path}"
        if not self.skips:
            raise NonFiniteLoss(f"{found}; train.on_nonfinite=skip trains on without such batches")
        if self.skipped >= self.cfg.max_skipped:
            raise NonFiniteLoss(f"{found}; train.max_skipped = {self.skipped} batches have been skipped already")
        self.skipped += 1
        if rank == 0:
            about = f"{self.skipped} of at most {self.cfg.max_skipped}"
            log.warning("%s; skipped (%s)", found, about, extra={"step": failed.step, "skipped_batches": self.skipped})
        return False
