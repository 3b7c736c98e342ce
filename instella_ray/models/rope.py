"""Rotary position embeddings (RoPE) of BIT's [latent; image] sequence, and sinusoidal grid positions."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

RopeStyle = Literal["rotary", "published"]


def grid_positions(side: int, extent: float | None, device: torch.device | None = None) -> Tensor:
    """Return the coordinates ``[side]`` of patches along one side.

    With an ``extent`` S, positions are interpolated to span [0, S-1] for any number of patches, so that the same weights
    work for every output size. Without it, positions are integers.
    """
    index = torch.arange(side, dtype=torch.float32, device=device)
    if extent is None:
        return index
    # Divide before multiplying, as published: the order affects the last bit. A single patch has position 0.
    return index / max(side - 1, 1) * (extent - 1)


def rope_table(
    latent_tokens: int,
    height: int,
    width: int,
    axes: tuple[int, int, int],
    extent: float | None,
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    """Build cosine and sine tables, float32 ``[latent_tokens + height * width, sum(axes)]``, latent tokens first.

    Latent token n has position (n, 0, 0), patch (r, c) has (0, r, c) in interpolated units. Angles are
    ``position * 10000^(-2m / D_axis)`` in float64; each frequency occupies two neighbouring columns.
    """
    rows = grid_positions(height, extent, device)
    columns = grid_positions(width, extent, device)
    positions = torch.zeros(latent_tokens + height * width, 3, device=device)
    positions[:latent_tokens, 0] = torch.arange(latent_tokens, dtype=torch.float32, device=device)
    positions[latent_tokens:, 1] = rows.repeat_interleave(width)
    positions[latent_tokens:, 2] = columns.repeat(height)
    angles = []
    for axis, size in enumerate(axes):
        exponent = torch.arange(0, size, 2, dtype=torch.float64, device=device) / size
        angles.append(positions[:, axis, None].double() * 10000.0**-exponent)
    table = torch.cat(angles, dim=-1).repeat_interleave(2, dim=-1)
    return table.cos().float(), table.sin().float()


def apply_rope(x: Tensor, table: tuple[Tensor, Tensor], style: RopeStyle) -> Tensor:
    """Apply the rotary table to ``x [B, heads, S, D]``.

    ``rotary`` rotates pairs of neighbouring columns, the correct rotation for this table. ``published`` pairs column j
    with j + D/2, which have different angles: not a rotation, but the variant that the released weights were trained with.
    """
    cos, sin = table
    if style == "rotary":
        even, odd = x[..., 0::2], x[..., 1::2]
        turned = torch.stack((-odd, even), dim=-1).flatten(-2)
    else:
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
    return (x * cos + turned * sin).to(x.dtype)


def sinusoidal_grid(height: int, width: int, channels: int, device: torch.device | None = None) -> Tensor:
    """Return sinusoidal position embeddings of the patch grid, ``[1, height * width, channels]``.

    Coordinates of each side span [-1, 1].
    """
    quarter = channels // 4
    frequency = torch.pi / 2 * 2.0 ** (4 * torch.arange(quarter, device=device) / quarter)

    def side(count: int) -> Tensor:
        angle = torch.linspace(-1, 1, count, device=device)[:, None] * frequency
        return torch.cat((angle.sin(), angle.cos()), dim=-1)

    rows = side(height)[:, None].expand(-1, width, -1)
    columns = side(width)[None].expand(height, -1, -1)
    return torch.cat((rows, columns), dim=-1).flatten(0, 1)[None]
