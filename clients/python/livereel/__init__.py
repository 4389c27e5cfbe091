"""Livereel's client: open, watch, steer and record live text-to-video streams.

from livereel import Client

with Client() as client, client.stream("a red ball on grass") as stream:
    for frame in stream.frames():
        ...
"""

from livereel import events
from livereel.async_client import AsyncClient, AsyncStream
from livereel.client import Client, Stream
from livereel.errors import (
    ApiError,
    AuthenticationFailed,
    Conflict,
    ConnectionFailed,
    InvalidRequest,
    LivereelError,
    NotFound,
    PermissionDenied,
    RateLimited,
    ServerFault,
    StreamFailed,
    VideoFailed,
)
from livereel.events import Event
from livereel.frames import Frame
from livereel.models import (
    Failure,
    Lora,
    Matte,
    Model,
    Output,
    PromptChange,
    Quality,
    Readiness,
    Recording,
    StreamInfo,
    Token,
    Video,
    VideoExtra,
    VideoPage,
)

__version__ = "0.1.0"

__all__ = [
    "ApiError",
    "AsyncClient",
    "AsyncStream",
    "AuthenticationFailed",
    "Client",
    "Conflict",
    "ConnectionFailed",
    "Event",
    "Failure",
    "Frame",
    "InvalidRequest",
    "LivereelError",
    "Lora",
    "Matte",
    "Model",
    "NotFound",
    "Output",
    "PermissionDenied",
    "PromptChange",
    "Quality",
    "RateLimited",
    "Readiness",
    "Recording",
    "ServerFault",
    "Stream",
    "StreamFailed",
    "StreamInfo",
    "Token",
    "Video",
    "VideoExtra",
    "VideoFailed",
    "VideoPage",
    "events",
]
