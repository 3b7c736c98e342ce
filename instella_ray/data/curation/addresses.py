"""Which addresses a downloader may connect to: links of strangers must not lead into the network it runs in."""

from __future__ import annotations

import re
import socket
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address

from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import ThreadedResolver

_NAT64 = IPv6Network("64:ff9b::/96")
_NUMERIC = re.compile(r"[\d.]+|0x[\da-f.x]*", re.IGNORECASE)


class RefusedAddressError(Exception):
    """The host is not on the public internet."""


def is_public(address: str) -> bool:
    """Whether an IP address is a single host's on the public internet.

    Not loopback, private, link-local (where clouds keep their credentials), shared, multicast or reserved, nor an IPv6
    address that stands for such an IPv4 one.
    """
    ip = ip_address(address.partition("%")[0])
    inner = _embedded(ip) if isinstance(ip, IPv6Address) else None
    if inner is not None:
        return is_public(str(inner))
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_unspecified)


def check_literal(host: str) -> None:
    """RefusedAddressError for a host that is an address but no public one, ValueError for one spelled unlike others.

    Such hosts never come to a resolver.
    """
    try:
        public = is_public(host)
    except ValueError:
        if _NUMERIC.fullmatch(host):
            raise
        return  # a name, which the resolver checks
    if not public:
        raise RefusedAddressError(host)


class PublicResolver(AbstractResolver):
    """The system's resolver without addresses that are not public.

    The connection is then made to an address given here, and no other answer of a name server can take its place.
    """

    def __init__(self) -> None:
        self._system = ThreadedResolver()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """The public addresses of ``host``; RefusedAddressError where it has others alone."""
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
