"""python -m server: serve the gateway until SIGTERM or SIGINT, and print the address to open once it works."""

import asyncio
import functools
import gc
import logging
import os
import resource
import signal
import socket
import sys
import time
from types import FrameType

import uvicorn
from fastapi import FastAPI

from server import logs, protocols
from server.app import create_app, reload_keys
from server.auth import keys
from server.backends.base import Backend
from server.backends.fake import FakeBackend
from server.backends.local import LocalBackend
from server.config import Config
from server.middleware.auth import MAX_HEAD_BYTES
from server.streams.registry import Streams
from server.tracing import Tracing, from_environment

KEEP_ALIVE_SECONDS = 20
"""How long an idle connection is kept: longer than clients keep theirs (httpx 5 s, aiohttp 15 s), for whoever sends a
request just as it is closed gets a reset for an answer."""
SEND_BUFFER_BYTES = 256 * 1024
"""Of the kernel, per connection: what lies there cannot be dropped any more, so it is latency for a slow viewer."""
SELDOM_SECONDS = 60.0
WANTED_FILES = 16_384
"""Every connection is one, every viewer over WebRTC one for each address of this machine."""


class ThrottleFilter(logging.Filter):
    """Of connections that cannot be taken for want of descriptors asyncio writes hundreds of lines a second."""

    _again_at = 0.0

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name != "asyncio" or "out of system resource" not in record.getMessage():
            return True
        record.exc_info = record.exc_text = None
        record.msg, record.args = "out of file descriptors: raise the limit (ulimit -n); connections wait", ()
        now = time.monotonic()
        if now < self._again_at:
            return False
        self._again_at = now + SELDOM_SECONDS
        return True


def raise_limit() -> None:
    """As many file descriptors as the system lets us have; many give processes 1024 until they ask."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = WANTED_FILES if hard == resource.RLIM_INFINITY else min(WANTED_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class Server(uvicorn.Server):
    """uvicorn, with streams that end before their sockets do, and with exit status 0 after a signal."""

    def __init__(self, config: uvicorn.Config, streams: Streams, drain_seconds: float = 0.0) -> None:
        """`drain_seconds` is how long streams may play on after SIGTERM."""
        super().__init__(config)
        self._streams = streams
        self._drain_seconds = drain_seconds
        self._patient = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """SIGTERM lets streams play on for a while, Ctrl-C and a second signal do not; one more waits for nobody.

        None is raised again afterwards.
        """
        self.force_exit = self.should_exit and not self._patient
        self._patient = sig == signal.SIGTERM and not self.should_exit
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Tell the viewers first."""
        seconds = self._drain_seconds if self._patient else 0.0
        ends_at = time.monotonic() + seconds
        self._streams.drain(seconds)
        while self._streams.playing and self._patient and time.monotonic() < ends_at:
            await asyncio.sleep(0.05)
        self._patient = False
        self._streams.end()
        await asyncio.sleep(0.1)  # their sockets' tasks send `ended` and close
        await super().shutdown(sockets)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket whose connections have a small send buffer."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
    listener.bind(address)
    listener.listen(512)
    return listener


def uvicorn_config(config: Config, backend: Backend, tracing: Tracing | None = None) -> tuple[uvicorn.Config, Streams]:
    """The application under the server settings that it needs. Raises `ValueError` when the keys cannot be read."""
    app = create_app(config, backend, tracing)
    settings = uvicorn.Config(
        app,
        http=protocols.HttpProtocol,
        ws=protocols.WebSocketProtocol,
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        ws_max_size=64 * 1024,
        ws_per_message_deflate=False,
        log_config=None,
        log_level="error",  # of what peers do wrong it would write a line each
        access_log=False,  # ours, with the names of keys and without queries, is in `server.middleware.request`
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=5,
    )
    return settings, app.state.streams


def spare_collections() -> None:
    """Have the garbage collector leave alone what is there now and stays: modules, routes, schemas.

    Nothing runs while it looks through everything, and with some hundred clients it did so every few seconds, for 60 to
    770 ms on a busy machine. What has come since is a tenth of that, and is looked through as ever.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(1_000, 10, 10)


async def serve(config: Config, tracing: Tracing) -> int:
    """Run until a signal comes; returns the exit status."""
    backend: Backend
    if config.backend == "fake":
        backend = FakeBackend(model=config.model)
    else:
        backend = LocalBackend(
            config.model,
            threads=config.engine_threads,
            loras=config.loras,
            standby=config.engine_spare == "on",
            arguments=config.engine_arguments,
            start_seconds=config.engine_start_timeout_s,
            hung_seconds=config.engine_timeout_s,
        )
    try:
        listener = listen(config.host, config.port)
    except OSError as error:
        print(f"cannot listen on {config.host}:{config.port}: {error.strerror}", file=sys.stderr)
        return 1
    host, port = listener.getsockname()[:2]
    settings, streams = uvicorn_config(config, backend, tracing)
    assert isinstance(settings.app, FastAPI)
    try:
        streams.open_data()
    except OSError as error:
        print(f"cannot keep clips and recordings: {error}", file=sys.stderr)
        return 1
    access = settings.app.state.access
    server = Server(settings, streams, config.drain_timeout_s)
    failed = False

    async def announce() -> None:
        nonlocal failed
        if await streams.engine_came_up():
            spare_collections()
            print(f"Livereel is ready: open http://{f'[{host}]' if ':' in host else host}:{port}/", flush=True)
        else:
            failed, server.should_exit = True, True

    announcer = asyncio.create_task(announce())
    if config.keys is not None:
        reload = functools.partial(reload_keys, access, force=True)
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reload)
    try:
        await server.serve(sockets=[listener])
    finally:
        announcer.cancel()
    return int(failed)


def main() -> int:
    if sys.argv[1:2] == ["keys"]:
        return keys.main(sys.argv[2:], os.environ)
    config = Config.from_arguments(sys.argv[1:], os.environ)
    logs.set_up(config.log).addFilter(ThrottleFilter())
    raise_limit()
    try:
        tracing = from_environment(os.environ)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return asyncio.run(serve(config, tracing))


if __name__ == "__main__":
    sys.exit(main())
