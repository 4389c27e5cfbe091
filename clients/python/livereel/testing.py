"""A server without network, engine or waiting, for the tests of programs that use this package.

server = FakeServer()
client = Client(transport=server.transport)            # or AsyncClient(transport=server.async_transport)
with client.stream("a red ball", duration_s=1) as stream:
    assert len(list(stream.frames())) == 16
server.fail(429, "queue_full", "Every place is taken.", retry_after=30)
"""

import base64
import json
import re
import struct
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from livereel.errors import ConnectionFailed
from livereel.frames import FORMATS, HEADER, VERSION
from livereel.models import (
    Failure,
    Lora,
    Matte,
    Model,
    Output,
    PromptChange,
    Recording,
    StreamInfo,
    Token,
    Video,
    VideoExtra,
)
from livereel.protocol import Closed, Reply, Request

SIDE, FPS, CHUNK = 16, 16, 12
NOW = 1_700_000_000.0
"""The time at which everything happens."""
FILM = b"\0\0\0\x18ftypisom a film of livereel.testing"
"""What every clip and recording contains."""
JPEG = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAFA3PEY8MlBGQUZaVVBfeMiCeG5uePWvuZHI////////////////////////////////"
    "////////////////////2wBDAVVaWnhpeOuCguv/////////////////////////////////////////////////////////////"
    "////////////wAARCAAQABADASIAAhEBAxEB/8QAFQABAQAAAAAAAAAAAAAAAAAAAAH/xAAUEAEAAAAAAAAAAAAAAAAAAAAA/8QA"
    "FAEBAAAAAAAAAAAAAAAAAAAAAv/EABQRAQAAAAAAAAAAAAAAAAAAAAD/2gAMAwEAAhEDEQA/AIAQv//Z"
)


class Refused(Exception):
    """The request gets this answer."""

    def __init__(self, status: int, code: str, message: str, param: str | None = None) -> None:
        self.reply = error_reply(status, code, message, param)


def error_reply(
    status: int, code: str, message: str, param: str | None = None, retry_after: float | None = None
) -> Reply:
    """The API's error object as an answer."""
    body = {"error": {"code": code, "message": message, "type": "", "param": param}, "request_id": "fake-request"}
    headers = {} if retry_after is None else {"retry-after": f"{retry_after:g}"}
    return Reply(status, headers, json.dumps(body).encode())


@dataclass(slots=True)
class FakeStream:
    """A stream of the fake server. Time does not pass: the next frame is there whenever it is asked for."""

    info: StreamInfo
    frame: int = 0
    seq: int = 0
    sockets: "list[FakeSocket]" = field(default_factory=list)

    def event(self, type: str, **fields: Any) -> str:
        """A new event as JSON."""
        self.seq += 1
        return json.dumps({"type": type, "seq": self.seq, "ts": NOW, "stream_id": self.info.id, **fields})

    def publish(self, type: str, **fields: Any) -> None:
        """Send an event to everybody who watches."""
        text = self.event(type, **fields)
        for socket in self.sockets:
            socket.pending.append(text)

    def end(self, reason: str, error: Failure | None = None) -> None:
        """End the stream; one that is over stays as it is."""
        if not self.info.over:
            self.info = replace(self.info, state="failed" if error else "ended", ended_reason=reason, error=error)
            if error is not None:
                self.publish("error", **asdict(error), retryable=True)
            self.publish("ended", reason=reason)


