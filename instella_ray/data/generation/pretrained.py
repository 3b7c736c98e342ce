"""Pretrained models by hub name or local folder: loading errors, names, and hashes that identify their weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import hf_hub_download
from safetensors import SafetensorError, safe_open

from ...errors import UserError

LOAD_ERRORS = (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError)
"""Exceptions of Transformers and Diffusers for a name that is not a model."""


@contextmanager
def loading(what: str, name: str) -> Iterator[None]:
    """Convert errors of loading ``name`` within the block into a one-line UserError."""
    try:
        yield
    except LOAD_ERRORS as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{what} '{name}': cannot be loaded ({reason})") from None


def located(name: str) -> str:
    """Make the path of a local folder absolute, because workers run in other directories; hub names are unchanged."""
    return str(Path(name).absolute()) if Path(name).is_dir() else name


def short_name(name: str) -> str:
    """Return the name of a local folder without its path, which is meaningless elsewhere; hub names are unchanged."""
    return Path(name).name if Path(name).is_dir() else name


def weights_identity(what: str, name: str, config_file: str) -> str:
    """Return an identifier of the version of a model: its hub revision, or the SHA-256 of the files of a local folder.

    ``config_file`` is a file that every such model has, whose revision on the hub is that of the model. A local folder
    is read completely, which takes seconds per GB. Raises UserError for a folder without safetensors weights, and for a
    truncated safetensors file.
    """
    folder = Path(name)
    if not folder.is_dir():
        with loading(what, name):
            # The hub cache stores the files of a revision in a folder named after it.
            return Path(hf_hub_download(name, config_file)).parent.name
    files = sorted(p for p in folder.rglob("*") if p.suffix in (".safetensors", ".json", ".jinja", ".txt", ".model"))
    weights = [path for path in files if path.suffix == ".safetensors"]
    if not weights:
        raise UserError(f"{what} '{name}': no weights found; expected .safetensors files, the only format that is read")
    for path in weights:
        try:
            with safe_open(path, "numpy"):
                pass
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: not a complete safetensors file ({error})") from None
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as stream:
            digest.update(str(path.relative_to(folder)).encode())
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
