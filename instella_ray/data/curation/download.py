"""Image downloader: concurrent HTTP requests with limits per host, retries, and checks of addresses and responses.

Limits concurrent requests per host, backs off exponentially, and respects ``Retry-After``, ``robots.txt``
(:mod:`.robots`) and ``X-Robots-Tag: noai``. Every request has a time limit and every image a size limit; memory holds the
responses being read and the results of one table. Links are asked for as they are written, and every address, of
redirects too, is checked before connecting (:mod:`.addresses`).
"""

from __future__ import annotations

import asyncio
import email.utils
import hashlib
import json
import logging
import re
import socket
import threading
import time
import weakref
import zlib
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import aiohttp
import pyarrow as pa
from multidict import CIMultiDictProxy
from pydantic import Field
from yarl import URL

from ...config import Config
from ...retries import RetryPolicy
from ..formats.names import web_url
from ..formats.parts import DOWNLOAD
from ..stages import Pool, Stage
from .addresses import PublicResolver, RefusedAddressError, check_literal
from .robots import RobotsRules

REDIRECTS = (301, 302, 303, 307, 308)
OPT_OUTS = {"noai", "noimageai"}
"""Directives of ``X-Robots-Tag`` that opt out of training."""
CONTENT_TYPES = ("application/octet-stream", "binary/octet-stream")
"""Accepted content types besides ``image/*``: defaults of object stores. A missing type is accepted too."""
ROBOTS_BYTES = 500 << 10
"""Size at which a ``robots.txt`` is cut off (bytes), at least 500 KiB by RFC 9309."""
ROBOTS_REDIRECTS = 5
"""Maximum number of redirects of a ``robots.txt``, by RFC 9309; behind more there are no rules."""
CHUNK_BYTES = 64 << 10
TABLES_AT_ONCE = 2
"""Tables that an actor processes concurrently: while one waits for its slowest hosts, the other uses the connections."""

Check = Callable[[CIMultiDictProxy[str], str | None], None]

log = logging.getLogger(__name__)


class DownloadConfig(Config):
    """Configuration of downloads; all limits are per actor."""

    actors: int = Field(1, ge=1)
    """Number of downloading processes."""
    concurrency: int = Field(64, ge=1)
    """Maximum number of concurrent requests."""
    per_host: int = Field(4, ge=1)
    """Maximum number of concurrent requests to one host."""
    batch_size: int = Field(512, ge=1)
    """Rows per table, whose images are in memory together; also the maximum number of samples per output tar."""
    timeout_s: float = Field(30, gt=0)
    """Time limit of one request, from connecting to the last byte (s); each redirect is a new request."""
    connect_timeout_s: float = Field(10, gt=0)
    """Time limit of connecting (s)."""
    retries: int = Field(2, ge=0)
    """Retries after 429, 5xx, a timeout, a lost or refused connection, or a temporary DNS failure."""
    backoff_s: float = Field(1, ge=0)
    """Wait before the first retry (s), with jitter; doubles with each further retry."""
    max_retry_after_s: float = Field(60, ge=0)
    """Maximum ``Retry-After`` (s); requests with a longer one are not retried."""
    max_bytes: int = Field(32 << 20, ge=1)
    """Maximum size of an image (bytes)."""
    max_redirects: int = Field(5, ge=0)
    """Maximum number of redirects per link."""
    allow_private: bool = False
    """Also connect to loopback, private and link-local addresses: only for links to your own file server."""
    user_agent: str = Field("instella-ray-dataset/0.1", min_length=1)
    """User-Agent header; add a contact address for operators of the servers."""
    respect_robots: bool = True
    """Skip what the server's ``robots.txt`` forbids to ``user_agent``, and all while it answers with 5xx or not at all."""
    respect_opt_out: bool = True
    """Skip images served with ``X-Robots-Tag: noai`` or ``noimageai``, for any robot."""


def download_stage(cfg: DownloadConfig) -> Stage:
    """Build the stage that downloads the images of rows (:data:`..formats.rows.SCHEMA`) with links."""
    # A quarter of a CPU is enough, because it mostly waits for the network.
    return Stage(partial(Downloader, cfg), Pool(cfg.actors, cpus=0.25, calls_at_once=TABLES_AT_ONCE))


