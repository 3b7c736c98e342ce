"""Buckets: numbers of slots that a pass may have, so that an image's bits do not depend on the others in the batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

Forward = Callable[[int, int], Tensor]
"""Computes outputs ``[branches * rows, ..., K]`` of the first ``rows`` slots from tensors with fixed addresses.

With 2 ``branches`` every slot has a row with its prompt and one without; with 1 only that with its prompt.
"""
Size = tuple[int, int]
"""Rows and branches of a pass."""
Passes = Mapping[Size, tuple[int, ...]]
"""Buckets, each with the numbers of slots that its consecutive passes have; usually one pass for all."""

KNEE = 256
"""Tokens up to which a pass takes as long as reading the weights, by the data sheets: an H200 does 206 multiply-adds while
it reads one bfloat16 weight, an MI300X 247."""


def bucket_sizes(slots: int) -> list[int]:
    """Return the powers of two and their triples below ``slots``, then ``slots``.

    No batch exceeds 1.5 times the number of occupied slots.
    """
    powers = [2**i for i in range(slots.bit_length())]
    return [*sorted(size for power in powers for size in (power, 3 * power) if size < slots), slots]


def agreeing_sizes(forward: Forward, sizes: Sequence[int], period: int) -> list[list[Size]]:
    """Partition the ``sizes``, with 1 and 2 branches, into groups at which every row's output is exactly the same.

    A matrix library may change its order of summation with the number of rows, and a difference in the last digit can
    flip sampled bits. Whether it does depends on the device, the shapes and the number of threads, so it is measured,
    on the current content of the tables, which must repeat after ``period`` slots: a size at which a row's output depends
    on its position is in no group, except for the largest if there is no other.
    """
    groups: list[_Group] = []
    for rows in reversed(sizes):
        for branches in (2, 1):
            output = forward(rows, branches).unflatten(0, (rows, branches))
            if not torch.equal(output, output[torch.arange(rows, device=output.device) % period]):
                continue
            group = next((group for group in groups if group.agrees(output)), None)
            if group is None:
                group = _Group()
                groups.append(group)
            group.add(output)
    return [group.sizes for group in groups if any(branches == 2 for _, branches in group.sizes)] or [[(sizes[-1], 2)]]


class _Group:
    """Sizes with the same bits, and the outputs of the first, and so largest, size of each branch."""

    def __init__(self) -> None:
        self.sizes: list[Size] = []
        self.outputs: dict[int, Tensor] = {}

    def agrees(self, output: Tensor) -> bool:
        """Return whether ``output [rows, branches, ...]`` is that of the first rows, in all branches that are known."""
        known = (
            (self.outputs[branch], output[:, branch]) for branch in range(output.shape[1]) if branch in self.outputs
        )
        return all(torch.equal(first[: len(part)], part) for first, part in known)

    def add(self, output: Tensor) -> None:
        rows, branches = output.shape[:2]
        self.sizes.append((rows, branches))
        for branch in range(branches):
            self.outputs.setdefault(branch, output[:, branch])


def plan_passes(groups: Sequence[Sequence[Size]], sizes: Sequence[int], tokens: int) -> Passes:
    """Return the buckets of the group that makes the ``sizes`` fastest; ``tokens`` of a slot are computed in a pass.

    Sizes outside of the group are split into several of its passes, so that neither one image nor a full table costs
    much more than its own. The choice rests on the sizes alone and not on measured times, by which replicas would differ.
    """
    plans = [_split(group, sizes) for group in groups]
    return min((plan for plan in plans if (sizes[-1], 2) in plan), key=lambda plan: _slowdown(plan, sizes, tokens))


def each_by_itself(sizes: Sequence[int]) -> Passes:
    """Return all ``sizes`` as buckets of one pass."""
    return {(rows, branches): (rows,) for rows in sizes for branches in (1, 2)}


def buckets_of(passes: Passes) -> dict[int, list[int]]:
    """Return the rows of the buckets by branches, ascending."""
    return {branches: sorted(rows for rows, count in passes if count == branches) for branches in (2, 1)}


def described(passes: Passes) -> str:
    """Describe the buckets: ``with guidance 1 2 4 (8 = 4 + 4), without 2 4``."""
    texts = []
    for branches, name in ((2, "with guidance"), (1, "without")):
        found = [(rows, passes[rows, branches]) for rows in buckets_of(passes)[branches]]
        names = [str(rows) if len(parts) == 1 else f"({rows} = {' + '.join(map(str, parts))})" for rows, parts in found]
        texts.append(f"{name} {' '.join(names) or 'none'}")
    return ", ".join(texts)


def _split(group: Sequence[Size], sizes: Sequence[int]) -> dict[Size, tuple[int, ...]]:
    found = {}
    for branches in (1, 2):
        usable = sorted((rows for rows, count in group if count == branches), reverse=True)
        for rows in sizes:
            left, parts = rows, []
            for part in usable:
                parts += [part] * (left // part)
                left %= part
            if not left:
                found[rows, branches] = tuple(parts)
    return found


def _slowdown(plan: Passes, sizes: Sequence[int], tokens: int) -> float:
    """Return the mean time over all sizes, relative to that of one pass of just that size."""

    def cost(rows: int, branches: int) -> float:
        return KNEE + rows * branches * tokens

    def least(rows: int, branches: int) -> float:
        """Return the time of the fastest bucket that covers ``rows`` slots."""
        covering = [size for size in plan if size[0] >= rows and size[1] >= branches]
        return min(sum(cost(part, size[1]) for part in plan[size]) for size in covering)

    return sum(least(rows, branches) / cost(rows, branches) for rows in sizes for branches in (1, 2))
