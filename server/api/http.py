"""The HTTP side: thin functions between requests and `Streams`, and the envelope around every one of them."""

import asyncio
import errno
import json
import logging
import os
import re
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartParser
from starlette.requests import ClientDisconnect, HTTPConnection, Request
from starlette.responses import FileResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine import wire
from server.api import idempotency, schemas
from server.auth.access import Access, access_of, principal_of, signed, with_token
from server.errors import ApiError, exhausted, not_found, request_id
from server.library.mp4 import Growth
from server.logs import redact
from server.media.matte import Matte
from server.metrics import CONTENT_TYPE, Metrics
from server.streams import admission
from server.streams.registry import Stream, Streams
from server.tracing import Tracing
from server.uploads import images as pictures

if TYPE_CHECKING:
    from opentelemetry.trace import Span

logger = logging.getLogger("livereel.http")

CLIENTS = Path(__file__).resolve().parents[2] / "clients"
WEB, OVERLAY = CLIENTS / "web", CLIENTS / "overlay"
MAX_BODY_BYTES = 64 * 1024
MAX_UPLOAD_BYTES = pictures.MAX_BYTES * 4 // 3 + MAX_BODY_BYTES
"""Of a request that may bring a picture; base64 takes four bytes for three."""
logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it tells of every form that is damaged
MultiPartParser.spool_max_size = MAX_UPLOAD_BYTES
"""Uploads stay in memory: nothing of a user's lies on a disk, and a full one is no fault of theirs."""
UPLOADS = {("POST", "/v1/streams"), ("POST", "/v1/videos")}
READ_BYTES = 256 * 1024
"""Of a file that grows, at a time."""
BODY_SECONDS = 10.0
"""How long a request body may take to arrive; one with a picture three times as long."""

ABORT = "livereel.abort"
"""ASGI extension of our own server (see `server.protocols`): drops the connection without waiting for the peer."""

NUMBER = re.compile(r"-?(0|[1-9][0-9]{0,19})(\.[0-9]{1,30})?([eE][+-]?[0-9]{1,3})?")
"""What a form may have for one, as JSON writes it."""

EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.ENOSPC, errno.EAGAIN)
"""What the system says when it has no more descriptors, memory, room or processes."""

FIELD = re.compile(r"(\w{1,32})((?:\[\w{0,32}\]){1,4})")
"""The name of what is nested in a form."""
MAX_FIELDS = 8 + 3 * schemas.MAX_CHANGES
"""Of a form."""

ERROR = {"model": schemas.ErrorBody}


