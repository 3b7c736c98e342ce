"""Instella-T2I on Ray: data curation, training, sampling, evaluation and serving of text-to-image over binary tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .pipeline import InstellaPipeline, PipelineOutput, Preview

__version__ = "0.1.0"
__all__ = ["InstellaPipeline", "PipelineOutput", "Preview", "__version__"]


def __getattr__(name: str) -> Any:
    """Import the pipeline on first use: it takes torch, which most commands do not need."""
    if name in __all__:
        from . import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
