"""Classification of storage errors as transient or permanent, by type, errno and HTTP status.

Error texts are not used, because they contain paths. Types are compared by name, so that the libraries need not be imported
for local files.
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
"""Errnos that s3fs assigns to error responses of the store; the response, the error's cause, decides."""
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
"""Whether errors of a type (top-level package and class name) are transient; subclasses take precedence."""


def transient(error: BaseException) -> bool:
    """Return whether a retry of the call may succeed, decided by the outermost error of a known kind.

    Wrapper errors of libraries are of no known kind, so their causes are examined.
    """
    verdicts = (_verdict(cause) for cause in causes(error, context=True))
    return next((verdict for verdict in verdicts if verdict is not None), False)


def _verdict(error: BaseException) -> bool | None:
    """Return whether this error, without its causes, is transient; None if it is of no known kind."""
    if status := http_status(error):
        return status in STATUSES
    for kind in type(error).__mro__:
        if (verdict := TYPES.get(f"{kind.__module__.partition('.')[0]}.{kind.__name__}")) is not None:
            return verdict
    number = error.errno if isinstance(error, OSError) else None
    return None if number is None or number in UNDECIDED_ERRNOS else number in ERRNOS


def http_status(error: BaseException) -> int | None:
    """Return the HTTP status of an error of gcsfs, Google's clients, aiohttp, botocore, requests or httpx; else None."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        answers = [response.get("ResponseMetadata", {}).get("HTTPStatusCode")]
    else:
        names = ("code", "status", "status_code")
        answers = [getattr(where, name, None) for where in (error, response) for name in names]
    numbers = (int(a) for a in answers if isinstance(a, int) or (isinstance(a, str) and a.isdecimal()))
    return next((number for number in numbers if 100 <= number < 600), None)
