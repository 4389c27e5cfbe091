"""The process loop: receive messages, pick streams, run a step, send frames. It computes nothing itself.

The worker's thread owns the model and the streams. `GatewayLink` is the thread of the socket, `LoraLoader` the one that
reads LoRA files; both hand messages over through the link's inbox.

Pixels go into a slot of `wire.Ring`. While the gateway holds all slots no chunk is begun; the worker still handles
messages, and loses nothing.
"""

import functools
import queue
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from engine import wire
from engine.checkpoints import lora
from engine.checkpoints.store import StoreError
from engine.gateway_link import FrameSlots, GatewayLink
from engine.lora_loader import LoadedLoras, LoraLoader
from engine.pipeline import Chunk, NotFiniteError, PictureError, Pipeline
from engine.scheduler import Demand, batch_with, pick
from engine.stream.state import StreamState

RECENT_STEPS = 8
"""The slowest of so many past steps is what the next one is expected to take."""
OUT_OF_MEMORY = "out_of_memory"
T = TypeVar("T")


def fault_code(error: RuntimeError | MemoryError) -> str:
    """The code of a `wire.Fault` for an error of the model."""
    no_memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
    return OUT_OF_MEMORY if no_memory else "generation_failed"


@dataclass
class Stream:
    """An open stream, as the worker sees it."""

    opening: wire.Open
    state: StreamState
    demand: Demand
    started: bool = False
    applied: int | None = None
    """Event of the steer that the next chunk is the first to show."""
    commit_seconds: float = 0.0
    """What the context pass of its last chunk took."""
    stale: bool = False
    """The model's weights changed since its last chunk."""


