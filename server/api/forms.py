"""Request bodies: JSON, and multipart forms that bring a picture."""

import json
import logging
import re
from collections.abc import Sequence
from typing import Any

from starlette.datastructures import Headers, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartParser
from starlette.requests import ClientDisconnect, Request

from engine import wire
from server.aio import first_of
from server.api.responses import wait_for_disconnect
from server.api.routing import streams_of
from server.api.schemas import MAX_CHANGES, printable
from server.errors import ApiError
from server.uploads import images

MAX_BODY_BYTES = 64 * 1024
MAX_UPLOAD_BYTES = images.MAX_BYTES * 4 // 3 + MAX_BODY_BYTES
"""Limit of a request that may bring a picture; base64 takes four bytes for three."""
MAX_FIELDS = 8 + 3 * MAX_CHANGES
"""Most fields of a form."""

NUMBER = re.compile(r"-?(0|[1-9][0-9]{0,19})(\.[0-9]{1,30})?([eE][+-]?[0-9]{1,3})?")
"""A number in a form field, written as in JSON."""
BRACKETED_NAME = re.compile(r"(\w{1,32})((?:\[\w{0,32}\]){1,4})")
"""Name of a nested form field, such as `extra[prompts][][at_s]`."""

logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it logs a warning for every malformed form
MultiPartParser.spool_max_size = MAX_UPLOAD_BYTES
"""Keeps uploads in memory: no user data is written to disk, and a full disk does not fail a request."""


def media_type(headers: Headers) -> str:
    """The Content-Type without its parameters."""
    return headers.get("content-type", "").split(";")[0].strip().lower()


def is_form(headers: Headers) -> bool:
    """Whether the request body is a multipart form."""
    return media_type(headers) == "multipart/form-data"


async def read_json(request: Request) -> Any:
    """The decoded JSON body; None if the body is empty. Raises `ApiError` 400."""
    try:
        body = await request.body()
        return json.loads(body) if body else None
    except (ValueError, RecursionError):
        raise ApiError(400, "invalid_json", "The body is not valid JSON in UTF-8.") from None


async def read_fields(request: Request, file: str, numbers: Sequence[str]) -> tuple[Any, bytes | None]:
    """The fields of a JSON or form body, and the content of the form's file called `file`, if there is one.

    Form fields whose name is in `numbers` are parsed as numbers. Raises `ApiError` 400.
    """
    return await read_form(request, file, numbers) if is_form(request.headers) else (await read_json(request), None)


async def read_form(request: Request, file: str, numbers: Sequence[str]) -> tuple[dict[str, Any], bytes | None]:
    """The fields of a multipart form, and the content of its file called `file`, if there is one.

    Nested names follow the convention of HTML form libraries: `a[b]` is field `b` of the object `a`, `a[]` appends an
    item to the list `a`, and `a[][b]` is field `b` of the first item of `a` that does not have it yet.
    """
    fields: dict[str, Any] = {}
    upload: bytes | None = None
    try:
        async with request.form(max_files=1, max_fields=MAX_FIELDS, max_part_size=MAX_BODY_BYTES) as form:
            for name, value in form.multi_items():
                bracketed = BRACKETED_NAME.fullmatch(name)
                path = [bracketed[1], *re.findall(r"\[(\w*)\]", bracketed[2])] if bracketed else [name]
                item: Any = value
                if path[-1] in numbers and isinstance(value, str) and NUMBER.fullmatch(value):
                    item = json.loads(value)
                if isinstance(value, UploadFile) and name == file and upload is None:
                    upload = await value.read()
                elif (name == file and upload is not None) or not set_field(fields, path, item):
                    message = f"`{printable(name)}` is there twice: send it once."
                    raise ApiError(400, "invalid_form", message, param=printable(name))
    except ApiError:
        raise
    except HTTPException:  # Starlette's error for a form that is malformed or exceeds a limit
        raise ApiError(400, "invalid_form", "The body is not a valid form with one file at most.") from None
    return fields, upload


def set_field(fields: dict[str, Any], path: list[str], value: Any) -> bool:
    """Set a nested field in place; False if it is already set, or its path runs through a value of another kind."""
    key, *rest = path
    if not rest:
        is_new = key not in fields
        fields.setdefault(key, value)
        return is_new
    inner = fields.setdefault(key, [] if rest[0] == "" else {})
    if rest[0]:
        return isinstance(inner, dict) and set_field(inner, rest, value)
    if not isinstance(inner, list):
        return False
    if len(rest) == 1:
        inner.append(value)
        return True
    item = next((item for item in inner if isinstance(item, dict) and rest[1] not in item), None)
    if item is None:
        inner.append(item := {})
    return set_field(item, rest[1:], value)


async def read_image(request: Request, info: wire.ModelInfo, upload: bytes | None, url: str | None) -> bytes:
    """Decode an uploaded file, or else a data URL, to frames of the model's size. Raises `ApiError`.

    Raises `ClientDisconnect`, and decodes no further, if the client leaves meanwhile.
    """
    data = upload if upload is not None else images.from_data_url(url or "")
    decode = streams_of(request).uploads.frames(data, info.width, info.height, info.fps)
    decoded: bytes | None = await first_of(decode, wait_for_disconnect(request.receive))
    if decoded is None:
        raise ClientDisconnect
    return decoded


async def check_connected(request: Request) -> None:
    """Raise `ClientDisconnect` if the client has left, so that nothing is made for nobody. The body must be read."""
    if await request.is_disconnected():
        raise ClientDisconnect
