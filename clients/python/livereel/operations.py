"""The operations of the API, each written once as a procedure; clients and streams make methods of them."""

import base64
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from livereel.errors import LivereelError
from livereel.models import (
    FilmFormat,
    Lora,
    Matte,
    Model,
    Output,
    PromptChange,
    Readiness,
    Recording,
    Scope,
    StreamInfo,
    Token,
    Transition,
    Video,
    VideoPage,
)
from livereel.parsing import T, parse
from livereel.protocol import Reply, Request, Steps, download, exchange, segment, wait_for_video

DOWNLOAD_RETRIES = 4

Image = bytes | str | Path
"""A picture or clip to continue from: its bytes, a data URL, or the path of a file."""


def call(kind: type[T], method: str, path: str, json: Any = None, **options: Any) -> Steps[T]:
    """The answer to a request, as an instance of `kind`."""
    return parse(kind, (yield from exchange(Request(method, path, json=json, **options))).json)


def call_list(kind: type[T], method: str, path: str, json: Any = None) -> Steps[list[T]]:
    """The list that a request is answered with."""
    body = (yield from exchange(Request(method, path, json=json))).json
    if not isinstance(body, Mapping) or not isinstance(body.get("data"), list):
        raise LivereelError("The answer is not the list that was expected: is this a Livereel server?")
    return [parse(kind, each) for each in body["data"]]


def once() -> dict[str, str]:
    """Headers with which a request can be sent again without making a second thing."""
    return {"idempotency-key": str(uuid.uuid4())}


def given(**fields: Any) -> dict[str, Any]:
    """The fields that are not None."""
    return {name: value for name, value in fields.items() if value is not None}


def changes(prompts: Iterable[PromptChange]) -> list[dict[str, Any]]:
    """Scheduled prompt changes as JSON."""
    return [asdict(each) for each in prompts]


def data_url(image: Image | None) -> str | None:
    """A picture as a data URL. Raises OSError if its file cannot be read."""
    if image is None or (isinstance(image, str) and image.startswith("data:")):
        return image
    data = image if isinstance(image, bytes) else Path(image).read_bytes()
    return f"data:application/octet-stream;base64,{base64.b64encode(data).decode()}"


# the server


def readiness() -> Steps[Readiness]:
    """Whether a stream could start now, and if not, why."""
    reply: Reply = yield from _ready()
    return parse(Readiness, reply.json)


def _ready() -> Steps[Reply]:
    outcome = yield Request("GET", "/readyz")
    if isinstance(outcome, Exception):
        raise outcome
    reply: Reply = outcome
    if reply.status != 503 and reply.error is not None:
        raise reply.error
    return reply


def list_models() -> Steps[list[Model]]:
    """The models that the server draws with; empty until its engine has started."""
    return call_list(Model, "GET", "/v1/models")


def get_model(id: str) -> Steps[Model]:
    """One model."""
    return call(Model, "GET", f"/v1/models/{segment(id)}")


def list_loras() -> Steps[list[Lora]]:
    """The server's LoRAs, and the strength of those that are applied."""
    return call_list(Lora, "GET", "/v1/loras")


def set_loras(loras: Mapping[str, float]) -> Steps[list[Lora]]:
    """Apply exactly these LoRAs, each with its strength, to every stream from its next chunk on."""
    return call_list(Lora, "PUT", "/v1/loras", {"loras": {name: float(strength) for name, strength in loras.items()}})


# streams


def create_stream(
    prompt: str,
    *,
    model: str | None = None,
    seed: int | None = None,
    duration_s: float | None = None,
    image: Image | None = None,
    prompts: Iterable[PromptChange] = (),
) -> Steps[StreamInfo]:
    """Open a stream. It starts at once, or waits in the server's queue.

    Args:
        prompt: What to show.
        model: Name of a model; the server's default when absent.
        seed: The same seed and prompts give the same frames; random when absent.
        duration_s: Seconds of video after which the stream ends; endless when absent.
        image: A picture or clip that the video continues from.
        prompts: Prompt changes at given times of the video.
    """
    fields = given(prompt=prompt, model=model, seed=seed, duration_s=duration_s, image=data_url(image))
    fields |= {"prompts": changes(prompts)} if (prompts := list(prompts)) else {}
    return call(StreamInfo, "POST", "/v1/streams", fields, headers=once())


