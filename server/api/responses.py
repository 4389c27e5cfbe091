"""Responses that last: as long as a stream, or as long as a file grows."""

import asyncio
import os
import re
from abc import ABC, abstractmethod
from email.utils import parsedate
from functools import partial
from pathlib import Path

from starlette.datastructures import Headers
from starlette.responses import FileResponse, Response
from starlette.staticfiles import NotModifiedResponse, StaticFiles
from starlette.types import Receive, Scope, Send

from server.aio import first_of, open_in_thread
from server.errors import ApiError, exhausted, file_removed, not_found
from server.library.mp4 import GrowingFile
from server.protocols import ABORT, takes_reserve

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
    if there is no file; the error is 410 if it has been removed.
    """

    def __init__(self, kind: str, growth: GrowingFile, headers: dict[str, str]) -> None:
        super().__init__(headers=headers)
        self._kind, self._growth = kind, growth

    async def send_all(self, scope: Scope, send: Send) -> None:
        growth, position = self._growth, 0
        if not await growth.wait_beyond(0):
            raise not_found(self._kind)
        try:
            descriptor = await open_in_thread(partial(os.open, growth.path, os.O_RDONLY | os.O_CLOEXEC), os.close)
        except FileNotFoundError:
            raise file_removed() from None
        try:
            if takes_reserve(descriptor):
                raise exhausted()
            if not await self.start(scope, send):
                return
            while await growth.wait_beyond(position):
                size = min(READ_BYTES, growth.size - position)
                data = await asyncio.to_thread(os.pread, descriptor, size, position)
                if not data:  # the file was cut by hand
                    await abort_and_wait(scope)
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


RANGE = r"(?:\d{1,30}-\d{0,30}|-\d{1,30})"
BYTE_RANGES = re.compile(rf"bytes=[ \t]*{RANGE}(?:[ \t]*,[ \t]*{RANGE})*[ \t]*", re.IGNORECASE)
MAX_RANGES = 100


class StoredFileResponse(FileResponse):
    """A complete file, with the preconditions and ranges of RFC 9110 (sections 13 and 14).

    A range unit other than bytes, a malformed `Range` and one with too many ranges are ignored. Raises `ApiError` 410,
    412 or 416.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.stat_result is None:
            try:
                self.stat_result = await asyncio.to_thread(os.stat, self.path)
            except FileNotFoundError:
                raise file_removed() from None
            self.set_stat_headers(self.stat_result)
        headers = Headers(scope=scope)
        self._check_preconditions(headers)
        if self._is_not_modified(headers):
            await NotModifiedResponse(self.headers)(scope, receive, send)
            return
        others = [(name, value) for name, value in scope["headers"] if name not in (b"range", b"if-range")]
        if scope["method"] == "GET" and (ranges := self._ranges(headers, self.stat_result.st_size)):
            others.append((b"range", ranges.encode()))
        scope = {**scope, "headers": others}
        await super().__call__(scope, receive, send)

    def _check_preconditions(self, headers: Headers) -> None:
        """Evaluate `If-Match`, or else `If-Unmodified-Since`. Raises `ApiError` 412."""
        if "if-match" in headers:
            tags = tags_of(headers["if-match"])
            holds = "*" in tags or self.headers["etag"] in tags
        else:
            holds = not modified_since(self.headers["last-modified"], headers.get("if-unmodified-since"))
        if not holds:
            raise ApiError(412, "precondition_failed", "The file is not the one that the request's precondition names.")

    def _is_not_modified(self, headers: Headers) -> bool:
        """Evaluate `If-None-Match`, or else `If-Modified-Since`."""
        if "if-none-match" in headers:
            tags = [tag.removeprefix("W/") for tag in tags_of(headers["if-none-match"])]
            return "*" in tags or self.headers["etag"] in tags
        since = headers.get("if-modified-since")
        return since is not None and modified_since(self.headers["last-modified"], since) is False

    def _ranges(self, headers: Headers, size: int) -> str:
        """The `Range` header without what lies past the end; empty to send the whole file. Raises `ApiError` 416."""
        given, condition = headers.get("range", ""), headers.get("if-range")
        if condition is not None and condition not in (self.headers["etag"], self.headers["last-modified"]):
            return ""
        if not BYTE_RANGES.fullmatch(given) or given.count(",") >= MAX_RANGES:
            return ""
        kept = []
        for each in given.partition("=")[2].split(","):
            first, _, last = each.strip().partition("-")
            if first and last and int(last) < int(first):
                return ""  # invalid, and with it the whole header
            if int(first) < size if first else int(last) > 0 < size:
                kept.append(each.strip())
        if not kept:
            headers_of_error = {"Content-Range": f"bytes */{size}"}
            raise ApiError(416, "range_not_satisfiable", f"The file has {size} bytes.", headers=headers_of_error)
        return f"bytes={','.join(kept)}"


class StoredFiles(StaticFiles):
    """A folder of files, each served as `StoredFileResponse`."""

    def file_response(
        self, full_path: str | os.PathLike[str], stat_result: os.stat_result, scope: Scope, status_code: int = 200
    ) -> Response:
        return StoredFileResponse(full_path, status_code, stat_result=stat_result)


def tags_of(header: str) -> list[str]:
    """The entity tags of a precondition."""
    return [tag.strip() for tag in header.split(",")]


def modified_since(modified: str, since: str | None) -> bool | None:
    """Whether a file was modified after `since`, both HTTP dates; None if `since` is absent or no date."""
    then, now = parsedate(since or ""), parsedate(modified)
    return None if then is None or now is None else now > then


def film_response(kind: str, path: Path, growth: GrowingFile | None, media_type: str, name: str) -> Response:
    """The file of a video or a recording, as a download called `name`. `growth` is None when it is complete."""
    if growth is None:
        return StoredFileResponse(path, media_type=media_type, filename=name)
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
