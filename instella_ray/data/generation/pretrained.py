"""Other people's models, by hub name or local folder: what they are called, and which version of one this is."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import hf_hub_download
from safetensors import SafetensorError, safe_open

from ...errors import UserError

LOAD_ERRORS = (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError)
"""What Transformers and Diffusers raise for a name that gives no model."""


@contextmanager
def loading(what: str, name: str) -> Iterator[None]:
    """UserError, in one line, for what goes wrong within while ``name`` is loaded."""
    try:
        yield
    except LOAD_ERRORS as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{what} '{name}': cannot be loaded ({reason})") from None


def located(name: str) -> str:
    """A local folder as an absolute path, because workers run in folders of their own; a hub name as it is."""
    return str(Path(name).absolute()) if Path(name).is_dir() else name


def short_name(name: str) -> str:
    """A hub name as it is, the last part of a path: where a model lay means nothing elsewhere."""
    return Path(name).name if Path(name).is_dir() else name


def fingerprint(what: str, name: str, config_file: str) -> str:
    """What tells a model's versions apart: the hub's revision, or sha256 over the files of a local folder.

    ``config_file`` is one that every such model has: on the hub, its revision is the model's. A local folder
    is read whole, which takes seconds a GB. UserError for a folder without weights as safetensors, and for a file of
    them that is cut short.
    """
    folder = Path(name)
    if not folder.is_dir():
        with loading(what, name):
            # The hub's cache keeps the files of a revision in a folder of that name.
            return Path(hf_hub_download(name, config_file)).parent.name
    files = sorted(p for p in folder.rglob("*") if p.suffix in (".safetensors", ".json", ".jinja", ".txt", ".model"))
    weights = [path for path in files if path.suffix == ".safetensors"]
    if not weights:
        raise UserError(f"{what} '{name}': no .safetensors there; weights in other formats are not read")
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
