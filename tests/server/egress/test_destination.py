"""URLs that may be pushed to, the addresses that they resolve to, and the connection."""

import asyncio
import ipaddress
import socket
import ssl
from pathlib import Path
from typing import Any

import pytest

from server.egress.destination import (
    DEFAULT_PORTS,
    Destination,
    UnreachableError,
    connect,
    is_listable,
    is_public,
    parse_destination,
    resolve,
)
from server.errors import ApiError

pytestmark = pytest.mark.anyio


ALLOWED = ("live.example", "10.0.0.5:1936", "[2001:db8::1]")


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("rtmp://live.example/app/key", ("rtmp", "live.example", 1935, "/app/key")),
        ("RTMPS://Live.Example/app/Key?a=B", ("rtmps", "live.example", 443, "/app/Key?a=B")),
        ("https://live.example", ("https", "live.example", 443, "/")),
        ("https://live.example:443/whip/KEY", ("https", "live.example", 443, "/whip/KEY")),
        ("rtmp://10.0.0.5:1936/a/k", ("rtmp", "10.0.0.5", 1936, "/a/k")),
        ("rtmp://[2001:db8::1]/a/k", ("rtmp", "[2001:db8::1]", 1935, "/a/k")),
    ],
)
def test_listed_destinations_are_allowed(url: str, expected: tuple[str, str, int, str]) -> None:
    target = parse_destination(url, ALLOWED)
    assert (target.scheme, target.host, target.port, target.path) == expected
    assert "key" not in (repr(target) + target.masked).lower()


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("http://live.example/whip", "invalid_url"),
        ("file:///etc/passwd", "invalid_url"),
        ("gopher://live.example/", "invalid_url"),
        ("data:text/plain,x", "invalid_url"),
        ("rtmp://live.example/", "invalid_url"),
        ("rtmp://live.example", "invalid_url"),
        ("rtmp://live.example?x", "invalid_url"),
        ("rtmp://live.example/?x=/a/k", "invalid_url"),
        ("rtmp://live.example//key", "invalid_url"),
        ("rtmp:///app/key", "invalid_url"),
        ("https://user@live.example/", "invalid_url"),
        ("https://live.example\\@169.254.169.254/", "invalid_url"),
        ("https://live.example#@169.254.169.254/", "invalid_url"),
        ("https://live.example /", "invalid_url"),
        ("https://live.example/\r\nHost: x", "invalid_url"),
        ("https://live.example:0/", "invalid_url"),
        ("https://live.example:99999/", "invalid_url"),
        ("https://live.example:443:80/", "invalid_url"),
        ("https://live.exampl\u00e9/", "invalid_url"),
        ("https://live.example:8443/", "output_not_allowed"),
        ("https://live.example.evil.test/", "output_not_allowed"),
        ("https://evil.test/live.example", "output_not_allowed"),
        ("https://live.example./", "invalid_url"),
        ("https://2130706433/", "output_not_allowed"),
        ("https://0x7f000001/", "output_not_allowed"),
        ("https://0177.0.0.1/", "output_not_allowed"),
        ("https://127.1/", "output_not_allowed"),
        ("https://[::ffff:169.254.169.254]/", "output_not_allowed"),
        ("https://169.254.169.254/latest", "output_not_allowed"),
        ("rtmp://10.0.0.5/a/k", "output_not_allowed"),
        ("rtmp://localhost/a/k", "output_not_allowed"),
    ],
)
def test_other_urls_are_refused(url: str, code: str) -> None:
    with pytest.raises(ApiError) as refused:
        parse_destination(url, ALLOWED)
    assert refused.value.code == code
    assert refused.value.status_code == (400 if code == "invalid_url" else 403)


@pytest.mark.parametrize("entry", ["live.example", "live.example:1936", "10.0.0.5", "[2001:db8::1]:1", "localhost:9"])
def test_what_the_operator_may_list(entry: str) -> None:
    assert is_listable(entry)


@pytest.mark.parametrize(
    "entry",
    [
        "Live.Example",
        "live.example:0",
        "live.example:65536",
        "live.example/app",
        "rtmp://live.example",
        "live.example.",
        "127.1",
        "2130706433",
        "0x7f000001",
        "10.0.0.0.5",
        "10.0.0.256",
        "[::1",
        "[1::2::3]",
        "[:::]:9",
    ],
)
def test_what_can_never_be_connected_to_is_refused_at_start(entry: str) -> None:
    assert not is_listable(entry)


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1::1", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("100.64.0.1", False),
        ("169.254.169.254", False),
        ("224.0.0.1", False),
        ("0.0.0.0", False),
        ("::1", False),
        ("fe80::1", False),
        ("fd00::1", False),
        ("::ffff:10.0.0.1", False),
        ("64:ff9b::a00:1", False),
        ("2002:a00:1::", False),
    ],
)
def test_public_addresses(address: str, expected: bool) -> None:
    assert is_public(ipaddress.ip_address(address)) is expected


async def test_every_address_of_a_name_must_be_public(monkeypatch: pytest.MonkeyPatch) -> None:
    target = parse_destination("rtmp://live.example/app/key", ALLOWED)
    found = ["93.184.216.34"]

    async def lookup(host: str, port: int, **options: Any) -> list[Any]:
        assert (host, port) == ("live.example", 1935)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in found]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", lookup, raising=False)
    assert await resolve(target) == "93.184.216.34"
    # DNS rebinding: one of the addresses is private now.
    found.append("169.254.169.254")
    with pytest.raises(UnreachableError, match="not public"):
        await resolve(target)
    # An address that the operator listed needs no lookup, and may be private.
    assert await resolve(parse_destination("rtmp://10.0.0.5:1936/a/k", ALLOWED)) == "10.0.0.5"
    # No DNS record decides what localhost is (RFC 6761, section 6.3).
    assert await resolve(parse_destination("rtmp://LocalHost/a/k", ("localhost",))) == "127.0.0.1"


async def test_rtmps_checks_the_certificate(certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    server = await asyncio.start_server(lambda r, w: w.close(), "127.0.0.1", 0, ssl=context)
    async with server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(UnreachableError, match="certificate"):
            await connect(Destination("rtmps", "127.0.0.1", port, "/a/k"), "127.0.0.1")
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
        with pytest.raises(UnreachableError, match="certificate"):  # valid, but for another host
            await connect(Destination("rtmps", "live.example", port, "/a/k"), "127.0.0.1")
        _, writer = await connect(Destination("rtmps", "127.0.0.1", port, "/a/k"), "127.0.0.1")
        writer.close()
    assert DEFAULT_PORTS["rtmps"] == 443
