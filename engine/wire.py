"""The contract between the gateway and the engine: every message that crosses the process boundary.

Each message is a msgspec struct encoded as MessagePack with a type tag; a message of an unknown type, with an
unknown field or a wrong type is refused by the decoder. One ZeroMQ message carries one struct. Pixels cross in shared
memory, a `Ring`, of which `Frames` names a slot. Nothing here imports torch: this is the one module of `engine` that
`server` may import.

Time is media time: `pts` counts 1/90000 s from the first frame of the stream. Durations are seconds.
"""

import mmap
from typing import Literal

import msgspec

PROTOCOL = 7
CLOCK_RATE = 90_000

LORA_NAME = r"\w[\w .+()-]{0,127}"
"""What a LoRA may be called: the stem of a file, which cannot lead to another folder."""

Transition = Literal["soft", "recache", "cut"]
EndReason = Literal["finished", "closed"]


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """Base of every message; the tag is the class name."""


class ModelInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a client may know about a model before it opens a stream."""

    name: str
    width: int
    height: int
    fps: int
    chunk_frames: int
    """Pixel frames in every chunk but the first."""
    first_chunk_frames: int
    """Pixel frames in the first chunk of a stream, and in the first after a cut."""
    steps: int
    """Denoising steps of a chunk; a stream that is late can be given fewer, see `SetSteps`."""
    chunk_seconds: float
    """Time from one chunk to the next, measured while warming up; admission divides playback time by it."""
    parameters: int
    description: str
    vocabulary: frozenset[str] | None = None
    """Every word that the model knows, in every form that it takes for the same word, in lower case; None if it takes
    any text."""
    prompt_words: int | None = None
    """How many words of a prompt the model reads, where it has a vocabulary. It ignores the rest."""
    promised: float = 0.9
    """Part of the engine's time that admission may promise; the rest absorbs what takes longer than usual."""


# gateway -> engine


class Open(Message, frozen=True):
    """Create a stream. It generates nothing until a `Credit` allows it."""

    stream: str
    model: str
    prompt: str
    seed: int
    max_frames: int | None = None
    """Frames after which the engine ends the stream; None is endless. The last chunk is trimmed to fit."""
    start_chunk: int = 0
    """Chunk index of the first chunk to generate: above zero when a stream is resumed in a new engine process."""
    start_frame: int = 0
    """Pixel frames already shown by earlier engine processes; `pts` continues from here."""
    picture: bytes = b""
    """What the stream goes on from: one or more frames of RGB24 at the model's size, one after the other."""
    background: bool = False
    """Nobody watches it: it gets what the others leave of the engine, and its credits are due at no time."""


class Steer(Message, frozen=True):
    """Change the prompt at the next chunk boundary. Answered by `Steered`, or by `Fault` with the same `event`."""

    stream: str
    event: int
    prompt: str
    transition: Transition


class Credit(Message, frozen=True):
    """Allow chunks with an index below `limit`; say when the next of them must be on screen.

    Cumulative, so that a repeated or reordered message does no harm. This is the back-pressure that keeps
    generation at 1:1 with playback, and it is how a stream is paused.
    """

    stream: str
    limit: int
    due_in: float
    """Seconds until the first frame that is not generated yet must be shown; negative when it is late."""


class SetSteps(Message, frozen=True):
    """Denoise with so many steps from the next chunk on: `ModelInfo.steps`, or fewer to be faster at less quality.

    `Frames` tells what a chunk was made with. An unknown stream is no error.
    """

    stream: str
    steps: int


class Close(Message, frozen=True):
    """End a stream and free its state. Answered by `Ended`; closing an unknown stream is no error."""

    stream: str


class SetLoras(Message, frozen=True):
    """Apply these LoRAs, and no others, from the next chunk boundary on; None only asks what there is.

    They change the model, and with it every stream. Answered by `Loras`, or by `Fault` with the same `event` and no
    stream; then nothing has changed, or, with the code `lora_failed`, no LoRA is applied any more.
    """

    event: int
    loras: dict[str, float] | None = None
    """Strength by name: 1 is what the LoRA was trained for, 0 keeps it loaded without effect."""


class Layout(Message, frozen=True):
    """The shared memory behind the engine's `--frames-fd` has its size now: map it as a `Ring` of this shape.

    Comes once, after `Ready`, which says how large a chunk is. Every slot is the engine's to write to.
    """

    slots: int
    slot_bytes: int


class Release(Message, frozen=True):
    """A slot has been read, or is not wanted: it is the engine's again. Answers every `Frames`."""

    slot: int
    generation: int


class Serve(Message, frozen=True):
    """For a standby, once: the engine before it is lost. It loads what is not loaded yet, and answers with `Ready`."""


class Shutdown(Message, frozen=True):
    """Leave the process loop at the next chunk boundary and exit with status 0."""


# engine -> gateway


class Ready(Message, frozen=True):
    """Weights are loaded and every shape is warm."""

    protocol: int
    pid: int
    models: list[ModelInfo]


class Waiting(Message, frozen=True):
    """A standby has prepared what it may, and waits for `Serve`; until then it says no more than that it lives."""

    warm: bool
    """Whether everything is loaded and warm, so that `Ready` follows at once. On a GPU it is not: see `--spare`."""


