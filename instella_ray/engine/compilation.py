"""torch.compile, and recorded CUDA or HIP graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import torch

from ..errors import UserError

Compilation = Literal["none", "compile", "graphs", "compile+graphs"]

F = TypeVar("F", bound=Callable[..., Any])


def check_compilation(compilation: Compilation) -> None:
    """Raise UserError for graphs without a GPU."""
    if "graphs" in compilation and not torch.cuda.is_available():
        raise UserError(f"compilation {compilation}: PyTorch sees no GPU here; expected none or compile")


def compiled(network: F, compilation: Compilation) -> F:
    """Return ``network`` compiled with torch.compile, once for each shape of its arguments, or as it is."""
    if "compile" not in compilation:
        return network
    from torch._dynamo import config

    # Static shapes: a batch size that is a constant of the code gives faster code, and a graph may be recorded of it.
    # Engines of equal models share the code, after a swap of weights too. Dynamo's default limit of 8 shapes would leave the
    # rest uncompiled, without notice.
    config.recompile_limit = config.accumulated_recompile_limit
    return torch.compile(network, dynamic=False, fullgraph=True)  # type: ignore[return-value]


class Recorded:
    """Recordings of a function, one for each of its possible arguments, which share their memory.

    A call replays the operations of the recording: one launch, whatever their number. The function must read all that
    changes from tensors with fixed addresses, and its result is overwritten by the next call.
    """

    def __init__(self, function: Callable[..., Any], arguments: Sequence[tuple[int, ...]]) -> None:
        """Record ``function(*each)`` for each of the ``arguments``; the function is run, too."""
        self._graphs: dict[tuple[int, ...], tuple[torch.cuda.CUDAGraph, Any]] = {}
        pool = torch.cuda.graph_pool_handle()
        for each in arguments:
            # Warm-up: the first passes choose kernels, compile, and allocate workspace, which a recording must not.
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    function(*each)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # The default mode would also reject CUDA calls of another engine's thread, which runs while weights are swapped.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                result = function(*each)
            self._graphs[each] = graph, result

    def __call__(self, *arguments: int) -> Any:
        """Replay the recording of ``arguments`` and return its result."""
        graph, result = self._graphs[arguments]
        graph.replay()
        return result
