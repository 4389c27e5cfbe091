"""A stream from prompt to frames: encode, denoise, decode, commit. Start reading the engine here.

    state = pipeline.open("a red ball bouncing on grass", seed=7)
    while True:
        chunk = pipeline.next_chunk(state)  # denoise and decode: `chunk.frames` can be shown
        pipeline.commit(state)              # the context pass: later chunks attend to this one

`Pipeline` holds what all streams share, `StreamState` what a stream carries from chunk to chunk. The rest of the engine
makes the model fast (`transforms`), loads it (`assemble`), and decides which stream runs next (`scheduler`, `worker`).
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.config import Preset
from engine.models.dit import TextContext
from engine.models.tokenizer import PromptTokenizer
from engine.stream.batch import RollingCache
from engine.stream.decoding import PictureEncoding, SideStream, leading_frame, to_bytes, to_host
from engine.stream.kv_cache import KVCache
from engine.stream.rollout import commit_chunk, denoise_chunk
from engine.stream.state import PendingPrompt, StreamState
from engine.transforms.apply import Served
from engine.wire import Transition


@dataclass(frozen=True)
class Chunk:
    """Decoded frames of one chunk."""

    index: int
    frame: int
    """Number of the first frame, counted from the stream's start."""
    frames: Tensor
    """uint8 [T, height, width, 3] in host memory."""
    discontinuity: bool
    """The chunk begins a scene: it does not continue the frames before."""
    steps: int | None = None
    """Denoising steps, where they were fewer than the preset's."""


class NotFiniteError(RuntimeError):
    """The model produced NaN or infinity; the stream cannot continue."""


class PictureError(ValueError):
    """A stream cannot start from these pixels; the message says why."""


