"""What is believed of proxies' headers (RFC 7239 and X-Forwarded-*), from whom, and the URLs that follow from it."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import httpx
import pytest
import websockets
from starlette.types import Message, Scope

from server.api.routing import BaseUrl, base_url
from server.auth import keys
from server.middleware.proxy import ProxyMiddleware, address_of, read_forwarded

pytestmark = pytest.mark.anyio

Start = Callable[..., contextlib.AbstractAsyncContextManager[Any]]

STRANGER, PROXY, INNER = "203.0.113.9", "10.0.0.5", "10.0.0.6"
TOLD = {
    "X-Forwarded-For": "198.51.100.7",
    "X-Forwarded-Host": "pub.example",
    "X-Forwarded-Proto": "https",
    "X-Forwarded-Prefix": "/live",
}


EVIL = dict(zip(TOLD, ("1.1.1.1", "evil.example", "http", "/evil"), strict=True))


async def passed(
    headers: dict[str, str] | list[tuple[str, str]],
    *,
    peer: str = "127.0.0.1",
    path: str = "/v1/streams",
    type: str = "http",
    raw_path: str = "",
    **settings: Any,
) -> tuple[Scope | None, list[Message]]:
    """The scope that the application gets, None if it is not called, and what the middleware itself sends."""
    seen: list[Scope] = []
    sent: list[Message] = []

    async def app(scope: Scope, receive: Any, send: Any) -> None:
        seen.append(scope)

    async def send(message: Message) -> None:
        sent.append(message)

    items = headers if isinstance(headers, list) else list(headers.items())
    scope = {
        "type": type,
        "scheme": "ws" if type == "websocket" else "http",
        "path": path,
        "raw_path": (raw_path or path).encode(),
        "query_string": b"a=b",
        "client": (peer, 4711),
        "headers": [(b"host", b"inner:8000"), *((name.lower().encode(), value.encode()) for name, value in items)],
    }
    await ProxyMiddleware(app, **settings)(scope, None, send)  # type: ignore[arg-type]
    return (seen[0] if seen else None), sent


async def base(headers: dict[str, str] | list[tuple[str, str]], **options: Any) -> tuple[BaseUrl, str]:
    """The base URL and the client's address that the application sees."""
    scope, _ = await passed(headers, **options)
    assert scope is not None
    return base_url(scope), scope["client"][0]


@pytest.mark.parametrize("peer", ["127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1", PROXY, f"::ffff:{PROXY}"])
async def test_trusted_proxies_are_believed(peer: str) -> None:
    found, client = await base(TOLD, peer=peer, trusted=("10.0.0.0/29", "2001:db8::/32"))
    assert found.url("/x") == "https://pub.example/live/x"
    assert client == "198.51.100.7"


@pytest.mark.parametrize("peer", [STRANGER, "10.0.0.8", "::ffff:10.0.0.8", "2001:db9::1", "fe80::1%eth0"])
async def test_nobody_else_is_believed(peer: str) -> None:
    headers = {**TOLD, "Forwarded": "for=198.51.100.7;host=pub.example;proto=https"}
    found, client = await base(headers, peer=peer, trusted=("10.0.0.0/29", "2001:db8::/32"))
    assert found == BaseUrl("http", "inner:8000")
    assert client == peer


@pytest.mark.parametrize(
    ("header", "client", "host"),
    [
        ("for=198.51.100.7;host=pub.example;proto=https", "198.51.100.7", "pub.example"),
        ('For="198.51.100.7:47011";Host="pub.example:8443";Proto=HTTPS', "198.51.100.7", "pub.example:8443"),
        ('proto=https; for="[2001:db8:cafe::17]:4711" ;host=pub.example', "2001:db8:cafe::17", "pub.example"),
        (
            "for=192.0.2.1;host=evil.example, for=198.51.100.7;host=pub.example;proto=https",
            "198.51.100.7",
            "pub.example",
        ),
        ("for=unknown;host=pub.example;proto=https", "127.0.0.1", "pub.example"),
        ("for=_hidden;host=pub.example;proto=https", "127.0.0.1", "pub.example"),
        ('for=198.51.100.7;host="pub.example:443";proto=https;by=10.0.0.1', "198.51.100.7", "pub.example"),
    ],
)
async def test_the_standard_header(header: str, client: str, host: str) -> None:
    """RFC 7239, sections 4 to 7."""
    found, seen = await base({"Forwarded": header})
    assert (found.scheme, found.host, seen) == ("https", host, client)


