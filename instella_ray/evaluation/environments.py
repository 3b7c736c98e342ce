"""Isolated Ray environments of actors whose packages do not fit this project's, and the start of such actors.

Ray requires its own and Python's version in every worker, so an environment has the Python of the cluster. With ``uv`` Ray
clones the node's environment (or stacks one on it) and installs the packages there, once per node.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import pydantic

from ..config import Config
from ..errors import UserError

REASON_LINES = 3
"""Most lines of an error that are told."""


class EnvironmentConfig(Config):
    """Where an actor with packages of its own gets them from: by default Ray installs them."""

    image_uri: str | None = None
    """Container image with all packages, instead of installing them."""
    conda: str | None = None
    """Conda environment with all packages, present on every node, instead of installing them."""
    gpus: float = pydantic.Field(default=0, ge=0)
    """GPUs of the actor, or a share of one."""

    def runtime_env(self, packages: Sequence[str], **options: Any) -> dict[str, Any]:
        """Return Ray's ``runtime_env``, with ``packages`` to install unless an image or environment has them.

        ``options``: those of Ray's ``uv``.
        """
        if self.image_uri:
            return {"image_uri": self.image_uri}
        if self.conda:
            return {"conda": self.conda}
        return {"uv": {"packages": list(packages), "uv_check": False, **options}}


def start_actor(
    worker: type, arguments: Mapping[str, Any], *, asker: str, runtime_env: dict[str, Any], gpus: float
) -> tuple[Any, dict[str, Any]]:
    """Start an actor of ``worker`` with ``arguments``; returns it and what its method ``about`` returns once it has loaded.

    The worker's module is sent along, so the environment needs only what this module imports. Raises UserError, prefixed
    with ``asker``, if the environment cannot be set up or the worker not be made.
    """
    import ray

    if not ray.is_initialized():
        raise UserError(f"{asker}: needs packages of its own, for which Ray makes an environment: not with local")
    module = sys.modules[worker.__module__]
    ray.cloudpickle.register_pickle_by_value(module)
    try:
        remote: Any = ray.remote(worker).options(num_gpus=gpus, runtime_env=runtime_env)
        actor = remote.remote(**arguments)
        return actor, ray.get(actor.about.remote())
    except ray.exceptions.RuntimeEnvSetupError as error:
        raise UserError(f"{asker}: its environment could not be set up: {_last_lines(error)}") from None
    except (ray.exceptions.RayActorError, ray.exceptions.RayTaskError) as error:
        raise UserError(f"{asker}: its actor could not start: {_last_lines(error)}") from None
    finally:
        ray.cloudpickle.unregister_pickle_by_value(module)


def _last_lines(error: Exception) -> str:
    """Return the end of an error's text in one line, where the reason stands, without the traceback before it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reasons = [number for number, line in enumerate(lines) if re.match(r"[\w.]+(Error|Exception)\b", line)]
    return " ".join(lines[reasons[-1] if reasons else 0 :][-REASON_LINES:])