class Pipeline:
    """One loaded model. Everything that differs between streams is in the `StreamState` that the caller keeps."""

    def __init__(
        self,
        preset: Preset,
        tokenizer: PromptTokenizer,
        text_encoder: nn.Module,
        served: Served,
        pictures: PictureEncoding | None = None,
    ) -> None:
        """
        Args:
            text_encoder: a `TextEncoder`, or what `place_text_encoder` returned for one.
            served: the transformer and decoder, after the transforms.
            pictures: encodes the frames that a stream may start from; None where the weights have no VAE encoder.

        Raises:
            ValueError: the preset's context is recomputed, and there is no encoder for it.
        """
        if preset.context == "recompute" and pictures is None:
            raise ValueError(f"{preset.name} encodes its own frames again, and its weights hold no VAE encoder")
        self.preset = preset
        self.rollout = preset.rollout()
        self.tokenizer = tokenizer
        self.text_encoder = text_encoder
        self.served = served
        self.dit = served.dit
        self.decoder = served.decoder
        self.pictures = pictures
        self.device: torch.device = served.wan.patch_embedding.weight.device
        self.dtype: torch.dtype = served.wan.patch_embedding.weight.dtype
        self._free_caches: list[KVCache] = []
        self._decode_stream = SideStream(self.device)
        # the newest chunks that the window holds, less the sink where it keeps its keys over a change
        kept = preset.window - (preset.sink if preset.recache == "past" else preset.chunk)
        self._remembered = kept // preset.chunk

    # Opening and closing

    @torch.inference_mode()
    def encode_prompt(self, prompt: str) -> Tensor:
        """[1, L, text_dim], zero past the end of the prompt."""
        ids = torch.tensor([self.tokenizer.encode(prompt, self.preset.text.length)], device=self.device)
        encoded: Tensor = self.text_encoder(ids)
        return encoded.to(self.dtype)

    @torch.inference_mode()
    def open(
        self, prompt: str, seed: int, *, chunk: int = 0, frame: int = 0, picture: Tensor | None = None
    ) -> StreamState:
        """A new stream.

        Args:
            chunk, frame: where it resumes a stream of an earlier engine process.
            picture: frames that it continues, uint8 [T, height, width, 3]; a single one is held still for a chunk.

        Raises:
            PictureError: the picture's size is not the model's, or the model cannot start from one.
        """
        cache = self._free_caches.pop() if self._free_caches else self.served.new_cache()
        cache.reset(chunk * self.preset.chunk)
        text = self.encode_prompt(prompt)
        state = StreamState(seed, cache, text, self.dit.encode_text(text), chunk=chunk, frame=frame)
        if picture is not None:
            self._start_from(state, picture)
        return state

    def close(self, state: StreamState) -> None:
        """End a stream, and do not use `state` again: its cache, with the CUDA graphs recorded for it, is reused."""
        self._free_caches.append(state.cache)

    def _start_from(self, state: StreamState, picture: Tensor) -> None:
        """Commit the picture's newest frames, as many as the window's past holds, as if the model had made them.

        The decoder sees their latents too, so that the first generated frame continues them.
        """
        preset = self.preset
        if self.pictures is None:
            raise PictureError("this model cannot start from a picture: its weights hold no VAE encoder")
        if picture.ndim != 4 or tuple(picture.shape[1:]) != (preset.height, preset.width, 3) or not len(picture):
            size = f"{preset.width}x{preset.height}"
            raise PictureError(f"a picture must have one or more frames of {size} RGB, got {tuple(picture.shape)}")
        whole_chunks = 1 + max(0, len(picture) - preset.first_chunk_frames) // preset.chunk_frames
        chunks = min(whole_chunks, max(1, preset.window // preset.chunk - 1))
        count = preset.first_chunk_frames + (chunks - 1) * preset.chunk_frames
        picture = picture[-count:]
        frames = torch.cat([picture, picture[-1:].expand(count - len(picture), -1, -1, -1)])
        latents = self.pictures(frames)
        for part in latents.split(preset.chunk, dim=2):
            first = state.memories is None
            with self._decode_stream(latents):
                decoded, state.memories = self.decoder(part, state.memories)
                state.leading += self._leading(decoded, first=first)
            self._write([state], part)
            self._keep_recent(state, part)

    # Chunk by chunk

    def next_chunk(self, state: StreamState) -> Chunk:
        """Generate and decode the next chunk. Its context pass remains to be done: see `commit`.

        Raises:
            NotFiniteError: the latents are not finite.
        """
        (made,) = self.next_chunks([state])
        if isinstance(made, NotFiniteError):
            raise made
        return made

    def kind(self, state: StreamState) -> Hashable:
        """Streams of equal kind may share a batch for their next chunks; one of kind None may not share any."""
        if state.pending is not None or state.blend_to is not None:
            return None
        return state.cache.written == 0 and state.uncommitted is None, state.steps

    @torch.inference_mode()
    def next_chunks(self, states: Sequence[StreamState]) -> list[Chunk | NotFiniteError]:
        """`next_chunk` of several streams of equal `kind`, in one batch: for each its chunk, or why it has none.

        Any exception leaves the streams as they were, so that each can be tried alone.

        Raises:
            ValueError: the streams are of several kinds.
        """
        if len(states) > 1 and (len(kinds := {self.kind(state) for state in states}) > 1 or None in kinds):
            raise ValueError("these streams have no common batch: see `kind`")
        for state in states:
            self._cross_boundary(state)
        rows = [(state.seed, state.chunk) for state in states]
        cache, context = self._batch(states)
        latents = denoise_chunk(self.dit, self.rollout, cache, context, rows, steps=states[0].steps)

        parts = latents.split(1)
        with self._decode_stream(latents):
            finite = [to_host(torch.isfinite(part).all()) for part in parts]
            decoded = []
            for part, state in zip(parts, states, strict=True):
                frames, memories = self.decoder(part, state.memories)
                leading = self._leading(frames, first=state.memories is None)
                decoded.append((to_host(to_bytes(frames)[0]), memories, leading))
            arrived = torch.cuda.Event() if self.device.type == "cuda" else None
            if arrived is not None:
                arrived.record()

        chunks = []
        for state, part, (frames, memories, leading) in zip(states, parts, decoded, strict=True):
            chunks.append(Chunk(state.chunk, state.frame, frames, state.memories is None, state.steps))
            state.memories = memories
            state.leading += leading
            state.uncommitted = part
            state.chunk += 1
            state.frame += len(frames)
        if arrived is not None:
            if len(states) == 1 and states[0].pending is None:
                # The GPU runs it while it decodes and while the frames are sent. Not for a batch: it could fail after
                # the streams have moved on.
                self.commit(states[0])
            arrived.synchronize()  # the one place where the host waits for the GPU
        return [
            chunk if good else NotFiniteError(f"chunk {chunk.index} has values that are not finite")
            for chunk, good in zip(chunks, finite, strict=True)
        ]

    @torch.inference_mode()
    def commit(self, *states: StreamState) -> None:
        """The context passes of the chunks just generated: off the latency path, but needed before the next ones."""
        waiting = [(state, state.uncommitted) for state in states if state.uncommitted is not None]
        if not waiting:
            return
        if self.preset.context == "recompute":
            for state, part in waiting:
                state.uncommitted = None
                self._keep_recent(state, part)
            self._recompute([state for state, _ in waiting])
            return
        latents = torch.cat([latents for _, latents in waiting])
        self._write([state for state, _ in waiting], latents, context_pass=self.served.context_pass)
        for state, part in waiting:
            state.uncommitted = None
            self._keep_recent(state, part)

    def _batch(self, states: Sequence[StreamState]) -> tuple[RollingCache, TextContext]:
        """The cache and the context of these streams as one batch."""
        if len(states) == 1:
            return states[0].cache, states[0].context
        caches = [state.cache for state in states]
        return type(caches[0]).join(caches), TextContext.join([state.context for state in states])

    def _write(self, states: Sequence[StreamState], latents: Tensor, *, context_pass: bool = True) -> None:
        """Write K and V of clean latents [B, C, F, h, w], one row per stream, and advance the caches."""
        rows = [(state.seed, state.cache.start_frame // self.preset.chunk) for state in states]
        cache, context = self._batch(states)
        commit_chunk(self.dit, self.rollout, cache, context, latents, rows, context_pass=context_pass)

    def _keep_recent(self, state: StreamState, latents: Tensor) -> None:
        state.recent = [*state.recent, latents][-self._remembered :] if self._remembered else []
        state.leading = state.leading[len(state.leading) - len(state.recent) :] if state.leading else []

    def _leading(self, frames: Tensor, *, first: bool) -> list[Tensor | None]:
        """What a recomputed context needs of a chunk's decoded frames: an entry of `StreamState.leading`, or none."""
        if self.preset.context != "recompute":
            return []
        return [None if first else leading_frame(frames, self.preset.chunk, self.preset.temporal_stride)]

    def _recompute(self, states: Sequence[StreamState]) -> None:
        """Write the caches anew from the recent latents alone, at positions from 0."""
        if len({len(state.recent) for state in states}) > 1:
            for state in states:
                self._recompute([state])
            return
        assert self.pictures is not None
        parts = [list(state.recent) for state in states]
        for state, own in zip(states, parts, strict=True):
            state.cache.reset(0)
            if (frame := state.leading[0]) is not None:
                self._decode_stream.join(frame)
                own[0] = self.pictures.begin_clip(own[0], frame)
        for latents in zip(*parts, strict=True):
            self._write(states, torch.cat(latents))

    # Changes while a stream runs

    def steer(self, state: StreamState, prompt: str, transition: Transition) -> int:
        """Change the prompt at the next chunk boundary; returns the index of the first chunk under it.

        It replaces a steer that is still pending.
        """
        state.pending = PendingPrompt(self.encode_prompt(prompt), transition)
        return state.chunk

    def set_steps(self, state: StreamState, steps: int) -> None:
        """Use so many denoising steps from the next chunk on, at least 1 and at most the preset's."""
        count = len(self.preset.steps)
        state.steps = max(1, steps) if steps < count else None

    def refresh_weights(self) -> None:
        """The transformer's weights changed: update what is kept beside them. Every stream then needs `refresh`."""
        self.dit.refresh()

    @torch.inference_mode()
    def refresh(self, state: StreamState) -> None:
        """The transformer's weights changed: recompute what the stream keeps of them, the sink's keys too."""
        self._set_text(state, state.text)
        self._rewrite_window(state)

    def _cross_boundary(self, state: StreamState) -> None:
        """What is due before the next chunk: the last one's context pass, a pending steer, the next step of a blend."""
        pending, state.pending = state.pending, None
        if pending is None or pending.transition == "soft":
            self.commit(state)
        if pending is not None:
            if pending.transition == "soft":
                state.blend_from, state.blend_to, state.blend_step = state.text, pending.text, 0
            else:
                state.blend_from = state.blend_to = None
                if pending.transition == "recache":
                    self._recache(state, pending.text)
                else:
                    self._cut(state, pending.text)
        if state.blend_from is not None and state.blend_to is not None:
            state.blend_step += 1
            share = state.blend_step / self.preset.soft_chunks
            self._set_text(state, torch.lerp(state.blend_from, state.blend_to, share) if share < 1 else state.blend_to)
            if share >= 1:
                state.blend_from = state.blend_to = None

    def _set_text(self, state: StreamState, text: Tensor) -> None:
        state.text = text
        state.context = self.dit.encode_text(text)

    def _recache(self, state: StreamState, text: Tensor) -> None:
        """Go on under another text, and rewrite as much of the cache under it as the model's authors do."""
        rule = self.preset.recache
        if rule == "nothing" or (rule == "past" and state.cache.written < state.cache.sink_slots):
            self.commit(state)
        self._set_text(state, text)
        if rule == "window":
            self._rewrite_window(state)
        elif rule == "past":
            self._rewrite_past(state)

    def _rewrite_window(self, state: StreamState) -> None:
        """Rewrite the K and V of the window's latents under the current text, in order and at their old positions."""
        end = self._take_uncommitted(state)
        if self.preset.context == "recompute":
            if state.recent:
                self._recompute([state])
            return
        state.cache.reset(end - len(state.recent) * self.preset.chunk)
        for latents in state.recent:
            self._write([state], latents)

    def _rewrite_past(self, state: StreamState) -> None:
        """The same for the past alone: the sink keeps its keys, and is in sight of what is rewritten."""
        cache, owed = state.cache, state.uncommitted is not None
        count = min(cache.past + owed, cache.ring_slots)
        end = self._take_uncommitted(state)
        cache.drop_past(end - count * self.preset.chunk)
        for latents in state.recent[len(state.recent) - count :]:
            self._write([state], latents)

    def _take_uncommitted(self, state: StreamState) -> int:
        """Count the last chunk among the recent ones without a context pass; returns the next chunk's position."""
        if state.uncommitted is None:
            return state.cache.start_frame
        self._keep_recent(state, state.uncommitted)
        state.uncommitted = None
        return state.cache.start_frame + self.preset.chunk

    def _cut(self, state: StreamState, text: Tensor) -> None:
        """Begin a scene under another text: one that shows nothing of the one before, or as its authors cut."""
        if self.preset.shot_offset is None:
            state.uncommitted = state.memories = None
            state.recent, state.leading = [], []
            state.cache.reset(state.chunk * self.preset.chunk)
            self._set_text(state, text)
            return
        self.commit(state)
        self._set_text(state, text)
        if state.cache.written:
            state.cache.cut(self.preset.shot_offset)
