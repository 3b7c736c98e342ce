"""What the training loop asks of the processes that train a run together, whatever has started them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol, TypeVar

import torch

T = TypeVar("T", bound=int | str)


class Workers(Protocol):
    """The processes of a run as one of them sees them; all of them call each method together.

    Rank and number of ranks are those of PyTorch's process group, see :func:`.shards.ranks`.
    """

    @property
    def device(self) -> torch.device:
        """What this process computes with."""

    @property
    def local_rank(self) -> int:
        """This process's number among those of its node."""

    def broadcast(self, value: T) -> T:
        """Rank 0's ``value``, on every rank."""

    def barrier(self) -> None:
        """Wait until all are here."""

    def nodes_to_go(self) -> Collection[str] | None:
        """Their nodes that are about to be taken away; None while there is no notice of any."""


class Alone:
    """One process that trains a run by itself on ``device``."""

    local_rank = 0

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def broadcast(self, value: T) -> T:
        return value

    def barrier(self) -> None:
        """There is nobody to wait for."""

    def nodes_to_go(self) -> None:
        return None
