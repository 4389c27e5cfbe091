"""python -m server: serve the gateway until SIGTERM or SIGINT, and print its address once it is ready."""

import asyncio
import errno
import functools
import gc
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
from server.streams.registry import Registry
from server.tracing import Tracing, from_environment

KEEP_ALIVE_SECONDS = 20
"""How long an idle connection is kept open. This is longer than clients keep theirs (httpx 5 s, aiohttp 15 s): a client
that sends a request just as the server closes the connection gets a reset instead of a response."""
SEND_BUFFER_BYTES = 256 * 1024
"""The kernel's send buffer per connection. Data in it can no longer be dropped, so it adds latency for slow viewers."""
LISTEN_BACKLOG = 2048
"""Connections that wait to be accepted, at most."""
MAX_OPEN_FILES = 16_384
"""Each connection takes one, and each WebRTC viewer one for every address of this machine."""


class Server(uvicorn.Server):
    """uvicorn, but streams end before their sockets close, and the exit status after a signal is 0."""

    def __init__(self, config: uvicorn.Config, streams: Registry, drain_seconds: float = 0.0) -> None:
        """`drain_seconds` is how long streams may play on after SIGTERM."""
        super().__init__(config)
        self._streams = streams
        self._drain_seconds = drain_seconds
        self._draining = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, with a queue of connections that the system keeps until they are accepted."""
        await super().startup(sockets)
        for each in sockets or ():
            each.listen(LISTEN_BACKLOG)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """SIGTERM starts draining; SIGINT, or a second signal, ends the streams now; one more skips the shutdown.

        Unlike uvicorn's, this does not raise the signals again after the shutdown.
        """
        self.force_exit = self.should_exit and not self._draining
        self._draining = sig == signal.SIGTERM and not self.should_exit
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain, end the streams and tell their viewers, then shut down as uvicorn does."""
        seconds = self._drain_seconds if self._draining else 0.0
        ends_at = time.monotonic() + seconds
        self._streams.drain(seconds)
        while self._streams.playing and self._draining and time.monotonic() < ends_at:
            await asyncio.sleep(0.05)
        self._draining = False
        self._streams.end()
        await asyncio.sleep(0.1)  # the sockets' tasks send `ended` and close
        await super().shutdown(sockets)


def listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket whose connections have a small send buffer. Raises OSError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except UnicodeError:  # a part of the name is empty, or has more than 63 letters
        raise OSError(errno.EINVAL, "this is no host name") from None
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
    listener.bind(address)
    listener.listen(512)
    return listener


def uvicorn_config(config: Config, backend: Backend, tracing: Tracing | None = None) -> tuple[uvicorn.Config, Registry]:
    """The application with its uvicorn settings, and its streams. Raises `ValueError` if the keys cannot be read."""
    app = create_app(config, backend, tracing)
    settings = uvicorn.Config(
        app,
        http=protocols.HttpProtocol,
        ws=protocols.WebSocketProtocol,
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        ws_max_size=64 * 1024,
        ws_per_message_deflate=False,
        backlog=protocols.ACCEPTS_PER_TURN,  # `Server.startup` makes the system's queue longer
        proxy_headers=False,  # `ProxyMiddleware` reads them
        forwarded_allow_ips=[*config.trusted_proxies],
        log_config=None,
        log_level="error",  # below that, uvicorn logs a line for every error of a peer
        access_log=False,  # `RequestMiddleware` writes one with the names of keys and without queries
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=5,
    )
    return settings, app.state.streams


def create_backend(config: Config) -> Backend:
    """The backend that the configuration names, not started yet."""
    if config.backend == "fake":
        return FakeBackend(model=config.model)
    return LocalBackend(
        config.model,
        threads=config.engine_threads,
        loras=config.loras,
        standby=config.engine_spare == "on",
        arguments=config.engine_arguments,
        start_seconds=config.engine_start_timeout_s,
        hung_seconds=config.engine_timeout_s,
    )


def raise_file_limit() -> None:
    """Raise the soft limit of open files as far as the system allows: by default many systems set 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(MAX_OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def freeze_heap() -> None:
    """Exclude all current objects (modules, routes, schemas) from garbage collection.

    A full collection stops the event loop. With some hundred clients there was one every few seconds, which took 60 to
    770 ms on a busy machine. The objects created since are a tenth of that, and are collected as usual.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(1_000, 10, 10)


async def serve(config: Config, tracing: Tracing) -> int:
    """Run until a signal arrives or the engine cannot start; returns the exit status."""
    backend = create_backend(config)
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
    server = Server(settings, streams, config.drain_timeout_s)
    failed = False

    async def announce() -> None:
        nonlocal failed
        if await streams.engine.came_up():
            freeze_heap()
            print(f"Livereel is ready: open http://{f'[{host}]' if ':' in host else host}:{port}/", flush=True)
        else:
            failed, server.should_exit = True, True

    announcer = asyncio.create_task(announce())
    if config.keys is not None:
        reload = functools.partial(reload_keys, settings.app.state.access, force=True)
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reload)
    try:
        await server.serve(sockets=[listener])
    finally:
        announcer.cancel()
    return int(failed)


def main() -> int:
    """Run the command line: the gateway, or `keys`, which manages the key file. Returns the exit status."""
    if sys.argv[1:2] == ["keys"]:
        return keys.main(sys.argv[2:], os.environ)
    config = Config.from_arguments(sys.argv[1:], os.environ)
    logs.set_up(config.log).addFilter(logs.ThrottleFilter())
    raise_file_limit()
    try:
        tracing = from_environment(os.environ)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return asyncio.run(serve(config, tracing))


if __name__ == "__main__":
    sys.exit(main())