def list_streams() -> Steps[list[StreamInfo]]:
    """The streams that this API key sees, including those that ended recently."""
    return call_list(StreamInfo, "GET", "/v1/streams")


def get_stream(stream_id: str) -> Steps[StreamInfo]:
    """The stream and its figures as they are now."""
    return call(StreamInfo, "GET", _stream(stream_id))


def steer(stream_id: str, prompt: str, *, transition: Transition = "recache") -> Steps[StreamInfo]:
    """Change the prompt. `chunk_index` of the result is the first chunk under it.

    `recache` turns the scene into the new one, `soft` blends over two chunks, `cut` starts a new scene.
    """
    return call(StreamInfo, "PATCH", _stream(stream_id), {"prompt": prompt, "transition": transition})


def schedule(stream_id: str, prompts: Iterable[PromptChange]) -> Steps[StreamInfo]:
    """Replace the prompt changes that are still to come; an empty list removes them."""
    return call(StreamInfo, "PATCH", _stream(stream_id), {"prompts": changes(prompts)})


def pause(stream_id: str) -> Steps[StreamInfo]:
    """Hold the frame on screen until `resume`."""
    return call(StreamInfo, "PATCH", _stream(stream_id), {"paused": True})


def resume(stream_id: str) -> Steps[StreamInfo]:
    """Play on."""
    return call(StreamInfo, "PATCH", _stream(stream_id), {"paused": False})


def end_stream(stream_id: str) -> Steps[None]:
    """End the stream. Ending it again has no effect."""
    yield from exchange(Request("DELETE", _stream(stream_id)))


def set_matte(stream_id: str, matte: Matte) -> Steps[StreamInfo]:
    """Set what is transparent for viewers who ask for it."""
    return call(StreamInfo, "PUT", f"{_stream(stream_id)}/matte", asdict(matte))


def remove_matte(stream_id: str) -> Steps[StreamInfo]:
    """Remove the matte: nothing is transparent any more."""
    return call(StreamInfo, "DELETE", f"{_stream(stream_id)}/matte")


def create_token(stream_id: str, scope: Scope = "view", *, expires_in_s: int = 600) -> Steps[Token]:
    """A token for this stream alone, to hand to a browser or a guest. `view` watches, `control` also changes it."""
    fields = {"scope": scope, "expires_in_s": expires_in_s}
    return call(Token, "POST", f"{_stream(stream_id)}/tokens", fields)


def push(
    stream_id: str, url: str, *, token: str | None = None, audio: Literal["silent", "none"] = "silent"
) -> Steps[Output]:
    """Push the stream to another server: `rtmp://` or `rtmps://` with the stream key, or `https://` for WHIP.

    The operator must have listed the host. `token` is WHIP's bearer token; RTMP gets a silent audio track unless
    `audio` is `none`.
    """
    return call(Output, "POST", f"{_stream(stream_id)}/outputs", given(url=url, token=token, audio=audio))


def list_outputs(stream_id: str) -> Steps[list[Output]]:
    """Where the stream is pushed to."""
    return call_list(Output, "GET", f"{_stream(stream_id)}/outputs")


def get_output(stream_id: str, output_id: str) -> Steps[Output]:
    """One output and its state."""
    return call(Output, "GET", f"{_stream(stream_id)}/outputs/{segment(output_id)}")


def remove_output(stream_id: str, output_id: str) -> Steps[None]:
    """Stop pushing to this output."""
    yield from exchange(Request("DELETE", f"{_stream(stream_id)}/outputs/{segment(output_id)}"))


def record(stream_id: str, *, format: FilmFormat = "mp4", alpha: bool = False) -> Steps[Recording]:
    """Record the stream from now on. `alpha`, for `webm` alone, adds transparency from the stream's matte."""
    return call(Recording, "POST", f"{_stream(stream_id)}/recordings", {"format": format, "alpha": alpha})


