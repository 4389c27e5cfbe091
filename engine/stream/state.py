"""Everything that one live stream carries from chunk to chunk."""

from dataclasses import dataclass, field

from torch import Tensor

from engine.models.dit import TextContext
from engine.stream.kv_cache import KVCache
from engine.wire import Transition


@dataclass
class PendingPrompt:
    """A steer that waits for the next chunk boundary."""

    text: Tensor
    transition: Transition


@dataclass
class StreamState:
    """Constant in size however long the stream runs. Counters are plain ints and never wrap."""

    seed: int
    cache: KVCache
    text: Tensor
    """[1, L, text_dim]: what the running prompt encodes to, or the blend on its way there."""
    context: TextContext
    chunk: int = 0
    frame: int = 0
    """Pixel frames generated so far: the media clock."""
    memories: list[Tensor] | None = None
    """The decoder's; None at the start of a scene."""
    recent: list[Tensor] = field(default_factory=list)
    """Clean latents of the past chunks in the window, oldest first: what `recache` writes again."""
    pending: PendingPrompt | None = None
    blend_from: Tensor | None = None
    blend_to: Tensor | None = None
    blend_step: int = 0
    steps: int | None = None
    """Denoising steps from the next chunk on, where that is fewer than the preset's."""
    uncommitted: Tensor | None = None
    """Latents of the chunk just emitted, whose context pass is still owed."""
