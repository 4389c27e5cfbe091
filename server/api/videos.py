"""Clips, over an API that is compatible with OpenAI's for videos: its clients work unchanged."""

import asyncio
import time
from typing import Annotated, Any, Literal

from fastapi import Query
from starlette.requests import Request
from starlette.responses import FileResponse, Response

from server.api import idempotency, schemas
from server.api.forms import check_connected, read_fields, read_image
from server.api.response_schemas import VideoDeleted, VideoList, VideoObject
from server.api.responses import StoredFileResponse, film_response
from server.api.routing import Route, principal_of, streams_of
from server.errors import ApiError, file_removed
from server.library import clip_maker
from server.library.clip import Change, Clip, Status, remix
from server.library.clip_maker import ClipMaker


def clips_of(request: Request) -> ClipMaker:
    """The application's clips."""
    return streams_of(request).clips


def describe(request: Request, id: str) -> dict[str, Any]:
    """The API's video object of this id. Raises `ApiError`."""
    clips = clips_of(request)
    return clips.describe(clips.get(id))


async def create_video(request: Request, response: Response) -> dict[str, Any]:
    """Make a clip. It is generated with the engine time that live streams leave over."""
    fields, upload = await read_fields(request, "input_reference", ("seed", "at_s"))
    body = schemas.read(schemas.CreateVideo, fields)
    with idempotency.claim(request, "POST /v1/videos", body.model_dump(), upload or b"") as claim:
        if claim.made is None:
            claim.made = (await create(request, body, upload)).id
        else:
            response.headers.update(idempotency.REPLAYED)
    return describe(request, claim.made)


async def create(request: Request, body: schemas.CreateVideo, upload: bytes | None) -> Clip:
    """Create the clip that a request asks for. Raises `ApiError`."""
    streams = streams_of(request)
    streams.check_open()
    info = streams.model_info(body.model, "size")
    size = f"{info.width}x{info.height}"
    if body.size not in (None, size):
        message = f"`size` must be {size}, which is what the model {info.name} draws, or left out."
        raise ApiError(400, "invalid_value", message, param="size")
    frames = max(1, round(float(body.seconds) * info.fps))
    prompts = [
        Change(0.0, body.prompt),
        *(Change(each.at_s, each.prompt, each.transition) for each in body.extra.prompts),
    ]
    check_times(prompts, float(body.seconds))
    picture = b""
    if upload is not None or body.input_reference is not None:
        url = body.input_reference
        try:
            url = url.image_url if isinstance(url, schemas.ImageReference) else url
            picture = await read_image(request, info, upload, url)
        except ApiError as error:
            raise rename_field(error, "image", "input_reference") from None
    seed = body.extra.seed
    clip = Clip(
        id=clip_maker.new_id(),
        model=info.name,
        prompt=body.prompt,
        prompts=prompts,
        seed=clip_maker.new_seed() if seed is None else seed,
        seconds=body.seconds,
        frames=frames,
        width=info.width,
        height=info.height,
        fps=info.fps,
        created_at=time.time(),
        picture=bool(picture),
    )
    await check_connected(request)
    await streams.clips.create(clip, picture, key=principal_of(request).key)
    return clip


async def list_videos(
    request: Request,
    limit: Annotated[int, Query(ge=1, le=schemas.MAX_PAGE)] = 20,
    after: str | None = None,
    order: Literal["asc", "desc"] = "desc",
) -> dict[str, Any]:
    """The clips of the key's owner, a page at a time."""
    principal = principal_of(request)
    visible = [clip for clip in clips_of(request).all() if principal.sees(clip.id, clip.owner)]
    if order == "desc":
        visible.reverse()
    if after is not None:
        place = next((place for place, clip in enumerate(visible) if clip.id == after), None)
        if place is None:
            raise ApiError(400, "invalid_value", "`after` must be the id of a video in the list.", param="after")
        visible = visible[place + 1 :]
    page = visible[:limit]
    return {
        "object": "list",
        "data": [clips_of(request).describe(clip) for clip in page],
        "first_id": page[0].id if page else None,
        "last_id": page[-1].id if page else None,
        "has_more": len(visible) > len(page),
    }


async def get_video(request: Request, id: str) -> dict[str, Any]:
    """One clip and its progress."""
    return describe(request, id)


async def delete_video(request: Request, id: str) -> dict[str, Any]:
    """Delete a clip and its files; a clip that is being made is cancelled."""
    owned = clips_of(request)
    await owned.delete(owned.get(id))
    return {"id": id, "object": "video.deleted", "deleted": True}


