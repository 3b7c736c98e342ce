"""Errors of a storage after which the same call may go through a moment later: by type, errno and HTTP status.

Never by an error's text, which holds paths. Types are known by their names, because none of these libraries is loaded
for a local file.
"""

from __future__ import annotations

import errno
import socket

from .retries import causes

STATUSES = {408, 425, 429, 500, 502, 503, 504}
ERRNOS = {
    errno.EAGAIN,
    errno.EINTR,
    errno.ESTALE,
    errno.EPIPE,
    errno.ETIMEDOUT,
    errno.ECONNRESET,
    errno.ECONNABORTED,
    errno.ECONNREFUSED,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.ENETRESET,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    socket.EAI_AGAIN,
}
UNDECIDED_ERRNOS = {errno.EIO, errno.EREMOTEIO, errno.EBUSY}
"""s3fs gives these to answers of the store, raised from the answer itself."""
TYPES = {
    "builtins.TimeoutError": True,
    "builtins.ConnectionError": True,
    "builtins.BlockingIOError": True,
    "builtins.InterruptedError": True,
    "builtins.FileNotFoundError": False,
    "builtins.FileExistsError": False,
    "builtins.PermissionError": False,
    "builtins.IsADirectoryError": False,
    "builtins.NotADirectoryError": False,
    "http.IncompleteRead": True,
    "ssl.SSLEOFError": True,
    "ssl.SSLZeroReturnError": True,
    "ssl.SSLError": False,
    "aiohttp.ClientSSLError": False,
    "aiohttp.ClientConnectionError": True,
    "aiohttp.ClientPayloadError": True,
    "requests.SSLError": False,
    "requests.ConnectionError": True,
    "requests.Timeout": True,
    "requests.ChunkedEncodingError": True,
    "botocore.SSLError": False,
    "botocore.ConnectionError": True,
    "botocore.HTTPClientError": True,
    "gcsfs.ChecksumError": True,
    "gcsfs.NonRetryableError": False,
    "google.TransportError": True,
}
"""Whether errors of a type (its package and its name) are transient; a more special type goes first."""


def transient(error: BaseException) -> bool:
    """True when the call may succeed if it is made again: the outermost error says so that says anything.

    What libraries raise around what went wrong says nothing, so what is behind it is asked.
    """
    verdicts = (_verdict(cause) for cause in causes(error, context=True))
    return next((verdict for verdict in verdicts if verdict is not None), False)


def _verdict(error: BaseException) -> bool | None:
    """Whether this one error is transient, or None where it does not say."""
    if status := http_status(error):
        return status in STATUSES
    for kind in type(error).__mro__:
        if (verdict := TYPES.get(f"{kind.__module__.partition('.')[0]}.{kind.__name__}")) is not None:
            return verdict
    number = error.errno if isinstance(error, OSError) else None
    return None if number is None or number in UNDECIDED_ERRNOS else number in ERRNOS


def http_status(error: BaseException) -> int | None:
    """The status of the answer that an error stands for: of gcsfs, Google's, aiohttp's, botocore's, requests', httpx's."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        answers = [response.get("ResponseMetadata", {}).get("HTTPStatusCode")]
    else:
        names = ("code", "status", "status_code")
        answers = [getattr(where, name, None) for where in (error, response) for name in names]
    numbers = (int(a) for a in answers if isinstance(a, int) or (isinstance(a, str) and a.isdecimal()))
    return next((number for number in numbers if 100 <= number < 600), None)
