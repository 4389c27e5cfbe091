"""What can be tried on the process from outside: its sockets, its requests, its log, its end."""

import asyncio
import json
import os
import re
import resource
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from aiortc import RTCConfiguration, RTCPeerConnection

from server.app import ROUTES
from server.auth import keys

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@contextmanager
def gateway(
    *arguments: str, log: Path, run: tuple[str, ...] = ("-m", "server", "--backend", "fake"), **options: Any
) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """The process once it is ready, and its port."""
    command = [sys.executable, *run, "--port", "0", *arguments]
    with log.open("w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=ROOT, **options)
        try:
            assert process.stdout is not None
            ready = re.fullmatch(r"Livereel is ready: open http://.*:(\d+)/\n", process.stdout.readline())
            assert ready, log.read_text()
            yield process, int(ready[1])
        finally:
            process.kill()
            process.communicate()


def until(condition: Any, seconds: float = 10.0) -> None:
    ends_at = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends_at
        time.sleep(0.05)


# 2: listeners


def family(pid: int) -> list[int]:
    """The process and those that it has started."""
    children: list[int] = []
    with suppress(FileNotFoundError, ProcessLookupError):  # a task or the process has just ended
        for task in Path(f"/proc/{pid}/task").iterdir():
            children += map(int, (task / "children").read_text().split())
    return [pid, *(each for child in children for each in family(child))]


def listeners(pid: int) -> tuple[set[tuple[str, int]], set[tuple[str, int]], set[str]]:
    """TCP and UDP addresses at which anybody of the family can be reached, and Unix sockets that have a name."""
    inodes = set()
    for each in family(pid):
        for descriptor in Path(f"/proc/{each}/fd").iterdir():
            with suppress(FileNotFoundError):
                inodes.update(re.findall(r"socket:\[(\d+)\]", os.readlink(descriptor)))
    tcp, udp, unix = set(), set(), set()
    for found, name, states in (
        (tcp, "tcp", ["0A"]),
        (tcp, "tcp6", ["0A"]),
        (udp, "udp", ["07"]),
        (udp, "udp6", ["07"]),
    ):
        for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[9] in inodes and fields[3] in states:
                host, port = fields[1].split(":")
                raw = b"".join(bytes.fromhex(host[k : k + 8])[::-1] for k in range(0, len(host), 8))
                found.add((socket.inet_ntop(socket.AF_INET6 if len(raw) == 16 else socket.AF_INET, raw), int(port, 16)))
    for line in Path(f"/proc/{pid}/net/unix").read_text().splitlines()[1:]:
        fields = line.split()
        if len(fields) > 7 and fields[6] in inodes and fields[5] == "01" and Path(fields[7]).exists():
            unix.add(fields[7])  # the engine's is unlinked once it is connected
    return tcp, udp, unix


def with_spare(pid: int, folder: Path) -> bool:
    """Whether the gateway has an engine and a spare, both connected."""
    return len(family(pid)) == 3 and not list(folder.glob("*/engine.sock"))


WITH_STUB = f"""
import functools, sys
from server import __main__ as server
command = (sys.executable, {str(Path(__file__).with_name("stub_engine.py"))!r})
server.LocalBackend = functools.partial(server.LocalBackend, command=command, standby_seconds=(0.05, 1.0))
sys.exit(server.main())
"""
"""The server as it is, but for the program that is its engine: one without torch, whose model is `mini`."""
STUB = ("-c", WITH_STUB, "--model", "good")
BALL = {"prompt": "a ball", "model": "mini"}


def environment(folder: Path) -> dict[str, str]:
    """What it writes for a while, it writes there."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(folder)}


async def an_offer() -> str:
    peer = RTCPeerConnection(RTCConfiguration(iceServers=[]))
    peer.addTransceiver("video", "recvonly")
    await peer.setLocalDescription(await peer.createOffer())
    sdp: str = peer.localDescription.sdp
    await peer.close()
    return sdp


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_nothing_listens_but_the_port_and_a_viewers_ice(host: str, tmp_path: Path) -> None:
    """Enumerated from the system, of gateway, engine and spare, before, while and after somebody watches."""
    path = tmp_path / "keys.toml"
    key = keys.add_key(path, "studio", "studio", ["control"], 4, 1000)
    log = tmp_path / "log"
    arguments = ("--host", host, "--keys", str(path))
    with gateway(*arguments, log=log, run=STUB, env=environment(tmp_path), umask=0) as (process, port):
        until(lambda: with_spare(process.pid, tmp_path))
        assert listeners(process.pid) == ({(host, port)}, set(), set())
        client = httpx.Client(base_url=f"http://127.0.0.1:{port}", headers={"authorization": f"Bearer {key}"})
        stream = client.post("/v1/streams", json=BALL).json()
        until(lambda: client.get(f"/v1/streams/{stream['id']}").json()["state"] == "live")
        headers = {"content-type": "application/sdp"}
        answer = client.post(stream["whep_url"], content=asyncio.run(an_offer()), headers=headers)
        assert answer.status_code == 201, answer.text
        tcp, udp, unix = listeners(process.pid)
        assert (tcp, unix) == ({(host, port)}, set())
        assert udp and all(number >= 1024 for _, number in udp)
        offered = set(re.findall(r"a=candidate:\S+ 1 udp \d+ (\S+) (\d+) typ host", answer.text))
        assert {(address, int(number)) for address, number in offered} == udp
        client.delete(answer.headers["location"])
        until(lambda: not listeners(process.pid)[1])
        # what it has written, under a umask that takes nothing away
        left = [each for each in tmp_path.rglob("*") if each.name.startswith("livereel-")]
        assert all(stat.S_IMODE(each.stat().st_mode) == 0o700 for each in left)


# 18: it is killed, and it runs out of descriptors


def test_what_is_killed_leaves_nothing_behind(tmp_path: Path) -> None:
    before = set(os.listdir("/dev/shm"))
    for first in (0, 1, 2):  # the gateway, its engine, or the spare of that
        with gateway(log=tmp_path / "log", run=STUB, env=environment(tmp_path)) as (process, port):
            client = httpx.Client(base_url=f"http://127.0.0.1:{port}")
            stream = client.post("/v1/streams", json=BALL).json()
            until(lambda: client.get(f"/v1/streams/{stream['id']}").json()["state"] == "live")  # noqa: B023
            until(lambda: with_spare(process.pid, tmp_path))
            left = family(process.pid)
            os.kill(left[first], signal.SIGKILL)
            process.kill()
        until(lambda: not any(alive(pid) for pid in left))  # noqa: B023
    # semaphores of multiprocessing are other people's: nothing here makes any
    assert not {name for name in set(os.listdir("/dev/shm")) - before if not name.startswith("sem.mp-")}
    # a folder of clips stays until the next server starts, which sees that nobody has it any more
    assert len(list(tmp_path.glob("livereel-*"))) <= 1
    with gateway(log=tmp_path / "log", run=STUB, env=environment(tmp_path)) as (process, _):
        # its own folder alone, once the standby has left the one that it starts with
        until(lambda: len(list(tmp_path.glob("livereel-*"))) == 1)
        process.terminate()
        process.wait(20)
    assert not list(tmp_path.glob("livereel-*"))


def alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_it_outlives_a_want_of_descriptors(tmp_path: Path) -> None:
    limit = 60
    prelude = lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))  # noqa: E731
    with gateway(log=tmp_path / "log", preexec_fn=prelude) as (process, port):
        address = f"http://127.0.0.1:{port}"
        with ExitStack() as crowd:
            client = crowd.enter_context(httpx.Client(base_url=address, timeout=20))
            stream = client.post("/v1/streams", json=BALL).json()
            until(lambda: client.get(f"/v1/streams/{stream['id']}").json()["state"] == "live")
            for _ in range(2 * limit):
                crowd.enter_context(socket.create_connection(("127.0.0.1", port)))
            time.sleep(0.5)
            # who is in is served, and told what is wanting
            assert client.get("/livez").status_code == 200
            picture = client.post("/v1/streams", data={"prompt": "a"}, files={"image": b"\x89PNG\r\n\x1a\n"})
            offer = client.post(
                stream["whep_url"], content=asyncio.run(an_offer()), headers={"content-type": "application/sdp"}
            )
            for answer in (picture, offer):
                assert answer.status_code == 503, answer.text
                assert answer.json()["error"]["code"] in ("exhausted", "no_address")
        until(lambda: quickly(address) == 200, 20)
        assert process.poll() is None
    log = (tmp_path / "log").read_text()
    assert "Traceback" not in log
    assert log.count("out of file descriptors") <= 1  # a quarter is reserved, which of so few a burst may take


def refused(connection: socket.socket) -> bool:
    """Whether the server has answered 503 already; it stays to be read."""
    try:
        return b"503" in connection.recv(100, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except OSError:
        return False


@pytest.mark.parametrize("limit", [256, 512])
def test_engine_and_standby_are_replaced_while_a_crowd_holds_what_it_gets(limit: int, tmp_path: Path) -> None:
    """libzmq ends the process that has no descriptor left for a new engine's connection."""
    prelude = lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))  # noqa: E731
    with gateway(log=tmp_path / "log", run=STUB, env=environment(tmp_path), preexec_fn=prelude) as (process, port):
        client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20)
        stream = client.post("/v1/streams", json=BALL).json()
        until(lambda: client.get(f"/v1/streams/{stream['id']}").json()["state"] == "live")
        until(lambda: with_spare(process.pid, tmp_path))
        with ExitStack() as crowd:
            many = [crowd.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(limit + 50)]
            until(lambda: sum(refused(one) for one in many) > 50)
            for victim in (2, 1, 2):  # the standby, the engine, the standby that has replaced it
                left = family(process.pid)
                os.kill(left[victim], signal.SIGKILL)
                until(lambda left=left, victim=victim: not alive(left[victim]))
                until(lambda left=left: len(family(process.pid)) == 3 and family(process.pid) != left, 30)
                until(lambda: with_spare(process.pid, tmp_path), 30)
                assert process.poll() is None
            assert client.get(f"/v1/streams/{stream['id']}").json()["state"] == "live"
        until(lambda: quickly(f"http://127.0.0.1:{port}") == 200, 20)
    assert "out of file descriptors" not in (tmp_path / "log").read_text()


