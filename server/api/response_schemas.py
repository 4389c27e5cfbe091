"""Response bodies as pydantic models: FastAPI validates responses against them and documents them in OpenAPI."""

from typing import Any, Literal

from pydantic import BaseModel, Field

from server.api.schemas import MatteObject, PromptChange, ScheduledPrompt

StateName = Literal["queued", "starting", "live", "paused", "ended", "failed"]


class ErrorDetail(BaseModel):
    message: str = Field(description="For people: what is wrong and how to fix it.")
    type: Literal[
        "invalid_request_error", "authentication_error", "permission_error", "rate_limit_error", "server_error"
    ]
    param: str | None = Field(description="The request field at fault, if there is one.")
    code: str = Field(description="For programs; stable.")


class ErrorBody(BaseModel):
    error: ErrorDetail
    request_id: str = Field(description="Id of the request, as in `x-request-id` and in the server's log.")


class StreamFailure(BaseModel):
    code: str
    message: str


class StreamQuality(BaseModel):
    """Quality of the chunks. When the engine falls behind, a stream gets fewer denoising steps before it stalls."""

    level: int = Field(description="0 is the best; each further level has one step less.")
    levels: int = Field(description="Number of levels.")
    steps: int = Field(description="Denoising steps of the newest chunk.")


IGNORED_WORDS = Field(
    description="Words that the model ignores, because it does not know them or reads only the words before them, in "
    "lower case; null if the model takes any text, or the engine has not started yet."
)


class StreamObject(BaseModel):
    """One stream. Width, height and fps are null until the engine has started for the first time."""

    id: str
    object: Literal["stream"] = "stream"
    state: StateName
    model: str
    prompt: str
    prompts: list[ScheduledPrompt] = Field(description="Prompts that are still to come.")
    ignored_words: list[str] | None = IGNORED_WORDS
    seed: int
    width: int | None
    height: int | None
    fps: int | None
    duration_s: float | None
    pause_reason: Literal["asked", "unwatched"] | None = Field(
        description="Why the stream is paused: `asked` by a client, or `unwatched` for a while; then the next viewer "
        "resumes it."
    )
    interrupted: bool = Field(
        description="Whether the engine process that generated the stream has died and the next one is not up yet."
    )
    retry_in_s: float | None = Field(
        description="When `interrupted`: seconds until the next engine process is started, 0 while it starts."
    )
    matte: MatteObject | None = Field(description="What is transparent with `alpha=stacked`; null if nothing is.")
    ws_url: str = Field(
        description="WebSocket with events and frames; add `format=rgb24` to the query for raw frames. Where the "
        "server has keys, it carries a token to view the stream for ten minutes."
    )
    whep_url: str = Field(
        description="Where a WebRTC player posts its offer (WHEP): a path on this server, or a URL where a proxy named "
        "the host."
    )
    created_at: float = Field(description="Unix time.")
    queue_position: int | None = Field(description="1 is next; null when not queued.")
    queue_wait_s: float | None = Field(description="Estimated wait in seconds; null if unknown.")
    frames_generated: int
    frames_shown: int
    chunk_index: int = Field(description="The chunk on screen.")
    real_time_factor: float | None = Field(description="Generation time over playback time of the recent chunks.")
    time_to_first_frame_s: float | None = Field(
        description="From the request until the first frame is ready to be sent."
    )
    quality: StreamQuality | None = Field(description="Null until the engine has started for the first time.")
    stalls: int = Field(description="How often a due frame was missing.")
    stalled_s: float
    buffer_s: float = Field(description="Playback time of the frames that are generated but not shown yet.")
    viewers: int
    error: StreamFailure | None = Field(description="Why the stream failed.")
    ended_reason: str | None = Field(description="finished, deleted, idle, shutting_down, revoked or failed.")


class TokenObject(BaseModel):
    """A token for one stream: for the query of an address, or for `Authorization: Bearer`."""

    object: Literal["token"] = "token"
    token: str = Field(description="Empty where the server has no keys and so needs no token.")
    stream_id: str
    scope: Literal["view", "control"]
    expires_at: float = Field(description="Unix time.")
    ws_url: str = Field(description="The stream's WebSocket with this token.")


class OutputError(BaseModel):
    code: str = Field(
        description="not_resolved, address_not_public, not_connected, certificate_refused, not_accepted, "
        "invalid_answer, stalled, connection_lost, too_many_viewers or internal_error."
    )
    message: str


class OutputObject(BaseModel):
    """One server that a stream is pushed to."""

    id: str
    object: Literal["output"] = "output"
    stream_id: str
    url: str = Field(description="Scheme and host; the rest is not shown.")
    kind: Literal["rtmp", "whip"]
    state: Literal["waiting", "connecting", "live", "ended"] = Field(
        description="`waiting` for the stream's first picture or the next attempt: it is tried until the stream ends."
    )
    attempts: int
    created_at: float = Field(description="Unix time.")
    live_since: float | None = Field(description="Unix time.")
    retry_at: float | None = Field(description="Unix time.")
    error: OutputError | None = Field(description="Why the last attempt failed.")


