"""Where a stream may be pushed to: a URL from a request, held against the operator's list, resolved once and pinned.

Whoever may open URLs through a server can reach what the server reaches. So nothing is opened that the operator has not
named; the name is looked up once and that very address connected to; and a name must not lead inside.
"""

import asyncio
import ipaddress
import re
import socket
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import urlsplit

from server.errors import ApiError

PORTS = {"rtmp": 1935, "rtmps": 443, "https": 443}
"""By scheme: what is pushed to, and its port when the URL names none. HTTPS is WHIP's."""
WANTED = "an address of rtmp://, rtmps:// or, for WHIP, https://, of at most 1024 ASCII characters"
HOST = re.compile(r"[a-z0-9](?:[a-z0-9.-]{0,251}[a-z0-9])?|\[[0-9a-f:.]{2,45}\]")
ENTRY = re.compile(rf"(?:{HOST.pattern})(?::\d{{1,5}})?")
"""What the operator may list: a host, whose default ports are meant, or a host and a port."""


class UnreachableError(Exception):
    """The destination cannot be had; `code` is for programs. No message holds any part of the URL but its host."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class Destination:
    """A URL that may be opened. What follows the host may be a key, and is shown to nobody."""

    scheme: str
    host: str
    """As in the URL: IPv6 in brackets."""
    port: int
    path: str = field(repr=False)
    """With the query."""

    @property
    def kind(self) -> Literal["rtmp", "whip"]:
        return "whip" if self.scheme == "https" else "rtmp"

    @property
    def authority(self) -> str:
        return self.host if self.port == PORTS[self.scheme] else f"{self.host}:{self.port}"

    @property
    def masked(self) -> str:
        return f"{self.scheme}://{self.authority}/***"


def destination(url: str, allowed: Collection[str]) -> Destination:
    """Read a URL. `allowed` is the operator's list. Raises `ApiError` when it must not be opened."""
    if not allowed:
        message = "This server pushes nothing out: its operator must name the hosts with --outputs."
        raise ApiError(403, "outputs_disabled", message)
    # What parsers disagree about is refused before one is asked: white space, backslashes, user names, other scripts.
    if not re.fullmatch(r"[!-~]{1,1024}", url) or re.search(r"[\\@#<>\"^`{|}]", url):
        raise _invalid("it has characters that it must not have")
    match = re.match(r"(?i)(rtmps?|https)://([^/?]+)(/[^?]*)?(\?.*)?$", url)
    if match is None:
        raise _invalid("it has another form")
    try:
        port = urlsplit(url).port
    except ValueError:
        raise _invalid("its port is no port") from None
    scheme, host = match[1].lower(), re.sub(r":\d*$", "", match[2].lower())
    path = (match[3] or "/") + (match[4] or "")
    if not HOST.fullmatch(host) or port == 0:
        raise _invalid("its host is no host")
    if scheme != "https" and not path.strip("/"):
        raise _invalid("the application and the key are missing: rtmp://HOST/APPLICATION/KEY")
    found = Destination(scheme, host, port or PORTS[scheme], path)
    names = {f"{host}:{found.port}"} | ({host} if found.port == PORTS[scheme] else set())
    if not names & set(allowed):
        message = "The operator has not allowed this host and port: they must be listed with --outputs."
        raise ApiError(403, "output_not_allowed", message, param="url")
    return found


def _invalid(what: str) -> ApiError:
    return ApiError(400, "invalid_url", f"`url` must be {WANTED}; {what}.", param="url")


async def resolve(where: Destination) -> str:
    """The one address to connect to. Raises `UnreachableError`.

    An address that the operator listed is taken as it is; a name must lead to public addresses only, whoever may have
    a say in its zone.
    """
    host = where.host.strip("[]")
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        async with asyncio.timeout(10):
            found = await asyncio.get_running_loop().getaddrinfo(host, where.port, type=socket.SOCK_STREAM)
    except (OSError, TimeoutError):
        raise UnreachableError("not_resolved", f"{where.host} cannot be looked up") from None
    addresses = [ipaddress.ip_address(str(each[4][0]).partition("%")[0]) for each in found]
    if not addresses or not all(public(address) for address in addresses):
        raise UnreachableError("address_not_public", f"{where.host} leads to an address that is not public")
    return str(addresses[0])


def public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether the address is one of the internet's, also when it is an IPv4 address in IPv6's clothes."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo and address.teredo[1])
        if inner:
            return public(inner)
        if address in ipaddress.ip_network("64:ff9b::/96"):
            return public(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
    return address.is_global and not address.is_multicast
