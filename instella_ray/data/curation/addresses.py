"""Checks of the addresses that a downloader connects to, so that links of a dataset cannot reach the local network."""

from __future__ import annotations

import re
import socket
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address

from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import ThreadedResolver

_NAT64 = IPv6Network("64:ff9b::/96")
_NUMERIC = re.compile(r"[\d.]+|0x[\da-f.x]*", re.IGNORECASE)


class RefusedAddressError(Exception):
    """Host that is not on the public internet; the message is its name."""


def is_public(address: str) -> bool:
    """Return whether an IP address is that of a single host on the public internet.

    False for loopback, private, link-local (such as cloud metadata services with credentials), shared, multicast and
    reserved addresses, and for IPv6 addresses that embed such an IPv4 address.
    """
    ip = ip_address(address.partition("%")[0])
    inner = _embedded(ip) if isinstance(ip, IPv6Address) else None
    if inner is not None:
        return is_public(str(inner))
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_unspecified)


def check_literal(host: str) -> None:
    """Raise RefusedAddressError for a host that is a non-public address, ValueError for a malformed numeric address.

    Needed because such hosts are not passed to the resolver. Names are not checked here.
    """
    try:
        public = is_public(host)
    except ValueError:
        if _NUMERIC.fullmatch(host):
            raise
        return  # a name: checked by the resolver
    if not public:
        raise RefusedAddressError(host)


class PublicResolver(AbstractResolver):
    """System resolver that returns only public addresses.

    The connection is made to the addresses checked here, so a later answer of a name server cannot replace them.
    """

    def __init__(self) -> None:
        self._system = ThreadedResolver()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """Return the public addresses of ``host``; RefusedAddressError if it has none."""
        found = await self._system.resolve(host, port, family)
        public = [entry for entry in found if is_public(entry["host"])]
        if not public:
            raise RefusedAddressError(host)
        return public

    async def close(self) -> None:
        await self._system.close()


def _embedded(ip: IPv6Address) -> IPv4Address | None:
    if ip in _NAT64:
        return IPv4Address(int(ip) & 0xFFFFFFFF)
    return ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
