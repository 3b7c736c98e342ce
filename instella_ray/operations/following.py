"""Streaming of a job's log across connection losses, and the job's exit code."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing, suppress

import aiohttp
import requests
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from ..errors import UserError

LOST = (OSError, RuntimeError, aiohttp.ClientError, requests.RequestException)
"""Errors of an unreachable head: connection refused, interrupted, or an error response."""
RETRY_S = 1.0
SILENCE_S = 120.0
"""Seconds without output after which to reconnect, as a connection may be broken undetected."""
GIVE_UP_S = 300.0
"""Seconds without a response from the cluster after which to stop."""


class LogFollower:
    """Prints the log of ``job`` until it ends, each line once."""

    def __init__(self, client: JobSubmissionClient, job: str) -> None:
        self.client, self.job = client, job
        self.printed = 0

    def run(self) -> JobDetails:
        """Print the log and return the job's final state.

        Raises UserError if the cluster has been unreachable for :data:`GIVE_UP_S`.
        """
        unreachable_since: float | None = None
        while True:
            with suppress(*LOST):
                asyncio.run(self._tail())
            try:
                details = self.client.get_job_info(self.job)
                if details.status.is_terminal():
                    # Print output since the connection was lost.
                    self._print(self.client.get_job_logs(self.job), 0)
                    return details
                unreachable_since = None
            except LOST as error:
                unreachable_since = unreachable_since or time.monotonic()
                if time.monotonic() - unreachable_since > GIVE_UP_S:
                    reason = str(error).splitlines()[0]
                    raise UserError(
                        f"{self.job}: the cluster has not answered for {GIVE_UP_S:.0f} s ({reason})"
                    ) from None
            time.sleep(RETRY_S)

    async def _tail(self) -> None:
        position = 0  # Ray always sends a log from its start
        async with aclosing(self.client.tail_job_logs(self.job)) as chunks:  # type: ignore[type-var]
            while True:
                async with asyncio.timeout(SILENCE_S):
                    text = await anext(chunks, None)
                if text is None:
                    return
                self._print(text, position)
                position += len(text)

    def _print(self, text: str, position: int) -> None:
        """Print the part of ``text`` not printed yet; ``text`` starts at character ``position`` of the log."""
        fresh = text[max(0, self.printed - position) :]
        print(fresh, end="", flush=True)
        self.printed = max(self.printed, position + len(text))


def exit_code(details: JobDetails) -> int:
    """Return the shell exit code of a job: its driver's code, 130 if stopped, 1 if unknown; 128 + n for signal n."""
    if details.status == JobStatus.SUCCEEDED:
        return 0
    if details.status == JobStatus.STOPPED:
        return 130
    code = details.driver_exit_code or 1
    return code if code > 0 else 128 - code