class OutputList(BaseModel):
    object: Literal["list"] = "list"
    data: list[OutputObject]


class StreamChanged(StreamObject):
    """The stream after the change; `chunk_index` is where it takes effect."""

    chunk_index: int = Field(description="The chunk where the change takes effect.")


class RecordingObject(BaseModel):
    """One recording. Times are unix times."""

    id: str
    object: Literal["recording"] = "recording"
    stream_id: str
    status: Literal["recording", "completed", "failed"]
    format: Literal["mp4", "webm"]
    alpha: bool = Field(description="Whether it has an alpha channel.")
    created_at: float
    ended_at: float | None
    expires_at: float | None = Field(description="When the recording is deleted; null until it has ended.")
    ended_reason: (
        Literal["stopped", "stream_ended", "storage_full", "too_slow", "failed", "server_restarted", "file_removed"]
        | None
    ) = Field(description="Why it ended. A completed recording is a whole film whatever the reason.")
    frames: int = Field(description="Frames recorded so far; after the end, those of the file.")
    frames_lost: int = Field(
        description="Frames that were shown but not recorded, because the encoder could not keep up."
    )
    duration_s: float = Field(description="Playback time, without stalls and pauses.")
    bytes: int


class RecordingList(BaseModel):
    object: Literal["list"] = "list"
    data: list[RecordingObject]


class VideoFailure(BaseModel):
    code: str
    message: str


class VideoExtra(BaseModel):
    seed: int
    fps: int
    frames: int
    frames_recorded: int
    queue_position: int | None = Field(description="1 is next; null when not queued.")
    prompts: list[PromptChange] = Field(description="The prompts, and when each begins.")
    ignored_words: list[str] | None = IGNORED_WORDS
    retryable: bool | None = Field(
        description="After a failure: whether the same request may succeed if it is sent again."
    )


class VideoObject(BaseModel):
    """One clip: OpenAI's video object, with everything else in `extra`. Times are unix times in seconds."""

    id: str
    object: Literal["video"] = "video"
    model: str
    status: Literal["queued", "in_progress", "completed", "failed"]
    progress: int = Field(description="Percentage.")
    created_at: int
    completed_at: int | None
    expires_at: int | None = Field(description="When the clip and its files are deleted; null until it has ended.")
    prompt: str
    size: str
    seconds: str
    remixed_from_video_id: str | None
    error: VideoFailure | None
    extra: VideoExtra


class VideoList(BaseModel):
    """A page of clips. Pass `last_id` as `after` to get the next page."""

    object: Literal["list"] = "list"
    data: list[VideoObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class VideoDeleted(BaseModel):
    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: bool


class StreamList(BaseModel):
    object: Literal["list"] = "list"
    data: list[StreamObject]


class ModelObject(BaseModel):
    id: str
    object: Literal["model"] = "model"
    width: int
    height: int
    fps: int
    chunk_frames: int = Field(description="Frames in every chunk but the first.")
    first_chunk_frames: int
    steps: int = Field(description="Denoising steps per chunk.")
    chunk_seconds: float = Field(description="Time to generate one chunk, measured when the engine started.")
    real_time_factor: float = Field(description="Generation time over playback time, measured when the engine started.")
    capacity: int = Field(description="How many streams of this model can play at 1:1 speed at once.")
    parameters: int
    description: str
    default: bool
    vocabulary: list[str] | None = Field(
        description="The words that the model knows, in alphabetical order; null if it takes any text."
    )
    fields: dict[str, Any] = Field(
        description="JSON schema of each field that a stream of this model takes: type, bounds, default, description."
    )


MODEL_FIELDS = (
    "width",
    "height",
    "fps",
    "chunk_frames",
    "first_chunk_frames",
    "steps",
    "chunk_seconds",
    "parameters",
    "description",
)
"""Fields of a model object that are copied from `wire.ModelInfo`."""


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelObject]


class LoraObject(BaseModel):
    id: str
    object: Literal["lora"] = "lora"
    strength: float | None = Field(
        description="Strength with which it is applied to every stream; null if it is not applied."
    )


class LoraList(BaseModel):
    object: Literal["list"] = "list"
    data: list[LoraObject]


class Alive(BaseModel):
    status: Literal["ok", "engine_down"] = Field(
        description="`engine_down` once the engine has failed for ten minutes in spite of all tries."
    )


class Readiness(BaseModel):
    ready: bool
    reason: str
    retry_in_s: float = Field(description="Seconds until an engine that has failed is started again; otherwise 0.")