class FakeSocket:
    """A WebSocket of the fake server."""

    def __init__(self, stream: FakeStream, format: str) -> None:
        self.lost = False
        self._stream = stream
        self._format = format
        self.pending: deque[str] = deque([stream.event("stream.started", stream=asdict(stream.info))])
        if stream.info.over:
            self.pending.append(stream.event("ended", reason=stream.info.ended_reason))
        stream.sockets.append(self)

    def receive(self) -> str | bytes | Closed:
        """The next event or frame."""
        stream = self._stream
        if self.lost:
            return Closed()
        if self.pending:
            return self.pending.popleft()
        if stream.info.over:
            return Closed(1000)
        if stream.info.state == "paused" or self._format == "events":
            raise AssertionError("The fake stream would send nothing more: resume or end it before you wait.")
        if stream.info.duration_s is not None and stream.frame >= stream.info.duration_s * FPS:
            stream.end("finished")
            return self.receive()
        if stream.frame % CHUNK == 0:
            chunk = stream.frame // CHUNK
            stream.publish("chunk", index=chunk, pts=self._pts, frames=CHUNK, gen_ms=10.0, shown=stream.frame)
        message = self._frame()
        stream.frame += 1
        return message

    def close(self) -> None:
        """Nobody reads any more."""
        if self in self._stream.sockets:
            self._stream.sockets.remove(self)

    @property
    def _pts(self) -> int:
        return self._stream.frame * 90_000 // FPS

    def _frame(self) -> bytes:
        number = next(number for number, name in FORMATS.items() if name == self._format)
        shade = self._stream.frame % 256
        payload = JPEG if self._format == "mjpeg" else struct.pack("B", shade) * (SIDE * SIDE * 3)
        return HEADER.pack(VERSION, number, SIDE, SIDE, 0, self._pts) + payload


