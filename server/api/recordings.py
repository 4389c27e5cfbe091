"""Recordings: record a live stream, and list, stop, delete and download what was recorded."""

from typing import Any

from starlette.requests import Request
from starlette.responses import FileResponse, Response

from server.api import schemas
from server.api.response_schemas import RecordingList, RecordingObject
from server.api.responses import film_response
from server.api.routing import Route, principal_of, streams_of, url_of
from server.errors import ApiError, file_removed
from server.library.recorder import Recorder
from server.library.recording_writer import MEDIA_TYPES


def recorder_of(request: Request) -> Recorder:
    """The application's recordings."""
    return streams_of(request).recorder


async def start_recording(
    request: Request, response: Response, id: str, body: schemas.CreateRecording
) -> dict[str, Any]:
    """Record a stream, from now on or from its first frame. A stream that is being recorded counts as watched."""
    if body.alpha and body.format != "webm":
        raise ApiError(400, "invalid_value", "`alpha` needs `format` webm: H.264 has no alpha channel.", param="alpha")
    streams = streams_of(request)
    recording = streams.get(id).record(streams.recorder, body.format, alpha=body.alpha)
    response.headers["Location"] = url_of(request, f"/v1/recordings/{recording.id}")
    return streams.recorder.describe(recording)


async def list_recordings_of_stream(request: Request, id: str) -> dict[str, Any]:
    """A stream's recordings, the newest first."""
    recorder = recorder_of(request)
    found = [each for each in recorder.all() if each.stream == id]
    if not found:
        streams_of(request).get(id)  # 404 if there is no such stream
    return {"object": "list", "data": [recorder.describe(each) for each in found]}


async def list_recordings(request: Request) -> dict[str, Any]:
    """The recordings of the key's owner, the newest first."""
    principal, recorder = principal_of(request), recorder_of(request)
    visible = [each for each in recorder.all() if principal.sees(each.id, each.owner)]
    return {"object": "list", "data": [recorder.describe(each) for each in visible]}


async def get_recording(request: Request, id: str) -> dict[str, Any]:
    """One recording and its progress."""
    recorder = recorder_of(request)
    return recorder.describe(recorder.get(id))


async def stop_recording(request: Request, id: str) -> dict[str, Any]:
    """Stop a recording; the response comes when its file is complete. Stopping it again has no effect."""
    recordings = recorder_of(request)
    await recordings.end(recordings.get(id))
    return recordings.describe(recordings.get(id))


async def delete_recording(request: Request, id: str) -> Response:
    """Delete a recording and its file; a running one is stopped first."""
    recordings = recorder_of(request)
    await recordings.delete(recordings.get(id))
    return Response(status_code=204)


async def content(request: Request, id: str) -> Response:
    """The recorded film. While it is being recorded, the response continues until the end; a complete film supports
    range requests."""
    recordings = recorder_of(request)
    recording = recordings.get(id)
    if recording.reason == "file_removed":
        raise file_removed()
    if recording.status == "failed":
        raise ApiError(409, "recording_failed", f"There is no film: the recording ended ({recording.reason}).")
    path = recordings.path(recording)
    name = f"{id}{recording.suffix}"
    return film_response("recording", path, recordings.growth(recording), MEDIA_TYPES[recording.format], name)


ROUTES = [
    Route(
        "POST",
        "/v1/streams/{id}/recordings",
        start_recording,
        RecordingObject,
        201,
        (400, 404, 409, 413, 415, 429, 503, 507),
    ),
    Route("GET", "/v1/streams/{id}/recordings", list_recordings_of_stream, RecordingList, 200, (404,)),
    Route("GET", "/v1/recordings", list_recordings, RecordingList),
    Route("GET", "/v1/recordings/{id}", get_recording, RecordingObject, 200, (404,)),
    Route("POST", "/v1/recordings/{id}/stop", stop_recording, RecordingObject, 200, (404,), accepts=""),
    Route("DELETE", "/v1/recordings/{id}", delete_recording, None, 204, (404,)),
    Route(
        "GET",
        "/v1/recordings/{id}/content",
        content,
        None,
        200,
        (404, 409, 410, 412, 416),
        {"response_class": FileResponse},
    ),
]
