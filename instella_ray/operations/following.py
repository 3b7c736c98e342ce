"""The log of a job as it is written, across lost connections, and how the job ended."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing, suppress

import aiohttp
import requests
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from ..errors import UserError

LOST = (OSError, RuntimeError, aiohttp.ClientError, requests.RequestException)
"""What a head out of reach looks like: refused, cut off in the middle, or answering with an error."""
RETRY_S = 1.0
SILENCE_S = 120.0
"""After so long without a line the connection is made anew: one may be dead without either end having noticed."""
GIVE_UP_S = 300.0


class LogFollower:
    """Prints the log of ``job`` to its end, each line once."""

    def __init__(self, client: JobSubmissionClient, job: str) -> None:
        self.client, self.job = client, job
        self.printed = 0

    def run(self) -> JobDetails:
        """Returns how the job ended; UserError when the cluster has been out of reach for :data:`GIVE_UP_S`."""
        out_of_reach_since: float | None = None
        while True:
            with suppress(*LOST):
                asyncio.run(self._tail())
            try:
                details = self.client.get_job_info(self.job)
                if details.status.is_terminal():
                    # What came after the connection was lost.
                    self._print(self.client.get_job_logs(self.job), 0)
                    return details
                out_of_reach_since = None
            except LOST as error:
                out_of_reach_since = out_of_reach_since or time.monotonic()
                if time.monotonic() - out_of_reach_since > GIVE_UP_S:
                    said = str(error).splitlines()[0]
                    raise UserError(
                        f"{self.job}: the cluster has not answered for {GIVE_UP_S:.0f} s ({said})"
                    ) from None
            time.sleep(RETRY_S)

    async def _tail(self) -> None:
        position = 0  # Ray sends a log from its beginning
        async with aclosing(self.client.tail_job_logs(self.job)) as chunks:  # type: ignore[type-var]
            while True:
                async with asyncio.timeout(SILENCE_S):
                    text = await anext(chunks, None)
                if text is None:
                    return
                self._print(text, position)
                position += len(text)

    def _print(self, text: str, position: int) -> None:
        """Print what is new of ``text``, which begins at character ``position`` of the log."""
        fresh = text[max(0, self.printed - position) :]
        print(fresh, end="", flush=True)
        self.printed = max(self.printed, position + len(text))


def exit_code(details: JobDetails) -> int:
    """A shell's view of how a job ended: its driver's own code, 130 where it was stopped, 1 where nothing is known."""
    if details.status == JobStatus.SUCCEEDED:
        return 0
    if details.status == JobStatus.STOPPED:
        return 130
    code = details.driver_exit_code or 1
    return code if code > 0 else 128 - code
