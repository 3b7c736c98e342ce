"""How an engine's network is run: batch sizes that may be used, torch.compile, recorded GPU graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from ..errors import UserError

Compilation = Literal["none", "compile", "graphs"]

Forward = Callable[[int], Tensor]
"""Outputs ``[2 rows, ..., K]`` of the first ``rows`` slots, read from tensors that never move."""


def bucket_sizes(slots: int) -> list[int]:
    """1, 2, 4, ... and ``slots`` itself: a batch is at most twice as large as it needs to be."""
    return [2**i for i in range(slots.bit_length()) if 2**i < slots] + [slots]


def usable_buckets(forward: Forward, sizes: Sequence[int]) -> list[int]:
    """Those of ``sizes`` at which ``forward`` gives every row the very numbers that the largest size gives it.

    A matrix library may sum in another order for another number of rows, and a last digit then decides a bit here and
    there. Whether it does depends on the device, the shapes and the number of threads, so it is tried out, on the
    tables as they are. Where only the largest size is left, every step costs as much as a full one.
    """
    whole = forward(sizes[-1]).clone()
    return [n for n in sizes if n == sizes[-1] or torch.equal(forward(n), whole[: 2 * n])]


def compiled(network: Forward, sizes: Sequence[int], compilation: Compilation) -> Forward:
    """``network`` as it is, through torch.compile, or as one recorded graph for each of ``sizes``."""
    if compilation == "none":
        return network
    if compilation == "compile":
        # Once a size: its batch is a constant of the compiled code.
        return torch.compile(network, dynamic=False)
    if not torch.cuda.is_available():
        raise UserError("compilation graphs: PyTorch sees no GPU here; expected none or compile")
    graphs = {rows: _record(network, rows) for rows in sizes}

    def replay(rows: int) -> Tensor:
        graph, output = graphs[rows]
        graph.replay()
        return output

    return replay


def _record(network: Forward, rows: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    # The first passes choose kernels and allocate work space, which must not happen while a graph is recorded.
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            network(rows)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # Another engine may be at work in its own thread, as when weights are swapped: its calls are not ours to forbid.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        output = network(rows)
    return graph, output