def test_it_takes_the_descriptors_that_it_may_have(tmp_path: Path) -> None:
    prelude = lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (256, 2048))  # noqa: E731
    with gateway(log=tmp_path / "log", preexec_fn=prelude) as (process, _):
        limits = Path(f"/proc/{process.pid}/limits").read_text()
    assert re.search(r"Max open files +2048 +2048 ", limits), limits


def quickly(address: str) -> int:
    try:
        return httpx.get(address + "/livez", timeout=2).status_code
    except httpx.HTTPError:
        return 0


# 10: requests that two servers would read in two ways


SMUGGLED = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
PAIRS = {
    "length and chunks": b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunks and length": b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
    "two lengths": b"Content-Length: 0\r\nContent-Length: 44\r\n\r\n",
    "a list of lengths": b"Content-Length: 0, 44\r\n\r\n",
    "a signed length": b"Content-Length: +0\r\n\r\n",
    "a length in hex": b"Content-Length: 0x0\r\n\r\n",
    "a length with a blank": b"Content-Length: 0 0\r\n\r\n",
    "an unknown coding": b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "two codings": b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    "codings in two lines": b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n",
    "a blank before the colon": b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
    "a vertical tab": b"Transfer-Encoding:\x0bchunked\r\n\r\n0\r\n\r\n",
    "a folded line": b"X-A: b\r\n Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "a bare CR": b"X-A: b\rTransfer-Encoding: chunked\r\n\r\n",
    "a NUL": b"X-A: b\0\r\n\r\n",
    "a chunk size that is none": b"Transfer-Encoding: chunked\r\n\r\n0x0\r\n\r\n",
    "a signed chunk size": b"Transfer-Encoding: chunked\r\n\r\n-0\r\n\r\n",
    "a huge chunk size": b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 40 + b"\r\n\r\n",
    "a chunk without its end": b"Transfer-Encoding: chunked\r\n\r\n1\r\nab0\r\n\r\n",
}


