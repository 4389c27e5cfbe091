"""The OpenAPI document: its introduction, and what it says about authentication."""

from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from server.api.routing import Route, url_of
from server.auth.access import OWNED_PATH, is_public

DESCRIPTION = """Real-time text-to-video: a prompt becomes live video, and you can change the prompt while it plays.

Open a stream with `POST /v1/streams` and connect to its `ws_url`. Text messages are JSON events, each with `type`,
`seq` and `ts`: `stream.started`, `queue.position`, `state`, `chunk`, `prompt.applied`, `quality.changed`,
`output.state`, `stall`, `engine.restarted`, `draining`, `error`, `ended`. The `reason` of a `state` event says why a
stream is paused: `asked` or `unwatched`. Binary messages are one frame each: a 16-byte header in network order (u8
version = 1, u8 format: 1 JPEG, 2 RGB24 or 3 fragmented MP4, u16 width, u16 height, u16 flags, u64 presentation time in
1/90000 s), then the payload. `?format=` is `mjpeg` (the default), `rgb24`, `fmp4` (H.264 for Media Source Extensions as
`video/mp4; codecs="avc1.42c0LL"`, with the level LL that `avcC` states; flags: 1 discontinuity, 2 keyframe, 4 the init
segment, which comes first) or `events` (no frames). `whep_url` is the stream over WebRTC, `/v1/streams/{id}/mjpeg` is
for an `<img>`. With `?alpha=stacked` each of them shows every frame above its matte, in a picture of twice the height
(see `PUT /v1/streams/{id}/matte`); `/overlay/{id}` is a page for OBS that shows it with transparency.

Where the server has keys, send one as `Authorization: Bearer KEY`. A viewer that cannot or must not have the key gets a
token for one stream from `POST /v1/streams/{id}/tokens`, and sends it in the same header or as `?token=`. `ws_url`
already carries a token.

`/v1/videos` makes clips as OpenAI's API does; what that API has no field for is in `extra`. `POST
/v1/streams/{id}/recordings` records a live stream, and `/v1/recordings` lists the films.

`POST /v1/streams`, `/v1/videos` and a remix accept an `Idempotency-Key`: if the response was lost, send the same
request again to get what the first one created."""

SECURITY_SCHEMES = {
    "key": {"type": "http", "scheme": "bearer", "description": "An API key, or a token for one stream."},
    "token": {"type": "apiKey", "in": "query", "name": "token", "description": "A token for one stream."},
}


class GatewayApp(FastAPI):
    """FastAPI with an OpenAPI document that declares which credentials each operation accepts."""

    def openapi(self) -> dict[str, Any]:
        """The OpenAPI document. Without keys it mentions no credentials."""
        if self.openapi_schema is None and self.state.access.keys is not None:
            schema = super().openapi()
            schema["components"]["securitySchemes"] = SECURITY_SCHEMES
            for path, methods in schema["paths"].items():
                owned = OWNED_PATH.fullmatch(path)
                accepted = ["key", "token"] if owned and owned[1] == "stream" else ["key"]
                for method, operation in methods.items():
                    public = is_public(method.upper(), path)
                    operation["security"] = [] if public else [{name: []} for name in accepted]
        return super().openapi()


async def document(request: Request) -> Response:
    """The OpenAPI document. Where this server is not at the root of its host for this client, it says where."""
    assert isinstance(request.app, GatewayApp)
    described, url = request.app.openapi(), url_of(request, "")
    return JSONResponse({**described, "servers": [{"url": url}]} if url else described)


ROUTES = [Route("GET", "/openapi.json", document, options={"include_in_schema": False})]