class Started(Message, frozen=True):
    """The engine took the stream up and is generating its first chunk."""

    stream: str


class Frames(Message, frozen=True):
    """One chunk: `frames` x `height` x `width` x 3 bytes of RGB24 at the start of slot `slot` of the ring.

    The slot is the gateway's until its `Release`; an engine without a free one generates nothing.
    """

    stream: str
    chunk: int
    pts: int
    frames: int
    width: int
    height: int
    gen_seconds: float
    """Time spent on the chunk before it was sent, and on the context pass of the one before it."""
    applied: int | None = None
    """The `event` of the newest steer that takes effect with this chunk."""
    discontinuity: bool = False
    """True when the scene starts afresh here: a cut, or a resumed stream."""
    slot: int = 0
    generation: int = 0
    """What the slot is stamped with; see `Ring`."""
    steps: int | None = None
    """Denoising steps, where `SetSteps` asked for another number than the model's; None is the model's."""

    @property
    def size(self) -> int:
        """Bytes of the pixels."""
        return self.frames * self.height * self.width * 3


class Steered(Message, frozen=True):
    """The new prompt will take effect at chunk `chunk`."""

    stream: str
    event: int
    chunk: int


class Ended(Message, frozen=True):
    """The stream is over in the engine and its state is freed."""

    stream: str
    reason: EndReason


class Loras(Message, frozen=True):
    """What LoRAs the engine can apply, and which it does."""

    event: int
    names: list[str]
    applied: dict[str, float]


class Fault(Message, frozen=True):
    """Something failed. With a stream, that stream is over, unless `event` names a refused steer or `SetLoras`."""

    code: str
    message: str
    stream: str | None = None
    event: int | None = None


class Heartbeat(Message, frozen=True):
    """Sent twice a second by a thread beside the step loop."""

    step_age: float
    """Seconds since the step loop last moved: a large value with work to do means that the loop hangs."""
    streams: int
    resident_bytes: int
    slots_used: int = 0
    slots: int = 0
    """Of the ring; both are 0 before `Layout`."""


ToEngine = Open | Steer | Credit | SetSteps | Close | SetLoras | Layout | Release | Serve | Shutdown
ToGateway = Ready | Started | Frames | Steered | Ended | Loras | Fault | Heartbeat

encode = msgspec.msgpack.Encoder().encode
decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
decode_to_gateway = msgspec.msgpack.Decoder(ToGateway | Waiting).decode


# the pixels


class DamagedError(ValueError):
    """A slot does not hold the chunk that was announced: it is stale, half written, or no slot at all."""


class Ring:
    """Shared memory in which chunks cross: `slots` slots of `slot_bytes` bytes, with two stamps each.

    Every write has a generation of its own, counted from 1. It is stamped on the slot before the pixels and again after
    them, so that a slot which is being written, or was written anew, never passes for the one that was announced.
    """

    def __init__(self, descriptor: int, slots: int, slot_bytes: int) -> None:
        """Map the memory behind a file descriptor, which stays the caller's. Raises OSError or ValueError."""
        self.slots, self.slot_bytes = slots, slot_bytes
        self._map = mmap.mmap(descriptor, self.bytes_for(slots, slot_bytes))
        self._bytes = memoryview(self._map)
        self._stamps = self._bytes[: 16 * slots].cast("Q")

    @staticmethod
    def bytes_for(slots: int, slot_bytes: int) -> int:
        """Size of the memory: stamps, then slots, each from a page's start."""
        if slots < 1 or slot_bytes < 1:
            raise ValueError(f"{slots} slots of {slot_bytes} bytes are no ring")
        return _pages(16 * slots) + slots * _pages(slot_bytes)

    def write(self, slot: int, generation: int, pixels: memoryview) -> None:
        """Fill a slot. `pixels` is flat, of unsigned bytes, and fits."""
        if len(pixels) > self.slot_bytes:
            raise ValueError(f"a chunk of {len(pixels)} bytes does not fit a slot of {self.slot_bytes}")
        start = self._start(slot)
        self._stamps[2 * slot] = generation
        self._bytes[start : start + len(pixels)] = pixels
        self._stamps[2 * slot + 1] = generation

    def read(self, slot: int, generation: int, size: int) -> bytes:
        """A copy of the first `size` bytes of a slot. Raises `DamagedError` unless they are those of `generation`."""
        if not (0 <= slot < self.slots and 0 < size <= self.slot_bytes):
            raise DamagedError(f"there is no slot {slot} with {size} bytes")
        start, stamps = self._start(slot), slice(2 * slot, 2 * slot + 2)
        before = self._stamps[stamps].tolist()
        pixels = bytes(self._bytes[start : start + size])
        after = self._stamps[stamps].tolist()
        if not before == after == [generation, generation]:
            raise DamagedError(f"slot {slot} has the stamps {before} and {after} instead of {generation}")
        return pixels

    def close(self) -> None:
        """Give the mapping back. The memory is freed with the last descriptor and mapping of it."""
        self._stamps.release()
        self._bytes.release()
        self._map.close()

    def _start(self, slot: int) -> int:
        return _pages(16 * self.slots) + slot * _pages(self.slot_bytes)


def _pages(size: int) -> int:
    """`size`, rounded up to whole pages."""
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
