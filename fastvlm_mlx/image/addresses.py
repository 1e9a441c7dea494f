"""The addresses of the public Internet, told from all others before anything connects to one."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

# Host and port → the texts of its addresses
Resolve = Callable[[str, int], Iterable[str]]

# Beyond what `ipaddress` knows in every version of Python: networks that carry IPv4 addresses
# inside (mapped, compatible, translated, 6to4, Teredo), that are local to a site or a carrier, and
# the hosts by which clouds hand out credentials.
NOT_PUBLIC = [
    ip_network(network)
    for network in (
        "0.0.0.0/8",
        "100.64.0.0/10",
        "168.63.129.16/32",
        "192.0.0.0/24",
        "192.88.99.0/24",
        "198.18.0.0/15",
        "240.0.0.0/4",
        "::/8",
        "100::/64",
        "2001::/23",
        "2001:db8::/32",
        "2002::/16",
        "3fff::/20",
        "5f00::/16",
        "fc00::/7",
        "fec0::/10",
    )
]


class NotPublicError(OSError):
    """A host that is not, or not only, on the public Internet."""


def system_addresses(host: str, port: int) -> list[str]:
    """The addresses of a host as the system finds them."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the public Internet."""
    try:
        ip = ip_address(address)
    except ValueError:
        return False
    special = ip.is_private or ip.is_loopback or ip.is_link_local or ip.is_multicast
    special = special or ip.is_reserved or ip.is_unspecified or not ip.is_global
    return not (special or _has_scope(ip) or any(ip in network for network in NOT_PUBLIC))


def _has_scope(ip: IPv4Address | IPv6Address) -> bool:
    return getattr(ip, "scope_id", None) is not None


def public_address(host: str, port: int, resolve: Resolve = system_addresses) -> str:
    """The address to connect to for a host, every address of which is public.

    Whoever connects to what this returns, and looks the host up no second time, connects to what
    was checked.

    Raises:
        NotPublicError: one of the addresses is not public.
        OSError: the host has no address.
    """
    try:
        addresses = list(resolve(host, port))
    except UnicodeError:
        raise OSError("its host is not a name") from None
    if not addresses:
        raise OSError("its host has no address")
    if not all(map(is_public, addresses)):
        raise NotPublicError("its host is not on the public Internet")
    return addresses[0]
