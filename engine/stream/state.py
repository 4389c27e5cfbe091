"""What a live stream carries from chunk to chunk."""

from dataclasses import dataclass, field

from torch import Tensor

from engine.models.dit import TextContext
from engine.stream.kv_cache import KVCache
from engine.wire import Transition


@dataclass
class PendingPrompt:
    """A steer that takes effect at the next chunk boundary."""

    text: Tensor
    """[1, L, text_dim]"""
    transition: Transition


@dataclass
class StreamState:
    """Of constant size however long the stream runs. Counters are Python ints and never wrap."""

    seed: int
    cache: KVCache
    text: Tensor
    """[1, L, text_dim]: the encoded prompt, or the current step of a blend towards it."""
    context: TextContext
    """Of `text`."""
    chunk: int = 0
    """Index of the next chunk."""
    frame: int = 0
    """Pixel frames generated so far: the media clock."""
    memories: list[Tensor] | None = None
    """State of the decoder; None at the start of a scene."""
    recent: list[Tensor] = field(default_factory=list)
    """Clean latents of the past chunks in the window, oldest first, for `recache`."""
    leading: list[Tensor | None] = field(default_factory=list)
    """Where the context is recomputed, for each of `recent` and for `uncommitted`: the frame of pixels [1, 3, H, W] in
    [0, 1] that stands for its first latent where nothing precedes it; None of a scene's first chunk."""
    pending: PendingPrompt | None = None
    blend_from: Tensor | None = None
    blend_to: Tensor | None = None
    blend_step: int = 0
    steps: int | None = None
    """Denoising steps from the next chunk on, if fewer than the preset's."""
    uncommitted: Tensor | None = None
    """Clean latents of the last chunk while its context pass is not done."""