def exchange(port: int, sent: bytes) -> bytes:
    """All that comes back until the server closes, or has been quiet for a while."""
    got = b""
    with socket.create_connection(("127.0.0.1", port), timeout=0.5) as client:
        client.sendall(sent)
        try:
            while part := client.recv(65536):
                got += part
        except (TimeoutError, ConnectionError):
            pass
    return got


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, Path]]:
    """A gateway without keys: its port, and its log."""
    log = tmp_path_factory.mktemp("plain") / "log"
    with gateway(log=log) as (process, port):
        yield port, log
        assert process.poll() is None
    assert "Traceback" not in log.read_text()


@pytest.mark.parametrize("name", PAIRS)
def test_nothing_is_smuggled(plain: tuple[int, Path], name: str) -> None:
    """What follows a request whose end is in doubt is never answered as a request of its own."""
    head = b"POST /v1/streams HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    got = exchange(plain[0], head + PAIRS[name] + SMUGGLED)
    assert b'"data"' not in got, got
    assert set(re.findall(rb"HTTP/1.1 (\d+)", got)) <= {b"400"}, got


def test_who_leaves_in_the_middle_is_no_fault_of_ours(plain: tuple[int, Path]) -> None:
    """The log of `plain` has nothing of it."""
    head = b"POST /v1/streams HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\nContent-Type: "
    for kind in (b"application/json", b"multipart/form-data; boundary=x"):
        with socket.create_connection(("127.0.0.1", plain[0])) as client:
            client.sendall(head + kind + b"\r\n\r\n{")
            time.sleep(0.1)


