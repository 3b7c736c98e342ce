"""How bits are used, and a word of warning when codes collapse."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor

SHARE = "bit_share"
"""Name of the fact that :func:`bit_summary` makes numbers of."""
log = logging.getLogger(__name__)


def bit_share(logits: Tensor) -> Tensor:
    """Share of pictures in which each bit is set ``[L, K]``, of ``logits [B, L, K]``."""
    return (logits.detach() > 0).float().mean(0)


def bit_summary(share: Tensor) -> dict[str, Tensor]:
    """Numbers to watch of ``share [L, K]``: each is a mean over the K bits of a position, then over positions or the worst.

    ``bit_entropy`` is in bits, 1 at best. ``dead_bits`` is the share of bits that are the same in every picture.
    """
    entropy = -(torch.xlogy(share, share) + torch.xlogy(1 - share, 1 - share)).mean(1) / torch.log(
        share.new_tensor(2.0)
    )
    dead = ((share == 0) | (share == 1)).float().mean(1)
    means = share.mean(1)
    return {
        "bit_mean": means.mean(),
        "bit_mean_lowest": means.min(),
        "bit_mean_highest": means.max(),
        "bit_entropy": entropy.mean(),
        "bit_entropy_worst": entropy.min(),
        "dead_bits": dead.mean(),
        "dead_bits_worst": dead.max(),
    }


class CollapseWatch:
    """Warns once when more than ``limit`` of all bits are dead."""

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.warned = False

    def look(self, step: int, summary: Mapping[str, Tensor], share: Tensor) -> None:
        """``summary`` and ``share [L, K]`` of the batch of ``step`` (counted from 0)."""
        if self.warned or float(summary["dead_bits"]) <= self.limit:
            return
        self.warned = True
        dead = ((share == 0) | (share == 1)).float().mean(1)
        log.warning(
            "step %d: codes collapse: %.1f %% of all bits are the same in every picture of the batch (limit %.1f %%), "
            "%d of %d positions have no live bit, mean entropy %.3f bits",
            *(step + 1, 100 * float(summary["dead_bits"]), 100 * self.limit),
            *(int((dead == 1).sum()), len(dead), float(summary["bit_entropy"])),
        )
