"""The process loop: receive, pick, step, send. Nothing numeric happens here.

Two threads share the work. The step loop owns the model and the streams. The wire thread owns the socket, so that
messages are taken in and heartbeats go out while a chunk is being generated; the two talk through a queue and an
in-process socket. A third thread reads LoRA files, which can take seconds; the step loop applies them.

Pixels go into a slot of `wire.Ring`. While the gateway has given none back no chunk is begun, so the loop goes on
taking messages and loses nothing.
"""

import functools
import itertools
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import msgspec
import torch
import zmq
from torch import Tensor

from engine import wire
from engine.checkpoints import lora
from engine.checkpoints.store import StoreError
from engine.pipeline import Chunk, NotFiniteError, PictureError, Pipeline
from engine.scheduler import Demand, batch_with, pick
from engine.stream.state import StreamState
from engine.transforms.lora import Adapters

HEARTBEAT_SECONDS = 0.5
RECENT_STEPS = 8
"""Steps whose slowest says how long the next one may take."""
OUT_OF_MEMORY = "out_of_memory"
T = TypeVar("T")


def resident_bytes() -> int:
    """Memory of this process that is in RAM; 0 where the system does not tell."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def cause(error: RuntimeError | MemoryError) -> str:
    """The code of a `wire.Fault` for what went wrong in the model."""
    want = isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
    return OUT_OF_MEMORY if want else "generation_failed"


@dataclass
class Stream:
    """A stream as the step loop sees it."""

    opening: wire.Open
    state: StreamState
    claim: Demand
    started: bool = False
    applied: int | None = None
    """Event of a steer that the next chunk will carry."""
    commit_seconds: float = 0.0
    stale: bool = False
    """The model's weights changed since its last chunk."""


@dataclass(frozen=True)
class LorasRead:
    """From the thread that reads to the step loop: what `request` asks for, or why it cannot be had."""

    request: wire.SetLoras
    loras: list[tuple[lora.Lora, float]] | StoreError


class Wire(threading.Thread):
    """Owns the socket to the gateway."""

    def __init__(self, address: str, parent: int | None) -> None:
        super().__init__(name="wire", daemon=True)
        self.inbox: queue.SimpleQueue[wire.ToEngine | LorasRead] = queue.SimpleQueue()
        self.last_step = time.monotonic()
        self.streams = 0
        self.slots_used, self.slots = 0, 0
        self._address, self._parent = address, parent
        self._context = zmq.Context()
        self._inner = self._context.socket(zmq.PAIR)
        self._inner.bind("inproc://out")
        self._stopping = False

    def send(self, message: wire.Message) -> None:
        """Called by the step loop only."""
        self._inner.send(wire.encode(message))

    def moved(self) -> None:
        """The step loop got on: heartbeats count from here."""
        self.last_step = time.monotonic()

    def finish(self) -> None:
        """Flush what was sent and end the thread."""
        self._inner.send(b"")
        self.join(timeout=5)
        self._inner.close(linger=0)
        if not self.is_alive():
            self._context.term()  # left to the garbage collector, it may wait for a socket that is collected after it

    def run(self) -> None:
        socket = self._context.socket(zmq.PAIR)
        socket.setsockopt(zmq.LINGER, 1000)
        socket.connect(self._address)
        out = self._context.socket(zmq.PAIR)
        out.connect("inproc://out")
        poller = zmq.Poller()
        poller.register(socket, zmq.POLLIN)
        poller.register(out, zmq.POLLIN)
        beat = time.monotonic()
        while True:
            ready = dict(poller.poll(max(0, round((beat - time.monotonic()) * 1000))))
            if out in ready:
                data = out.recv()
                if not data:
                    break
                socket.send(data)
            if socket in ready:
                self._receive(socket.recv())
            if time.monotonic() >= beat:
                beat = time.monotonic() + HEARTBEAT_SECONDS
                age = time.monotonic() - self.last_step
                beat_now = wire.Heartbeat(age, self.streams, resident_bytes(), self.slots_used, self.slots)
                socket.send(wire.encode(beat_now))
                if self._parent is not None and os.getppid() != self._parent:
                    os._exit(1)  # nobody is left to serve, and the step loop may hang
        out.close()
        socket.close()

    def _receive(self, data: bytes) -> None:
        try:
            self.inbox.put(wire.decode_to_engine(data))
        except msgspec.MsgspecError as error:
            print(f"engine: a message was refused: {error}", flush=True)


