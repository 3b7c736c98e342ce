"""Generators with weights and activations of eight bits in the matrix products of their blocks, for inference.

Each output channel of a weight and each row of the activations has a scale of its own, so that a row's result depends on no
other row. Sums of integers are exact in any order: an ``int8`` product has the same bits in any batch and of any library.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from .generator import Generator

Quantization = Literal["none", "int8", "fp8"]

LEAST_ROWS = 32
"""Rows to which an int8 product is padded on GPUs, whose libraries expect more than 16."""
MULTIPLE = 16
"""Divisor of the widths that the libraries' fp8 products expect; int8 needs 8."""


class EightBitLinear(nn.Module):
    """Linear layer ``y = x W^T + b`` with ``W`` and ``x`` rounded to eight bits."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        """Round the weights of ``linear`` to ``dtype``, int8 or a float8."""
        super().__init__()
        self.limit = float(torch.iinfo(dtype).max if dtype == torch.int8 else torch.finfo(dtype).max)
        weight, scale = self._rounded(linear.weight.detach(), dtype)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale.flatten())
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[..., out]`` in the dtype of ``x [..., in]``."""
        rows = x.flatten(0, -2)
        rounded, scale = self._rounded(rows, self.weight.dtype)
        if self.weight.dtype == torch.int8:
            missing = LEAST_ROWS - len(rows) if x.is_cuda else 0
            padded = F.pad(rounded, (0, 0, 0, missing)) if missing > 0 else rounded
            out = torch._int_mm(padded, self.weight.t())[: len(rows)].float()
            out = out.mul_(scale).mul_(self.scale)
        else:
            # GPUs scale rows for bfloat16 results alone.
            dtype = torch.bfloat16 if x.is_cuda else torch.float32
            out = torch._scaled_mm(rounded, self.weight.t(), scale, self.scale[None], out_dtype=dtype)
        out = out if self.bias is None else out + self.bias
        return out.to(x.dtype).unflatten(0, x.shape[:-1])

    def _rounded(self, rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return ``rows [n, d]`` in ``dtype`` and their scales, float32 ``[n, 1]``."""
        scale = (rows.abs().amax(-1, keepdim=True).float() / self.limit).clamp(min=torch.finfo(torch.float32).tiny)
        values = rows / scale
        values = values.round() if dtype == torch.int8 else values.clamp(-self.limit, self.limit)
        return values.to(dtype), scale


def quantize(model: Generator, quantization: Quantization) -> None:
    """Replace the linear layers of attention and feed-forward in place.

    They have nearly all of the weights that a step reads. The projections of text features, the layers that read the
    timestep and the bits, and the output layer keep their precision. Raises UserError for widths that are no multiple of
    :data:`MULTIPLE`, and for fp8 on a GPU without it.
    """
    if quantization == "none":
        return
    dtype = torch.int8 if quantization == "int8" else _float8(model.x_embedder.weight.device)
    if model.cfg.width % MULTIPLE:
        raise UserError(f"quantization {quantization}: width {model.cfg.width}, expected a multiple of {MULTIPLE}")
    for block in model.transformer_blocks:
        for name, module in list(block.named_modules()):
            if isinstance(module, nn.Linear) and name.startswith(("attn.", "ff.", "mlp.")):
                block.set_submodule(name, EightBitLinear(module, dtype))


def _float8(device: torch.device) -> torch.dtype:
    """Return the float8 with three bits of mantissa that ``device`` multiplies."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        if torch.version.hip:
            name = properties.gcnArchName
            if "gfx94" in name:  # MI300 has a format of its own
                return torch.float8_e4m3fnuz
            known = name.startswith(("gfx95", "gfx12"))
        else:
            known = (properties.major, properties.minor) >= (8, 9)
        if not known:
            raise UserError(f"quantization fp8: {properties.name} has no fp8, expected none or int8")
    return torch.float8_e4m3fn
