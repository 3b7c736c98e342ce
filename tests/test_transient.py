"""Which errors of a storage may pass: told by type, errno and status, whatever path the text holds."""

from __future__ import annotations

import errno
import http.client
import socket
import ssl
import urllib.error
from collections.abc import Callable, Iterator
from email.message import Message
from unittest.mock import Mock

import aiohttp
import httpx
import pytest
import requests
from fsspec.exceptions import FSTimeoutError
from yarl import URL

from instella_ray.errors import UserError
from instella_ray.transient import http_status, transient

PATH = "bucket/run-503/step-0000500/timed out"
"""What a path may hold by chance."""
INFO = aiohttp.RequestInfo(URL("http://s/503"), "GET", {}, URL("http://s/503"))  # type: ignore[arg-type]
PEER = Mock(ssl=True, host="s", port=443)


def of_errno(number: int) -> OSError:
    return OSError(number, "text", PATH)


def of_gcsfs(code: int | str) -> Exception:
    retry = pytest.importorskip("gcsfs.retry", reason="the extra 'gcs' is not installed")
    error: Exception = retry.HttpError({"code": code, "message": f"the object {PATH}"})
    return error


def of_aiohttp(status: int) -> Exception:
    return aiohttp.ClientResponseError(INFO, (), status=status, message=PATH)


def of_requests(status: int) -> Exception:
    response = requests.Response()
    response.status_code = status
    return requests.HTTPError(PATH, response=response)


def of_httpx(status: int) -> Exception:
    request = httpx.Request("GET", f"http://{PATH.replace(' ', '')}")
    return httpx.HTTPStatusError(PATH, request=request, response=httpx.Response(status, request=request))


class ClientError(Exception):
    """As botocore's, which is not installed: the answer as a dictionary."""

    def __init__(self, status: int) -> None:
        super().__init__(f"An error occurred (503) when calling the PutObject operation: {PATH}")
        self.response = {"Error": {"Code": "503"}, "ResponseMetadata": {"HTTPStatusCode": status}}


def of_urllib(status: int) -> Exception:
    return urllib.error.HTTPError(f"http://{PATH}", status, PATH, Message(), None)


def of_google(name: str) -> Exception:
    exceptions = pytest.importorskip("google.api_core.exceptions", reason="the extra 'gcs' is not installed")
    error: Exception = getattr(exceptions, name)(PATH)
    return error


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.ENOENT, errno.EACCES, errno.EPERM, errno.EROFS])
def test_a_disk_that_refuses_goes_on_refusing(number: int) -> None:
    assert not transient(of_errno(number))


@pytest.mark.parametrize("number", [errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.EINVAL, errno.ENAMETOOLONG])
def test_a_wrong_name_stays_wrong(number: int) -> None:
    assert not transient(of_errno(number))


@pytest.mark.parametrize(
    "name",
    [
        "ECONNRESET",
        "ECONNREFUSED",
        "ECONNABORTED",
        "EPIPE",
        "ETIMEDOUT",
        "EHOSTUNREACH",
        "ENETUNREACH",
        "EAGAIN",
        "EINTR",
        "ESTALE",
    ],
)
def test_a_network_comes_back(name: str) -> None:
    assert transient(of_errno(getattr(errno, name)))


@pytest.mark.parametrize("make", [of_gcsfs, of_aiohttp, of_requests, of_httpx, ClientError, of_urllib])
def test_answers_are_told_by_their_status(make: Callable[[int], Exception]) -> None:
    for status in (408, 429, 500, 502, 503, 504):
        assert http_status(make(status)) == status and transient(make(status)), status
    for status in (400, 401, 403, 404, 409, 412, 416, 501):
        assert http_status(make(status)) == status and not transient(make(status)), status