@pytest.mark.parametrize(
    "text",
    ["for", "for=", "host=x;host=y", 'host="x', "host=x y", "host=x, y", "; ,", "host==x", "h@st=x", "host = x", " "],
)
async def test_a_malformed_standard_header_is_ignored(text: str) -> None:
    assert read_forwarded(text) == []
    assert await base({"Forwarded": text}) == (BaseUrl("http", "inner:8000"), "127.0.0.1")


def test_empty_parameters_and_elements_are_allowed() -> None:
    """RFC 7239, section 4, and RFC 9110, section 5.6.1."""
    assert read_forwarded(", for=a;, ,;for=b;;host=x,") == [{"for": "a"}, {"for": "b", "host": "x"}]


def test_quoted_pairs() -> None:
    assert read_forwarded(r'for="_a\"\\b"; host="x,y;z" , for=c') == [{"for": '_a"\\b', "host": "x,y;z"}, {"for": "c"}]


@pytest.mark.parametrize(
    "headers",
    [
        {"X-Forwarded-Host": "a b"},
        {"X-Forwarded-Host": "pub.example/evil"},
        {"X-Forwarded-Host": "user@pub.example"},
        {"X-Forwarded-Host": "pub.example:123456"},
        {"X-Forwarded-Host": "x" * 300},
        {"X-Forwarded-Host": ""},
        {"X-Forwarded-Proto": "javascript"},
        {"X-Forwarded-Prefix": "live"},
        {"X-Forwarded-Prefix": "//evil.example"},
        {"X-Forwarded-Prefix": "/a/../b"},
        {"X-Forwarded-Prefix": "/a%0d%0ab"},
        {"X-Forwarded-Prefix": '/a"><script>'},
        {"X-Forwarded-Prefix": "/\\evil.example"},
        {"X-Forwarded-Prefix": "/"},
        {"X-Forwarded-For": "somebody"},
        {"X-Forwarded-For": "198.51.100.300"},
        {"X-Forwarded-For": ""},
    ],
)
async def test_malformed_values_are_ignored(headers: dict[str, str]) -> None:
    assert await base(headers) == (BaseUrl("http", "inner:8000"), "127.0.0.1")


async def test_what_a_client_had_sent_to_its_proxy_is_not_believed() -> None:
    """Each proxy appends, so its own entry is the last one; with two trusted proxies the last two are theirs."""
    spoofed = {name: f"{value}, {TOLD[name]}" for name, value in EVIL.items()}
    found, client = await base(spoofed)
    assert (found.url("/"), client) == ("https://pub.example/live/", "198.51.100.7")
    twice = {
        "X-Forwarded-For": f"1.1.1.1, 198.51.100.7, {PROXY}",
        "X-Forwarded-Host": "evil.example, pub.example, proxy.internal",
        "X-Forwarded-Proto": "http, https, http",
    }
    found, client = await base(twice, peer=INNER, trusted=(PROXY, INNER))
    assert (found.url("/"), client) == ("https://pub.example/", "198.51.100.7")
    found, client = await base(twice, peer=INNER, trusted=(INNER,))
    assert (found.url("/"), client) == ("http://proxy.internal/", PROXY)


async def test_repeated_headers_are_one_list() -> None:
    """RFC 9110, section 5.3."""
    found, client = await base([("X-Forwarded-For", "1.1.1.1"), ("X-Forwarded-For", "198.51.100.7")])
    assert client == "198.51.100.7"
    found, _ = await base([("Forwarded", "host=evil.example"), ("Forwarded", "host=pub.example")])
    assert found.host == "pub.example"


