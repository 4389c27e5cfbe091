"""The outermost ASGI middleware: what proxies say about the client, its URL and the path prefix of this server.

`Forwarded` (RFC 7239) and `X-Forwarded-For`, `-Host`, `-Proto` and `-Prefix` are believed only from trusted proxies:
this machine, and those that the operator names. A proxy appends to such a header what it saw, and passes on what its
client had sent, so lists are read from the right, one entry per trusted proxy. Malformed values are ignored.
"""

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from urllib.parse import quote

from starlette.datastructures import Headers
from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.routing import BASE_URL, is_host, make_base_url
from server.config import is_root_path

Address = IPv4Address | IPv6Address

TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
PAIR = re.compile(rf'[ \t]*(?:({TOKEN})=({TOKEN}|"(?:[^"\\]|\\.)*")[ \t]*)?(;|,|$)')
"""One parameter of `Forwarded`, which may be missing, and what follows it (RFC 7239, section 4)."""


class ProxyMiddleware:
    """Notes each client's `BaseUrl` in the scope, replaces the address of a trusted proxy by the client's, and takes
    the prefix off the path, whether or not the proxy has done so."""

    def __init__(self, app: ASGIApp, *, trusted: Sequence[str] = (), root_path: str = "") -> None:
        """`trusted` are addresses and networks of proxies; `root_path` is a prefix that does not depend on a proxy."""
        self._app = app
        self._trusted = [ipaddress.ip_network(each, strict=False) for each in trusted]
        self._root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        told = self._told(scope, Headers(scope=scope))
        prefix = self._root_path or told.prefix
        base = make_base_url(scope, scheme=told.scheme, host=told.host, prefix=prefix)
        path, raw_path = scope["path"], scope["raw_path"]
        if prefix and path == prefix and scope["type"] == "http":
            # Without the slash the page's relative addresses would lead out of the prefix.
            query = scope["query_string"].decode("latin-1")
            location = base.url("/") + (f"?{query}" if query else "")
            await RedirectResponse(location, 308)(scope, receive, send)
            return
        if prefix and path.startswith(prefix + "/"):
            path = path.removeprefix(prefix)
            raw = raw_path.removeprefix(prefix.encode())
            raw_path = raw if raw != raw_path else quote(path).encode()  # the prefix was percent-encoded
        forwarded = {
            BASE_URL: base,
            "scheme": base.scheme if scope["type"] == "http" else base.scheme.replace("http", "ws"),
            "client": (told.client, 0) if told.client else scope["client"],
            "path": path,
            "raw_path": raw_path,
        }
        await self._app({**scope, **forwarded}, receive, send)

    def _told(self, scope: Scope, headers: Headers) -> "Told":
        """What trusted proxies say about this request."""
        peer = address_of(scope["client"][0]) if scope["client"] else None
        if peer is None or not self._trusts(peer):
            return Told()
        standard = read_forwarded(",".join(headers.getlist("forwarded")))
        # A proxy that sets one family of headers passes on what its client sent in the other. Most set X-Forwarded-*.
        nodes = listed(headers, "x-forwarded-for") or [each.get("for", "") for each in standard]
        client, proxies = peer, 0
        for node in reversed(nodes):
            proxies += 1
            address = address_of(node)
            if address is None:
                break
            client = address
            if not self._trusts(address):
                break

        def nearest(name: str) -> str:
            """The entry that the outermost trusted proxy made, which saw the client itself."""
            values = listed(headers, f"x-forwarded-{name}") or [each.get(name, "") for each in standard]
            return values[-min(max(1, proxies), len(values))] if values else ""

        host, scheme = nearest("host"), nearest("proto").lower()
        prefix = nearest("prefix").rstrip("/")
        return Told(
            client="" if client == peer else str(client),
            host=host if is_host(host) else "",
            scheme={"http": "http", "https": "https", "ws": "http", "wss": "https"}.get(scheme, ""),
            prefix=prefix if is_root_path(prefix) else "",
        )

    def _trusts(self, address: Address) -> bool:
        return address.is_loopback or any(
            address.version == network.version and address in network for network in self._trusted
        )


@dataclass(frozen=True, slots=True)
class Told:
    """What proxies say; empty where they say nothing that can be believed."""

    client: str = ""
    """Address."""
    host: str = ""
    """A host, and the port if it is not the scheme's own."""
    scheme: str = ""
    prefix: str = ""


def listed(headers: Headers, name: str) -> list[str]:
    """The items of a header that may be repeated, and whose values may be lists (RFC 9110, section 5.3)."""
    values = headers.getlist(name)
    return [each.strip() for each in ",".join(values).split(",")] if values else []


def read_forwarded(text: str) -> list[dict[str, str]]:
    """The elements of a `Forwarded` header (RFC 7239, section 4), with names in lower case; none if it is malformed."""
    elements: list[dict[str, str]] = [{}]
    at = 0
    while at < len(text):
        match = PAIR.match(text, at)
        if match is None:
            return []
        if match[1]:
            name, value = match[1].lower(), match[2]
            if name in elements[-1]:
                return []
            elements[-1][name] = re.sub(r"\\(.)", r"\1", value[1:-1]) if value.startswith('"') else value
        if match[3] == ",":
            elements.append({})
        at = match.end()
    return [element for element in elements if element]


def address_of(node: str) -> Address | None:
    """The IP address of a node, which may have brackets and a port (RFC 7239, section 6); None if it names none."""
    if match := re.fullmatch(r"\[([0-9A-Fa-f:.]+)\](:\w+)?|([0-9.]+):\w+", node):
        node = match[1] or match[3]
    try:
        address = ipaddress.ip_address(node.partition("%")[0])
    except ValueError:
        return None
    return (address.ipv4_mapped or address) if isinstance(address, IPv6Address) else address
