"""Client of a remote cluster, through its dashboard's address and token."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient
from ray.util.state import list_nodes
from ray.util.state.exception import RayStateApiException

from ..errors import UserError

ADDRESS = "RAY_API_SERVER_ADDRESS"
LOCAL = "http://127.0.0.1:8265"
MOST_NODES = 10_000


def named_address(address: str | None) -> str | None:
    """Return ``address``, or else that in Ray's environment variables; None if there is none."""
    return address or os.environ.get(ADDRESS) or os.environ.get("RAY_ADDRESS") or None


class ClusterClient:
    """Client of the cluster at ``address`` (None: :func:`named_address`, or this machine).

    Raises UserError if it does not answer or rejects the token.
    """

    def __init__(self, address: str | None) -> None:
        self.address = named_address(address) or LOCAL
        os.environ[ADDRESS] = self.address  # Ray's clients prefer this variable to their argument
        for module in ("dashboard_sdk", "job.sdk"):  # they log uploads and closed connections
            logging.getLogger(f"ray.dashboard.modules.{module}").setLevel(logging.WARNING)
        with self.reached():
            self.jobs = JobSubmissionClient(self.address)

    def nodes(self) -> list[dict[str, float]]:
        """Return the total resources of each alive node, by Ray's resource names."""
        with self.reached():
            states = list_nodes(address=self.address, filters=[("state", "=", "ALIVE")], limit=MOST_NODES)
            return [dict(state.resources_total) for state in states]

    @contextmanager
    def reached(self) -> Iterator[None]:
        """Convert authentication and connection errors to a UserError with one line."""
        try:
            yield
        except AuthenticationError:
            raise UserError(
                f"{self.address}: the token is missing or wrong; expected RAY_AUTH_MODE=token, and this cluster's token "
                "in RAY_AUTH_TOKEN or ~/.ray/auth_token"
            ) from None
        except (ConnectionError, requests.RequestException, RayStateApiException) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{self.address}: expected the dashboard of a running Ray cluster ({reason})") from None
