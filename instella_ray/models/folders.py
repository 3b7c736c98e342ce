"""Names of model folders: the checkpoints of a run, and ``RUN_DIR/latest`` and ``RUN_DIR/best``, which name one of them."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from .. import storage
from ..errors import UserError
from .bundled import bundled_folder

CHECKPOINTS = "checkpoints"
STATE = "state.json"
"""File of a checkpoint that is written last: a folder without it is incomplete."""
RUN_CONFIG, BEST_FILE = "config.yaml", "best.json"
LATEST, BEST = "latest", "best"
DEMO_GENERATOR = "runs/diffusion"
"""Run in a demo's folder whose newest checkpoint the folder stands for."""


def find_model(path: str) -> str:
    """Return the absolute path or URL of a model folder, which may be given as :func:`named_checkpoint`.

    The folder of a demo stands for its diffusion generator; ``DEMO/runs/ar/latest`` is the other one. The names of
    :func:`.bundled.bundled_names` are models of the package, unless a model folder or demo has that path. Raises
    UserError for a name that no checkpoint has, and for a run directory, which holds several models.
    """
    found = storage.absolute(named_checkpoint(path))
    if storage.exists(storage.join(found, CHECKPOINTS)):
        names = [LATEST] + [BEST] * storage.exists(storage.join(_validation_of(found), BEST_FILE))
        expected = " or ".join(storage.join(path, name) for name in names)
        raise UserError(f"{path}: a run directory, not a model folder; expected {expected}, or one of its checkpoints")
    run = storage.join(found, DEMO_GENERATOR)
    if storage.exists(storage.join(run, CHECKPOINTS)):
        return latest_checkpoint(run)
    bundled = None if storage.exists(storage.join(found, RUN_CONFIG)) else bundled_folder(path)
    return found if bundled is None else str(bundled)


def named_checkpoint(path: str) -> str:
    """Return the checkpoint that ``path`` names, or ``path`` if it names none.

    ``RUN_DIR/latest`` and ``RUN_DIR/checkpoints/latest`` are the newest complete checkpoint, ``RUN_DIR/best`` is the copy
    of the best one that validation keeps. An existing folder of that name takes precedence. Raises UserError if the run
    has no such checkpoint.
    """
    absolute = storage.absolute(path.rstrip("/"))
    run_dir, _, name = absolute.rpartition("/")
    if name not in (LATEST, BEST) or storage.exists(absolute):
        return path
    if name == LATEST:
        return latest_checkpoint(run_dir.removesuffix(f"/{CHECKPOINTS}"))
    return best_model(run_dir)


def best_model(run_dir: str) -> str:
    """Return the model folder that validation has marked as the best of a run; UserError if there is none."""
    folder = _validation_of(run_dir)
    marked = storage.join(folder, BEST_FILE)
    storage.invalidate_listing(marked)
    if not storage.exists(marked):
        raise UserError(f"run_dir {run_dir}: no best checkpoint, as validation has written no {marked}")
    # Not the path that the file records: the run may have been moved since.
    return validated_model(folder, storage.read_json(marked)["step"])


def _validation_of(run_dir: str) -> str:
    """Return the validation folder of a run, as its configuration names it."""
    file = storage.join(run_dir, RUN_CONFIG)
    config: Any = yaml.safe_load(storage.read_text(file)) if storage.exists(file) else None
    section = config.get("validation") if isinstance(config, dict) else None
    return validation_folder(run_dir, section.get("folder") if isinstance(section, dict) else None)


def validation_folder(run_dir: str, shared: str | None) -> str:
    """Return where a run's validation writes: ``RUN_DIR/validation``, or the folder of the run's name in ``shared``."""
    run_dir = storage.absolute(run_dir.rstrip("/"))
    return storage.join(storage.absolute(shared), run_dir.rpartition("/")[2]) if shared else f"{run_dir}/validation"


def validated_model(folder: str, step: int) -> str:
    """Return the folder of the model that validation measured after ``step`` steps."""
    return storage.join(folder, checkpoint_name(step), "model")


def checkpoint_name(step: int) -> str:
    """Return the folder name of the checkpoint after ``step`` steps; names sort by step."""
    return f"step-{step:07d}"


def checkpoint_step(folder: str) -> int:
    """Return the number of completed steps of a checkpoint folder."""
    return int(folder.rpartition("/step-")[2])


def checkpoint_folders(run_dir: str | Path) -> dict[str, bool]:
    """Return all checkpoint folders of a run, oldest first, and whether each is complete."""
    base = storage.join(storage.absolute(str(run_dir)), CHECKPOINTS)
    storage.invalidate_listing(base)
    fs, path = storage.filesystem(base)
    found = [PurePosixPath(name).relative_to(path.rstrip("/")) for name in storage.retry(lambda: fs.find(path))]
    complete = {name.parts[0] for name in found if name.parts[1:] == (STATE,)}
    names = sorted({name.parts[0] for name in found if name.parts[0].startswith("step-")})
    return {storage.join(base, name): name in complete for name in names}


def finished_checkpoints(run_dir: str | Path) -> list[str]:
    """Return the complete checkpoint folders of a run, oldest first."""
    return [folder for folder, complete in checkpoint_folders(run_dir).items() if complete]


def latest_checkpoint(run_dir: str | Path) -> str:
    """Return the newest complete checkpoint folder of a run; UserError if there is none."""
    folders = finished_checkpoints(run_dir)
    if not folders:
        raise UserError(f"run_dir {run_dir}: no finished checkpoint")
    return folders[-1]
