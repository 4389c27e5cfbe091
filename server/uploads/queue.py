"""Uploads wait here for the decoder: bounded in number and in bytes, and decoded one at a time."""

import asyncio
import contextlib
import ctypes
from collections.abc import Callable, Iterator

from server.errors import ApiError
from server.uploads import images

MAX_UPLOADS = 16
"""Uploads that are decoded or wait for it. A picture takes a tenth of a second, a long clip seconds."""
MAX_BYTES = 64 << 20
"""Of all request bodies with an upload, from the first byte that arrives to the response."""
RETRY_SECONDS = 5
TRIM_SECONDS = 1.0
"""From the end of an upload to the return of its memory to the system."""


class UploadQueue:
    """The uploads of one gateway. What exceeds a bound is refused with `ApiError` 503, to be sent again later."""

    def __init__(self) -> None:
        self._decoder = asyncio.Semaphore(1)
        self._bytes = 0
        self._waiting = 0
        self._trim: asyncio.TimerHandle | None = None

    @property
    def waiting(self) -> int:
        """Uploads that are decoded or wait for it."""
        return self._waiting

    @contextlib.contextmanager
    def hold(self, expected: int = 0) -> Iterator[Callable[[int], None]]:
        """Count the bytes of an upload as long as the context lasts; call the result with how many have arrived.

        `expected` is how many will arrive, as far as that is known. Both raise `ApiError`.
        """
        held = 0

        def arrive(size: int) -> None:
            nonlocal held
            self._check(size - held)
            self._bytes += size - held
            held = size

        self._check(expected)
        try:
            yield arrive
        finally:
            self._bytes -= held
            if held and self._trim is None:
                self._trim = asyncio.get_running_loop().call_later(TRIM_SECONDS, self._on_trim)

    async def frames(self, data: bytes, width: int, height: int, fps: int) -> bytes:
        """Decode an upload as `images.frames` does, after those that came before it. Live streams keep the processor:
        one is decoded at a time. Raises `ApiError`."""
        if self._waiting >= MAX_UPLOADS:
            raise too_many_uploads()
        self._waiting += 1
        try:
            async with self._decoder:
                return await images.frames(data, width, height, fps)
        finally:
            self._waiting -= 1

    def _on_trim(self) -> None:
        self._trim = None
        asyncio.get_running_loop().run_in_executor(None, trim_heap)

    def _check(self, size: int) -> None:
        if self._bytes + size > MAX_BYTES:
            raise too_many_uploads()


def too_many_uploads() -> ApiError:
    message = f"Too many pictures and clips are being taken in: send it again in {RETRY_SECONDS} s."
    return ApiError(503, "too_many_uploads", message, headers={"Retry-After": str(RETRY_SECONDS)})


def trim_heap() -> None:
    """Give freed memory back to the system. glibc keeps what lies below a block in use: hundreds of megabytes, after
    many uploads at a time."""
    with contextlib.suppress(AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