@dataclass(frozen=True, slots=True)
class Route:
    """One line of the table in `ROUTES`: everything FastAPI has to know about an endpoint."""

    method: str
    path: str
    endpoint: Any
    model: Any = None
    status: int = 200
    errors: tuple[int, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    accepts: str = "application/json"
    """Media type of a request body; empty where none is read."""


def streams_of(connection: HTTPConnection) -> Streams:
    """The application's streams."""
    streams = connection.app.state.streams
    assert isinstance(streams, Streams)
    return streams


def wants_alpha(connection: HTTPConnection) -> bool:
    """Whether a viewer takes every frame above its matte. Raises `ApiError` for anything else in `?alpha=`."""
    wanted = connection.query_params.get("alpha", "none")
    if wanted not in ("none", "stacked"):
        raise ApiError(400, "invalid_value", "`alpha` must be none or stacked.", param="alpha")
    return wanted == "stacked"


# streams


async def create_stream(request: Request, response: Response) -> dict[str, Any]:
    """Open a stream: it starts at once, or waits in the queue for a place in the engine."""
    streams = streams_of(request)
    fields, upload = await read_fields(request, "image", ("seed", "duration_s"))
    body = schemas.read(schemas.CreateStream, fields)
    with claim_of(request, "POST /v1/streams", body.model_dump(), upload or b"") as claim:
        if claim.made is None:
            picture = b""
            if upload is not None or body.image is not None:
                picture = await read_picture(streams, streams.info(body.model), upload, body.image)
            key = principal_of(request).key
            stream = streams.open(body.prompt, body.model, body.seed, body.duration_s, picture, key=key)
            claim.made = stream.session.id
        else:
            stream = streams.get(claim.made)
            response.headers.update(idempotency.REPLAYED)
    response.headers["Location"] = f"/v1/streams/{stream.session.id}"
    return stream_object(request, stream)


def claim_of(
    request: Request, operation: str, payload: Any, *uploads: bytes
) -> AbstractContextManager[idempotency.Claim]:
    """The right to do what the request asks for, once for each `Idempotency-Key` (see `Idempotency.claim`)."""
    ledger: idempotency.Idempotency = request.app.state.idempotency
    key, sent = principal_of(request).key, request.headers.getlist(idempotency.HEADER)
    client, shown = key.serial if key else None, ", ".join(sent) if sent else None
    return ledger.claim(client, shown, idempotency.fingerprint(operation, payload, *uploads), time.monotonic())


async def read_json(request: Request) -> Any:
    """The body of a request, decoded."""
    try:
        body = await request.body()
        return json.loads(body) if body else None
    except (ValueError, RecursionError):
        raise ApiError(400, "invalid_json", "The body is not valid JSON in UTF-8.") from None


async def read_fields(request: Request, file: str, numbers: Sequence[str]) -> tuple[Any, bytes | None]:
    """The fields of a form or of JSON, and the uploaded file of this name apart."""
    return await read_form(request, file, numbers) if is_form(request.headers) else (await read_json(request), None)


async def read_picture(streams: Streams, info: wire.ModelInfo, upload: bytes | None, url: str | None) -> bytes:
    """Frames of the model's size of what came as a file or as a data URL."""
    data = upload if upload is not None else pictures.from_data_url(url or "")
    async with streams.decoding:
        return await pictures.frames(data, info.width, info.height, info.fps)


async def read_form(request: Request, file: str, numbers: Sequence[str]) -> tuple[dict[str, Any], bytes | None]:
    """The fields of a form, `numbers` as numbers, and the uploaded file apart.

    `a[b]` is field `b` of the object `a`, `a[]` the next item of the list `a`, and `a[][b]` field `b` of its first
    item that has none: so programs write what is nested.
    """
    fields: dict[str, Any] = {}
    upload: bytes | None = None
    try:
        async with request.form(max_files=1, max_fields=MAX_FIELDS, max_part_size=MAX_BODY_BYTES) as form:
            for name, value in form.multi_items():
                bracketed = FIELD.fullmatch(name)
                path = [bracketed[1], *re.findall(r"\[(\w*)\]", bracketed[2])] if bracketed else [name]
                item: Any = value
                if path[-1] in numbers and isinstance(value, str) and NUMBER.fullmatch(value):
                    item = json.loads(value)
                if isinstance(value, UploadFile) and name == file and upload is None:
                    upload = await value.read()
                elif (name == file and upload is not None) or not put(fields, path, item):
                    shown = name.encode("ascii", "backslashreplace").decode()[:64]
                    raise ApiError(400, "invalid_form", f"`{shown}` is there twice: send it once.", param=shown)
    except ApiError:
        raise
    except HTTPException:  # what Starlette makes of a form that is damaged or over a limit
        raise ApiError(400, "invalid_form", "The body is not a valid form with one file at most.") from None
    return fields, upload


def put(into: dict[str, Any], path: list[str], value: Any) -> bool:
    """Set a field of a form; false when it is there already, or as something else."""
    key, *rest = path
    if not rest:
        fresh = key not in into
        into.setdefault(key, value)
        return fresh
    inner = into.setdefault(key, [] if rest[0] == "" else {})
    if rest[0]:
        return isinstance(inner, dict) and put(inner, rest, value)
    if not isinstance(inner, list):
        return False
    if len(rest) == 1:
        inner.append(value)
        return True
    item = next((item for item in inner if isinstance(item, dict) and rest[1] not in item), None)
    if item is None:
        inner.append(item := {})
    return put(item, rest[1:], value)


async def list_streams(request: Request) -> dict[str, Any]:
    """The key's streams, those that ended a short while ago included."""
    principal = principal_of(request)
    mine = [stream for stream in streams_of(request).all() if principal.sees(stream.session.id, stream.owner)]
    return {"object": "list", "data": [stream_object(request, stream) for stream in mine]}


async def get_stream(request: Request, id: str) -> dict[str, Any]:
    """One stream and its figures."""
    return stream_object(request, streams_of(request).get(id))


async def change_stream(request: Request, id: str, body: schemas.ChangeStream) -> dict[str, Any]:
    """Change the prompt from the next chunk on, or hold and continue playback."""
    streams = streams_of(request)
    stream = streams.get(id)
    if body.transition is not None and body.prompt is None:
        raise ApiError(
            400, "missing_field", "`transition` says how to get to a new prompt: send `prompt` too.", param="prompt"
        )
    if body.prompt is None and body.paused is None:
        raise ApiError(400, "nothing_to_change", "Send at least one of `prompt` and `paused`.")
    chunk = await streams.change(stream, body.prompt, body.transition, body.paused)
    return {**stream_object(request, stream), "chunk_index": chunk}


async def delete_stream(request: Request, id: str) -> Response:
    """End a stream. Doing it again does no harm."""
    streams = streams_of(request)
    streams.close(streams.get(id))
    return Response(status_code=204)


async def set_matte(request: Request, id: str, body: schemas.MatteObject) -> dict[str, Any]:
    """Say what is transparent for who watches with `alpha=stacked`, from the picture on screen on."""
    streams = streams_of(request)
    stream = streams.get(id)
    streams.set_matte(stream, Matte(**body.model_dump()))
    return stream_object(request, stream)


async def remove_matte(request: Request, id: str) -> dict[str, Any]:
    """Nothing is transparent any more."""
    streams = streams_of(request)
    stream = streams.get(id)
    streams.set_matte(stream, None)
    return stream_object(request, stream)


async def create_token(request: Request, id: str, body: schemas.CreateToken) -> dict[str, Any]:
    """A token that lets a browser or a guest watch or control this one stream for a while, without the key."""
    principal = principal_of(request)
    if principal.stream is not None:
        raise ApiError(403, "scope_missing", "A token makes no tokens: use an API key.")
    id = streams_of(request).get(id).session.id
    token = access_of(request).grant(principal, id, body.scope, body.expires_in_s)
    return {
        "object": "token",
        "token": token,
        "stream_id": id,
        "scope": body.scope,
        "expires_at": time.time() + body.expires_in_s,
        "ws_url": with_token(socket_url(request, id), token),
    }


def stream_object(connection: HTTPConnection, stream: Stream) -> dict[str, Any]:
    """The stream as the API shows it to this client."""
    whep_url = f"/v1/streams/{stream.session.id}/whep"
    return {**stream.snapshot(), "ws_url": ws_url(connection, stream.session.id), "whep_url": whep_url}


def ws_url(connection: HTTPConnection, id: str) -> str:
    """Where this client finds the stream's WebSocket, with what it needs to get in."""
    return signed(connection, id, socket_url(connection, id))


def socket_url(connection: HTTPConnection, id: str) -> str:
    """Absolute, unless the Host header makes no sense."""
    path, host = f"/v1/streams/{id}/ws", connection.headers.get("host", "")
    if not re.fullmatch(r"[A-Za-z0-9.\-_]+(:\d+)?|\[[0-9A-Fa-f:.]+\](:\d+)?", host):
        return path
    scheme = "wss" if connection.url.scheme in ("https", "wss") else "ws"
    return f"{scheme}://{host}{path}"


# the server


async def list_models(request: Request) -> dict[str, Any]:
    """The models that the engine serves; none while it starts."""
    streams = streams_of(request)
    data = []
    for info in streams.models:
        share = admission.cost(info.chunk_seconds, info.chunk_frames, info.fps)
        data.append(
            {
                "id": info.name,
                "object": "model",
                **{name: getattr(info, name) for name in schemas.MODEL_FIELDS},
                "real_time_factor": share,
                "capacity": admission.capacity(share, info.promised),
                "default": info.name == streams.default_model,
            }
        )
    return {"object": "list", "data": data}


async def list_loras(request: Request) -> dict[str, Any]:
    """The LoRAs that can be applied, and how strongly they are."""
    return lora_list(await streams_of(request).loras())


async def change_loras(request: Request, body: schemas.ChangeLoras) -> dict[str, Any]:
    """Apply these LoRAs and no others, to every stream, from its next chunk on."""
    return lora_list(await streams_of(request).loras(body.loras))


def lora_list(loras: wire.Loras) -> dict[str, Any]:
    """What the engine said, as the API shows it. A LoRA that is applied is listed, even if its file is gone."""
    data = [
        {"id": name, "object": "lora", "strength": loras.applied.get(name)}
        for name in sorted({*loras.names, *loras.applied})
    ]
    return {"object": "list", "data": data}


async def livez() -> dict[str, Any]:
    """The process answers."""
    return {"status": "ok"}


async def readyz(request: Request, response: Response) -> dict[str, Any]:
    """Whether a stream could start now: the engine is up and heard from. 503 and the reason otherwise."""
    ready, reason = streams_of(request).readiness()
    if access_of(request).keys is not None:
        reason = "ready" if ready else "see the server's log"  # whoever asks has shown no key
    response.status_code = 200 if ready else 503
    return {"ready": ready, "reason": reason}


async def metrics(request: Request) -> Response:
    """Figures for Prometheus."""
    streams_of(request).count()
    figures: Metrics = request.app.state.metrics
    return Response(figures.render(), media_type=CONTENT_TYPE)


async def page(request: Request) -> Response:
    """The live preview."""
    return FileResponse(WEB / "index.html")


async def docs(request: Request) -> Response:
    """The reference of this API."""
    return FileResponse(WEB / "docs.html")


async def overlay(request: Request, id: str) -> Response:
    """A page that is nothing but the stream, with its transparency."""
    return FileResponse(OVERLAY / "index.html")


ROUTES = [
    Route(
        "POST",
        "/v1/streams",
        create_stream,
        schemas.StreamObject,
        201,
        (400, 404, 409, 413, 415, 422, 429, 503),
        {
            "openapi_extra": {
                "requestBody": schemas.body_schema(schemas.CreateStream, "image"),
                "parameters": [schemas.IDEMPOTENCY_KEY],
            }
        },
    ),
    Route("GET", "/v1/streams", list_streams, schemas.StreamList),
    Route("GET", "/v1/streams/{id}", get_stream, schemas.StreamObject, 200, (404,)),
    Route("PATCH", "/v1/streams/{id}", change_stream, schemas.StreamChanged, 200, (400, 404, 409, 413, 415, 504)),
    Route("DELETE", "/v1/streams/{id}", delete_stream, None, 204, (404,)),
    Route("PUT", "/v1/streams/{id}/matte", set_matte, schemas.StreamObject, 200, (400, 404, 409, 413, 415)),
    Route("DELETE", "/v1/streams/{id}/matte", remove_matte, schemas.StreamObject, 200, (404, 409)),
    Route(
        "POST", "/v1/streams/{id}/tokens", create_token, schemas.TokenObject, 201, (400, 401, 403, 404, 413, 415, 429)
    ),
    Route("GET", "/v1/models", list_models, schemas.ModelList),
    Route("GET", "/v1/loras", list_loras, schemas.LoraList, 200, (503, 504)),
    Route("PUT", "/v1/loras", change_loras, schemas.LoraList, 200, (400, 404, 409, 413, 415, 503, 504)),
    Route("GET", "/livez", livez, schemas.Alive),
    Route("GET", "/readyz", readyz, schemas.Readiness, options={"responses": {503: {"model": schemas.Readiness}}}),
    Route("GET", "/metrics", metrics, options={"response_class": Response, "responses": {"default": ERROR}}),
    Route("GET", "/docs", docs, options={"include_in_schema": False}),
    Route("GET", "/overlay/{id}", overlay, options={"include_in_schema": False}),
    Route("GET", "/", page, options={"include_in_schema": False}),
]


# responses that go on


class LongLivedResponse(Response, ABC):
    """A response that goes on for as long as there is something to send, or its reader wants it."""

    def __init__(self, status_code: int = 200, headers: dict[str, str] | None = None) -> None:
        super().__init__(status_code=status_code, headers=headers)
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = [asyncio.create_task(self.send_all(scope, send)), asyncio.create_task(gone(receive))]
        try:
            done, _ = await asyncio.wait(work, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in work:
                task.cancel()
            await asyncio.gather(*work, return_exceptions=True)

    @abstractmethod
    async def send_all(self, scope: Scope, send: Send) -> None:
        """Send the response, from its head to its end."""


def film(kind: str, path: Path, growth: Growth | None, media_type: str, name: str) -> Response:
    """The file of a video or a recording, which is complete, or grows."""
    if growth is None:
        return FileResponse(path, media_type=media_type, filename=name)
    return GrowingFileResponse(
        kind, growth, {"content-type": media_type, "content-disposition": f'attachment; filename="{name}"'}
    )


class GrowingFileResponse(LongLivedResponse):
    """A file from its start, and what is added to it, until it is complete. Breaks off if it never will be."""

    def __init__(self, kind: str, growth: Growth, headers: dict[str, str]) -> None:
        super().__init__(headers=headers)
        self._kind, self._growth = kind, growth

    async def send_all(self, scope: Scope, send: Send) -> None:
        growth, place = self._growth, 0
        if not await growth.beyond(0):
            raise not_found(self._kind)
        descriptor = await asyncio.to_thread(os.open, growth.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            while await growth.beyond(place):
                wanted = min(READ_BYTES, growth.size - place)
                data = await asyncio.to_thread(os.pread, descriptor, wanted, place)
                place += len(data)
                await send({"type": "http.response.body", "body": data, "more_body": True})
            if not growth.whole:
                await abort(scope)
            await send({"type": "http.response.body", "body": b""})
        except asyncio.CancelledError:
            drop(scope)  # its key was taken away, or the server ends
            raise
        finally:
            os.close(descriptor)


async def gone(receive: Receive) -> None:
    """Wait until the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


def drop(scope: Scope) -> None:
    """Drop the connection, so that its client does not take a response for complete."""
    if extension := scope.get("extensions", {}).get(ABORT):
        extension["call"]()


async def abort(scope: Scope) -> None:
    """Drop the connection, and wait until that is known. Ends only by being cancelled."""
    drop(scope)
    await asyncio.Event().wait()  # until the client is known to be gone


# errors


def error_response(error: ApiError) -> JSONResponse:
    """The error object of the API."""
    return JSONResponse(error.body, error.status_code, dict(error.headers or {}))


async def on_http_exception(request: Request, exception: Exception) -> Response:
    """Every failure that is raised on purpose, by us or by the framework."""
    assert isinstance(exception, HTTPException)
    if isinstance(exception, ApiError):
        return error_response(exception)
    status, headers = exception.status_code, dict(exception.headers or {})
    if status == 404:
        error = ApiError(404, "not_found", "There is nothing at this path: see /docs.")
    elif status == 405:
        # The framework knows the methods of one of our routes; a path has several.
        headers["Allow"] = ", ".join(route.method for route in routes_at(request.scope)) or headers.get("allow", "GET")
        headers.pop("allow", None)
        error = ApiError(405, "method_not_allowed", f"Use {headers['Allow']} here.", headers=headers)
    elif status == 400:
        error = ApiError(400, "invalid_json", "The body is not valid JSON in UTF-8.")
    else:
        error = ApiError(status, "http_error", HTTPStatus(status).phrase + ".", headers=headers)
    return error_response(error)


async def on_validation_error(request: Request, exception: Exception) -> Response:
    """A request body that the schema refuses."""
    assert isinstance(exception, RequestValidationError)
    return error_response(schemas.explain(exception.errors()))


def routes_at(scope: Scope) -> Sequence[Route]:
    """What the application has for the path of a request."""
    routes: Sequence[Route] = scope["app"].state.routes
    return [route for route in routes if re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", route.path), scope["path"])]


# the envelope


class Envelope:
    """Outermost layer: request ids, security headers, the log of requests, and an error object when all else failed."""

    def __init__(self, app: ASGIApp, *, access: Access, tracing: Tracing) -> None:
        self._app = app
        self._access = access
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        id = headers.get("x-request-id", "")
        # Not even as somebody's id is a key or a token ever logged.
        if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", id) or id != redact(id):
            id = f"req_{secrets.token_hex(12)}"
        request_id.set(id)
        path = scope["raw_path"].decode("ascii", "replace")[:200]
        with self._tracing.request(scope.get("method", "GET"), path, headers) as span:
            await self._serve(scope, receive, send, headers, span)

    async def _serve(self, scope: Scope, receive: Receive, send: Send, headers: Headers, span: "Span | None") -> None:
        id, started, begun = request_id.get(), False, time.monotonic()

        async def send_with_headers(message: Message) -> None:
            nonlocal started
            if message["type"] == "websocket.accept":
                message.setdefault("headers", [])
                MutableHeaders(scope=message)["x-request-id"] = id
                self._note(scope, 101, begun, span)
            elif message["type"] == "http.response.start":
                started = True
                response_headers = MutableHeaders(scope=message)
                response_headers["x-request-id"] = id
                for name, value in (*security_headers(scope, headers), *self._access.cors(headers)):
                    response_headers.setdefault(name, value)
                self._note(scope, message["status"], begun, span)
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except ClientDisconnect:
            return  # in the middle of its request: there is nobody to answer, and nothing to write down
        except Exception as error:
            if scope["type"] == "websocket":
                raise
            if isinstance(error, ApiError):
                await error_response(error)(scope, receive, send_with_headers)
                return
            failure = ApiError(500, "internal_error", f"The server failed; its log has request {id}.")
            if isinstance(error, OSError) and error.errno in EXHAUSTED:
                failure = exhausted()
                logger.error("request %s failed: %s", id, error.strerror)
            else:
                logger.exception("request %s failed", id)
            if started:
                raise
            await error_response(failure)(scope, receive, send_with_headers)

    def _note(self, scope: Scope, status: int, begun: float, span: "Span | None") -> None:
        """Who did what, where there is anybody to tell apart. Never the query, which may hold a token."""
        if span is not None:
            span.set_attribute("http.response.status_code", status)
        principal = scope.get("state", {}).get("principal")
        if self._access.keys is not None and (principal or status >= 400):
            path = scope["raw_path"].decode("ascii", "replace")[:200]
            who = principal.name if principal else "-"
            method = scope.get("method", "GET")
            seconds = round(time.monotonic() - begun, 4)
            extra = {"principal": who, "method": method, "path": path, "status": status, "seconds": seconds}
            logger.info("%s %s %s %d", who, method, path, status, extra=extra)


class Bodies:
    """Limits on request bodies, and on who may send them."""

    def __init__(self, app: ASGIApp, *, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            ours = self._access.origin_allowed(headers)
            check_body(scope, headers, ours)
            if not ours and scope["method"] not in ("GET", "HEAD", "OPTIONS"):
                message = "This page may not use the server: the operator must allow its origin with --origins."
                raise ApiError(403, "origin_not_allowed", message)
            limit = body_limit(scope)
            receive = BodyLimit(receive, limit, BODY_SECONDS * (1 if limit == MAX_BODY_BYTES else 3))
        await self._app(scope, receive, send)


class BodyLimit:
    """A request body that may not be too long, nor take too long."""

    def __init__(self, receive: Receive, limit: int, seconds: float) -> None:
        self._receive = receive
        self._size, self._limit = 0, limit
        self._deadline = asyncio.get_running_loop().time() + seconds
        self._complete = False

    async def __call__(self) -> Message:
        if self._complete:
            return await self._receive()  # waits for the client to leave, for as long as the response takes
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            raise ApiError(408, "body_timeout", "The request body took too long.") from None
        self._size += len(message.get("body", b""))
        self._complete = not message.get("more_body", False)
        if self._size > self._limit:
            raise body_too_large(self._limit)
        return message


def check_body(scope: Scope, headers: Headers, ours: bool) -> None:
    """What the headers give away about a body before it is read; `ours` says that the origin is allowed."""
    if not scope["path"].startswith("/v1/") or scope["method"] not in ("POST", "PATCH", "PUT"):
        return
    length, limit = headers.get("content-length", "0"), body_limit(scope)
    if length.isdecimal() and int(length[:20]) > limit:
        raise body_too_large(limit)
    if route := next((route for route in routes_at(scope) if route.method == scope["method"]), None):
        if route.accepts in ("", media_type(headers)):
            return
        # A type that a form can send would let any web page open streams on the visitor's own machine: such a request
        # must come from our own page, or from no browser at all.
        if not (is_form(headers) and limit == MAX_UPLOAD_BYTES and ours):
            what = "JSON" if route.accepts == "application/json" else "SDP"
            message = f"Send {what}, with `Content-Type: {route.accepts}`."
            raise ApiError(
                415, "unsupported_media_type", message, headers={f"Accept-{scope['method'].title()}": route.accepts}
            )


def media_type(headers: Headers) -> str:
    return headers.get("content-type", "").split(";")[0].strip().lower()


def is_form(headers: Headers) -> bool:
    return media_type(headers) == "multipart/form-data"


def body_limit(scope: Scope) -> int:
    """Bytes that the body of this request may have."""
    return MAX_UPLOAD_BYTES if (scope["method"], scope["path"]) in UPLOADS else MAX_BODY_BYTES


def body_too_large(limit: int) -> ApiError:
    return ApiError(413, "body_too_large", f"The body is too large: send at most {limit} bytes.")


def security_headers(scope: Scope, headers: Headers) -> list[tuple[str, str]]:
    """Headers for every response. Nothing from another host is ever loaded."""
    # Some browsers do not count WebSockets under 'self': name them.
    host = headers.get("host", "")
    sockets = f" ws://{host} wss://{host}" if re.fullmatch(r"[A-Za-z0-9.:\[\]-]+", host) else ""
    policy = (
        f"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; media-src blob:; "
        f"connect-src 'self'{sockets}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    # What the server says now is not what it says in a second; the page's own files are revalidated.
    caching = "no-cache" if scope["path"] in ("/", "/docs") or scope["path"].startswith("/assets/") else "no-store"
    return [
        ("content-security-policy", policy),
        ("x-content-type-options", "nosniff"),
        ("referrer-policy", "no-referrer"),
        ("cache-control", caching),
    ]