def test_requests_in_a_row_are_answered_in_a_row(plain: tuple[int, Path]) -> None:
    one = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"
    got = exchange(plain[0], one * 20 + SMUGGLED)
    assert got.count(b"HTTP/1.1 200 ") == 21
    assert got.count(b'"data"') == 1 and got.index(b'"data"') > got.rindex(b'"ok"')


def test_headers_of_rewriting_proxies_and_other_methods_change_nothing(plain: tuple[int, Path]) -> None:
    address = f"http://127.0.0.1:{plain[0]}"
    stream = httpx.post(f"{address}/v1/streams", json={"prompt": "a"}).json()
    path = f"{address}/v1/streams/{stream['id']}"
    for name in ("X-HTTP-Method-Override", "X-HTTP-Method", "X-Method-Override"):
        assert httpx.post(path, headers={name: "DELETE"}).status_code == 405
        assert httpx.get(path + "?_method=DELETE", headers={name: "DELETE"}).json()["state"] != "ended"
    answer = httpx.get(path, headers={"X-Original-URL": "/metrics", "X-Rewrite-URL": "/metrics"})
    assert answer.json()["id"] == stream["id"]
    httpx.delete(path)


# 14: the log, and where a page's address goes


def test_nobody_writes_lines_into_the_log(tmp_path: Path) -> None:
    path, log = tmp_path / "keys.toml", tmp_path / "log"
    key = keys.add_key(path, "studio", "studio", ["control"], 4, 1000)
    with gateway("--keys", str(path), log=log) as (_, port):
        for target in (
            b"/v1/%0d%0aFORGED%20line",
            b"/v1/\x1b[2JFORGED",
            b"/v1/\xe2\x80\xa8FORGED",
            b"/v1/" + b"F" * 9000,
        ):
            for credential in (key.encode(), b"lrt_FORGED.x\x1b[2J", b"FORGED"):
                head = b"GET " + target + b"?token=lrt_SECRET HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer "
                exchange(port, head + credential + b"\r\nX-Request-Id: a\x1b[31mFORGED\r\nUser-Agent: FORGED\r\n\r\n")
        exchange(port, b"FORGED\r\n\r\n")
        text = log.read_text()
    assert "studio GET /v1/%0d%0aFORGED%20line 404 [req_" in text
    assert re.fullmatch(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d+ [A-Z]+ livereel\.[\x20-\x7e]{1,400}\n)*", text), text
    assert key not in text and "SECRET" not in text and "Bearer" not in text


