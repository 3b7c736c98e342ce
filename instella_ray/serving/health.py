"""Whether an endpoint's stages are well, as Ray Serve sees them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from ray import serve
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import DeploymentStatusOverview

TIMEOUT_S = 3.0


async def unhealthy(stages: Mapping[str, DeploymentHandle]) -> list[str]:
    """Stages without a replica that passed its last health check, with what Serve says of them.

    Serve is asked, not the replicas: a call to one that is full waits for its turn, and full is not unhealthy.
    """
    try:
        async with asyncio.timeout(TIMEOUT_S):
            deployments = await asyncio.to_thread(_deployments)
    except Exception as error:
        return [f"Serve: {type(error).__name__}"]
    found = {name: deployments.get(stage.deployment_name) for name, stage in stages.items()}
    return [f"{name}: {about.status.value if about else 'gone'}" for name, about in found.items() if not _alive(about)]


def _deployments() -> dict[str, DeploymentStatusOverview]:
    return serve.status().applications[serve.get_replica_context().app_name].deployments


def _alive(about: DeploymentStatusOverview | None) -> bool:
    # One that is being given new settings goes on with its requests.
    states = about.replica_states.items() if about is not None else ()
    return any(count and state in ("RUNNING", "UPDATING") for state, count in states)
