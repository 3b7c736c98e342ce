"""Recordings on a CPU with the rules of a GPU's graphs: fixed addresses, no reads, and numbers of the host frozen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

READ = torch.ops.aten._local_scalar_dense.default


class Tape(TorchDispatchMode):
    """Operations of a block with the tensors that they read and wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not READ, "a recording must not read from the device"
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        for func, args, kwargs, result in self.calls:
            for old, new in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs)), strict=True):
                # Views and operations in place have written to the old address already.
                if isinstance(old, torch.Tensor) and old.numel() and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class RecordedOnCPU:
    """What :class:`instella_ray.engine.compilation.Recorded` is on a GPU."""

    def __init__(self, function: Callable[..., Any], arguments: Sequence[tuple[int, ...]]) -> None:
        self.tapes: dict[tuple[int, ...], tuple[Tape, Any]] = {}
        self.launches = 0
        for each in arguments:
            with Tape() as tape:
                result = function(*each)
            self.tapes[each] = tape, result

    def __call__(self, *arguments: int) -> Any:
        tape, result = self.tapes[arguments]
        self.launches += 1
        with _disable_current_modes(), torch.no_grad():
            tape.replay()
        return result
