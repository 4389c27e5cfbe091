"""Request bodies as pydantic models: strict types, unknown fields rejected, every limit in the schema."""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

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
    "prompt": f"a non-empty string of at most {MAX_PROMPT_BYTES} bytes of UTF-8, without NUL and lone "
    "surrogates; tabs and line ends count as spaces",
    "model": "the name of a model in /v1/models",
    "seed": f"an integer from 0 to {MAX_SEED}",
    "duration_s": f"a number of seconds above 0 and at most {MAX_DURATION_SECONDS}",
    "image": f"{WANTED}: a data URL in JSON, a file in a form",
    "transition": "one of soft, recache, cut",
    "paused": "true or false",
    "prompts": f"a list of at most {MAX_CHANGES} objects of `at_s`, `prompt` and `transition`, `at_s` rising",
    "at_s": f"a number of seconds from 0 to {MAX_DURATION_SECONDS}",
    "mode": "chroma or luma",
    "color": "a colour such as #00b140",
    "tolerance": "a number from 0 to 1",
    "softness": "a number from 0 to 1",
    "url": OUTPUT_URL,
    "token": "1 to 1024 ASCII characters without spaces",
    "seconds": f'an integer of seconds, or a string such as "2.5": above 0 and at most {MAX_CLIP_SECONDS}',
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
"""What each field must be, as it is worded in error messages."""


def integral(number: Any) -> Any:
    """Turn 7.0 into 7: JSON has only one kind of number, so both are integers."""
    return int(number) if isinstance(number, float) and number.is_integer() else number


LINE_END = re.compile(r"\r\n|[\n\r\u2028\u2029]")
"""A line end; the last two are Unicode's separators of lines and paragraphs."""
VISIBLE = r"[^\x00-\x1f\x7f-\x9f\s]"
"""A character that is neither white space nor a control character: a prompt needs one."""


def check_prompt(prompt: str) -> str:
    """The prompt on one line: each tab and line end becomes a space, and spaces around the text are stripped.

    All else is the model's to clean: `\\x85` and `\\xa0` may be letters of wrongly decoded text, which it mends.

    Raises `PydanticCustomError` if the prompt is empty or too long, or has a NUL or a lone surrogate. One line end
    after the text, which an editor adds to a file, does not count towards the length.
    """
    if ending := re.search(f"(?:{LINE_END.pattern})\\Z", prompt):
        prompt = prompt[: ending.start()]
    prompt = LINE_END.sub(" ", prompt).replace("\t", " ")
    if refused := re.search("[\x00\ud800-\udfff]", prompt):
        raise PydanticCustomError(
            "prompt_character",
            "it has the {what} U+{code} at position {position}",
            {
                "what": "control character" if refused[0] == "\x00" else "lone surrogate",
                "code": f"{ord(refused[0]):04X}",
                "position": refused.start(),
            },
        )
    if (size := len(prompt.encode())) > MAX_PROMPT_BYTES:
        raise PydanticCustomError("prompt_too_long", "it has {size} bytes", {"size": size})
    if not re.search(VISIBLE, prompt):
        raise PydanticCustomError("prompt_empty", "it is empty")
    return prompt.strip(" ")


def printable(name: str) -> str:
    """A name that the client chose, fit for an error message: ASCII, at most 64 characters."""
    return name.encode("ascii", "backslashreplace").decode()[:64]


def check_loras(loras: dict[str, float]) -> dict[str, float]:
    """Return `loras`. Raises `PydanticCustomError` if they are too many, or a name or strength is invalid."""
    if len(loras) > MAX_LORAS:
        raise PydanticCustomError("lora_count", "it has {count}", {"count": len(loras)})
    for name, strength in loras.items():
        quoted = printable(name)
        if not re.fullmatch(LORA_NAME, name):
            raise PydanticCustomError("lora_name", "`{name}` can be no name", {"name": quoted})
        if not -MAX_STRENGTH <= strength <= MAX_STRENGTH:
            raise PydanticCustomError(
                "lora_strength", "`{name}` has the strength {strength}", {"name": quoted, "strength": str(strength)}
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
            "pattern": rf"^[^\x00]*{VISIBLE}[^\x00]*$",
        },
    ),
]
Integral = BeforeValidator(integral)
Seed = Annotated[StrictInt, Field(ge=0, le=MAX_SEED), Integral]
Transition = Literal["soft", "recache", "cut"]


class Request(BaseModel):
    """Base of all request bodies."""

    model_config = ConfigDict(extra="forbid")


At = Annotated[float, Field(strict=True, ge=0, le=MAX_CLIP_SECONDS, allow_inf_nan=False)]


class PromptChange(Request):
    """A change of the prompt within a clip."""

    at_s: At = Field(
        description="Seconds from the start; the change takes effect at the chunk that begins nearest to it."
    )
    prompt: Prompt
    transition: Transition = "recache"


Later = Annotated[float, Field(strict=True, ge=0, le=MAX_DURATION_SECONDS, allow_inf_nan=False)]


class ScheduledPrompt(Request):
    """A change of the prompt at a given time of a stream."""

    at_s: Later = Field(
        description="Seconds of video from the start of the stream; the change takes effect at the chunk that begins "
        "nearest to it."
    )
    prompt: Prompt
    transition: Transition = "recache"


C = TypeVar("C", bound=ScheduledPrompt | PromptChange)


def check_rising(changes: list[C]) -> list[C]:
    """Return `changes`. Raises `PydanticCustomError` if their times do not rise."""
    times = [each.at_s for each in changes]
    if times != sorted(set(times)):
        raise PydanticCustomError("at_s_order", "`at_s` does not rise")
    return changes


Schedule = Annotated[list[ScheduledPrompt], Field(max_length=MAX_CHANGES), AfterValidator(check_rising)]


class CreateStream(Request):
    """A stream to open."""

    prompt: Prompt
    model: StrictStr | None = Field(None, description="Name of a model; the server's default when absent.")
    seed: Seed | None = Field(None, description="The same seed and prompt give the same frames; random when absent.")
    duration_s: Annotated[float, Field(strict=True, gt=0, le=MAX_DURATION_SECONDS, allow_inf_nan=False)] | None = Field(
        None, description="Seconds of video after which the stream ends; endless when absent."
    )
    image: StrictStr | None = Field(
        None,
        description=f"Image or clip that the video continues from: {WANTED}, as a data URL. Cropped to the model's "
        "proportions; of a clip, the last frames are used.",
    )
    prompts: Schedule = Field(
        default=[],
        description="How the prompt changes while the stream plays. The same seed and prompts give the same frames.",
    )


class VideoOptions(Request):
    """What OpenAI's API has no field for."""

    seed: Seed | None = Field(None, description="Random when absent.")
    prompts: Annotated[list[PromptChange], Field(max_length=MAX_CHANGES), AfterValidator(check_rising)] = Field(
        default=[], description="How the prompt changes while the clip runs."
    )


class ImageReference(Request):
    """A picture, as OpenAI's API has it in JSON."""

    image_url: StrictStr = Field(description="A data URL.")


SECONDS = r"^[0-9]{1,4}(\.[0-9]{1,3})?$"


def integer_as_text(number: Any) -> Any:
    """Turn the JSON integers 4 and 4.0 into "4"; anything else is returned as it is."""
    number = integral(number)
    return str(number) if isinstance(number, int) and not isinstance(number, bool) else number


def check_seconds(seconds: str) -> str:
    """Return `seconds`. Raises `ValueError` if it is not a number above 0 and within the limit."""
    if not re.fullmatch(SECONDS, seconds) or not 0 < float(seconds) <= MAX_CLIP_SECONDS:
        raise ValueError
    return seconds


def allow_integer_seconds(schema: dict[str, Any]) -> None:
    """Describe both forms of `seconds` in its JSON schema, in place. Forms have the first only."""
    del schema["type"]
    schema["anyOf"] = [
        {"type": "string", "pattern": SECONDS},
        {"type": "integer", "minimum": 1, "maximum": MAX_CLIP_SECONDS},
    ]


class CreateVideo(Request):
    """A clip to make."""

    prompt: Prompt
    model: StrictStr | None = Field(None, description="Name of a model; the server's default when absent.")
    seconds: Annotated[StrictStr, AfterValidator(check_seconds), BeforeValidator(integer_as_text)] = Field(
        "4",
        description=f"Its length: {REQUIREMENTS['seconds']}.",
        json_schema_extra=allow_integer_seconds,
    )
    size: StrictStr | None = Field(None, description=f"{REQUIREMENTS['size']}. The model's when absent.")
    input_reference: StrictStr | ImageReference | None = Field(
        None, description=f"Image or clip that the clip continues from: {REQUIREMENTS['input_reference']}."
    )
    extra: VideoOptions = VideoOptions(seed=None)


class RemixOptions(Request):
    """What OpenAI's API has no field for."""

    at_s: At = Field(
        0.0, description="Seconds from the start at which the new prompt takes effect; the prompts before it are kept."
    )
    transition: Transition = "recache"


class RemixVideo(Request):
    """A clip to make from another one: with its seed, its picture and its prompts up to the change."""

    prompt: Prompt
    extra: RemixOptions = RemixOptions(at_s=0.0)


def inline_refs(schema: Any, definitions: Mapping[str, Any]) -> Any:
    """The schema with each `$ref` replaced by its definition: OpenAPI has no place for a body's own definitions."""
    if isinstance(schema, list):
        return [inline_refs(each, definitions) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return inline_refs(definitions[schema["$ref"]], definitions)
    return {name: inline_refs(each, definitions) for name, each in schema.items()}


def form_schema(schema: dict[str, Any], file: str) -> dict[str, Any]:
    """The schema of a multipart form with the same fields and a file. Forms have no null: omit the field instead."""
    fields = {
        name: {**{key: value for key, value in field.items() if key != "anyOf"}, **field.get("anyOf", [{}])[0]}
        for name, field in schema["properties"].items()
    }
    fields[file] = {"type": "string", "format": "binary", "description": f"A file: {WANTED}."}
    return {"type": "object", "required": schema["required"], "properties": fields, "additionalProperties": False}


def body_schema(kind: type[Request], file: str) -> dict[str, Any]:
    """OpenAPI request body of an endpoint that reads its own body: JSON, or a multipart form with a file."""
    schema = kind.model_json_schema(ref_template="{model}")
    schema = inline_refs(schema, schema.pop("$defs", {}))
    form = form_schema(schema, file)
    return {
        "required": True,
        "content": {"application/json": {"schema": schema}, "multipart/form-data": {"schema": form}},
    }


@functools.cache
def stream_fields() -> dict[str, Any]:
    """JSON schema of each field that opens or changes a stream, for clients that draw their controls from it."""
    fields: dict[str, Any] = {}
    for kind in (ChangeStream, CreateStream):
        schema = kind.model_json_schema(ref_template="{model}")
        definitions = schema.pop("$defs", {})
        fields |= {name: inline_refs(field, definitions) for name, field in schema["properties"].items()}
    del fields["model"]
    return fields


class ChangeStream(Request):
    """A change to a stream; at least one of `prompt`, `prompts` and `paused`."""

    model_config = ConfigDict(
        json_schema_extra={
            "anyOf": [
                {"required": ["prompt"], "properties": {"prompt": {"type": "string"}}},
                {
                    "required": ["paused"],
                    "properties": {"paused": {"type": "boolean"}, "transition": {"type": "null"}},
                },
                {
                    "required": ["prompts"],
                    "properties": {"prompts": {"type": "array"}, "transition": {"type": "null"}},
                },
            ]
        }
    )

    prompt: Prompt | None = None
    transition: Transition | None = Field(
        None,
        description="How the picture changes to the new prompt: `soft` blends from one to the other, `recache` (the "
        "default) keeps the scene, `cut` starts a new one. Only with `prompt`.",
    )
    paused: StrictBool | None = Field(None, description="Pause or resume playback.")
    prompts: Schedule | None = Field(
        None, description="Prompts that are still to come. They replace those that were scheduled; `[]` removes them."
    )


class ChangeLoras(Request):
    """The LoRAs to apply; all others are removed."""

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
    """What is transparent: everything near one colour (chroma key), or everything dark (luma key)."""

    mode: Literal["chroma", "luma"] = Field(
        "chroma",
        description="`chroma` makes the colour transparent, at any brightness; `luma` makes dark areas transparent.",
    )
    color: Annotated[StrictStr, Field(pattern=r"^#[0-9A-Fa-f]{6}$")] = Field(
        "#00b140", description="For `chroma`: the colour of the background."
    )
    tolerance: Annotated[float, Field(strict=True, ge=0, le=1, allow_inf_nan=False)] = Field(
        0.1,
        description="How far from the colour (in Cb or Cr), or how bright, a transparent pixel may be, from 0 to 1.",
    )
    softness: Annotated[float, Field(strict=True, ge=0, le=1, allow_inf_nan=False)] = Field(
        0.1, description="How much further the edge extends, from transparent to opaque."
    )


class CreateOutput(Request):
    """Where to push a stream."""

    url: Annotated[StrictStr, Field(min_length=1, max_length=1024)] = Field(
        description=f"{OUTPUT_URL[0].upper()}{OUTPUT_URL[1:]}. It contains the stream key; no response shows it.",
        examples=["rtmps://live.example:443/app/KEY"],
    )
    audio: Literal["silent", "none"] = Field(
        "silent",
        description="For RTMP: the audio track. Some services take no stream without one, so by default it is silence, "
        "as AAC; `none` sends the video alone. WHIP has none.",
    )
    token: Annotated[StrictStr, Field(pattern=r"^[!-~]{1,1024}$")] | None = Field(
        None, description="For WHIP: sent as `Authorization: Bearer`. No response shows it again."
    )


class CreateToken(Request):
    """A token to create for a stream."""

    scope: Literal["view", "control"] = Field(
        "view", description="`view` watches the stream, `control` also changes and ends it."
    )
    expires_in_s: Annotated[StrictInt, Field(ge=1, le=MAX_TOKEN_SECONDS), Integral] = Field(
        600, description="Lifetime in seconds. Connections that are open when it expires continue."
    )


class CreateRecording(Request):
    """A recording to start."""

    model_config = ConfigDict(
        json_schema_extra={
            "anyOf": [
                {"properties": {"alpha": {"const": False}}},
                {"properties": {"format": {"const": "webm"}}, "required": ["format"]},
            ]
        }
    )

    format: Literal["mp4", "webm"] = Field("mp4", description="`mp4` is the H.264 that viewers get, `webm` is VP9.")
    alpha: StrictBool = Field(False, description="With `webm`: add an alpha channel from the stream's matte.")


R = TypeVar("R", bound=Request)


def read(kind: type[R], fields: Any) -> R:
    """Validate a decoded request body. Raises `ApiError` 400."""
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise explain([{**each, "loc": ("body", *each["loc"])} for each in error.errors()]) from None


def path_of(location: Sequence[str | int]) -> str:
    """The path of a field within a body: `extra.prompts[0].at_s`."""
    return "".join(f"[{each}]" if isinstance(each, int) else f".{each}" for each in location).lstrip(".")


def explain(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """The first of pydantic's validation errors as an API error that names the field and says what it must be."""
    error = errors[0]
    kind, field = error["type"], next((str(part) for part in error["loc"][1:]), None)
    if kind == "json_invalid":
        return ApiError(400, "invalid_json", "The body is not valid JSON.")
    if field is None:
        return ApiError(400, "invalid_body", "The body must be a JSON object whose field names are valid Unicode.")
    if kind == "extra_forbidden":
        name = printable(path_of(error["loc"][1:]))
        return ApiError(400, "unknown_field", f"There is no field `{name}`: remove it.", param=name)
    requirement = REQUIREMENTS.get(field, "left out")
    if kind == "missing" and len(error["loc"]) == 2:
        return ApiError(400, "missing_field", f"`{field}` is missing: it must be {requirement}.", param=field)
    is_custom = kind.startswith(("prompt_", "lora_", "at_s_"))  # raised by the validators above
    message = f"`{field}` must be {requirement}{'; ' + error['msg'] if is_custom else ''}."
    return ApiError(400, kind if is_custom else "invalid_value", message, param=field)
