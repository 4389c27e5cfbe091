"""A fake engine for tests and benchmarks: a moving test picture made from prompt and seed, with failures on demand.

It follows the real engine's contract (credits, steers, a trimmed last chunk, counters that survive a restart), so that
the gateway and its clients can be built and tested without torch.
"""

import asyncio
import contextlib
import hashlib
import time
from dataclasses import dataclass, field

from PIL import Image, ImageDraw

from engine import wire
from server.backends.base import Deliver, EngineLost, Health

STAMP_FIELDS = (16, 32, 8, 8)
"""Bits of a stamp's fields: frame number, milliseconds since 1970, prompt, checksum. Values are taken modulo 2^bits."""
STAMP_BITS = sum(STAMP_FIELDS)
STAMP_ROWS = 2


def stamp(draw: ImageDraw.ImageDraw, width: int, frame: int, milliseconds: int, prompt: int) -> None:
    """Draw a stamp along the top of a picture, as black and white squares that survive every codec.

    The bits of all fields, most significant first, fill two rows. The checksum is the sum of the other fields' bytes.
    """
    values = [value % (1 << bits) for value, bits in zip((frame, milliseconds, prompt), STAMP_FIELDS, strict=False)]
    data = b"".join(value.to_bytes(bits // 8) for value, bits in zip(values, STAMP_FIELDS, strict=False))
    bits = int.from_bytes(data + bytes([sum(data) % 256]))
    columns = STAMP_BITS // STAMP_ROWS
    side = width // columns
    for k in range(STAMP_BITS):
        x, y = k % columns * side, k // columns * side
        shade = 255 if bits >> (STAMP_BITS - 1 - k) & 1 else 0
        draw.rectangle((x, y, x + side - 1, y + side - 1), (shade, shade, shade))


@dataclass(slots=True)
class _Stream:
    opened: wire.Open
    prompt: str
    chunk: int
    frame: int
    limit: int = 0
    due_at: float = 0.0
    steer: wire.Steer | None = None
    fresh: bool = True
    """The next chunk starts a new scene."""
    started: bool = False
    steps: int | None = None
    """Denoising steps that `wire.SetSteps` asked for; None for the model's own number."""
    busy: bool = False
    """Chunk `chunk` is being generated, so a steer applies to the one after it."""


@dataclass(slots=True, kw_only=True)
class FakeBackend:
    """One fake engine. `chunk_seconds` is both what it reports and what it takes per chunk."""

    width: int = 256
    height: int = 256
    fps: int = 16
    chunk_frames: int = 12
    first_chunk_frames: int = 9
    chunk_seconds: float = 0.25
    steps: int = 2
    """Denoising steps that it reports; with fewer it is faster."""
    model: str = "mini"
    ready_after: float = 0.0
    restart_after: float = 0.05
    restarts_left: int = 1_000_000
    """How many crashes it recovers from."""
    extra_seconds: float = 0.0
    """Added to every chunk's time, beyond what it reports."""
    stamped: bool = False
    """Stamp every picture with the time it was made, for `server.bench.latency`; see `stamp`."""
    refuse_steers: bool = False
    vocabulary: frozenset[str] | None = None
    """Words that it says it knows; it draws any text."""
    loras: tuple[str, ...] = ()
    """LoRAs that it reports; they change nothing in the picture."""
    sent: list[wire.ToEngine] = field(default_factory=list)
    """Every message from the gateway except credits."""
    _deliver: Deliver | None = None
    _applied: dict[str, float] = field(default_factory=dict)
    _streams: dict[str, _Stream] = field(default_factory=dict)
    _generation: int = 0
    _ready: bool = False
    _gave_up: bool = False
    _wake: asyncio.Event = field(default_factory=asyncio.Event)
    _task: asyncio.Task[None] | None = None

    # Backend

    async def start(self, deliver: Deliver) -> None:
        self._deliver = deliver
        self._task = asyncio.create_task(self._run(self.ready_after), name="fake engine")

    def send(self, message: wire.ToEngine) -> None:
        if not isinstance(message, wire.Credit):
            self.sent.append(message)
        if not self._ready:
            return
        match message:
            case wire.Open():
                self._streams[message.stream] = _Stream(
                    message, message.prompt, message.start_chunk, message.start_frame
                )
            case wire.Credit():
                if stream := self._streams.get(message.stream):
                    stream.limit = max(stream.limit, message.limit)
                    stream.due_at = asyncio.get_running_loop().time() + message.due_in
            case wire.Steer():
                self._steer(message)
            case wire.SetSteps():
                if stream := self._streams.get(message.stream):
                    stream.steps = message.steps if message.steps < self.steps else None
            case wire.Close():
                self._streams.pop(message.stream, None)
                self._emit(wire.Ended(message.stream, "closed"))
            case wire.SetLoras():
                self._set_loras(message)
            case wire.Shutdown():
                pass
        self._wake.set()

    def health(self) -> Health:
        reason = "ready" if self._ready else "the engine failed" if self._gave_up else "the engine is starting"
        return Health(self._ready, reason, self._generation)

    async def stop(self) -> None:
        self._deliver = None
        await self._cancel()
        self._ready = False

    # failures on demand

    def crash(self, reason: str = "the engine crashed") -> None:
        """Crash now, and restart after `restart_after` seconds unless `restarts_left` is used up."""
        assert self._task is not None
        self._task.cancel()
        self._streams.clear()
        self._applied = {}
        self._ready = False
        retrying = self.restarts_left > 0
        self.restarts_left -= 1
        self._gave_up = not retrying
        self._emit(EngineLost(reason, retrying))
        if retrying:
            self._task = asyncio.create_task(self._run(self.restart_after), name="fake engine")

    def break_stream(self, stream: str, message: str = "the latents became NaN") -> None:
        """Make one stream fail."""
        self._streams.pop(stream, None)
        self._emit(wire.Fault("numeric", message, stream))

    # the engine

    async def _run(self, delay: float) -> None:
        await asyncio.sleep(delay)
        self._generation += 1
        self._ready = True
        self._emit(wire.Ready(wire.PROTOCOL, 0, [self._info()]))
        while True:
            if (stream := self._pick()) is None:
                self._wake.clear()
                await self._wake.wait()
            else:
                await self._step(stream)

    def _pick(self) -> _Stream | None:
        runnable = [stream for stream in self._streams.values() if stream.chunk < stream.limit]
        return min(runnable, key=lambda stream: (stream.opened.background, stream.due_at), default=None)

    async def _step(self, stream: _Stream) -> None:
        name = stream.opened.stream
        if not stream.started:
            stream.started = True
            self._emit(wire.Started(name))
        applied = None
        if steer := stream.steer:
            stream.steer, stream.prompt, applied = None, steer.prompt, steer.event
            stream.fresh |= steer.transition == "cut"
        stream.busy = True
        steps = stream.steps
        # The context pass costs as much as a denoising step.
        seconds = (self.chunk_seconds + self.extra_seconds) * (1 + (steps or self.steps)) / (1 + self.steps)
        await asyncio.sleep(seconds)
        stream.busy = False
        if self._streams.get(name) is not stream:
            return  # closed in the meantime
        frames = self.first_chunk_frames if stream.fresh else self.chunk_frames
        if stream.opened.max_frames is not None:
            frames = min(frames, stream.opened.max_frames - stream.frame)
        pixels = b"".join(self._picture(stream, stream.frame + k) for k in range(frames))
        self._emit(
            wire.Frames(
                stream=name,
                chunk=stream.chunk,
                pts=stream.frame * wire.CLOCK_RATE // self.fps,
                frames=frames,
                width=self.width,
                height=self.height,
                gen_seconds=seconds,
                applied=applied,
                discontinuity=stream.fresh and stream.frame > 0,
                steps=steps,
            ),
            pixels,
        )
        stream.chunk += 1
        stream.frame += frames
        stream.fresh = False
        if stream.frame == stream.opened.max_frames:
            self._streams.pop(name, None)
            self._emit(wire.Ended(name, "finished"))

    def _steer(self, message: wire.Steer) -> None:
        stream = self._streams.get(message.stream)
        if stream is None or self.refuse_steers:
            self._emit(wire.Fault("steer_refused", "the engine cannot do that", message.stream, message.event))
            return
        stream.steer = message
        self._emit(wire.Steered(message.stream, message.event, stream.chunk + stream.busy))

    def _set_loras(self, message: wire.SetLoras) -> None:
        wanted = self._applied if message.loras is None else message.loras
        if unknown := wanted.keys() - set(self.loras):
            fault = wire.Fault("lora_not_found", f"there is no LoRA {min(unknown)!r}", event=message.event)
            self._emit(fault)
            return
        self._applied = dict(wanted)
        self._emit(wire.Loras(message.event, sorted(self.loras), dict(wanted)))

    def _picture(self, stream: _Stream, frame: int) -> bytes:
        """RGB24, height x width x 3 bytes; the same for the same seed, prompt and frame."""
        digest = hashlib.sha256(f"{stream.opened.seed} {stream.prompt}".encode()).digest()
        ground, ball = tuple(40 + value // 3 for value in digest[:3]), tuple(90 + value // 2 for value in digest[3:6])
        image = Image.new("RGB", (self.width, self.height), ground)
        draw = ImageDraw.Draw(image)
        draw.rectangle((0, self.height * 2 // 3, self.width, self.height), tuple(value * 2 // 3 for value in ground))
        # One lap in 48 frames, with a bounce twice a lap, so that every frame differs from the one before.
        radius = self.height // 7
        x = (frame % 48) * (self.width + 2 * radius) // 48 - radius
        y = self.height * 2 // 3 - radius - abs(12 - frame % 24) * self.height // 40
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), ball)
        if self.stamped:
            stamp(draw, self.width, frame, round(time.time() * 1000), digest[0])
        return image.tobytes()

    def _info(self) -> wire.ModelInfo:
        return wire.ModelInfo(
            name=self.model,
            width=self.width,
            height=self.height,
            fps=self.fps,
            chunk_frames=self.chunk_frames,
            first_chunk_frames=self.first_chunk_frames,
            steps=self.steps,
            chunk_seconds=self.chunk_seconds,
            parameters=0,
            description="A moving test picture; no model behind it.",
            vocabulary=self.vocabulary,
        )

    def _emit(self, event: wire.ToGateway | EngineLost, pixels: bytes = b"") -> None:
        if self._deliver is not None:
            self._deliver(event, pixels)

    async def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None
