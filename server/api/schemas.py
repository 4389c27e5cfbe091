"""What clients send and get, as pydantic models: strict types, unknown fields refused, every limit in the schema."""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from engine.wire import LORA_NAME
from server.egress.destination import OUTPUT_URL
from server.errors import ApiError
from server.uploads.images import WANTED

MAX_PROMPT_BYTES = 4096
MAX_SEED = 2**63 - 1
MAX_DURATION_SECONDS = 86_400
MAX_TOKEN_SECONDS = 86_400
MAX_CLIP_SECONDS = 600
MAX_CHANGES = 32
MAX_PAGE = 100
MAX_LORAS = 16
MAX_STRENGTH = 4.0

REQUIREMENTS = {
    "prompt": f"a non-empty string of at most {MAX_PROMPT_BYTES} bytes of UTF-8, without control characters",
    "model": "the name of a model in /v1/models",
    "seed": f"an integer from 0 to {MAX_SEED}",
    "duration_s": f"a number of seconds above 0 and at most {MAX_DURATION_SECONDS}",
    "image": f"{WANTED}: a data URL in JSON, a file in a form",
    "transition": "one of soft, recache, cut",
    "paused": "true or false",
    "mode": "chroma or luma",
    "color": "a colour such as #00b140",
    "tolerance": "a number from 0 to 1",
    "softness": "a number from 0 to 1",
    "url": OUTPUT_URL,
    "token": "1 to 1024 ASCII characters without spaces",
    "seconds": f'a string of a number of seconds above 0 and at most {MAX_CLIP_SECONDS}, such as "4"',
    "size": "the size that the model draws, as WIDTHxHEIGHT: see /v1/models",
    "input_reference": f"{WANTED}: a file in a form, in JSON a data URL or an object with one as `image_url`",
    "extra": "an object; of a clip `seed` (an integer from 0) and `prompts` (a list of at most "
    f"{MAX_CHANGES} objects of `at_s`, `prompt` and `transition`, `at_s` rising), of a remix `at_s` and `transition`",
    "limit": f"an integer from 1 to {MAX_PAGE}",
    "order": "asc or desc",
    "after": "the id of a video in the list",
    "variant": "video or thumbnail",
    "format": "mp4 or webm",
    "scope": "view or control",
    "expires_in_s": f"an integer of seconds from 1 to {MAX_TOKEN_SECONDS}",
    "loras": f"an object of at most {MAX_LORAS} names in /v1/loras, each with a strength from {-MAX_STRENGTH:g} "
    f"to {MAX_STRENGTH:g}",
}
"""What each field must be, as the error message says it."""


def whole(number: Any) -> Any:
    """JSON has one kind of number, so 7.0 is an integer."""
    return int(number) if isinstance(number, float) and number.is_integer() else number


def check_prompt(prompt: str) -> str:
    """The prompt without white space around it; raises when it is not a fit sentence."""
    for position, character in enumerate(prompt):
        category = unicodedata.category(character)
        if category in ("Cc", "Cs"):
            what = "control character" if category == "Cc" else "lone surrogate"
            raise PydanticCustomError(
                "prompt_character",
                "it has the {what} U+{code} at position {position}",
                {"what": what, "code": f"{ord(character):04X}", "position": position},
            )
    if (size := len(prompt.encode())) > MAX_PROMPT_BYTES:
        raise PydanticCustomError("prompt_too_long", "it has {size} bytes", {"size": size})
    if not (prompt := prompt.strip()):
        raise PydanticCustomError("prompt_empty", "it is empty")
    return prompt


def check_loras(loras: dict[str, float]) -> dict[str, float]:
    """The same; raises when a name could be no file's, or a strength is out of bounds."""
    if len(loras) > MAX_LORAS:
        raise PydanticCustomError("lora_count", "it has {count}", {"count": len(loras)})
    for name, strength in loras.items():
        # The name is the client's: show it in ASCII and short, whatever it holds.
        shown = name.encode("ascii", "backslashreplace").decode()[:64]
        if not re.fullmatch(LORA_NAME, name):
            raise PydanticCustomError("lora_name", "`{shown}` can be no name", {"shown": shown})
        if not -MAX_STRENGTH <= strength <= MAX_STRENGTH:
            raise PydanticCustomError(
                "lora_strength", "`{shown}` has the strength {strength}", {"shown": shown, "strength": str(strength)}
            )
    return loras


