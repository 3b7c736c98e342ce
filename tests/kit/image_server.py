"""A real HTTP server on loopback with everything that strangers' servers do to a downloader."""

from __future__ import annotations

import asyncio
import gzip
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

from aiohttp import web

from .shards import image_bytes

GOOD = image_bytes(1)
JPEG = {"Content-Type": "image/jpeg"}
ROBOTS = {"plain": "noai", "list": "noindex, NoImageAI", "named": "somebot: noai", "other": "noindex, nofollow"}
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class ImageServer:
    """``/NAME`` misbehaves as its name says, except ``/robots.txt``. Counts requests by path, and how many ran at once."""

    def __init__(self) -> None:
        self.requests: Counter[str] = Counter()
        self.headers: dict[str, str] = {}
        self.robots_requests = 0
        self.robots_answers = [(404, "")]
        """Status and text of each answer for ``/robots.txt``; the last one is repeated."""
        self.running = self.most_at_once = 0
        self.port = 0

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}/{path}"

    async def handle(self, request: web.Request) -> web.StreamResponse:
        if request.path == "/robots.txt":
            self.robots_requests += 1
            status, text = self.robots_answers[min(self.robots_requests, len(self.robots_answers)) - 1]
            return web.Response(status=status, text=text)
        name, _, detail = request.path.lstrip("/").partition("/")
        self.requests[request.path.lstrip("/")] += 1
        self.headers = dict(request.headers)
        self.running += 1
        self.most_at_once = max(self.most_at_once, self.running)
        try:
            handler: Callable[[web.Request, str], Awaitable[web.StreamResponse]] = getattr(self, name)
            return await handler(request, detail)
        finally:
            self.running -= 1

    async def good(self, request: web.Request, detail: str) -> web.Response:
        return web.Response(body=GOOD, headers={**JPEG, "Set-Cookie": "id=1"})

    async def untyped(self, request: web.Request, detail: str) -> web.StreamResponse:
        return await _raw(request, f"HTTP/1.1 200 OK\r\nContent-Length: {len(GOOD)}\r\n\r\n".encode() + GOOD)

    async def status(self, request: web.Request, detail: str) -> web.Response:
        return web.Response(status=int(detail), body=b"sorry", headers=JPEG)

    async def recovers(self, request: web.Request, detail: str) -> web.Response:
        """The first answer has the status and headers of ``detail`` (STATUS or STATUS,Retry-After)."""
        if self.requests[request.path.lstrip("/")] > 1:
            return await self.good(request, detail)
        status, _, after = detail.partition(",")
        return web.Response(status=int(status), headers={"Retry-After": after} if after else {})

    async def never(self, request: web.Request, detail: str) -> web.StreamResponse:
        """Headers, some bytes, and then nothing more."""
        response = web.StreamResponse(headers=JPEG)
        await response.prepare(request)
        await response.write(GOOD[:100])
        await asyncio.sleep(60)
        return response

    async def moment(self, request: web.Request, detail: str) -> web.Response:
        await asyncio.sleep(0.05)
        return await self.good(request, detail)

    async def huge(self, request: web.Request, detail: str) -> web.StreamResponse:
        """Endless, with or without saying so."""
        response = web.StreamResponse(headers=JPEG)
        if detail == "announced":
            response.content_length = 1 << 40
        await response.prepare(request)
        while True:
            await response.write(bytes(1 << 16))

    async def bomb(self, request: web.Request, detail: str) -> web.Response:
        return web.Response(body=gzip.compress(bytes(64 << 20)), headers={**JPEG, "Content-Encoding": "gzip"})

    async def compressed(self, request: web.Request, detail: str) -> web.Response:
        return web.Response(body=gzip.compress(GOOD), headers={**JPEG, "Content-Encoding": detail})

    async def html(self, request: web.Request, detail: str) -> web.Response:
        return web.Response(text="<html>gone</html>", content_type="text/html")

    async def liar(self, request: web.Request, detail: str) -> web.Response:
        return web.Response(text="<html>gone</html>", content_type="image/jpeg")

    async def cut(self, request: web.Request, detail: str) -> web.StreamResponse:
        return await _raw(request, b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nContent-Length: 5000\r\n\r\nabc")

    async def hangup(self, request: web.Request, detail: str) -> web.StreamResponse:
        return await _raw(request, b"")

    async def garbage(self, request: web.Request, detail: str) -> web.StreamResponse:
        return await _raw(request, b"\xff\xfe this is no HTTP\r\n\r\n")

    async def empty(self, request: web.Request, detail: str) -> web.Response:
        return web.Response(body=b"", headers=JPEG)

    async def robots(self, request: web.Request, detail: str) -> web.Response:
        return web.Response(body=GOOD, headers={**JPEG, "X-Robots-Tag": ROBOTS[detail]})

    async def to(self, request: web.Request, detail: str) -> web.Response:
        """A redirect to the rest of the path, or to the address in the query."""
        return web.Response(status=302, headers={"Location": request.query.get("url", f"/{detail}")})

    async def loop(self, request: web.Request, detail: str) -> web.Response:
        return web.Response(status=301, headers={"Location": f"/loop/{int(detail or 0) + 1}"})


async def _raw(request: web.Request, data: bytes) -> web.StreamResponse:
    """Bytes as they are, and the end of the connection."""
    assert request.transport is not None
    request.transport.write(data)  # type: ignore[attr-defined]
    request.transport.close()
    return web.StreamResponse()


@contextmanager
def serving(handle: Handler, port: int = 0) -> Iterator[int]:
    """Run a server in a thread; gives its port. OSError where that is taken."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def start() -> web.ServerRunner:
        runner = web.ServerRunner(web.Server(handle), shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        return runner

    async def stop(runner: web.ServerRunner) -> None:
        await runner.cleanup()
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    try:
        runner = asyncio.run_coroutine_threadsafe(start(), loop).result()
        try:
            yield runner.addresses[0][1]
        finally:
            asyncio.run_coroutine_threadsafe(stop(runner), loop).result()
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