class Slots:
    """The engine's end of the ring: which slots are free, and what was last written to the others."""

    def __init__(self, descriptor: int) -> None:
        """Nothing is free before `lay_out`."""
        self._descriptor = descriptor
        self._ring: wire.Ring | None = None
        self._free: list[int] = []
        self._taken: dict[int, int] = {}
        self._generations = itertools.count(1)

    @property
    def free(self) -> int:
        """How many chunks can be put now."""
        return len(self._free)

    @property
    def used(self) -> int:
        """How many hold a chunk that the gateway has not released."""
        return len(self._taken)

    @property
    def total(self) -> int:
        """How many there are."""
        return len(self._taken) + len(self._free)

    def lay_out(self, layout: wire.Layout) -> None:
        """Map the memory, which the gateway has given this shape."""
        self._ring = wire.Ring(self._descriptor, layout.slots, layout.slot_bytes)
        self._free = list(range(layout.slots))

    def put(self, pixels: memoryview) -> tuple[int, int]:
        """Copy a chunk into a free slot; returns the slot and its generation, for `wire.Frames`."""
        assert self._ring is not None
        slot, generation = self._free.pop(), next(self._generations)
        self._taken[slot] = generation
        self._ring.write(slot, generation, pixels)
        return slot, generation

    def give_back(self, slot: int, generation: int) -> None:
        """The gateway is done with the slot. What it never had, or gave back already, stays as it is."""
        if self._taken.get(slot) == generation:
            del self._taken[slot]
            self._free.append(slot)

    def close(self) -> None:
        """Unmap the memory."""
        if self._ring is not None:
            self._ring.close()


