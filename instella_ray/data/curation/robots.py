"""Rules of ``robots.txt`` (RFC 9309), fetched once per server and applied by protego."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable

from protego import Protego
from yarl import URL

CACHED_S = 24 * 3600
"""Time for which rules are valid (s): RFC 9309 asks for no more."""
CACHED_SERVERS = 4096
"""Servers whose rules are kept in memory, the last ones asked for."""


class RobotsRules:
    """Rules of all servers for one user agent; servers are told apart by scheme, host and port.

    ``fetch(URL of robots.txt)`` returns the file, empty if the server has none; an error of it is that of all who wait,
    and the next one asks anew.
    """

    def __init__(self, fetch: Callable[[URL], Awaitable[bytes]], user_agent: str) -> None:
        self._fetch, self._user_agent = fetch, user_agent
        self._rules: OrderedDict[URL, tuple[float, asyncio.Task[Protego]]] = OrderedDict()

    async def allow(self, url: URL) -> bool:
        """Return whether the rules of its server allow to fetch ``url``."""
        server = url.origin()
        asked, rules = self._rules.get(server, (0.0, None))
        failed = rules is not None and rules.done() and (rules.cancelled() or rules.exception() is not None)
        if rules is None or failed or time.monotonic() - asked > CACHED_S:
            rules = asyncio.create_task(self._load(server))
            self._rules[server] = (time.monotonic(), rules)
            if len(self._rules) > CACHED_SERVERS:
                self._rules.popitem(last=False)
        self._rules.move_to_end(server)
        # Shielded, because others wait for it too.
        return bool((await asyncio.shield(rules)).can_fetch(str(url), self._user_agent))

    async def _load(self, server: URL) -> Protego:
        data = await self._fetch(server.with_path("/robots.txt"))
        return Protego.parse(data.decode("utf-8-sig", "replace"))
