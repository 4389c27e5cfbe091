"""Responses that last: as long as a stream, or as long as a file grows."""

import asyncio
import os
from abc import ABC, abstractmethod
from pathlib import Path

from starlette.responses import FileResponse, Response
from starlette.types import Receive, Scope, Send

from server.aio import first_of
from server.errors import not_found
from server.library.mp4 import Growth
from server.protocols import ABORT

READ_BYTES = 256 * 1024
"""How much of a growing file is read at a time."""


class LongLivedResponse(Response, ABC):
    """A response that ends when `send_all` has sent everything or the client disconnects."""

    def __init__(self, status_code: int = 200, headers: dict[str, str] | None = None) -> None:
        super().__init__(status_code=status_code, headers=headers)
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await first_of(self.send_all(scope, send), wait_for_disconnect(receive))

    @abstractmethod
    async def send_all(self, scope: Scope, send: Send) -> None:
        """Send the whole response: its headers by `start`, then its body unless the request was HEAD."""

    async def start(self, scope: Scope, send: Send) -> bool:
        """Send the headers; returns whether a body follows them. There is none for HEAD, whose response ends here."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        if scope.get("method") == "HEAD":
            await send({"type": "http.response.body", "body": b""})
            return False
        return True


class GrowingFileResponse(LongLivedResponse):
    """A file from its start, followed by what is appended to it, until it is complete.

    Aborts the connection if the file will never be complete. `kind` names the resource in the 404 error that is raised
    if there is no file.
    """

    def __init__(self, kind: str, growth: Growth, headers: dict[str, str]) -> None:
        super().__init__(headers=headers)
        self._kind, self._growth = kind, growth

    async def send_all(self, scope: Scope, send: Send) -> None:
        growth, position = self._growth, 0
        if not await growth.wait_beyond(0):
            raise not_found(self._kind)
        descriptor = await asyncio.to_thread(os.open, growth.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if not await self.start(scope, send):
                return
            while await growth.wait_beyond(position):
                size = min(READ_BYTES, growth.size - position)
                data = await asyncio.to_thread(os.pread, descriptor, size, position)
                position += len(data)
                await send({"type": "http.response.body", "body": data, "more_body": True})
            if not growth.complete:
                await abort_and_wait(scope)
            await send({"type": "http.response.body", "body": b""})
        except asyncio.CancelledError:
            abort_connection(scope)  # the client's key was revoked, or the server is stopping
            raise
        finally:
            os.close(descriptor)


def film_response(kind: str, path: Path, growth: Growth | None, media_type: str, name: str) -> Response:
    """The file of a video or a recording, as a download called `name`. `growth` is None when it is complete."""
    if growth is None:
        return FileResponse(path, media_type=media_type, filename=name)
    return GrowingFileResponse(
        kind, growth, {"content-type": media_type, "content-disposition": f'attachment; filename="{name}"'}
    )


async def wait_for_disconnect(receive: Receive) -> None:
    """Wait until the client has disconnected."""
    while (await receive())["type"] != "http.disconnect":
        pass


def abort_connection(scope: Scope) -> None:
    """Drop the connection at once, so that the client does not take a truncated response for a complete one."""
    if extension := scope.get("extensions", {}).get(ABORT):
        extension["call"]()


async def abort_and_wait(scope: Scope) -> None:
    """Drop the connection, then wait to be cancelled: that happens once the disconnect is noticed."""
    abort_connection(scope)
    await asyncio.Event().wait()