class Downloader:
    """Downloads the images of rows that have no image and no problem, from the ``url`` in their ``meta``.

    A failed download sets the problem of the row to ``download:REASON``, with the reasons ``http_STATUS`` (such as
    ``http_404``), ``timeout``, ``connection``, ``dns``, ``tls``, ``protocol``, ``bad_url``, ``private_address``,
    ``redirects``, ``robots``, ``robots_unreachable``, ``opt_out``, ``content_type``, ``content_encoding``,
    ``too_large``, ``cut_off`` and ``empty``. The bytes are not checked to be an image.
    Thread-safe: threads share the connections.
    """

    def __init__(self, cfg: DownloadConfig) -> None:
        self._loop = asyncio.new_event_loop()
        self._loop.set_default_executor(ThreadPoolExecutor(32, "dns"))
        self._thread = threading.Thread(target=_run, args=(self._loop,), daemon=True)
        self._thread.start()
        self._fetcher = self._wait_for(_open(cfg))
        self._end = weakref.finalize(self, _end, self._loop, self._fetcher)

    def __call__(self, table: pa.Table) -> pa.Table:
        images, problems = table["image"].to_pylist(), table["problem"].to_pylist()
        metas = table["meta"].to_pylist()
        links = {
            row: str(json.loads(metas[row]).get("url", ""))
            for row, (image, problem) in enumerate(zip(images, problems, strict=True))
            if image is None and problem is None
        }
        for row, result in self._wait_for(_all(self._fetcher, links)).items():
            if isinstance(result, bytes):
                images[row] = result
            else:
                problems[row] = DOWNLOAD + result
        for name, values in (("image", images), ("problem", problems)):
            column = table.schema.get_field_index(name)
            table = table.set_column(column, name, pa.array(values, table.schema.field(name).type))
        return table

    def close(self) -> None:
        """Close the connections and stop the thread; also done when the downloader is garbage-collected."""
        self._end()
        self._thread.join()

    def _wait_for(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


class FetchError(Exception):
    """Failed download: its reason, whether to try ``again``, and the ``after`` of ``Retry-After`` (s; 0 without)."""

    def __init__(self, reason: str, *, again: bool = False, after: float = 0) -> None:
        super().__init__(reason)
        self.reason, self.again, self.after = reason, again, after


class Fetcher:
    """Downloads links in one event loop, within the limits of a configuration."""

    def __init__(self, cfg: DownloadConfig, session: aiohttp.ClientSession) -> None:
        self.cfg, self.session = cfg, session
        self._slots = asyncio.Semaphore(cfg.concurrency)
        self._hosts: dict[str, _HostSlots] = {}
        self._robots = RobotsRules(self._robots_file, cfg.user_agent)

    async def fetch(self, link: str) -> bytes | str:
        """Download ``link``: its bytes, or the reason of the failure."""
        policy = RetryPolicy(
            self._may_pass,
            tries=self.cfg.retries + 1,
            first_wait_s=self.cfg.backoff_s,
            jitter=partial(_jitter, link),
            asked_wait_s=_asked_wait_s,
        )
        try:
            return await policy.call_async(partial(self._follow, link))
        except FetchError as error:
            return error.reason

    def _may_pass(self, error: BaseException) -> bool:
        return isinstance(error, FetchError) and error.again and error.after <= self.cfg.max_retry_after_s

    async def close(self) -> None:
        """Close all connections."""
        await self.session.close()

    async def _follow(self, link: str) -> bytes:
        """Download ``link``, following redirects by separate requests, so that each address is checked."""
        url = _url(link)
        for _ in range(self.cfg.max_redirects + 1):
            try:
                if self.cfg.respect_robots and not await self._robots.allow(url):
                    raise FetchError("robots")
                answer = await self._request(url, self._check_image, self.cfg.max_bytes)
            except (FetchError, asyncio.CancelledError):
                raise
            except Exception as error:
                raise _explained(error, url) from error
            if isinstance(answer, bytes):
                return answer
            url = _url(answer, url)
        raise FetchError("redirects")

    async def _robots_file(self, url: URL) -> bytes:
        """Download a ``robots.txt``; empty if the server has none or one that cannot be read."""
        for _ in range(ROBOTS_REDIRECTS + 1):
            try:
                answer = await self._request(url, lambda headers, target: None, ROBOTS_BYTES, cut=True)
                if isinstance(answer, bytes):
                    return answer
                url = _url(answer, url)
            except FetchError as error:
                if error.reason.startswith("http_5"):
                    raise FetchError("robots_unreachable", again=True, after=error.after) from error
                break
        return b""

    def _check_image(self, headers: CIMultiDictProxy[str], target: str | None) -> None:
        """Raise FetchError for the headers of an unwanted response; ``target`` is that of a redirect."""
        if self.cfg.respect_opt_out and _opted_out(headers.getall("X-Robots-Tag", [])):
            raise FetchError("opt_out")
        if target is None and not _may_be_image(headers.get("Content-Type", "")):
            raise FetchError("content_type")

    async def _request(self, url: URL, check: Check, limit: int, *, cut: bool = False) -> bytes | str:
        """Send one request; returns the body, or the target of a redirect.

        ``check`` (headers, target) may refuse the response. A body over ``limit`` bytes is ``cut`` there, or refused.
        """
        host = url.host or ""
        if not self.cfg.allow_private:
            check_literal(host)
        # Acquires the slot of the host first, so that waiting for a busy host does not block requests to others.
        async with self._host_slot(host), self._slots, asyncio.timeout(self.cfg.timeout_s):
            async with self.session.get(url, allow_redirects=False) as response:
                headers, status = response.headers, response.status
                location = headers.get("Location") if status in REDIRECTS else None
                if location is None and not 200 <= status < 300:
                    again = status == 429 or status >= 500
                    raise FetchError(f"http_{status}", again=again, after=_retry_after(headers))
                check(headers, location)
                if location is not None:
                    return location
                if (response.content_length or 0) > limit and not cut:
                    raise FetchError("too_large")
                body = bytearray()
                async for chunk in response.content.iter_chunked(CHUNK_BYTES):
                    body += chunk
                    if len(body) > limit:
                        if not cut:
                            raise FetchError("too_large")
                        del body[limit:]
                        break
        return _decoded(bytes(body), headers.get("Content-Encoding", ""), limit)

    @asynccontextmanager
    async def _host_slot(self, host: str) -> AsyncIterator[None]:
        """Limit concurrent requests to ``host``; idle hosts are removed, because there may be millions."""
        slots = self._hosts.setdefault(host, _HostSlots(self.cfg.per_host))
        slots.users += 1
        try:
            async with slots:
                yield
        finally:
            slots.users -= 1
            if not slots.users:
                del self._hosts[host]


class _HostSlots(asyncio.Semaphore):
    users = 0


def _run(loop: asyncio.AbstractEventLoop) -> None:
    try:
        loop.run_forever()
    finally:
        loop.close()


def _end(loop: asyncio.AbstractEventLoop, fetcher: Fetcher) -> None:
    """Stop ``loop`` without waiting, because this may run in any thread, including that of the loop."""

    async def end() -> None:
        await fetcher.close()
        loop.stop()

    asyncio.run_coroutine_threadsafe(end(), loop)


async def _open(cfg: DownloadConfig) -> Fetcher:
    """Open a session without cookies, proxies, keep-alive and automatic decompression."""
    connector = aiohttp.TCPConnector(
        limit=0,  # limited by the fetcher
        force_close=True,
        ttl_dns_cache=300,
        resolver=None if cfg.allow_private else PublicResolver(),
    )
    session = aiohttp.ClientSession(
        connector=connector,
        cookie_jar=aiohttp.DummyCookieJar(),
        headers={"User-Agent": cfg.user_agent, "Accept": "image/*,*/*;q=0.5", "Accept-Encoding": "identity"},
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=cfg.connect_timeout_s),
        auto_decompress=False,
        trust_env=False,
    )
    return Fetcher(cfg, session)