def list_recordings_of_stream(stream_id: str) -> Steps[list[Recording]]:
    """The stream's recordings, the newest first."""
    return call_list(Recording, "GET", f"{_stream(stream_id)}/recordings")


def _stream(id: str) -> str:
    return f"/v1/streams/{segment(id)}"


# recordings


def list_recordings() -> Steps[list[Recording]]:
    """The recordings that this API key sees, the newest first."""
    return call_list(Recording, "GET", "/v1/recordings")


def get_recording(id: str) -> Steps[Recording]:
    """One recording and its progress."""
    return call(Recording, "GET", f"/v1/recordings/{segment(id)}")


def stop_recording(id: str) -> Steps[Recording]:
    """Stop a recording; returns when its file is complete."""
    return call(Recording, "POST", f"/v1/recordings/{segment(id)}/stop")


def delete_recording(id: str) -> Steps[None]:
    """Delete a recording and its file."""
    yield from exchange(Request("DELETE", f"/v1/recordings/{segment(id)}"))


def download_recording(id: str, to: str | Path) -> Steps[Path]:
    """Download the film; returns its path. A broken connection is continued. A running recording is followed to its
    end."""
    return download(f"/v1/recordings/{segment(id)}/content", to, {}, DOWNLOAD_RETRIES)


# clips


def create_video(
    prompt: str,
    *,
    seconds: float = 4,
    model: str | None = None,
    size: str | None = None,
    seed: int | None = None,
    image: Image | None = None,
    prompts: Iterable[PromptChange] = (),
) -> Steps[Video]:
    """Start to make a clip of `seconds` seconds. The other arguments are those of a stream."""
    prompts = list(prompts)
    extra = given(seed=seed, prompts=changes(prompts) or None)
    fields = given(prompt=prompt, model=model, size=size, input_reference=data_url(image), extra=extra or None)
    return call(Video, "POST", "/v1/videos", {**fields, "seconds": f"{seconds:g}"}, headers=once())


def list_videos(
    *, limit: int = 20, after: str | None = None, order: Literal["asc", "desc"] = "desc"
) -> Steps[VideoPage]:
    """A page of the clips that this API key sees."""
    return call(VideoPage, "GET", "/v1/videos", params=given(limit=str(limit), after=after, order=order))


def get_video(id: str) -> Steps[Video]:
    """One clip and its progress."""
    return call(Video, "GET", f"/v1/videos/{segment(id)}")


def delete_video(id: str) -> Steps[None]:
    """Delete a clip and its files; one that is being made is cancelled."""
    yield from exchange(Request("DELETE", f"/v1/videos/{segment(id)}"))


def remix_video(id: str, prompt: str, *, at_s: float = 0, transition: Transition = "recache") -> Steps[Video]:
    """Make a clip from another one: its seed, picture and prompts, but the new prompt from `at_s` seconds on."""
    fields = {"prompt": prompt, "extra": {"at_s": at_s, "transition": transition}}
    return call(Video, "POST", f"/v1/videos/{segment(id)}/remix", fields, headers=once())


def download_video(id: str, to: str | Path, *, variant: Literal["video", "thumbnail"] = "video") -> Steps[Path]:
    """Download a clip as MP4, or its first frame as WebP; returns the path. A clip that is being made is followed to
    its end."""
    return download(f"/v1/videos/{segment(id)}/content", to, {"variant": variant}, DOWNLOAD_RETRIES)


def generate(
    prompt: str,
    to: str | Path,
    *,
    seconds: float = 4,
    model: str | None = None,
    size: str | None = None,
    seed: int | None = None,
    image: Image | None = None,
    prompts: Iterable[PromptChange] = (),
) -> Steps[Video]:
    """Make a clip and download it to a file, as MP4; returns the clip when its file is complete."""
    video = yield from create_video(
        prompt, seconds=seconds, model=model, size=size, seed=seed, image=image, prompts=prompts
    )
    video = yield from wait_for_video(video.id)
    yield from download_video(video.id, to)
    return video
