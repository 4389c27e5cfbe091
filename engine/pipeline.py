"""A stream from prompt to frames: encode, denoise, decode, commit. Start reading the engine here."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.config import Preset, RolloutConfig
from engine.models.dit import TextContext
from engine.models.tokenizer import PromptTokenizer
from engine.stream.batch import JoinedCaches
from engine.stream.decoding import PictureEncoding, SideStream, to_host
from engine.stream.kv_cache import KVCache
from engine.stream.rollout import Transformer, commit_chunk, denoise_chunk
from engine.stream.state import PendingPrompt, StreamState
from engine.transforms.apply import Served
from engine.transforms.cuda_graphs import GraphedWan
from engine.transforms.fused import FusedWan
from engine.wire import Transition


@dataclass(frozen=True)
class Chunk:
    """Frames uint8 [T, height, width, 3] of chunk `index`, in host memory; the media time of the first is `frame`."""

    index: int
    frame: int
    frames: Tensor
    discontinuity: bool
    steps: int | None = None
    """Denoising steps that it was made with, where those are not the preset's."""


class NotFiniteError(RuntimeError):
    """The model produced NaN or infinity; the stream cannot go on."""


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
        """`text_encoder` is a `TextEncoder`, or what `place_text_encoder` made of one."""
        self.preset = preset
        self.rollout = preset.rollout()
        self.tokenizer = tokenizer
        self.text_encoder = text_encoder
        self.served = served
        self.dit = served.dit
        self.decoder = served.decoder
        self.pictures = pictures
        self._caches: list[KVCache] = []
        self._beside = SideStream(served.wan.patch_embedding.weight.device)
        self.device: torch.device = served.wan.patch_embedding.weight.device
        self.dtype: torch.dtype = served.wan.patch_embedding.weight.dtype

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
        """A new stream. `chunk` and `frame` are where it stands when it continues an earlier engine process's.

        `picture`, uint8 [T, height, width, 3], is what came before the first frame: see `_see`.

        Raises:
            PictureError: the picture has another size than the model, or the model cannot start from one.
        """
        cache = self._caches.pop() if self._caches else self.served.new_cache()
        cache.reset(chunk * self.preset.chunk)
        text = self.encode_prompt(prompt)
        state = StreamState(seed, cache, text, self.dit.encode_text(text), chunk=chunk, frame=frame)
        if picture is not None:
            self._see(state, picture)
        return state

    def close(self, state: StreamState) -> None:
        """The stream is over: its cache, and what was recorded for it, serves the next one. Do not use it again."""
        self._caches.append(state.cache)

    def _see(self, state: StreamState, picture: Tensor) -> None:
        """Let the stream have seen a picture: as many of its newest frames as the window's past holds.

        A single picture stands still for a chunk. Its latents get a context pass like any others, and go through the
        decoder, so that the first frame shown continues it.
        """
        preset = self.preset
        if self.pictures is None:
            raise PictureError("this model cannot start from a picture: its weights hold no VAE encoder")
        if picture.ndim != 4 or tuple(picture.shape[1:]) != (preset.height, preset.width, 3) or not len(picture):
            size = f"{preset.width}x{preset.height}"
            raise PictureError(f"a picture must have one or more frames of {size} RGB, got {tuple(picture.shape)}")
        fitting = 1 + max(0, len(picture) - preset.first_chunk_frames) // preset.chunk_frames
        chunks = min(fitting, max(1, preset.window // preset.chunk - 1))
        count = preset.first_chunk_frames + (chunks - 1) * preset.chunk_frames
        picture = picture[-count:]
        frames = torch.cat([picture, picture[-1:].expand(count - len(picture), -1, -1, -1)])
        latents = self.pictures(frames)
        for part in latents.split(preset.chunk, dim=2):
            with self._beside(latents):
                self.decode(part, state)
            self._write([state], part)
            self._remember(state, part)

    def steer(self, state: StreamState, prompt: str, transition: Transition) -> int:
        """Change the prompt at the next chunk boundary; returns the index of the first chunk under it.

        A steer that waits already is replaced.
        """
        state.pending = PendingPrompt(self.encode_prompt(prompt), transition)
        return state.chunk

    def set_steps(self, state: StreamState, steps: int) -> None:
        """Denoise with so many steps from the next chunk on, at least 1; the preset's own number or more is its own."""
        count = len(self.preset.steps)
        state.steps = max(1, steps) if steps < count else None

    def refresh_weights(self) -> None:
        """The transformer's weights changed: take over what is held apart from them. Streams need `refresh`, too."""
        if isinstance(self.dit, FusedWan | GraphedWan):
            self.dit.refresh()

    @torch.inference_mode()
    def refresh(self, state: StreamState) -> None:
        """The transformer's weights changed: make again what the stream keeps of them, as a `recache` steer does."""
        self._set_text(state, state.text)
        self._recache(state)

    def next_chunk(self, state: StreamState) -> Chunk:
        """Generate and decode the next chunk. Its context pass is owed: see `commit`.

        Raises:
            NotFiniteError: the latents are not finite.
        """
        (made,) = self.next_chunks([state])
        if isinstance(made, NotFiniteError):
            raise made
        return made

    def kind(self, state: StreamState) -> Hashable:
        """Streams of the same kind may have their next chunks made in one batch; None is for a batch of its own."""
        if state.pending is not None or state.blend_to is not None:
            return None
        return state.cache.written == 0 and state.uncommitted is None, state.steps

    @torch.inference_mode()
    def next_chunks(self, states: Sequence[StreamState]) -> list[Chunk | NotFiniteError]:
        """`next_chunk` of several streams of the same `kind`, in one batch; for each its chunk, or why there is none.

        What else is raised leaves them where they were, so that each can be tried alone.

        Raises:
            ValueError: the streams are of several kinds.
        """
        if len(states) > 1 and (len(kinds := {self.kind(state) for state in states}) > 1 or None in kinds):
            raise ValueError("these streams have no common batch: see `kind`")
        for state in states:
            self._cross_boundary(state)
        steps = states[0].steps
        rows = [(state.seed, state.chunk) for state in states]
        latents = denoise_chunk(*self._batch(states), rows, steps=steps)
        parts = latents.split(1)
        with self._beside(latents):
            finite = [to_host(torch.isfinite(part).all()) for part in parts]
            decoded = []
            for part, state in zip(parts, states, strict=True):
                frames, memories = self.decoder(part, state.memories)
                decoded.append((to_host(frames[0]), memories))
            arrived = torch.cuda.Event() if self.device.type == "cuda" else None
            if arrived is not None:
                arrived.record()
        chunks = []
        for state, part, (frames, memories) in zip(states, parts, decoded, strict=True):
            chunks.append(Chunk(state.chunk, state.frame, frames, state.memories is None, state.steps))
            state.memories = memories
            state.uncommitted = part
            state.chunk += 1
            state.frame += len(frames)
        if arrived is not None:
            if len(states) == 1 and states[0].pending is None:
                # Beside decoding, and while the frames are sent. A batch must not fail when its streams have moved on.
                self.commit(states[0])
            arrived.synchronize()  # the one place where the host waits for the GPU
        return [
            chunk if good else NotFiniteError(f"chunk {chunk.index} has values that are not finite")
            for chunk, good in zip(chunks, finite, strict=True)
        ]

    def decode(self, latents: Tensor, state: StreamState) -> Tensor:
        """Latents [1, C, F, h, w] to uint8 [T, height, width, 3]; the decoder's memories move on in the state."""
        frames, state.memories = self.decoder(latents, state.memories)
        return frames[0]

    @torch.inference_mode()
    def commit(self, *states: StreamState) -> None:
        """The context pass over the chunks just emitted: off the latency path, and due before the next ones."""
        owing = [(state, state.uncommitted) for state in states if state.uncommitted is not None]
        if not owing:
            return
        latents = torch.cat([latents for _, latents in owing])
        self._write([state for state, _ in owing], latents, context_pass=self.served.context_pass)
        for state, part in owing:
            state.uncommitted = None
            self._remember(state, part)

    def _batch(
        self, states: Sequence[StreamState]
    ) -> tuple[Transformer, RolloutConfig, KVCache | JoinedCaches, TextContext]:
        """What a rollout of these streams' chunks as one batch begins with."""
        if len(states) == 1:
            return self.dit, self.rollout, states[0].cache, states[0].context
        # what is recorded is bound to one cache
        model = self.dit.model if isinstance(self.dit, GraphedWan) else self.dit
        caches, contexts = zip(*((state.cache, state.context) for state in states), strict=True)
        return model, self.rollout, JoinedCaches(caches), TextContext.join(contexts)

    def _write(self, states: Sequence[StreamState], latents: Tensor, *, context_pass: bool = True) -> None:
        rows = [(state.seed, state.cache.start_frame // self.preset.chunk) for state in states]
        model, rollout, cache, context = self._batch(states)
        commit_chunk(model, rollout, cache, context, latents, rows, context_pass=context_pass)

    def _remember(self, state: StreamState, latents: Tensor) -> None:
        past = self.preset.window // self.preset.chunk - 1
        state.recent = [*state.recent, latents][-past:] if past else []

    def _cross_boundary(self, state: StreamState) -> None:
        """Everything that a chunk boundary brings: the owed context pass, a steer, the next step of a blend."""
        pending, state.pending = state.pending, None
        if pending is None or pending.transition == "soft":
            self.commit(state)
        if pending is not None:
            if pending.transition == "soft":
                state.blend_from, state.blend_to, state.blend_step = state.text, pending.text, 0
            else:
                state.blend_from = state.blend_to = None
                self._set_text(state, pending.text)
                if pending.transition == "recache":
                    self._recache(state)
                else:
                    self._cut(state)
        if state.blend_from is not None and state.blend_to is not None:
            state.blend_step += 1
            share = state.blend_step / self.preset.soft_chunks
            self._set_text(state, torch.lerp(state.blend_from, state.blend_to, share) if share < 1 else state.blend_to)
            if share >= 1:
                state.blend_from = state.blend_to = None

    def _set_text(self, state: StreamState, text: Tensor) -> None:
        state.text = text
        state.context = self.dit.encode_text(text)

    def _recache(self, state: StreamState) -> None:
        """Rewrite the K and V of the window's latents under the new text, in order and at their old positions."""
        committed = state.uncommitted is None
        if state.uncommitted is not None:
            self._remember(state, state.uncommitted)
            state.uncommitted = None
        count = len(state.recent)
        end = state.cache.start_frame + (0 if committed else self.preset.chunk)
        state.cache.reset(end - count * self.preset.chunk)
        for latents in state.recent:
            self._write([state], latents)

    def _cut(self, state: StreamState) -> None:
        """A fresh scene: nothing of the old one is seen again."""
        state.uncommitted = None
        state.recent = []
        state.memories = None
        state.cache.reset(state.chunk * self.preset.chunk)