async def _all(fetcher: Fetcher, links: Mapping[int, str]) -> dict[int, bytes | str]:
    results = await asyncio.gather(*map(fetcher.fetch, links.values()))
    return dict(zip(links, results, strict=True))


def _url(link: str, base: URL | None = None) -> URL:
    """Parse a link as an http or https URL, without user and password; FetchError if it is not one."""
    if (url := web_url(link, base)) is None:
        raise FetchError("bad_url")
    return url


def _explained(error: Exception, url: URL) -> FetchError:
    match error:
        case TimeoutError():
            return FetchError("timeout", again=True)
        case RefusedAddressError():
            return FetchError("private_address")
        case aiohttp.ClientConnectorDNSError():
            return FetchError("dns", again=error.os_error.errno == socket.EAI_AGAIN)
        case aiohttp.ClientSSLError():
            return FetchError("tls")
        case aiohttp.ClientPayloadError():
            return FetchError("cut_off")
        case ValueError():
            return FetchError("bad_url")
        case aiohttp.ClientConnectionError() | OSError():
            return FetchError("connection", again=True)
        case _:
            # An unexpected response must not fail the other downloads.
            log.debug("%s: %r", url, error)
            return FetchError("protocol")


def _opted_out(values: list[str]) -> bool:
    """Return whether any ``X-Robots-Tag`` value contains an opt-out, with or without the name of a robot."""
    return any(OPT_OUTS.intersection(re.split(r"[\s,:;]+", value.lower())) for value in values)


def _may_be_image(content_type: str) -> bool:
    kind = content_type.partition(";")[0].strip().lower()
    return not kind or kind.startswith("image/") or kind in CONTENT_TYPES


def _retry_after(headers: Mapping[str, str]) -> float:
    """Return ``Retry-After`` (s), given as a number or as a date; 0 if missing or invalid."""
    text = headers.get("Retry-After", "").strip()
    if text.isdecimal():
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0


def _asked_wait_s(error: BaseException) -> float:
    return error.after if isinstance(error, FetchError) else 0.0


def _jitter(link: str, failures: int) -> float:
    """Return a factor of 0.5 to 1.5 by a hash of the link, so that downloads that fail together are retried apart."""
    digest = hashlib.sha256(f"{failures - 1} {link}".encode("utf-8", "replace")).digest()
    return 0.5 + digest[0] / 255


def _decoded(body: bytes, encoding: str, limit: int) -> bytes:
    """Decompress a body that a server compressed unrequested, up to ``limit`` bytes; FetchError if that fails."""
    if not body:
        raise FetchError("empty")
    match encoding.strip().lower():
        case "" | "identity":
            return body
        case "gzip" | "x-gzip" | "deflate":
            decoder = zlib.decompressobj(zlib.MAX_WBITS | 32)  # gzip or zlib header
            try:
                plain = decoder.decompress(body, limit + 1)
            except zlib.error:
                raise FetchError("content_encoding") from None
            if len(plain) > limit:
                raise FetchError("too_large")
            if not decoder.eof:
                raise FetchError("cut_off")
            return plain
        case _:
            raise FetchError("content_encoding")