Prompt = Annotated[
    StrictStr,
    AfterValidator(check_prompt),
    Field(
        description=f"What to show: {REQUIREMENTS['prompt']}.",
        examples=["a red metal cube bouncing on grass"],
        json_schema_extra={
            "minLength": 1,
            "maxLength": MAX_PROMPT_BYTES,
            "pattern": r"^[^\x00-\x1f\x7f-\x9f]*[^\x00-\x1f\x7f-\x9f\s][^\x00-\x1f\x7f-\x9f]*$",
        },
    ),
]
Whole = BeforeValidator(whole)
Transition = Literal["soft", "recache", "cut"]
StateName = Literal["queued", "starting", "live", "paused", "ended", "failed"]


class Request(BaseModel):
    model_config = ConfigDict(extra="forbid")


class CreateStream(Request):
    """A stream to open."""

    prompt: Prompt
    model: StrictStr | None = Field(None, description="Name of a model; the server's default when absent.")
    seed: Annotated[StrictInt, Field(ge=0, le=MAX_SEED), Whole] | None = Field(
        None, description="The same seed and prompt give the same frames; random when absent."
    )
    duration_s: Annotated[float, Field(strict=True, gt=0, le=MAX_DURATION_SECONDS, allow_inf_nan=False)] | None = Field(
        None, description="Seconds of video after which the stream ends; endless when absent."
    )
    image: StrictStr | None = Field(
        None,
        description=f"What the video goes on from: {WANTED}, as a data URL. Cut to the model's proportions; of a clip, "
        "the newest frames count.",
    )


At = Annotated[float, Field(strict=True, ge=0, le=MAX_CLIP_SECONDS, allow_inf_nan=False)]


class PromptChange(Request):
    """Another prompt, from a moment of a clip on."""

    at_s: At = Field(description="Seconds from the start; it takes effect at the chunk that begins nearest to that.")
    prompt: Prompt
    transition: Transition = "recache"


class VideoOptions(Request):
    """What OpenAI's API has no field for."""

    seed: Annotated[StrictInt, Field(ge=0, le=MAX_SEED), Whole] | None = Field(None, description="Random when absent.")
    prompts: Annotated[list[PromptChange], Field(max_length=MAX_CHANGES)] = Field(
        default=[], description="How the prompt changes while the clip runs."
    )

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        times = [each.at_s for each in self.prompts]
        if times != sorted(set(times)):
            raise PydanticCustomError("at_s_order", "`at_s` does not rise")
        return self


class ImageReference(Request):
    """A picture, as OpenAI's API has it in JSON."""

    image_url: StrictStr = Field(description="A data URL.")


SECONDS = r"^[0-9]{1,4}(\.[0-9]{1,3})?$"


def check_seconds(seconds: str) -> str:
    if not re.fullmatch(SECONDS, seconds) or not 0 < float(seconds) <= MAX_CLIP_SECONDS:
        raise ValueError
    return seconds


class CreateVideo(Request):
    """A clip to make."""

    prompt: Prompt
    model: StrictStr | None = Field(None, description="Name of a model; the server's default when absent.")
    seconds: Annotated[StrictStr, AfterValidator(check_seconds)] = Field(
        "4", description=f"Its length: {REQUIREMENTS['seconds']}.", json_schema_extra={"pattern": SECONDS}
    )
    size: StrictStr | None = Field(None, description=f"{REQUIREMENTS['size']}. The model's when absent.")
    input_reference: StrictStr | ImageReference | None = Field(
        None, description=f"What the clip goes on from: {REQUIREMENTS['input_reference']}."
    )
    extra: VideoOptions = VideoOptions(seed=None)


class RemixOptions(Request):
    """What OpenAI's API has no field for."""

    at_s: At = Field(0.0, description="Until then the clip stays as it was.")
    transition: Transition = "recache"


class RemixVideo(Request):
    """A clip to make from another: with its seed, its picture and its prompts, but for what changes."""

    prompt: Prompt
    extra: RemixOptions = RemixOptions(at_s=0.0)


