"""Counts what a block asks of the device: operations, and reads that would wait for a GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

VIEWS = (
    "view",
    "slice",
    "select",
    "expand",
    "unsqueeze",
    "squeeze",
    "transpose",
    "permute",
    "unbind",
    "split",
    "t.",
    "alias",
)
"""Operations without a kernel."""
READS = ("tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__")


class Operations(TorchDispatchMode):
    """Operations with a kernel, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).removeprefix("aten.")
        if not name.startswith(VIEWS):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def counted() -> Iterator[tuple[Counter[str], Counter[str]]]:
    """The operations of the block by name, and its reads of tensors on the host."""
    operations, reads = Operations(), Counter[str]()
    with ExitStack() as stack:
        for name in READS:
            original = getattr(torch.Tensor, name)

            def read(self: torch.Tensor, *args: Any, _name: str = name, _original: Any = original) -> Any:
                reads[_name] += 1
                return _original(self, *args)

            stack.enter_context(mock.patch.object(torch.Tensor, name, read))
        stack.enter_context(operations)
        yield operations.counts, reads
