"""The servers that the client is tried against: the package's fake, and the real gateway with a pretended engine."""

import asyncio
import contextlib
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from livereel import AsyncClient, Client, Stream, StreamInfo
from livereel.parsing import parse
from livereel.testing import FakeServer

from server.backends.fake import FakeBackend
from tests.server.conftest import Gateway, gateway
from tests.server.egress.harness import free_port

SDK = Path(__file__).parents[3] / "clients" / "python"
START_SECONDS = 120


_servers = contextlib.ExitStack()
"""Servers that the tests of this folder share."""


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(nextitem: pytest.Item | None) -> None:
    """Stop the shared servers after the last test of this folder: the tests of others count threads and files."""
    if nextitem is None or Path(__file__).parent not in nextitem.path.parents:
        _servers.close()


class GatewayThread:
    """The gateway in a thread of its own, as a synchronous test needs it."""

    def __init__(self, backend: FakeBackend | None = None, **settings: Any) -> None:
        self._started = threading.Event()
        self._backend, self._settings = backend, settings
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))
        self.gateway: Gateway
        self.error: BaseException | None = None

    async def _serve(self) -> None:
        self.loop, self._over = asyncio.get_running_loop(), asyncio.Event()
        try:
            backend = self._backend or FakeBackend(width=64, height=48, chunk_seconds=0.02, loras=("watercolour",))
            async with gateway(backend, **self._settings) as self.gateway:
                self._started.set()
                await self._over.wait()
        except BaseException as error:
            self.error = error
        finally:
            self._started.set()

    @property
    def url(self) -> str:
        return f"http://{self.gateway.address}"

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function in the gateway's event loop."""

        async def run() -> Any:
            return function(*arguments)

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(10)

    def __enter__(self) -> "GatewayThread":
        self._thread.start()
        self._started.wait(30)
        if self.error is not None:
            raise self.error
        return self

    def __exit__(self, *exception: object) -> None:
        self.loop.call_soon_threadsafe(self._over.set)
        self._thread.join(30)
        if self.error is not None:
            raise self.error


@pytest.fixture(scope="session")
def running() -> GatewayThread:
    """A gateway for all tests that do not change how it is set up."""
    return _servers.enter_context(GatewayThread(outputs=("127.0.0.1:9",)))


@pytest.fixture(scope="session")
def real_server(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A server with `mini` that `livereel serve` runs: the environment of its users. `RTMP_PORT` is a port of this
    machine that it may push to."""
    return _servers.enter_context(serving(tmp_path_factory.mktemp("server") / "log"))


@contextlib.contextmanager
def serving(log: Path) -> Iterator[dict[str, str]]:
    base = {name: value for name, value in os.environ.items() if not name.startswith("LIVEREEL_")}
    base |= {"PYTHONPATH": str(SDK), "BROWSER": "true"}
    with log.open("w") as out:
        port = str(free_port())
        command = [sys.executable, "-m", "livereel", "serve", "--port", "0", "--engine-spare", "off"]
        command += ["--outputs", f"127.0.0.1:{port}"]
        process = subprocess.Popen(command, cwd=SDK.parents[1], env=base, stdout=out, stderr=out)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not (ready := re.search(r"open (http://\S+?)/?$", log.read_text(), re.MULTILINE)):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield {**base, "LIVEREEL_URL": ready[1], "RTMP_PORT": port}
    finally:
        process.terminate()
        assert process.wait(30) == 0


@pytest.fixture
def run_gateway_thread() -> Callable[..., contextlib.AbstractContextManager[GatewayThread]]:
    return GatewayThread


@dataclass
class Server:
    """A server of either kind, and clients of it."""

    client: Client
    make_async: Callable[[], AsyncClient]


@pytest.fixture(params=["fake", "gateway"])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """The fake server and the real gateway: what holds for one holds for the other."""
    if request.param == "fake":
        fake = FakeServer()
        with Client(transport=fake.transport) as client:
            yield Server(client, lambda: AsyncClient(transport=fake.async_transport))
    else:
        running: GatewayThread = request.getfixturevalue("running")
        with Client(running.url) as client:
            yield Server(client, lambda: AsyncClient(running.url))


@pytest.fixture
def client(server: Server) -> Client:
    return server.client


@pytest.fixture
def known_stream() -> Callable[..., Stream]:
    """Makes a stream that a client has not asked the server about."""

    def make(client: Client, id: str = "unknown") -> Stream:
        return Stream(client._transport, 0, parse(StreamInfo, {"id": id}), ours=False)

    return make


@pytest.fixture
def fake() -> FakeServer:
    return FakeServer()


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"