def inline(schema: Any, definitions: Mapping[str, Any]) -> Any:
    """The schema with what it refers to in its place: the references of a body go nowhere in OpenAPI."""
    if isinstance(schema, list):
        return [inline(each, definitions) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return inline(definitions[schema["$ref"]], definitions)
    return {name: inline(each, definitions) for name, each in schema.items()}


def form_of(schema: dict[str, Any], file: str) -> dict[str, Any]:
    """The schema of a form with the same fields. A form has no null: who means it leaves the field out."""
    fields = {
        name: {**{key: value for key, value in field.items() if key != "anyOf"}, **field.get("anyOf", [{}])[0]}
        for name, field in schema["properties"].items()
    }
    fields[file] = {"type": "string", "format": "binary", "description": f"A file: {WANTED}."}
    return {"type": "object", "required": schema["required"], "properties": fields, "additionalProperties": False}


def body_schema(kind: type[Request], file: str) -> dict[str, Any]:
    """The two forms of a request that may bring a file, for OpenAPI: the endpoint reads the body itself."""
    schema = kind.model_json_schema(ref_template="{model}")
    schema = inline(schema, schema.pop("$defs", {}))
    form = form_of(schema, file)
    return {
        "required": True,
        "content": {"application/json": {"schema": schema}, "multipart/form-data": {"schema": form}},
    }


class ChangeStream(Request):
    """A change to a stream; at least one of `prompt` and `paused`."""

    model_config = ConfigDict(
        json_schema_extra={
            "anyOf": [
                {"required": ["prompt"], "properties": {"prompt": {"type": "string"}}},
                {
                    "required": ["paused"],
                    "properties": {"paused": {"type": "boolean"}, "transition": {"type": "null"}},
                },
            ]
        }
    )

    prompt: Prompt | None = None
    transition: Transition | None = Field(
        None,
        description="How the picture gets to the new prompt: `soft` blends over, `recache` (the default) carries "
        "the scene over, `cut` starts a new one. Only with `prompt`.",
    )
    paused: StrictBool | None = Field(None, description="Hold the picture, or go on.")


class ChangeLoras(Request):
    """The LoRAs to apply, and no others."""

    loras: Annotated[
        dict[StrictStr, StrictFloat],
        AfterValidator(check_loras),
        Field(
            description=f"Strength by name: {REQUIREMENTS['loras']}.",
            examples=[{"watercolour": 0.8}],
            json_schema_extra={
                "propertyNames": {"pattern": f"^{LORA_NAME}$"},
                "additionalProperties": {"type": "number", "minimum": -MAX_STRENGTH, "maximum": MAX_STRENGTH},
                "maxProperties": MAX_LORAS,
            },
        ),
    ]


class MatteObject(Request):
    """What is transparent: what is near one colour, or what is dark."""

    mode: Literal["chroma", "luma"] = Field(
        "chroma", description="`chroma` keys the colour, whatever its brightness; `luma` takes dark for transparent."
    )
    color: Annotated[StrictStr, Field(pattern=r"^#[0-9A-Fa-f]{6}$")] = Field(
        "#00b140", description="For `chroma`: the background's."
    )
    tolerance: Annotated[float, Field(strict=True, ge=0, le=1, allow_inf_nan=False)] = Field(
        0.1, description="How far from it (in Cb or Cr), or how bright, as a part of 1, is still transparent."
    )
    softness: Annotated[float, Field(strict=True, ge=0, le=1, allow_inf_nan=False)] = Field(
        0.1, description="How much further the edge goes from transparent to opaque."
    )


class CreateOutput(Request):
    """Where to push a stream."""

    url: Annotated[StrictStr, Field(min_length=1, max_length=1024)] = Field(
        description=f"{OUTPUT_URL[0].upper()}{OUTPUT_URL[1:]}. With the stream's key, which is shown to nobody again.",
        examples=["rtmps://live.example:443/app/KEY"],
    )
    token: Annotated[StrictStr, Field(pattern=r"^[!-~]{1,1024}$")] | None = Field(
        None, description="For WHIP: sent as `Authorization: Bearer`, and shown to nobody again."
    )


class CreateToken(Request):
    """What a token for a stream shall allow, and for how long."""

    scope: Literal["view", "control"] = Field(
        "view", description="`view` watches the stream, `control` also changes and ends it."
    )
    expires_in_s: Annotated[StrictInt, Field(ge=1, le=MAX_TOKEN_SECONDS), Whole] = Field(
        600, description="Seconds. A connection that is open by then goes on."
    )


class ErrorDetail(BaseModel):
    message: str = Field(description="For people: what is wrong and how to mend it.")
    type: Literal[
        "invalid_request_error", "authentication_error", "permission_error", "rate_limit_error", "server_error"
    ]
    param: str | None = Field(description="The field at fault, if one is.")
    code: str = Field(description="For programs; stable.")


class ErrorBody(BaseModel):
    error: ErrorDetail
    request_id: str = Field(description="Of the request, as in `x-request-id`: the server's log has it.")


class StreamFailure(BaseModel):
    code: str
    message: str


class StreamQuality(BaseModel):
    """How well chunks are made: a stream that would run dry gets fewer denoising steps before it stalls."""

    level: int = Field(description="0 is the best; each level above is a step less.")
    levels: int = Field(description="How many there are.")
    steps: int = Field(description="Denoising steps of the newest chunk.")


class StreamObject(BaseModel):
    """One stream. Width, height and fps are null until the engine is up for the first time."""

    id: str
    object: Literal["stream"] = "stream"
    state: StateName
    model: str
    prompt: str
    seed: int
    width: int | None
    height: int | None
    fps: int | None
    duration_s: float | None
    pause_reason: Literal["asked", "unwatched"] | None = Field(
        description="Why the stream is paused: a client asked, or nobody has watched for a while; then the next viewer "
        "makes it go on."
    )
    matte: MatteObject | None = Field(description="What is transparent with `alpha=stacked`; null is nothing.")
    ws_url: str = Field(
        description="WebSocket with events and frames; add `format=rgb24` to the query for raw frames. Where the "
        "server has keys, it carries a token to view the stream for ten minutes."
    )
    whep_url: str = Field(description="Where a WebRTC player posts its offer (WHEP).")
    created_at: float = Field(description="Unix time.")
    queue_position: int | None = Field(description="1 is next; null when not queued.")
    queue_wait_s: float | None = Field(description="Estimate; null when nobody knows.")
    frames_generated: int
    frames_shown: int
    chunk_index: int = Field(description="The chunk on screen.")
    real_time_factor: float | None = Field(description="Generation time over playback time of the recent chunks.")
    time_to_first_frame_s: float | None = Field(description="From the request to the first frame ready to be sent.")
    quality: StreamQuality | None = Field(description="Null until the engine is up for the first time.")
    stalls: int = Field(description="Times that a due frame was not there.")
    stalled_s: float
    buffer_s: float = Field(description="Playback time of the frames generated and not shown yet.")
    viewers: int
    error: StreamFailure | None = Field(description="Why the stream failed.")
    ended_reason: str | None = Field(description="finished, deleted, idle, shutting_down, revoked or failed.")


class TokenObject(BaseModel):
    """A token for one stream: for the query of an address, or for `Authorization: Bearer`."""

    object: Literal["token"] = "token"
    token: str = Field(description="Empty where the server has no keys, and needs none.")
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
    """One place that a stream is pushed to."""

    id: str
    object: Literal["output"] = "output"
    stream_id: str
    url: str = Field(description="Scheme and host; what follows is not shown.")
    kind: Literal["rtmp", "whip"]
    state: Literal["waiting", "connecting", "live", "ended", "failed"] = Field(
        description="`waiting` for the stream's first picture, or to try again; `failed` after eight attempts in a row."
    )
    attempts: int
    created_at: float = Field(description="Unix time.")
    live_since: float | None = Field(description="Unix time.")
    retry_at: float | None = Field(description="Unix time.")
    error: OutputError | None = Field(description="Why the last attempt came to nothing.")


class OutputList(BaseModel):
    object: Literal["list"] = "list"
    data: list[OutputObject]


class StreamChanged(StreamObject):
    """The stream after the change; `chunk_index` is where it takes effect."""

    chunk_index: int = Field(description="The chunk where the change takes effect.")


class CreateRecording(Request):
    """A recording to begin."""

    model_config = ConfigDict(
        json_schema_extra={
            "anyOf": [
                {"properties": {"alpha": {"const": False}}},
                {"properties": {"format": {"const": "webm"}}, "required": ["format"]},
            ]
        }
    )

    format: Literal["mp4", "webm"] = Field("mp4", description="`mp4` is H.264 as viewers get it, `webm` is VP9.")
    alpha: StrictBool = Field(
        False, description="With `webm`: an alpha channel, which is what the stream's matte makes transparent."
    )


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
    expires_at: float | None = Field(description="When it is deleted; null until it is over.")
    ended_reason: (
        Literal["stopped", "stream_ended", "storage_full", "too_slow", "failed", "server_restarted"] | None
    ) = Field(description="Why it is over. Whatever it is, a completed recording is a whole film.")
    frames: int
    frames_lost: int = Field(description="Shown meanwhile, and missed because the encoder could not keep up.")
    duration_s: float = Field(description="Playback time: stalls and pauses are left out.")
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
    prompts: list[PromptChange] = Field(description="What it shows, and from when.")
    retryable: bool | None = Field(description="Of a failure: whether the same request may succeed.")


class VideoObject(BaseModel):
    """One clip: OpenAI's object, and all else in `extra`. Times are unix times in seconds."""

    id: str
    object: Literal["video"] = "video"
    model: str
    status: Literal["queued", "in_progress", "completed", "failed"]
    progress: int = Field(description="Per cent.")
    created_at: int
    completed_at: int | None
    expires_at: int | None = Field(description="When the clip and its files are deleted; null until it is over.")
    prompt: str
    size: str
    seconds: str
    remixed_from_video_id: str | None
    error: VideoFailure | None
    extra: VideoExtra


class VideoList(BaseModel):
    """A page of clips. `after` the last id comes the next one."""

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
    real_time_factor: float = Field(description="Generation time over playback time, measured then.")
    capacity: int = Field(description="Streams of this model that play at 1:1 at once.")
    parameters: int
    description: str
    default: bool


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
"""What a model object takes over from `wire.ModelInfo` as it is."""


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelObject]


