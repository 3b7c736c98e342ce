"""Base class of filters with ONNX models, run by onnxruntime on the CPU, or on GPUs if its build supports CUDA."""

from __future__ import annotations

from typing import ClassVar

from ....errors import UserError
from .base import ImageFilter

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


class OnnxFilter(ImageFilter):
    """Image filter with an ONNX model."""

    requires: ClassVar[tuple[str, ...]] = ("onnxruntime",)

    def check(self) -> None:
        super().check()
        if not self.gpus_per_actor:
            return
        import onnxruntime

        if CUDA not in onnxruntime.get_available_providers():
            raise UserError(
                f"{self.label}.gpus_per_actor {self.gpus_per_actor:g}: this onnxruntime does not support CUDA; "
                "expected 0, or the package onnxruntime-gpu"
            )