def test_no_address_is_told_to_others(plain: tuple[int, Path]) -> None:
    """Tokens may be in addresses: `no-referrer` on everything, and no link or file of others."""
    address = f"http://127.0.0.1:{plain[0]}"
    for path in ("/", "/docs", "/assets/app.js", "/v1/streams", "/v1/nothing", "/livez", "/openapi.json"):
        answer = httpx.get(address + path)
        assert answer.headers["referrer-policy"] == "no-referrer", path
    for page in ("/", "/docs"):
        assert not re.findall(r"""(?:src|href)=["']?(?:https?:)?//""", httpx.get(address + page).text)


# 3: every route, whoever asks


def test_every_route_is_closed_to_whoever_may_not(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    mine = keys.add_key(path, "mine", "mine", ["control"], 4, 10_000)
    theirs = keys.add_key(path, "theirs", "theirs", ["control"], 4, 10_000)
    with gateway("--keys", str(path), log=tmp_path / "log") as (_, port):
        client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20)

        def call(method: str, path: str, key: str | None, **options: Any) -> httpx.Response:
            headers = {"authorization": f"Bearer {key}"} if key else {}
            return client.request(method, path, headers={**headers, **options.pop("headers", {})}, **options)

        stream = call("POST", "/v1/streams", mine, json={"prompt": "a"}).json()
        other = call("POST", "/v1/streams", mine, json={"prompt": "b"}).json()
        until(lambda: call("GET", f"/v1/streams/{stream['id']}", mine).json()["state"] == "live")
        sdp = {"content-type": "application/sdp"}
        session = call("POST", stream["whep_url"], mine, content=asyncio.run(an_offer()), headers=sdp)
        assert session.status_code == 201
        session_id = session.headers["location"].rpartition("/")[2]
        tokens = f"/v1/streams/{stream['id']}/tokens"
        brief = call("POST", tokens, mine, json={"expires_in_s": 1}).json()["token"]
        viewing = call("POST", f"/v1/streams/{other['id']}/tokens", mine, json={"scope": "control"}).json()["token"]
        time.sleep(1.1)
        public = {("GET", each) for each in ("/livez", "/readyz", "/docs", "/", "/overlay/{id}")}
        described = json.loads(call("GET", "/openapi.json", mine).text)["paths"]
        known = {(route.method, route.path) for route in ROUTES}
        assert {(method.upper(), each) for each, methods in described.items() for method in methods} <= known
        for method, template in sorted({*known, ("GET", "/openapi.json"), ("GET", "/nothing")} - public):
            target = template.replace("{id}", stream["id"]).replace("{session}", session_id)
            for shown in (None, "nonsense", keys.PREFIX + "x" * 43, brief, brief[:-2]):
                answer = call(method, target, shown)
                assert answer.status_code == 401, (method, target, shown)
                if shown and shown.startswith("lrt_"):
                    assert call(method, f"{target}?token={shown}", None).status_code == 401
            if "{id}" in template:
                for shown in (theirs, viewing):
                    answer = call(method, target, shown)
                    assert answer.status_code == 404, (method, target)
        # a session of others is none of one's own stream's either
        own = call("POST", "/v1/streams", theirs, json={"prompt": "c"}).json()
        for method in ("PATCH", "DELETE"):
            headers = {"content-type": "application/trickle-ice-sdpfrag"}
            stolen = call(method, f"{own['whep_url']}/{session_id}", theirs, headers=headers)
            assert (stolen.status_code, stolen.json()["error"]["code"]) == (404, "session_not_found")
        assert call("DELETE", session.headers["location"], mine).status_code == 200
        for method, target in public:
            # whatever is asked about: the page of an overlay is the same for streams that there are not
            there, nowhere = (call(method, target.replace("{id}", id), None) for id in (stream["id"], "nonsense"))
            assert there.status_code == nowhere.status_code == 200
            assert there.content == nowhere.content
