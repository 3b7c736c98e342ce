"""Execution of an engine's network: batch-size buckets, torch.compile and recorded GPU graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from ..errors import UserError

Compilation = Literal["none", "compile", "graphs"]

Forward = Callable[[int, int], Tensor]
"""Computes outputs ``[branches * rows, ..., K]`` of the first ``rows`` slots from tensors with fixed addresses.

With 2 ``branches`` every slot has a row with its prompt and one without; with 1 only that with its prompt.
"""


def bucket_sizes(slots: int) -> list[int]:
    """Return the powers of two and their triples below ``slots``, then ``slots``.

    No batch exceeds 1.5 times the number of occupied slots.
    """
    powers = [2**i for i in range(slots.bit_length())]
    return [*sorted(size for power in powers for size in (power, 3 * power) if size < slots), slots]


def usable_buckets(forward: Forward, sizes: Sequence[int]) -> dict[int, list[int]]:
    """Return the ``sizes``, by branches, at which every row's output is exactly that of the largest size with 2 branches.

    A matrix library may change its order of summation with the number of rows, and a difference in the last digit can
    flip sampled bits. Whether it does depends on the device, the shapes and the number of threads, so it is measured,
    on the current content of the tables. If only the largest size remains, every step costs as much as a full batch.
    """
    whole = forward(sizes[-1], 2).clone()

    def same(rows: int, branches: int) -> bool:
        return torch.equal(forward(rows, branches), whole[: 2 * rows : 2 // branches])

    guided = [rows for rows in sizes if rows == sizes[-1] or same(rows, 2)]
    return {2: guided, 1: [rows for rows in sizes if same(rows, 1)]}


def compiled(network: Forward, sizes: Sequence[int], compilation: Compilation) -> Forward:
    """Return ``network`` unchanged, compiled with torch.compile, or recorded as graphs, one by size and branches.

    Raises UserError for ``graphs`` without a GPU.
    """
    if compilation == "none":
        return network
    if compilation == "compile":
        from torch._dynamo import config

        # Compiled once per size and branches, so that the batch size is a constant of the compiled code. Engines
        # of equal models share it, after a swap of weights too. The default limit of 8 would leave the rest uncompiled.
        config.recompile_limit = config.accumulated_recompile_limit
        return torch.compile(network, dynamic=False)
    if not torch.cuda.is_available():
        raise UserError("compilation graphs: PyTorch sees no GPU here; expected none or compile")
    graphs = {(rows, branches): _record(network, rows, branches) for rows in sizes for branches in (1, 2)}

    def replay(rows: int, branches: int) -> Tensor:
        graph, output = graphs[rows, branches]
        graph.replay()
        return output

    return replay


def _record(network: Forward, rows: int, branches: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    # Warm-up: the first passes choose kernels and allocate workspace, which is not allowed while a graph is recorded.
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            network(rows, branches)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # The default mode would also reject CUDA calls of another engine's thread, which runs while weights are swapped.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        output = network(rows, branches)
    return graph, output