def test_a_status_may_be_a_word_or_a_member() -> None:
    assert transient(of_gcsfs("503")) and not transient(of_gcsfs("403"))
    assert transient(of_google("ServiceUnavailable")) and not transient(of_google("Forbidden"))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (TimeoutError(), True),
        (FSTimeoutError(), True),
        (ConnectionError("reset"), True),
        (ConnectionResetError(), True),
        (BrokenPipeError(), True),
        (http.client.IncompleteRead(b"half"), True),
        (http.client.RemoteDisconnected(), True),
        (socket.gaierror(socket.EAI_AGAIN, "busy"), True),
        (socket.gaierror(socket.EAI_NONAME, "unknown"), False),
        (ssl.SSLEOFError(8, "EOF"), True),
        (ssl.SSLCertVerificationError(1, "self-signed certificate"), False),
        (aiohttp.ServerDisconnectedError(), True),
        (aiohttp.ClientOSError(errno.ECONNRESET, "reset"), True),
        (aiohttp.ClientConnectorError(PEER, OSError(errno.ECONNREFUSED, "refused")), True),
        (aiohttp.ServerTimeoutError(), True),
        (aiohttp.ClientPayloadError("not all of it"), True),
        (aiohttp.ClientConnectorCertificateError(PEER, Exception("self-signed")), False),
        (aiohttp.InvalidURL(PATH), False),
        (requests.ConnectionError("503"), True),
        (requests.exceptions.ProxyError(), True),  # gcsfs makes it of a 502
        (requests.exceptions.ReadTimeout(), True),
        (requests.exceptions.ChunkedEncodingError(), True),
        (requests.exceptions.SSLError(), False),
        (FileNotFoundError(PATH), False),
        (FileExistsError(PATH), False),
        (PermissionError(PATH), False),
        (IsADirectoryError(PATH), False),
        (OSError("503 Service Unavailable"), False),
        (OSError(f"Forbidden: {PATH}"), False),
        (RuntimeError("Connection reset"), False),
        (ValueError("timed out"), False),
        (UserError(PATH), False),
        (MemoryError(), False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else str(value),
)
def test_errors_without_a_number_are_told_by_their_type(error: Exception, expected: bool) -> None:
    assert transient(error) is expected


def behind(outer: Exception, inner: BaseException) -> Exception:
    """``outer`` raised from ``inner``."""
    try:
        raise outer from inner
    except Exception as error:
        return error


def after(outer: Exception, inner: Exception) -> Exception:
    """``outer`` raised while ``inner`` was handled."""
    try:
        try:
            raise inner
        except Exception:
            raise outer  # noqa: B904
    except Exception as error:
        return error


class HasCause(Exception):
    """As Ray and google.api_core wrap errors."""

    def __init__(self, cause: Exception) -> None:
        super().__init__("wrapped")
        self.cause = cause


def wrapped() -> Iterator[tuple[Exception, bool]]:
    full, busy, missing = of_errno(errno.ENOSPC), of_aiohttp(503), FileNotFoundError(PATH)
    yield behind(RuntimeError("reading failed"), busy), True
    yield behind(OSError("reading failed"), busy), True
    yield behind(RuntimeError("503"), full), False
    yield after(RuntimeError("reading failed"), busy), True
    yield HasCause(busy), True
    yield HasCause(full), False
    # The outermost error that says anything: what was handled before may be long settled.
    yield after(full, busy), False
    yield behind(full, busy), False
    yield after(busy, missing), True
    yield behind(missing, busy), False
    # As s3fs does with the answers of a store.
    yield behind(OSError(errno.EBUSY, "Please reduce your request rate"), ClientError(503)), True
    yield behind(OSError(errno.EREMOTEIO, "We encountered an internal error"), ClientError(500)), True
    yield behind(OSError(errno.EBUSY, "conflict"), ClientError(409)), False
    yield behind(PermissionError("Access Denied"), ClientError(403)), False
    # A disk that breaks, and a folder that is mounted, have no store behind them.
    yield of_errno(errno.EIO), False
    yield of_errno(errno.EBUSY), False


@pytest.mark.parametrize(("error", "expected"), wrapped())
def test_what_is_behind_an_error_counts_where_it_says_nothing_itself(error: Exception, expected: bool) -> None:
    assert transient(error) is expected


def test_what_is_raised_from_nothing_has_nothing_behind_it() -> None:
    try:
        try:
            raise of_aiohttp(503)
        except Exception:
            raise RuntimeError("settled") from None
    except RuntimeError as error:
        assert not transient(error)


def test_a_circle_of_causes_ends() -> None:
    first, second = RuntimeError("one"), RuntimeError("two")
    first.__cause__, second.__cause__ = second, first
    assert not transient(first)
