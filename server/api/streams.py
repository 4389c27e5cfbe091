"""Streams: create, list, change and end them; their mattes and tokens."""

import time
from collections.abc import Sequence
from typing import Any

from starlette.requests import HTTPConnection, Request
from starlette.responses import Response

from server.api import idempotency, schemas
from server.api.forms import check_connected, read_fields, read_image
from server.api.response_schemas import StreamChanged, StreamList, StreamObject, TokenObject
from server.api.routing import Route, access_of, principal_of, socket_url, streams_of, url_of, with_token, ws_url
from server.errors import ApiError
from server.library.clip import Change
from server.media.matte import Matte
from server.streams.stream import Stream


async def create_stream(request: Request, response: Response) -> dict[str, Any]:
    """Open a stream. It starts at once, or waits in the queue until the engine has capacity."""
    streams = streams_of(request)
    fields, upload = await read_fields(request, "image", ("seed", "duration_s", "at_s"))
    body = schemas.read(schemas.CreateStream, fields)
    with idempotency.claim(request, "POST /v1/streams", body.model_dump(), upload or b"") as claim:
        if claim.made is None:
            picture = b""
            if upload is not None or body.image is not None:
                picture = await read_image(request, streams.model_info(body.model), upload, body.image)
            await check_connected(request)
            key = principal_of(request).key
            prompts = changes_of(body.prompts)
            stream = streams.open(
                body.prompt, body.model, body.seed, body.duration_s, picture, prompts=prompts, key=key
            )
            claim.made = stream.session.id
        else:
            stream = streams.get(claim.made)
            response.headers.update(idempotency.REPLAYED)
    response.headers["Location"] = url_of(request, f"/v1/streams/{stream.session.id}")
    return stream_object(request, stream)


def changes_of(prompts: Sequence[schemas.ScheduledPrompt]) -> list[Change]:
    """The changes that a request schedules."""
    return [Change(each.at_s, each.prompt, each.transition) for each in prompts]


async def list_streams(request: Request) -> dict[str, Any]:
    """The streams of the key's owner, including those that ended recently."""
    principal = principal_of(request)
    visible = [stream for stream in streams_of(request).all() if principal.sees(stream.session.id, stream.owner)]
    return {"object": "list", "data": [stream_object(request, stream) for stream in visible]}


async def get_stream(request: Request, id: str) -> dict[str, Any]:
    """One stream and its figures."""
    return stream_object(request, streams_of(request).get(id))


async def change_stream(request: Request, id: str, body: schemas.ChangeStream) -> dict[str, Any]:
    """Change the prompt from the next chunk on, or pause and resume playback."""
    streams = streams_of(request)
    stream = streams.get(id)
    if body.transition is not None and body.prompt is None:
        raise ApiError(
            400, "missing_field", "`transition` says how to get to a new prompt: send `prompt` too.", param="prompt"
        )
    if body.prompt is None and body.paused is None and body.prompts is None:
        raise ApiError(400, "nothing_to_change", "Send at least one of `prompt`, `prompts` and `paused`.")
    prompts = None if body.prompts is None else changes_of(body.prompts)
    chunk = await stream.change(body.prompt, body.transition, body.paused, prompts)
    return {**stream_object(request, stream), "chunk_index": chunk}


async def delete_stream(request: Request, id: str) -> Response:
    """End a stream. Ending it again has no effect."""
    streams = streams_of(request)
    streams.get(id).end("deleted")
    return Response(status_code=204)


async def set_matte(request: Request, id: str, body: schemas.MatteObject) -> dict[str, Any]:
    """Set what is transparent for viewers with `alpha=stacked`, from the frame on screen on."""
    streams = streams_of(request)
    stream = streams.get(id)
    stream.set_matte(Matte(**body.model_dump()))
    return stream_object(request, stream)


async def remove_matte(request: Request, id: str) -> dict[str, Any]:
    """Remove the matte: nothing is transparent any more."""
    streams = streams_of(request)
    stream = streams.get(id)
    stream.set_matte(None)
    return stream_object(request, stream)


async def create_token(request: Request, id: str, body: schemas.CreateToken) -> dict[str, Any]:
    """Create a token that lets a browser or a guest watch or control this one stream for a while, without the key."""
    principal = principal_of(request)
    if principal.stream is not None:
        raise ApiError(403, "scope_missing", "A token makes no tokens: use an API key.")
    id = streams_of(request).get(id).session.id
    token = access_of(request).issue_token(principal, id, body.scope, body.expires_in_s)
    return {
        "object": "token",
        "token": token,
        "stream_id": id,
        "scope": body.scope,
        "expires_at": time.time() + body.expires_in_s,
        "ws_url": with_token(socket_url(request, id), token),
    }


def stream_object(connection: HTTPConnection, stream: Stream) -> dict[str, Any]:
    """The API's stream object, with the URLs that this client needs to watch it."""
    whep_url = url_of(connection, f"/v1/streams/{stream.session.id}/whep")
    return {**stream.snapshot(), "ws_url": ws_url(connection, stream.session.id), "whep_url": whep_url}


ROUTES = [
    Route(
        "POST",
        "/v1/streams",
        create_stream,
        StreamObject,
        201,
        (400, 404, 409, 413, 415, 422, 429, 503),
        {
            "openapi_extra": {
                "requestBody": schemas.body_schema(schemas.CreateStream, "image"),
                "parameters": [idempotency.PARAMETER],
            }
        },
    ),
    Route("GET", "/v1/streams", list_streams, StreamList),
    Route("GET", "/v1/streams/{id}", get_stream, StreamObject, 200, (404,)),
    Route("PATCH", "/v1/streams/{id}", change_stream, StreamChanged, 200, (400, 404, 409, 413, 415, 504)),
    Route("DELETE", "/v1/streams/{id}", delete_stream, None, 204, (404,)),
    Route("PUT", "/v1/streams/{id}/matte", set_matte, StreamObject, 200, (400, 404, 409, 413, 415)),
    Route("DELETE", "/v1/streams/{id}/matte", remove_matte, StreamObject, 200, (404, 409)),
    Route(
        "POST",
        "/v1/streams/{id}/tokens",
        create_token,
        TokenObject,
        201,
        (400, 401, 403, 404, 413, 415, 429),
    ),
]
