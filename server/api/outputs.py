"""Outputs of a stream: push it to another server, over RTMP or WHIP."""

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from server.api import schemas
from server.api.response_schemas import OutputList, OutputObject
from server.api.routing import Route, principal_of, streams_of, url_of
from server.egress.outputs import Outputs


def outputs_of(request: Request) -> Outputs:
    """The application's outputs."""
    outputs = request.app.state.outputs
    assert isinstance(outputs, Outputs)
    return outputs


async def create_output(request: Request, response: Response, id: str, body: schemas.CreateOutput) -> dict[str, Any]:
    """Push the stream to another server, over RTMP or WHIP. The operator must have listed its host."""
    key = principal_of(request).key
    stream = streams_of(request).get(id)
    serial = key.serial if key else None
    output = outputs_of(request).open(stream, body.url, body.token or "", serial, audio=body.audio)
    response.headers["Location"] = url_of(request, f"/v1/streams/{id}/outputs/{output.id}")
    return output.snapshot()


async def list_outputs(request: Request, id: str) -> dict[str, Any]:
    """The stream's outputs."""
    outputs = outputs_of(request).all(streams_of(request).get(id))
    return {"object": "list", "data": [output.snapshot() for output in outputs]}


async def get_output(request: Request, id: str, output: str) -> dict[str, Any]:
    """One output and its state."""
    return outputs_of(request).get(streams_of(request).get(id), output).snapshot()


async def delete_output(request: Request, id: str, output: str) -> Response:
    """Stop pushing to this output and remove it."""
    outputs = outputs_of(request)
    await outputs.remove(outputs.get(streams_of(request).get(id), output))
    return Response(status_code=204)


PATH = "/v1/streams/{id}/outputs"

ROUTES = [
    Route("POST", PATH, create_output, OutputObject, 201, (400, 403, 404, 409, 413, 415)),
    Route("GET", PATH, list_outputs, OutputList, 200, (404,)),
    Route("GET", PATH + "/{output}", get_output, OutputObject, 200, (404,)),
    Route("DELETE", PATH + "/{output}", delete_output, None, 204, (404,)),
]
