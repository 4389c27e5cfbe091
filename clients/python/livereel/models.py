"""What the server answers, as dataclasses. Times are unix times in seconds unless a name says otherwise."""

from dataclasses import dataclass, field
from typing import Any, Literal

State = Literal["queued", "starting", "live", "paused", "ended", "failed"]
Transition = Literal["soft", "recache", "cut"]
"""How the picture gets to a new prompt: `soft` blends, `recache` turns the scene into the new one, `cut` starts a new
scene."""
Scope = Literal["view", "control"]
FilmFormat = Literal["mp4", "webm"]


@dataclass(frozen=True, slots=True)
class PromptChange:
    """A change of the prompt, `at_s` seconds of video after the start."""

    at_s: float
    prompt: str
    transition: Transition = "recache"


@dataclass(frozen=True, slots=True)
class Failure:
    """Why something failed. `code` is stable and meant for programs."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Quality:
    """Quality of a stream's chunks: `level` 0 is the best, each further one has a denoising step less."""

    level: int
    levels: int
    steps: int


@dataclass(frozen=True, slots=True)
class Matte:
    """What is transparent: everything near `color` (chroma), or everything dark (luma)."""

    mode: Literal["chroma", "luma"] = "chroma"
    color: str = "#00b140"
    tolerance: float = 0.1
    softness: float = 0.1


@dataclass(frozen=True, slots=True)
class StreamInfo:
    """A stream. Width, height and fps are None until the engine has started for the first time."""

    id: str
    state: State
    model: str
    prompt: str
    seed: int
    width: int | None
    height: int | None
    fps: int | None
    duration_s: float | None
    pause_reason: Literal["asked", "unwatched"] | None
    interrupted: bool
    """The engine has died, and the next one is not up yet."""
    retry_in_s: float | None
    """When interrupted: seconds until the next engine is started, 0 while it starts."""
    matte: Matte | None
    ws_url: str
    whep_url: str
    created_at: float
    queue_position: int | None
    """1 is next."""
    queue_wait_s: float | None
    frames_generated: int
    frames_shown: int
    chunk_index: int
    """The chunk on screen; in the answer to a change, the chunk where it takes effect."""
    real_time_factor: float | None
    """Generation time over playback time of the recent chunks."""
    time_to_first_frame_s: float | None
    quality: Quality | None
    stalls: int
    stalled_s: float
    buffer_s: float
    viewers: int
    error: Failure | None
    ended_reason: str | None
    ignored_words: list[str] | None = None
    """Words of the prompt that the model does not know."""
    prompts: list[PromptChange] = field(default_factory=list)
    """Prompt changes that are still to come."""
    object: str = "stream"

    @property
    def over(self) -> bool:
        """Whether the stream has ended or failed."""
        return self.state in ("ended", "failed")


@dataclass(frozen=True, slots=True)
class Token:
    """A token for one stream; `token` is empty where the server needs none."""

    token: str = field(repr=False)
    stream_id: str
    scope: Scope
    expires_at: float
    ws_url: str = field(repr=False)
    object: str = "token"


@dataclass(frozen=True, slots=True)
class Output:
    """A server that a stream is pushed to. `url` shows scheme and host alone."""

    id: str
    stream_id: str
    url: str
    kind: Literal["rtmp", "whip"]
    state: Literal["waiting", "connecting", "live", "ended"]
    attempts: int
    created_at: float
    live_since: float | None
    retry_at: float | None
    error: Failure | None
    """Why the last attempt failed."""
    object: str = "output"


@dataclass(frozen=True, slots=True)
class Recording:
    """A live stream that is, or was, written to a file."""

    id: str
    stream_id: str
    status: Literal["recording", "completed", "failed"]
    format: FilmFormat
    alpha: bool
    created_at: float
    ended_at: float | None
    expires_at: float | None
    ended_reason: str | None
    frames: int
    frames_lost: int
    duration_s: float
    bytes: int
    object: str = "recording"


@dataclass(frozen=True, slots=True)
class VideoExtra:
    """What OpenAI's video object has no field for."""

    seed: int
    fps: int
    frames: int
    frames_recorded: int
    queue_position: int | None
    ignored_words: list[str] | None = None
    retryable: bool | None = None
    prompts: list[PromptChange] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Video:
    """A clip. `progress` is a percentage."""

    id: str
    model: str
    status: Literal["queued", "in_progress", "completed", "failed"]
    progress: int
    created_at: int
    completed_at: int | None
    expires_at: int | None
    prompt: str
    size: str
    seconds: str
    remixed_from_video_id: str | None
    error: Failure | None
    extra: VideoExtra
    object: str = "video"

    @property
    def over(self) -> bool:
        """Whether the clip is completed or has failed."""
        return self.status in ("completed", "failed")


@dataclass(frozen=True, slots=True)
class VideoPage:
    """A page of clips; pass `last_id` as `after` to get the next one."""

    data: list[Video]
    first_id: str | None
    last_id: str | None
    has_more: bool
    object: str = "list"


@dataclass(frozen=True, slots=True)
class Model:
    """What a model draws, and how fast the server is at it."""

    id: str
    width: int
    height: int
    fps: int
    chunk_frames: int
    first_chunk_frames: int
    steps: int
    chunk_seconds: float
    real_time_factor: float
    capacity: int
    """How many streams play at 1:1 speed at once."""
    parameters: int
    description: str
    default: bool
    vocabulary: list[str] | None = None
    """The words that it knows; None if it takes any text."""
    fields: dict[str, Any] = field(default_factory=dict)
    """JSON schema of each field that a stream of this model takes."""
    object: str = "model"


@dataclass(frozen=True, slots=True)
class Lora:
    """A LoRA; `strength` is None if it is not applied."""

    id: str
    strength: float | None
    object: str = "lora"


@dataclass(frozen=True, slots=True)
class Readiness:
    """Whether a stream could start now, and if not, why."""

    ready: bool
    reason: str
    retry_in_s: float
    """Seconds until an engine that has failed is started again; otherwise 0."""