class LoraObject(BaseModel):
    id: str
    object: Literal["lora"] = "lora"
    strength: float | None = Field(description="How strongly it is applied now, to every stream; null when it is not.")


class LoraList(BaseModel):
    object: Literal["list"] = "list"
    data: list[LoraObject]


class Alive(BaseModel):
    status: Literal["ok"] = "ok"


class Readiness(BaseModel):
    ready: bool
    reason: str


R = TypeVar("R", bound=Request)


def read(kind: type[R], fields: Any) -> R:
    """A decoded request body; raises `ApiError`."""
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise explain([{**each, "loc": ("body", *each["loc"])} for each in error.errors()]) from None


def explain(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """The first of pydantic's findings about a request body, as an error that names the field and says the fix."""
    error = errors[0]
    kind, field = error["type"], next((str(part) for part in error["loc"][1:]), None)
    if kind == "json_invalid":
        return ApiError(400, "invalid_json", "The body is not valid JSON.")
    if field is None:
        return ApiError(400, "invalid_body", "The body must be a JSON object whose field names are valid Unicode.")
    if kind == "extra_forbidden":
        # The name is the client's: show it in ASCII and short, whatever it holds.
        name = field.encode("ascii", "backslashreplace").decode()[:64]
        return ApiError(400, "unknown_field", f"There is no field `{name}`: remove it.", param=name)
    requirement = REQUIREMENTS.get(field, "left out")
    if kind == "missing" and len(error["loc"]) == 2:
        return ApiError(400, "missing_field", f"`{field}` is missing: it must be {requirement}.", param=field)
    ours = kind.startswith(("prompt_", "lora_", "at_s_"))
    message = f"`{field}` must be {requirement}{'; ' + error['msg'] if ours else ''}."
    return ApiError(400, kind if ours else "invalid_value", message, param=field)
