"""Health of an endpoint's stages according to Ray Serve."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from ray import serve
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import DeploymentStatusOverview

TIMEOUT_S = 3.0


async def unhealthy(stages: Mapping[str, DeploymentHandle]) -> list[str]:
    """Return ``name: status`` of each stage without a replica that passed its last health check.

    Queries Serve rather than the replicas: a call to a fully loaded replica would wait in its queue, and a loaded
    replica is not unhealthy.
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
    # A replica that is being reconfigured continues to process requests.
    states = about.replica_states.items() if about is not None else ()
    return any(count and state in ("RUNNING", "UPDATING") for state, count in states)
