"""Where a stream may be pushed to: parse the URL, check it against the operator's list, resolve it, connect to it.

A client that can make the server open URLs can reach whatever the server can reach (SSRF). So only hosts that the
operator listed are opened, a name is resolved once and that same address is connected to, and a name must not resolve
to a private address.
"""

import asyncio
import ipaddress
import re
import socket
import ssl
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal, Protocol
from urllib.parse import urlsplit

from server.errors import ApiError
from server.media.viewer import Viewer

DEFAULT_PORTS = {"rtmp": 1935, "rtmps": 443, "https": 443}
"""The schemes that can be pushed to, each with its default port. HTTPS means WHIP."""
CONNECT_SECONDS = 15.0
"""From the first packet until the server accepts the stream."""
OUTPUT_URL = "an address of rtmp://, rtmps:// or, for WHIP, https://, of at most 1024 ASCII characters"
HOST = re.compile(r"[a-z0-9](?:[a-z0-9.-]{0,251}[a-z0-9])?|\[[0-9a-f:.]{2,45}\]")
ENTRY = re.compile(rf"({HOST.pattern})(?::(\d{{1,5}}))?")
"""An entry of the operator's list: a host (at its scheme's default port) or a host and a port."""
LISTED = "a host in lower case, or HOST:PORT: live.example:1936"


class UnreachableError(Exception):
    """The destination cannot be used; `code` is machine-readable. The message names the host and nothing else of the
    URL."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class Destination:
    """A URL that the operator allows. Everything after the host may be a secret key and is never shown."""

    scheme: str
    host: str
    """As in the URL: an IPv6 address is in brackets."""
    port: int
    path: str = field(repr=False)
    """Path and query."""

    @property
    def kind(self) -> Literal["rtmp", "whip"]:
        return "whip" if self.scheme == "https" else "rtmp"

    @property
    def authority(self) -> str:
        """Host, and port unless it is the scheme's default."""
        return self.host if self.port == DEFAULT_PORTS[self.scheme] else f"{self.host}:{self.port}"

    @property
    def masked(self) -> str:
        """The URL without its secret part, as clients see it."""
        return f"{self.scheme}://{self.authority}/***"


def is_listable(entry: str) -> bool:
    """Whether an entry of the operator's list can ever match a URL that can be connected to."""
    match = ENTRY.fullmatch(entry)
    if match is None or (match[2] and not 1 <= int(match[2]) <= 65535):
        return False
    host = match[1]
    # As browsers have it (WHATWG URL, "ends in a number checker"): such a host is an IPv4 address or nothing.
    if host.startswith("[") or re.fullmatch(r"\d+|0x[0-9a-f]*", host.rpartition(".")[2]):
        try:
            ipaddress.ip_address(host.strip("[]"))
        except ValueError:
            return False
    return True


def parse_destination(url: str, allowed: Collection[str]) -> Destination:
    """Parse a URL. `allowed` is the operator's list. Raises `ApiError` if the URL is invalid or not allowed."""
    if not allowed:
        message = "This server pushes nothing out: its operator must name the hosts with --outputs."
        raise ApiError(403, "outputs_disabled", message)
    # Refuse what URL parsers disagree about: white space, backslashes, user names, non-ASCII characters.
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
    if scheme != "https" and not re.match(r"/[^/?]", path):
        raise _invalid("the application and the key are missing: rtmp://HOST/APPLICATION/KEY")
    found = Destination(scheme, host, port or DEFAULT_PORTS[scheme], path)
    names = {f"{host}:{found.port}"} | ({host} if found.port == DEFAULT_PORTS[scheme] else set())
    if not names & set(allowed):
        message = "The operator has not allowed this host and port: they must be listed with --outputs."
        raise ApiError(403, "output_not_allowed", message, param="url")
    return found


def _invalid(what: str) -> ApiError:
    return ApiError(400, "invalid_url", f"`url` must be {OUTPUT_URL}; {what}.", param="url")


async def resolve(target: Destination) -> str:
    """The address to connect to. Raises `UnreachableError`.

    An IP address that the operator listed is used as it is. A name must resolve to public addresses only, because its
    DNS records may be under somebody else's control; `localhost` has none (RFC 6761, section 6.3).
    """
    host = target.host.strip("[]")
    if host == "localhost":
        return "127.0.0.1"
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        async with asyncio.timeout(10):
            found = await asyncio.get_running_loop().getaddrinfo(host, target.port, type=socket.SOCK_STREAM)
    except (OSError, TimeoutError):
        raise UnreachableError("not_resolved", f"{target.host} cannot be looked up") from None
    addresses = [ipaddress.ip_address(str(each[4][0]).partition("%")[0]) for each in found]
    if not addresses or not all(is_public(address) for address in addresses):
        raise UnreachableError(
            "address_not_public", f"{target.host} leads to an address that is not public: list the address"
        )
    return str(addresses[0])


async def connect(target: Destination, address: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect to the resolved address; over TLS, the certificate must be valid for the host. Raises
    `UnreachableError`."""
    secure = target.scheme != "rtmp"
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            return await asyncio.open_connection(
                address,
                target.port,
                ssl=ssl.create_default_context() if secure else None,
                server_hostname=target.host.strip("[]") if secure else None,
            )
    except ssl.SSLCertVerificationError:
        raise UnreachableError("certificate_refused", f"the certificate of {target.host} is not valid for it") from None
    except (OSError, TimeoutError):
        raise UnreachableError("not_connected", f"{target.authority} cannot be connected to") from None


class Feed(Protocol):
    """The stream's side of a push: where its frames come from, and whom it tells that it is live."""

    @property
    def h264_level(self) -> int:
        """The stream's level_idc in H.264."""

    async def attach(self, viewer: Viewer) -> None:
        """Start queueing the stream's frames for this viewer. Raises `ApiError` if the stream has too many viewers."""

    def request_key(self, viewer: Viewer) -> None:
        """Ask for a keyframe: the receiver cannot show anything before it."""

    def on_live(self) -> None:
        """The server has accepted the stream."""


def is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether the address is globally routable. An IPv4 address embedded in IPv6 is judged as the IPv4 address."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo and address.teredo[1])
        if inner:
            return is_public(inner)
        if address in ipaddress.ip_network("64:ff9b::/96"):
            return is_public(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
    return address.is_global and not address.is_multicast
