"""Sizes of networks as frozen data that can be read without torch, which takes seconds to load."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DiTConfig:
    """Sizes of a Wan transformer. `parameters` and memory follow from these alone."""

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    text_dim: int
    in_channels: int = 16
    out_channels: int = 16
    patch: tuple[int, int, int] = (1, 2, 2)
    freq_dim: int = 256
    eps: float = 1e-6
    pooled_text: bool = False
    """A linear layer adds the prompt's mean to the time embedding: what binds words to pictures in a small model."""

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads
