"""The server itself: its models and LoRAs, health checks, metrics, and the pages that it serves."""

from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from engine import wire
from server.api import schemas
from server.api.response_schemas import MODEL_FIELDS, Alive, ErrorBody, LoraList, ModelList, ModelObject, Readiness
from server.api.responses import StoredFileResponse
from server.api.routing import Route, access_of, streams_of
from server.errors import engine_unavailable
from server.metrics import CONTENT_TYPE, Metrics
from server.streams import admission

CLIENTS = Path(__file__).resolve().parents[2] / "clients"
LIVE_SECONDS = 600.0
"""How long the engine may fail before the server counts as dead."""
WEB, OVERLAY, JS = CLIENTS / "web", CLIENTS / "overlay", CLIENTS / "js"


async def list_models(request: Request) -> dict[str, Any]:
    """The models that the engine serves; empty until the engine has started."""
    streams = streams_of(request)
    data = [model_object(info, streams.default_model) for info in streams.engine.models.values()]
    return {"object": "list", "data": data}


async def get_model(request: Request, model: str) -> dict[str, Any]:
    """One model that the engine serves."""
    streams = streams_of(request)
    if not streams.engine.models and model == streams.default_model:
        raise engine_unavailable()
    return model_object(streams.model_info(model), streams.default_model)


def model_object(info: wire.ModelInfo, default: str) -> dict[str, Any]:
    """The API's object of a model. `default` is the name of the default model."""
    share = admission.cost(info.chunk_seconds, info.chunk_frames, info.fps)
    return {
        "id": info.name,
        "object": "model",
        **{name: getattr(info, name) for name in MODEL_FIELDS},
        "real_time_factor": share,
        "capacity": admission.capacity(share, info.promised),
        "default": info.name == default,
        "vocabulary": None if info.vocabulary is None else sorted(info.vocabulary),
        "fields": schemas.stream_fields(),
    }


async def list_loras(request: Request) -> dict[str, Any]:
    """The available LoRAs, and the strength of those that are applied."""
    return lora_list(await streams_of(request).engine.loras())


async def change_loras(request: Request, body: schemas.ChangeLoras) -> dict[str, Any]:
    """Apply exactly these LoRAs, to every stream, from its next chunk on."""
    return lora_list(await streams_of(request).engine.loras(body.loras))


def lora_list(loras: wire.Loras) -> dict[str, Any]:
    """The API's list of LoRAs. An applied LoRA is listed even if its file has been removed."""
    data = [
        {"id": name, "object": "lora", "strength": loras.applied.get(name)}
        for name in sorted({*loras.names, *loras.applied})
    ]
    return {"object": "list", "data": data}


async def livez(request: Request, response: Response) -> dict[str, Any]:
    """Liveness: the process answers. 503 once the engine has failed for ten minutes in spite of all tries: a supervisor
    should restart the server, or call somebody."""
    alive = streams_of(request).engine.health().down_seconds < LIVE_SECONDS
    response.status_code = 200 if alive else 503
    return {"status": "ok" if alive else "engine_down"}


async def readyz(request: Request, response: Response) -> dict[str, Any]:
    """Readiness: a stream could start now, because the engine is up and responding. Otherwise 503 with the reason."""
    ready, reason = streams_of(request).readiness()
    if access_of(request).keys is not None:
        reason = "ready" if ready else "see the server's log"  # this request needs no key, so give nothing away
    response.status_code = 200 if ready else 503
    return {"ready": ready, "reason": reason, "retry_in_s": round(streams_of(request).engine.health().restart_in, 1)}


async def metrics(request: Request) -> Response:
    """Metrics for Prometheus."""
    streams_of(request).update_gauges()
    exported: Metrics = request.app.state.metrics
    return Response(exported.render(), media_type=CONTENT_TYPE)


async def page(request: Request) -> Response:
    """The studio: a page to open, watch and steer streams."""
    return StoredFileResponse(WEB / "index.html")


async def docs(request: Request) -> Response:
    """The API reference."""
    return StoredFileResponse(WEB / "docs.html")


async def overlay(request: Request, id: str) -> Response:
    """A page that shows only the stream, with its transparency, for OBS and the like."""
    return StoredFileResponse(OVERLAY / "index.html")


ROUTES = [
    Route("GET", "/v1/models", list_models, ModelList),
    Route("GET", "/v1/models/{model}", get_model, ModelObject, 200, (404, 503)),
    Route("GET", "/v1/loras", list_loras, LoraList, 200, (503, 504)),
    Route("PUT", "/v1/loras", change_loras, LoraList, 200, (400, 404, 409, 413, 415, 503, 504)),
    Route("GET", "/livez", livez, Alive, options={"responses": {503: {"model": Alive}}}),
    Route(
        "GET",
        "/readyz",
        readyz,
        Readiness,
        options={"responses": {503: {"model": Readiness}}},
    ),
    Route(
        "GET",
        "/metrics",
        metrics,
        options={"response_class": Response, "responses": {"default": {"model": ErrorBody}}},
    ),
    Route("GET", "/docs", docs, options={"include_in_schema": False}),
    Route("GET", "/overlay/{id}", overlay, options={"include_in_schema": False}),
    Route("GET", "/", page, options={"include_in_schema": False}),
]