class Worker:
    """Steps the open streams of one pipeline."""

    def __init__(
        self, pipeline: Pipeline, link: GatewayLink, frames: int, loras: Path | None = None, *, batch: int = 1
    ) -> None:
        """
        Args:
            frames: file descriptor of the memory of `wire.Ring`.
            loras: folder of the LoRA files that may be applied.
            batch: how many streams' chunks may be generated in one batch.
        """
        self.pipeline = pipeline
        self.link = link
        self.slots = FrameSlots(frames)
        self.streams: dict[str, Stream] = {}
        self.loras = LoraLoader(pipeline.served.wan, loras, link.inbox.put)
        self._max_batch = batch
        self._step_seconds: deque[float] = deque(maxlen=RECENT_STEPS)

    def run(self) -> None:
        """Serve until `Shutdown`.

        Raises:
            torch.AcceleratorError: the device is lost, and every stream with it.
        """
        try:
            while True:
                names = self._pick()
                if not self._receive(wait=not names):
                    return
                names = self._same_kind(names)  # messages may have closed or changed some
                if names:
                    began = time.monotonic()
                    self._step(names)
                    self._step_seconds.append((time.monotonic() - began) / len(names))
                self.link.progressed()
                self.link.streams = len(self.streams)
                self.link.slots_used, self.link.slots = self.slots.used, self.slots.total
        finally:
            self.loras.close()
            self.slots.close()

    def _pick(self) -> list[str]:
        """The streams whose next chunks to generate now, in one batch."""
        demands = {name: stream.demand for name, stream in self.streams.items()}
        now, step_seconds = time.monotonic(), max(self._step_seconds, default=0.0)
        first = pick(demands, now, step_seconds) if self.slots.free else None
        if first is None:
            return []
        limit = min(self._max_batch, self.slots.free)
        candidates = self._same_kind([first, *self.streams]) if limit > 1 else [first]
        return [first, *batch_with(demands, first, candidates, now, step_seconds, limit)]

    def _same_kind(self, names: list[str]) -> list[str]:
        """The first of `names` that is open, and those of the others that may share a batch with it."""
        is_open = [name for name in names if name in self.streams]
        kinds = [None if (s := self.streams[name]).stale else self.pipeline.kind(s.state) for name in is_open]
        return [name for i, name in enumerate(is_open) if i == 0 or (kinds[i] is not None and kinds[i] == kinds[0])]

    def _receive(self, *, wait: bool) -> bool:
        """Handle all messages that have arrived, after waiting for one where `wait`; false at `Shutdown`."""
        while True:
            try:
                message = self.link.inbox.get(timeout=0.25) if wait else self.link.inbox.get_nowait()
            except queue.Empty:
                return True
            wait = False
            self.link.progressed()
            match message:
                case wire.Open():
                    self._open(message)
                case wire.Steer():
                    self._steer(message)
                case wire.Credit(stream=name, limit=limit, due_in=due_in):
                    if name in self.streams:
                        stream = self.streams[name]
                        due = time.monotonic() + due_in
                        stream.demand = replace(stream.demand, limit=max(limit, stream.demand.limit), due=due)
                case wire.SetSteps(stream=name, steps=steps):
                    if name in self.streams:
                        self.pipeline.set_steps(self.streams[name].state, steps)
                case wire.Close(stream=name):
                    if name in self.streams:
                        self._end(name, "closed")
                case wire.SetLoras(event=event, loras=None):
                    self._report_loras(event)
                case wire.SetLoras(loras=dict(strengths)):
                    self.loras.request(message, strengths)
                case LoadedLoras():
                    self._apply_loras(message)
                case wire.Release(slot=slot, generation=generation):
                    self.slots.release(slot, generation)
                case wire.Layout():
                    self.slots.lay_out(message)
                case wire.Shutdown():
                    return False

    def _apply_loras(self, message: LoadedLoras) -> None:
        event = message.request.event
        if isinstance(message.loras, StoreError):
            code = "lora_not_found" if isinstance(message.loras, lora.LoraNotFoundError) else "lora_unusable"
            self.link.send(wire.Fault(code, str(message.loras), event=event))
            return
        try:
            changed = self.loras.adapters.set(message.loras)
        except (RuntimeError, MemoryError) as error:
            print(f"engine: LoRAs could not be applied: {error!r}", flush=True)
            text = "the LoRAs could not be applied, and none is applied any more: see the server's log"
            self.link.send(wire.Fault("lora_failed", text, event=event))
            changed = True
        else:
            self._report_loras(event)
        if changed:
            self.pipeline.refresh_weights()
            for stream in self.streams.values():
                stream.stale = True

    def _report_loras(self, event: int) -> None:
        self.link.send(wire.Loras(event, self.loras.names(), self.loras.adapters.strengths))

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
                picture=self._pixels(message.picture),
            )
        except PictureError as error:
            self.link.send(wire.Fault("picture_refused", str(error), message.stream))
            return
        except torch.AcceleratorError:
            raise
        except (RuntimeError, MemoryError) as error:
            print(f"engine: stream {message.stream} could not be opened: {error!r}", flush=True)
            self.link.send(wire.Fault(fault_code(error), "the stream could not be opened", message.stream))
            return
        now, chunk = time.monotonic(), message.start_chunk
        # a stream that resumes after a crash is on screen already
        demand = Demand(chunk, chunk, now, message.background, None if chunk or message.background else now)
        self.streams[message.stream] = Stream(message, state, demand)

    def _pixels(self, data: bytes) -> Tensor | None:
        """RGB24 frames of the model's size as uint8 [T, height, width, 3]; None for no bytes.

        Raises:
            PictureError: the bytes are not whole frames.
        """
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
            self.link.send(wire.Fault(fault_code(error), text, message.stream, message.event))
            return
        stream.applied = message.event
        self.link.send(wire.Steered(message.stream, message.event, chunk))

    def _step(self, names: list[str]) -> None:
        """Generate and send a chunk of each stream, then run their context passes."""
        streams = {name: self.streams[name] for name in names}
        for name, stream in streams.items():
            if not stream.started:
                stream.started = True
                self.link.send(wire.Started(name))
        began = time.perf_counter()
        chunks = self._generate(streams)
        seconds = (time.perf_counter() - began) / len(names)
        for name, chunk in chunks.items():
            self._send_frames(name, streams[name], chunk, seconds)
        uncommitted = {name: streams[name] for name in chunks if name in self.streams}
        began = time.perf_counter()
        if len(uncommitted) > 1:
            states = [stream.state for stream in uncommitted.values()]
            self._try_batch(functools.partial(self.pipeline.commit, *states))
        for name, stream in uncommitted.items():  # does nothing after a batch that succeeded
            self._try(name, functools.partial(self.pipeline.commit, stream.state))
        for stream in uncommitted.values():
            stream.commit_seconds = (time.perf_counter() - began) / len(uncommitted)

    def _generate(self, streams: Mapping[str, Stream]) -> dict[str, Chunk]:
        """The next chunk of each stream. One that fails is ended, and has none."""
        made: list[Chunk | NotFiniteError] | None = None
        if len(streams) > 1:
            states = [stream.state for stream in streams.values()]
            made = self._try_batch(functools.partial(self.pipeline.next_chunks, states))
        if made is None:
            alone = {name: self._try(name, functools.partial(self._next_chunk, s)) for name, s in streams.items()}
            return {name: chunk for name, chunk in alone.items() if chunk is not None}
        chunks = {}
        for name, chunk in zip(streams, made, strict=True):
            if isinstance(chunk, NotFiniteError):
                self._fail(name, "not_finite", str(chunk))
            else:
                chunks[name] = chunk
        return chunks

    def _next_chunk(self, stream: Stream) -> Chunk:
        if stream.stale:
            stream.stale = False
            self.pipeline.refresh(stream.state)
        return self.pipeline.next_chunk(stream.state)

    def _send_frames(self, name: str, stream: Stream, chunk: Chunk, seconds: float) -> None:
        """Send a chunk that took `seconds` to generate to the gateway; ends the stream after its last one."""
        frames = chunk.frames.contiguous().numpy()
        left = None if stream.opening.max_frames is None else stream.opening.max_frames - chunk.frame
        if left is not None:
            frames = frames[: max(left, 0)]
        count, height, width, _ = frames.shape
        fps = self.pipeline.preset.fps
        slot, generation = self.slots.write(frames.data.cast("B"))
        message = wire.Frames(
            stream=name,
            chunk=chunk.index,
            pts=chunk.frame * (wire.CLOCK_RATE // fps),
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
        self.link.progressed()
        due = stream.demand.due + count / fps
        stream.demand = replace(stream.demand, chunk=stream.state.chunk, due=due, opened=None)
        if left is not None and left <= len(chunk.frames):
            self._end(name, "finished")

    def _try_batch(self, work: Callable[[], T]) -> T | None:
        """What `work` on a batch returns; None when it failed. The caller then tries each stream alone, since one of
        them may be the cause."""
        try:
            return work()
        except torch.AcceleratorError:
            raise
        except (RuntimeError, MemoryError) as error:
            print(f"engine: a batch failed: {error!r}", flush=True)
        return None

    def _try(self, name: str, work: Callable[[], T]) -> T | None:
        """What `work` for one stream returns; None when it failed, and then the stream is ended. The others go on."""
        try:
            return work()
        except NotFiniteError as error:
            code, text = "not_finite", str(error)
        except torch.AcceleratorError:
            raise  # nothing runs on this device any more: the gateway resumes the streams in a new process
        except (RuntimeError, MemoryError) as error:
            print(f"engine: chunk of {name} failed: {error!r}", flush=True)
            code, text = fault_code(error), "the chunk could not be generated"
        # Outside of `except`, where the traceback no longer keeps the failed computation's tensors alive.
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