class FakeServer:
    """Keeps streams, clips and recordings in memory. Behaviour that a test needs can be set from outside."""

    url = "http://livereel.test"

    def __init__(self) -> None:
        self.requests: list[Request] = []
        """Everything that was sent, WebSockets excepted."""
        self.slept: list[float] = []
        """Seconds that the client would have waited."""
        self.offline = False
        """Nothing can be reached."""
        self.video_polls = 2
        """How often a clip is asked for until it is completed."""
        self.video_failure: Failure | None = None
        """With this, clips fail."""
        self.streams: dict[str, FakeStream] = {}
        self.videos: dict[str, Video] = {}
        self.recordings: dict[str, Recording] = {}
        self.outputs: dict[str, dict[str, Output]] = {}
        self.models = [
            Model("mini", SIDE, SIDE, FPS, CHUNK, 9, 2, 0.3, 0.4, 2, 0, "A test picture.", True),
        ]
        self.loras: dict[str, float | None] = {"watercolour": None}
        self._failures: deque[Reply | None] = deque()
        self._numbers = 0

    @property
    def transport(self) -> "FakeTransport":
        """For a `Client`."""
        return FakeTransport(self)

    @property
    def async_transport(self) -> "AsyncFakeTransport":
        """For an `AsyncClient`."""
        return AsyncFakeTransport(self)

    # failures on demand

    def fail(
        self, status: int, code: str, message: str = "", *, param: str | None = None, retry_after: float | None = None
    ) -> None:
        """Answer the next request with an error. Several calls make as many requests fail."""
        self._failures.append(error_reply(status, code, message or f"The test says {code}.", param, retry_after))

    def lose_request(self) -> None:
        """Let the connection of the next request break."""
        self._failures.append(None)

    def lose_sockets(self) -> None:
        """Let every open WebSocket break."""
        for stream in self.streams.values():
            for socket in stream.sockets:
                socket.lost = True

    def fail_stream(self, id: str, code: str = "numeric", message: str = "The latents became NaN.") -> None:
        """Let a stream fail."""
        self.streams[id].end("failed", Failure(code, message))

    # the network

    def request(self, request: Request) -> Reply:
        """The answer to a request. Raises `ConnectionFailed`."""
        if self.offline:
            raise ConnectionFailed("The fake server is offline.")
        self.requests.append(request)
        if self._failures:
            if (failure := self._failures.popleft()) is None:
                raise ConnectionFailed("The test has broken the connection.")
            return failure
        try:
            for method, pattern, answer in ROUTES:
                if method == request.method and (found := re.fullmatch(pattern, request.path)):
                    made = answer(self, request, *found.groups())
                    break
            else:
                raise Refused(404, "not_found", f"There is no {request.method} {request.path}.")
        except Refused as refused:
            return refused.reply
        if isinstance(made, bytes):
            if request.sink is not None:
                request.sink.begin(Reply(200))
                request.sink.file.write(made)
            return Reply(200, {}, made)
        return Reply(204) if made is None else Reply(200, {}, json.dumps(made).encode())

    def connect(self, path: str) -> FakeSocket:
        """Open a WebSocket. Raises `ConnectionFailed`."""
        if self.offline:
            raise ConnectionFailed("The fake server is offline.")
        found = re.fullmatch(r"/v1/streams/([^/]+)/ws\?format=(\w+)(&alpha=stacked)?", path)
        assert found, path
        return FakeSocket(self._stream(found[1]), found[2])

    # what is answered

    def _new_id(self, prefix: str) -> str:
        self._numbers += 1
        return f"{prefix}{self._numbers}"

    def _stream(self, id: str) -> FakeStream:
        if id not in self.streams:
            raise Refused(404, "stream_not_found", "No stream has this id.")
        return self.streams[id]

    def _live(self, id: str) -> FakeStream:
        stream = self._stream(id)
        if stream.info.over:
            raise Refused(409, "stream_ended", "The stream is over.")
        return stream

    def _create_stream(self, request: Request) -> Any:
        body = request.json
        if not body["prompt"].strip():
            raise Refused(400, "prompt_empty", "`prompt` must be a non-empty string.", "prompt")
        id = self._new_id("stream")
        info = StreamInfo(
            id, "live", body.get("model") or "mini", body["prompt"], body.get("seed", 7), SIDE, SIDE, FPS,
            body.get("duration_s"), None, False, None, None, f"ws://livereel.test/v1/streams/{id}/ws",
            f"/v1/streams/{id}/whep", NOW, None, None, 0, 0, 0, 0.4, 0.2, None, 0, 0.0, 0.0, 0, None, None, [],
            [PromptChange(**each) for each in body.get("prompts", [])],
        )  # fmt: skip
        self.streams[id] = FakeStream(info)
        return asdict(info)

    def _change_stream(self, request: Request, id: str) -> Any:
        stream, body = self._live(id), request.json
        if "prompt" in body:
            chunk = stream.frame // CHUNK + 1
            stream.info = replace(stream.info, prompt=body["prompt"], chunk_index=chunk)
            applied = {"prompt": body["prompt"], "transition": body["transition"], "latency_s": 0.0}
            stream.publish("prompt.applied", chunk_index=chunk, pts=stream.frame * 90_000 // FPS, **applied)
        if "prompts" in body:
            stream.info = replace(stream.info, prompts=[PromptChange(**each) for each in body["prompts"]])
        if "paused" in body:
            paused: bool = body["paused"]
            reason = "asked" if paused else None
            stream.info = replace(stream.info, state="paused" if paused else "live", pause_reason=reason)  # type: ignore[arg-type]
            stream.publish("state", state=stream.info.state, reason=reason)
        return asdict(stream.info)

    def _set_matte(self, request: Request, id: str) -> Any:
        stream = self._live(id)
        stream.info = replace(stream.info, matte=Matte(**request.json) if request.method == "PUT" else None)
        return asdict(stream.info)

    def _create_output(self, request: Request, id: str) -> Any:
        self._live(id)
        kind = "rtmp" if request.json["url"].startswith("rtmp") else "whip"
        url = re.sub(r"(?<=[^/:])/.*", "/***", request.json["url"].replace("://", "\0")).replace("\0", "://")
        output = Output(self._new_id("out_"), id, url, kind, "live", 1, NOW, NOW, None, None)  # type: ignore[arg-type]
        self.outputs.setdefault(id, {})[output.id] = output
        return asdict(output)

    def _output(self, request: Request, id: str, output: str) -> Any:
        outputs = self.outputs.get(id, {})
        if output not in outputs:
            raise Refused(404, "output_not_found", "No output has this id.")
        return asdict(outputs[output]) if request.method == "GET" else outputs.pop(output) and None

    def _create_token(self, request: Request, id: str) -> Any:
        scope, token = request.json["scope"], self._new_id("lrt_")
        expires = NOW + request.json["expires_in_s"]
        return asdict(Token(token, id, scope, expires, f"{self._stream(id).info.ws_url}?token={token}"))

    def _create_recording(self, request: Request, id: str) -> Any:
        self._live(id)
        format, alpha = request.json["format"], request.json["alpha"]
        if alpha and format != "webm":
            raise Refused(400, "invalid_value", "`alpha` needs `format` webm.", "alpha")
        recording = Recording(self._new_id("rec_"), id, "recording", format, alpha, NOW, None, None, None, 0, 0, 0.0, 0)
        self.recordings[recording.id] = recording
        return asdict(recording)

    def _recording(self, request: Request, id: str) -> Any:
        if id not in self.recordings:
            raise Refused(404, "recording_not_found", "No recording has this id.")
        if request.method == "DELETE":
            del self.recordings[id]
            return None
        recording = self.recordings[id]
        if request.path.endswith(("/stop", "/content")) and recording.status == "recording":
            recording = self.recordings[id] = replace(
                recording, status="completed", ended_at=NOW + 1, ended_reason="stopped", frames=FPS, bytes=len(FILM)
            )
        return FILM if request.path.endswith("/content") else asdict(recording)

    def _create_video(self, request: Request, source: str | None = None) -> Any:
        body = request.json
        old = None if source is None else self._known_video(source)
        options = body.get("extra", {})
        seconds = old.seconds if old else body["seconds"]
        seed = old.extra.seed if old else options.get("seed", 7)
        changes = [PromptChange(**each) for each in options.get("prompts", [])]
        prompts = [PromptChange(0.0, body["prompt"]), *changes]
        frames = max(1, round(float(seconds) * FPS))
        video = Video(
            self._new_id("video_"), body.get("model") or "mini", "queued", 0, int(NOW), None, None, body["prompt"],
            f"{SIDE}x{SIDE}", seconds, source, None, VideoExtra(seed, FPS, frames, 0, 1, [], None, prompts),
        )  # fmt: skip
        self.videos[video.id] = video
        return asdict(video)

    def _known_video(self, id: str) -> Video:
        if id not in self.videos:
            raise Refused(404, "video_not_found", "No video has this id.")
        return self.videos[id]

    def _video(self, request: Request, id: str) -> Any:
        video = self._known_video(id)
        if request.method == "DELETE":
            del self.videos[id]
            return {"id": id, "object": "video.deleted", "deleted": True}
        if not video.over:
            progress = min(100, video.progress + max(1, 100 // self.video_polls))
            video = replace(video, status="in_progress", progress=progress)
            if self.video_failure is not None:
                video = replace(video, status="failed", error=self.video_failure)
            elif progress == 100:
                video = replace(video, status="completed", completed_at=int(NOW) + 1)
            self.videos[id] = video
        return asdict(video)

    def _video_content(self, request: Request, id: str) -> Any:
        video = self._known_video(id)
        if video.status == "queued":
            raise Refused(409, "video_not_ready", "The video is queued and has no frame yet.")
        return FILM

    def _list_videos(self, request: Request) -> Any:
        videos = [asdict(each) for each in self.videos.values()][:: 1 if request.params.get("order") == "asc" else -1]
        ids = [each["id"] for each in videos]
        start = ids.index(request.params["after"]) + 1 if "after" in request.params else 0
        page = videos[start : start + int(request.params.get("limit", 20))]
        first, last = (page[0]["id"], page[-1]["id"]) if page else (None, None)
        return {"data": page, "first_id": first, "last_id": last, "has_more": len(videos) > start + len(page)}

    def _model(self, request: Request, id: str) -> Any:
        for model in self.models:
            if model.id == id:
                return asdict(model)
        raise Refused(404, "model_not_found", f"There is no model `{id}`: see /v1/models.", "model")

    def _loras(self, request: Request) -> Any:
        if request.method == "PUT":
            for name in request.json["loras"]:
                if name not in self.loras:
                    raise Refused(404, "lora_not_found", f"There is no LoRA `{name}`.", "loras")
            self.loras = {name: request.json["loras"].get(name) for name in self.loras}
        return listed(Lora(name, strength) for name, strength in self.loras.items())


def listed(items: Any) -> dict[str, Any]:
    """A list as the API answers it."""
    return {"object": "list", "data": [asdict(each) for each in items]}


Answer = Callable[..., Any]
S, ID = "/v1/streams", "([^/]+)"
ROUTES: list[tuple[str, str, Answer]] = [
    ("GET", "/readyz", lambda server, request: {"ready": True, "reason": "ready", "retry_in_s": 0.0}),
    ("GET", "/v1/models", lambda server, request: listed(server.models)),
    ("GET", f"/v1/models/{ID}", FakeServer._model),
    ("GET", "/v1/loras", FakeServer._loras),
    ("PUT", "/v1/loras", FakeServer._loras),
    ("POST", S, FakeServer._create_stream),
    ("GET", S, lambda server, request: listed(each.info for each in server.streams.values())),
    ("GET", f"{S}/{ID}", lambda server, request, id: asdict(server._stream(id).info)),
    ("PATCH", f"{S}/{ID}", FakeServer._change_stream),
    ("DELETE", f"{S}/{ID}", lambda server, request, id: server._stream(id).end("deleted")),
    ("PUT", f"{S}/{ID}/matte", FakeServer._set_matte),
    ("DELETE", f"{S}/{ID}/matte", FakeServer._set_matte),
    ("POST", f"{S}/{ID}/tokens", FakeServer._create_token),
    ("POST", f"{S}/{ID}/outputs", FakeServer._create_output),
    ("GET", f"{S}/{ID}/outputs", lambda server, request, id: listed(server.outputs.get(id, {}).values())),
    ("GET", f"{S}/{ID}/outputs/{ID}", FakeServer._output),
    ("DELETE", f"{S}/{ID}/outputs/{ID}", FakeServer._output),
    ("POST", f"{S}/{ID}/recordings", FakeServer._create_recording),
    (
        "GET",
        f"{S}/{ID}/recordings",
        lambda server, request, id: listed(each for each in server.recordings.values() if each.stream_id == id),
    ),
    ("GET", "/v1/recordings", lambda server, request: listed(server.recordings.values())),
    ("GET", f"/v1/recordings/{ID}", FakeServer._recording),
    ("POST", f"/v1/recordings/{ID}/stop", FakeServer._recording),
    ("DELETE", f"/v1/recordings/{ID}", FakeServer._recording),
    ("GET", f"/v1/recordings/{ID}/content", FakeServer._recording),
    ("POST", "/v1/videos", FakeServer._create_video),
    ("GET", "/v1/videos", FakeServer._list_videos),
    ("GET", f"/v1/videos/{ID}", FakeServer._video),
    ("DELETE", f"/v1/videos/{ID}", FakeServer._video),
    ("POST", f"/v1/videos/{ID}/remix", FakeServer._create_video),
    ("GET", f"/v1/videos/{ID}/content", FakeServer._video_content),
]


class FakeTransport:
    """The way from a `Client` to a `FakeServer`."""

    def __init__(self, server: FakeServer) -> None:
        self.server = server
        self.url = server.url

    def request(self, request: Request) -> Reply:
        return self.server.request(request)

    def connect(self, path: str) -> FakeSocket:
        return self.server.connect(path)

    def sleep(self, seconds: float) -> None:
        self.server.slept.append(seconds)

    def close(self) -> None:
        """There is nothing to close."""


class AsyncFakeSocket:
    """A `FakeSocket` for an `AsyncClient`."""

    def __init__(self, socket: FakeSocket) -> None:
        self._socket = socket

    async def receive(self) -> str | bytes | Closed:
        return self._socket.receive()

    async def close(self) -> None:
        self._socket.close()


class AsyncFakeTransport:
    """The way from an `AsyncClient` to a `FakeServer`."""

    def __init__(self, server: FakeServer) -> None:
        self.server = server
        self.url = server.url

    async def request(self, request: Request) -> Reply:
        return self.server.request(request)

    async def connect(self, path: str) -> AsyncFakeSocket:
        return AsyncFakeSocket(self.server.connect(path))

    async def sleep(self, seconds: float) -> None:
        self.server.slept.append(seconds)

    async def close(self) -> None:
        """There is nothing to close."""