async def remix_video(request: Request, response: Response, id: str, body: schemas.RemixVideo) -> dict[str, Any]:
    """Make a clip from another one, with its seed, picture and prompts, but the new prompt from `at_s` on."""
    with idempotency.claim(request, f"POST /v1/videos/{id}/remix", body.model_dump()) as claim:
        if claim.made is None:
            claim.made = (await create_remix(request, id, body)).id
        else:
            response.headers.update(idempotency.REPLAYED)
    return describe(request, claim.made)


async def create_remix(request: Request, id: str, body: schemas.RemixVideo) -> Clip:
    """Create the clip that a remix asks for. Raises `ApiError`."""
    streams = streams_of(request)
    streams.check_open()
    source = streams.clips.get(id)
    if source.status is not Status.COMPLETED:
        message = f"The video is {source.status.value}, and only a completed one can be remixed."
        raise ApiError(409, "video_not_completed", message)
    info, at = streams.model_info(source.model, "prompt"), body.extra.at_s
    if (info.width, info.height, info.fps) != (source.width, source.height, source.fps):
        raise ApiError(409, "model_changed", "The video's model draws another size or rate by now: create a new one.")
    prompts = remix(source.prompts, Change(at, body.prompt, body.extra.transition))
    check_times(prompts, float(source.seconds))
    try:
        picture = await asyncio.to_thread(streams.clips.picture, source)
    except FileNotFoundError:
        raise file_removed() from None
    clip = Clip(
        id=clip_maker.new_id(),
        model=source.model,
        prompt=body.prompt,
        prompts=prompts,
        seed=source.seed,
        seconds=source.seconds,
        frames=source.frames,
        width=source.width,
        height=source.height,
        fps=source.fps,
        created_at=time.time(),
        remixed_from=source.id,
        picture=bool(picture),
    )
    await check_connected(request)
    await streams.clips.create(clip, picture, key=principal_of(request).key)
    return clip


async def content(request: Request, id: str, variant: Literal["video", "thumbnail"] = "video") -> Response:
    """The clip as MP4. While it is being made, the response continues until it is complete; a complete clip supports
    range requests. `variant=thumbnail` is its first frame as WebP."""
    owned = clips_of(request)
    clip = owned.get(id)
    if clip.failure is not None:
        if clip.failure.code == clip_maker.REMOVED.code:
            raise file_removed()
        raise ApiError(409, "video_failed", f"The video failed: {clip.failure.message}")
    growth = owned.growth(clip)
    if clip.status is Status.QUEUED or (variant == "thumbnail" and not clip.recorded):
        message = f"The video is {clip.status.value} and has no frame yet: try again soon."
        raise ApiError(409, "video_not_ready", message, headers={"Retry-After": "2"})
    if variant == "thumbnail":
        return StoredFileResponse(owned.file(clip, clip_maker.STILL), media_type="image/webp")
    return film_response("video", owned.file(clip, clip_maker.FILM), growth, "video/mp4", f"{id}.mp4")


def check_times(prompts: list[Change], seconds: float) -> None:
    """Raise `ApiError` if a prompt begins after the end of the clip."""
    if prompts[-1].at_s >= seconds:
        message = (
            f"`extra` has a prompt at {prompts[-1].at_s:g} s, and the clip ends at {seconds:g} s: let it begin before."
        )
        raise ApiError(400, "invalid_value", message, param="extra")


def rename_field(error: ApiError, old: str, new: str) -> ApiError:
    """The error as it reads where the field has another name."""
    message = error.detail.replace(f"`{old}`", f"`{new}`")
    return ApiError(error.status_code, error.code, message, param=new, headers=error.headers)


ROUTES = [
    Route(
        "POST",
        "/v1/videos",
        create_video,
        VideoObject,
        200,
        (400, 404, 409, 413, 415, 422, 429, 503, 507),
        {
            "openapi_extra": {
                "requestBody": schemas.body_schema(schemas.CreateVideo, "input_reference"),
                "parameters": [idempotency.PARAMETER],
            }
        },
    ),
    Route("GET", "/v1/videos", list_videos, VideoList, 200, (400,)),
    Route("GET", "/v1/videos/{id}", get_video, VideoObject, 200, (404,)),
    Route("DELETE", "/v1/videos/{id}", delete_video, VideoDeleted, 200, (404,)),
    Route(
        "POST",
        "/v1/videos/{id}/remix",
        remix_video,
        VideoObject,
        200,
        (400, 404, 409, 410, 413, 415, 422, 429, 503, 507),
        {"openapi_extra": {"parameters": [idempotency.PARAMETER]}},
    ),
    Route(
        "GET",
        "/v1/videos/{id}/content",
        content,
        None,
        200,
        (400, 404, 409, 410, 412, 416),
        {"response_class": FileResponse},
    ),
]