async def test_the_headers_that_most_proxies_set_come_before_the_one_that_they_pass_on() -> None:
    found, client = await base({**TOLD, "Forwarded": "for=1.1.1.1;host=evil.example;proto=http"})
    assert (found.url("/"), client) == ("https://pub.example/live/", "198.51.100.7")


@pytest.mark.parametrize(
    ("node", "address"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("192.0.2.1:80", "192.0.2.1"),
        ("[2001:db8::1]", "2001:db8::1"),
        ("[2001:db8::1]:_x", "2001:db8::1"),
        ("2001:db8::1", "2001:db8::1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("unknown", "None"),
        ("_x", "None"),
        ("", "None"),
    ],
)
def test_nodes(node: str, address: str) -> None:
    assert str(address_of(node)) == address


@pytest.mark.parametrize(
    ("path", "raw_path", "becomes"),
    [
        ("/live/v1/streams", "", ("/v1/streams", b"/v1/streams")),
        ("/live/", "", ("/", b"/")),
        ("/v1/streams", "", ("/v1/streams", b"/v1/streams")),
        ("/lively/v1", "", ("/lively/v1", b"/lively/v1")),
        ("/live/v1/a b", "/live/v1/a%20b", ("/v1/a b", b"/v1/a%20b")),
        ("/live/v1/a b", "/l%69ve/v1/a%20b", ("/v1/a b", b"/v1/a%20b")),
    ],
)
@pytest.mark.parametrize("settings", [{"root_path": "/live"}, {}], ids=["option", "header"])
async def test_the_prefix_is_taken_off_if_it_is_there(
    path: str, raw_path: str, becomes: tuple[str, bytes], settings: dict[str, str]
) -> None:
    headers = {} if settings else {"X-Forwarded-Prefix": "/live/"}
    for type in ("http", "websocket"):
        scope, _ = await passed(headers, path=path, raw_path=raw_path, type=type, **settings)
        assert scope is not None
        assert (scope["path"], scope["raw_path"]) == becomes
        assert "root_path" not in scope
        assert base_url(scope).url("/x") == "/live/x"


async def test_the_prefix_without_a_slash_is_redirected() -> None:
    """The page's addresses are relative to its own: without the slash they would lead out of the prefix."""
    scope, sent = await passed(TOLD, path="/live")
    assert scope is None
    assert sent[0]["status"] == 308
    assert dict(sent[0]["headers"])[b"location"] == b"https://pub.example/live/?a=b"


async def test_the_option_is_for_everybody_and_goes_before_the_header() -> None:
    found, _ = await base({"X-Forwarded-Prefix": "/evil"}, peer=STRANGER, root_path="/live")
    assert found.url("/") == "/live/"
    found, _ = await base({"X-Forwarded-Prefix": "/other"}, root_path="/live")
    assert found.url("/") == "/live/"


@pytest.mark.parametrize("path", ["/live", ""])
async def test_every_url_is_the_clients(run_gateway: Start, tmp_path: Path, path: str) -> None:
    """The proxy passes the prefix on, or has taken it off."""
    store = tmp_path / "keys.toml"
    key = keys.add_key(store, "studio", "studio", ["control"], 8, 1000)
    credentials = {"authorization": f"Bearer {key}"}
    headers = {**TOLD, **credentials, "origin": "https://pub.example"}
    root = "https://pub.example/live"
    async with run_gateway(keys=store, outputs=("127.0.0.1:9",)) as gateway:
        http = gateway.http
        made = await http.post(f"{path}/v1/streams", json={"prompt": "a"}, headers=headers)
        assert made.status_code == 201
        stream = made.json()
        resource = f"{root}/v1/streams/{stream['id']}"
        assert made.headers["location"] == resource
        assert stream["whep_url"] == f"{resource}/whep"
        socket_url, _, token = stream["ws_url"].partition("?token=")
        assert socket_url == f"wss://pub.example/live/v1/streams/{stream['id']}/ws" and token
        inner = f"{path}/v1/streams/{stream['id']}"
        listed = (await http.get(f"{path}/v1/streams", headers=headers)).json()["data"][0]
        assert listed["whep_url"] == stream["whep_url"]
        guest = (await http.post(f"{inner}/tokens", json={"scope": "view"}, headers=headers)).json()
        assert guest["ws_url"].startswith(socket_url + "?token=")
        await gateway.until(lambda: gateway.stream_of(stream).session.state == "live")
        recording = await http.post(f"{inner}/recordings", json={}, headers=headers)
        assert recording.headers["location"] == f"{root}/v1/recordings/{recording.json()['id']}"
        output = await http.post(f"{inner}/outputs", json={"url": "rtmp://127.0.0.1:9/a/b"}, headers=headers)
        assert output.headers["location"] == f"{resource}/outputs/{output.json()['id']}"
        described = (await http.get(f"{path}/openapi.json", headers=headers)).json()
        assert described["servers"] == [{"url": root}]
        page = await http.get(f"{path}/", headers=headers)
        policy = page.headers["content-security-policy"]
        assert "wss://pub.example" in policy and "inner" not in policy
        missing = (await http.get(f"{path}/nowhere", headers=headers)).json()["error"]["message"]
        assert f"{root}/docs" in missing
        address = f"ws://{gateway.address}{inner}/ws?token={token}"
        asked = {**TOLD, "Origin": "https://pub.example"}
        async with websockets.connect(address, additional_headers=asked, compression=None) as socket:
            assert f"wss://pub.example/live/v1/streams/{stream['id']}/ws" in str(await socket.recv())


@pytest.mark.parametrize("name", ["/", "/docs", "/overlay/st_1"])
async def test_pages_load_by_relative_addresses(run_gateway: Start, name: str) -> None:
    async with run_gateway(root_path="/live") as gateway:
        page = httpx.URL(f"http://{gateway.address}/live{name}")
        text = (await gateway.http.get(page)).text
        links = [part.split('"')[0] for word in ("href=", "src=") for part in text.split(f'{word}"')[1:]]
        links = [link for link in links if not link.startswith("data:")]
        assert links
        for link in links:
            assert not link.startswith("/")
            target = urljoin(str(page), link)
            assert target.startswith(f"http://{gateway.address}/live/")
            assert (await gateway.http.get(target)).status_code == 200


async def test_whep_sessions_are_where_the_answer_says(run_gateway: Start, rtc_viewer: Any) -> None:
    async with run_gateway(root_path="/live") as gateway:
        stream = await gateway.live()
        assert stream["whep_url"] == f"/live/v1/streams/{stream['id']}/whep"
        async with rtc_viewer(gateway, stream, "VP8") as viewer:
            assert viewer.session.startswith(stream["whep_url"] + "/")
            assert (await gateway.http.options(viewer.session)).status_code == 200
        assert (await gateway.http.delete(viewer.session)).status_code == 200


async def test_without_keys_no_name_opens_the_server_to_a_page_from_elsewhere(run_gateway: Start) -> None:
    """A page whose name was bound to this machine (DNS rebinding) can send these headers itself, or through a proxy."""
    async with run_gateway() as gateway:
        for headers in ({"X-Forwarded-Host": "localhost"}, {"Forwarded": "host=localhost"}):
            response = await gateway.http.get("/v1/streams", headers={"host": "evil.example", **headers})
            assert response.status_code == 421
        headers = {"X-Forwarded-Host": "evil.example", "Origin": "http://evil.example"}
        response = await gateway.http.post("/v1/streams", json={"prompt": "a"}, headers=headers)
        assert response.status_code == 403
        headers = {"X-Forwarded-Host": "localhost:9", "Origin": "http://localhost:9"}
        response = await gateway.http.post("/v1/streams", json={"prompt": "a"}, headers=headers)
        assert response.status_code == 201