class Worker:
    """The step loop over the open streams of one pipeline."""

    def __init__(
        self, pipeline: Pipeline, link: Wire, frames: int, loras: Path | None = None, *, batch: int = 1
    ) -> None:
        """`frames` is the file descriptor of the ring; `loras` the folder of the LoRA files that may be applied;
        `batch` how many streams' chunks may be made at once."""
        self.pipeline = pipeline
        self.link = link
        self.slots = Slots(frames)
        self.streams: dict[str, Stream] = {}
        self.adapters = Adapters(pipeline.served.wan)
        self._most = batch
        self._steps: deque[float] = deque(maxlen=RECENT_STEPS)
        self._folder = loras
        self._shapes = lora.shapes_of(pipeline.served.wan)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="loras")

    def run(self) -> None:
        """Until `Shutdown`. Raises `torch.AcceleratorError` when the device is lost, and every stream with it."""
        try:
            while True:
                names = self._next()
                if not self._receive(wait=not names):
                    return
                names = self._alike(names)
                if names:
                    began = time.monotonic()
                    self._step(names)
                    self._steps.append((time.monotonic() - began) / len(names))
                self.link.moved()
                self.link.streams = len(self.streams)
                self.link.slots_used, self.link.slots = self.slots.used, self.slots.total
        finally:
            self._reader.shutdown(wait=False, cancel_futures=True)
            self.slots.close()

    def _next(self) -> list[str]:
        """The streams whose chunks are to be made now, in one batch."""
        claims = {name: stream.claim for name, stream in self.streams.items()}
        now, step_seconds = time.monotonic(), max(self._steps, default=0.0)
        first = pick(claims, now, step_seconds) if self.slots.free else None
        if first is None:
            return []
        most = min(self._most, self.slots.free)
        alike = self._alike([first, *self.streams]) if most > 1 else [first]
        return [first, *batch_with(claims, first, alike, now, step_seconds, most)]

    def _alike(self, names: list[str]) -> list[str]:
        """The first of these that are open, and all that may be made in one batch with it."""
        there = [name for name in names if name in self.streams]
        kinds = [None if (s := self.streams[name]).stale else self.pipeline.kind(s.state) for name in there]
        return [name for i, name in enumerate(there) if i == 0 or (kinds[i] is not None and kinds[i] == kinds[0])]

    def _receive(self, *, wait: bool) -> bool:
        """Take in every message there is, waiting for one when there is no work; false at `Shutdown`."""
        while True:
            try:
                message = self.link.inbox.get(timeout=0.25) if wait else self.link.inbox.get_nowait()
            except queue.Empty:
                return True
            wait = False
            self.link.moved()
            match message:
                case wire.Open():
                    self._open(message)
                case wire.Steer():
                    self._steer(message)
                case wire.Credit(stream=name, limit=limit, due_in=due_in):
                    if name in self.streams:
                        stream = self.streams[name]
                        due = time.monotonic() + due_in
                        stream.claim = replace(stream.claim, limit=max(limit, stream.claim.limit), due=due)
                case wire.SetSteps(stream=name, steps=steps):
                    if name in self.streams:
                        self.pipeline.set_steps(self.streams[name].state, steps)
                case wire.Close(stream=name):
                    if name in self.streams:
                        self._end(name, "closed")
                case wire.SetLoras(event=event, loras=None):
                    self._tell_loras(event)
                case wire.SetLoras(loras=dict(strengths)):
                    self._reader.submit(self._read_loras, message, strengths)
                case LorasRead():
                    self._set_loras(message)
                case wire.Release(slot=slot, generation=generation):
                    self.slots.give_back(slot, generation)
                case wire.Layout():
                    self.slots.lay_out(message)
                case wire.Shutdown():
                    return False

    def _read_loras(self, request: wire.SetLoras, strengths: Mapping[str, float]) -> None:
        """In the thread that reads. Requests are read, and so applied, in the order they came."""
        held = self.adapters.active
        found: list[tuple[lora.Lora, float]] | StoreError
        try:
            found = [(held[name][0] if name in held else self._load(name), s) for name, s in strengths.items()]
        except StoreError as error:
            found = error
        except Exception as error:  # want of memory, a file that vanishes: whatever it is, the client hears of it
            print(f"engine: LoRAs could not be read: {error!r}", flush=True)
            found = StoreError("the LoRAs could not be read: see the server's log")
        self.link.inbox.put(LorasRead(request, found))

    def _load(self, name: str) -> lora.Lora:
        if self._folder is None:
            raise lora.LoraNotFoundError(f"there is no LoRA {name!r}: start the server with `--loras DIR`")
        return lora.read(self._folder, name, self._shapes)

    def _set_loras(self, message: LorasRead) -> None:
        event = message.request.event
        if isinstance(message.loras, StoreError):
            code = "lora_not_found" if isinstance(message.loras, lora.LoraNotFoundError) else "lora_unusable"
            self.link.send(wire.Fault(code, str(message.loras), event=event))
            return
        try:
            changed = self.adapters.set(message.loras)
        except (RuntimeError, MemoryError) as error:
            print(f"engine: LoRAs could not be applied: {error!r}", flush=True)
            text = "the LoRAs could not be applied, and none is applied any more: see the server's log"
            self.link.send(wire.Fault("lora_failed", text, event=event))
            changed = True
        else:
            self._tell_loras(event)
        if changed:
            self.pipeline.changed()
            for stream in self.streams.values():
                stream.stale = True

    def _tell_loras(self, event: int) -> None:
        names = lora.names(self._folder) if self._folder is not None else []
        self.link.send(wire.Loras(event, names, self.adapters.strengths))

    def _open(self, message: wire.Open) -> None:
        if message.model != self.pipeline.preset.name:
            self.link.send(
                wire.Fault("model_not_found", f"this engine serves {self.pipeline.preset.name}", message.stream)
            )
            return
        if message.stream in self.streams:
            self.link.send(wire.Fault("stream_exists", "a stream of this name is open", message.stream))
            return
        try:
            state = self.pipeline.open(
                message.prompt,
                message.seed,
                chunk=message.start_chunk,
                frame=message.start_frame,
                picture=self._picture(message.picture),
            )
        except PictureError as error:
            self.link.send(wire.Fault("picture_refused", str(error), message.stream))
            return
        except torch.AcceleratorError:
            raise
        except (RuntimeError, MemoryError) as error:
            print(f"engine: stream {message.stream} could not be opened: {error!r}", flush=True)
            self.link.send(wire.Fault(cause(error), "the stream could not be opened", message.stream))
            return
        now, chunk = time.monotonic(), message.start_chunk
        # one that goes on after a loss is on screen already
        claim = Demand(chunk, chunk, now, message.background, None if chunk or message.background else now)
        self.streams[message.stream] = Stream(message, state, claim)

    def _picture(self, data: bytes) -> Tensor | None:
        if not data:
            return None
        preset = self.pipeline.preset
        if len(data) % (preset.height * preset.width * 3):
            raise PictureError(f"{len(data)} bytes are no whole number of {preset.width}x{preset.height} RGB frames")
        return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(-1, preset.height, preset.width, 3)

    def _steer(self, message: wire.Steer) -> None:
        stream = self.streams.get(message.stream)
        if stream is None:
            fault = wire.Fault("stream_not_found", "no such stream in the engine", message.stream, message.event)
            self.link.send(fault)
            return
        try:
            chunk = self.pipeline.steer(stream.state, message.prompt, message.transition)
        except torch.AcceleratorError:
            raise
        except (RuntimeError, MemoryError) as error:
            print(f"engine: a steer of {message.stream} failed: {error!r}", flush=True)
            text = "the new prompt could not be read"
            self.link.send(wire.Fault(cause(error), text, message.stream, message.event))
            return
        stream.applied = message.event
        self.link.send(wire.Steered(message.stream, message.event, chunk))

    def _step(self, names: list[str]) -> None:
        streams = {name: self.streams[name] for name in names}
        for name, stream in streams.items():
            if not stream.started:
                stream.started = True
                self.link.send(wire.Started(name))
        began = time.perf_counter()
        chunks = self._generate(streams)
        seconds = (time.perf_counter() - began) / len(names)
        for name, chunk in chunks.items():
            self._hand_over(name, streams[name], chunk, seconds)
        owing = {name: streams[name] for name in chunks if name in self.streams}
        began = time.perf_counter()
        if len(owing) > 1:
            states = [stream.state for stream in owing.values()]
            self._together(functools.partial(self.pipeline.commit, *states))
        for name, stream in owing.items():  # after a batch that did not fail, nothing is owed
            self._try(name, functools.partial(self.pipeline.commit, stream.state))
        for stream in owing.values():
            stream.commit_seconds = (time.perf_counter() - began) / len(owing)

    def _generate(self, streams: Mapping[str, Stream]) -> dict[str, Chunk]:
        """The next chunk of each; of one that fails none, and it is over."""
        made: list[Chunk | NotFiniteError] | None = None
        if len(streams) > 1:
            states = [stream.state for stream in streams.values()]
            made = self._together(functools.partial(self.pipeline.next_chunks, states))
        if made is None:
            alone = {name: self._try(name, functools.partial(self._one, stream)) for name, stream in streams.items()}
            return {name: chunk for name, chunk in alone.items() if chunk is not None}
        chunks = {}
        for name, chunk in zip(streams, made, strict=True):
            if isinstance(chunk, NotFiniteError):
                self._fail(name, "not_finite", str(chunk))
            else:
                chunks[name] = chunk
        return chunks

    def _one(self, stream: Stream) -> Chunk:
        if stream.stale:
            stream.stale = False
            self.pipeline.refresh(stream.state)
        return self.pipeline.next_chunk(stream.state)

    def _together(self, work: Callable[[], T]) -> T | None:
        """What `work` on a batch returns; None when it failed, which one stream's fault need not be: each is tried
        alone then."""
        try:
            return work()
        except torch.AcceleratorError:
            raise
        except (RuntimeError, MemoryError) as error:
            print(f"engine: a batch failed: {error!r}", flush=True)
        return None

    def _hand_over(self, name: str, stream: Stream, chunk: Chunk, seconds: float) -> None:
        """Send a chunk that took so long to the gateway; it may be the stream's last."""
        frames = chunk.frames.contiguous().numpy()
        left = None if stream.opening.max_frames is None else stream.opening.max_frames - chunk.frame
        if left is not None:
            frames = frames[: max(left, 0)]
        count, height, width, _ = frames.shape
        clock = wire.CLOCK_RATE // self.pipeline.preset.fps
        slot, generation = self.slots.put(frames.data.cast("B"))
        message = wire.Frames(
            stream=name,
            chunk=chunk.index,
            pts=chunk.frame * clock,
            frames=count,
            width=width,
            height=height,
            gen_seconds=seconds + stream.commit_seconds,
            applied=stream.applied,
            discontinuity=chunk.discontinuity and chunk.index > 0,
            slot=slot,
            generation=generation,
            steps=chunk.steps,
        )
        stream.applied = None
        self.link.send(message)
        self.link.moved()
        stream.claim = replace(
            stream.claim,
            chunk=stream.state.chunk,
            due=stream.claim.due + count / self.pipeline.preset.fps,
            opened=None,
        )
        if left is not None and left <= len(chunk.frames):
            self._end(name, "finished")

    def _try(self, name: str, work: Callable[[], T]) -> T | None:
        """What `work` returns; None when it failed, and the stream with it. The others go on."""
        try:
            return work()
        except NotFiniteError as error:
            code, text = "not_finite", str(error)
        except torch.AcceleratorError:
            raise  # nothing runs on this device any more: the gateway resumes the streams in a new process
        except (RuntimeError, MemoryError) as error:
            print(f"engine: chunk of {name} failed: {error!r}", flush=True)
            code, text = cause(error), "the chunk could not be generated"
        # Out here the error is forgotten, and with its traceback the tensors of what was being done.
        self._fail(name, code, text)
        if code == OUT_OF_MEMORY and self.pipeline.device.type == "cuda":
            torch.cuda.empty_cache()
        return None

    def _fail(self, name: str, code: str, text: str) -> None:
        self.pipeline.close(self.streams.pop(name).state)
        self.link.send(wire.Fault(code, text, name))

    def _end(self, name: str, reason: wire.EndReason) -> None:
        self.pipeline.close(self.streams.pop(name).state)
        self.link.send(wire.Ended(name, reason))
