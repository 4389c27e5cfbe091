"""The Wan diffusion transformer, with the parameter names of the original checkpoints.

Pure mathematics: the `SelfAttend` object that the caller passes in decides what a token may attend to. A KV cache, a
block-causal mask and the training pattern are three such objects over the same weights.

Shapes: B batch, F latent frames, N tokens in a frame, S = F * N tokens, D = dim, L text tokens.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.models.config import DiTConfig
from engine.ops.attention import attention

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(q, k, v), each [B, S, heads, head_dim], normalised but not yet rotated -> [B, S, heads, head_dim]."""


class SelfAttend(Protocol):
    """Decides which tokens self-attention sees, and at which positions they are."""

    def at(self, layer: int) -> Attend:
        """The attention function of one layer."""


@dataclass(frozen=True)
class TextContext:
    """What the transformer needs of G encoded prompts, computed once per prompt."""

    layers: list[tuple[Tensor, Tensor]]
    """The cross-attention K and V of every layer, [G, L, heads, head_dim] each."""
    pooled: Tensor
    """[G, dim]: added to the time embedding; zero where the model has no such path."""
    lengths: Tensor
    """int32 [G]: tokens before the padding. Keys and values of all padding tokens are equal."""

    def map(self, change: Callable[[Tensor], Tensor]) -> "TextContext":
        """A context of `change` applied to every tensor; all have the prompts on their first axis."""
        layers = [(change(k), change(v)) for k, v in self.layers]
        return TextContext(layers, change(self.pooled), change(self.lengths))

    @staticmethod
    def join(contexts: "Sequence[TextContext]") -> "TextContext":
        """One context of the prompts of all, concatenated."""
        layers = [
            (torch.cat([k for k, _ in pairs]), torch.cat([v for _, v in pairs]))
            for pairs in zip(*(context.layers for context in contexts), strict=True)
        ]
        pooled, lengths = ([getattr(context, name) for context in contexts] for name in ("pooled", "lengths"))
        return TextContext(layers, torch.cat(pooled), torch.cat(lengths))


def text_lengths(text: Tensor) -> Tensor:
    """How many positions of text [G, L, D] come before the padding, which is zero: int32 [G]."""
    position = torch.arange(1, text.shape[1] + 1, device=text.device, dtype=torch.int32)
    return ((text != 0).any(dim=-1) * position).amax(dim=1)


def pool_text(text: Tensor) -> Tensor:
    """Mean of text [G, L, D] over the positions that are not padding, which are zero: [G, D]."""
    present = (text != 0).any(dim=-1, keepdim=True)
    return text.sum(dim=1) / present.sum(dim=1).clamp(min=1)


class NoPooledText(nn.Module):
    """Stands for the pooled-text layer in the public Wan models, which read text by cross-attention only."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, pooled: Tensor) -> Tensor:
        return pooled.new_zeros(len(pooled), self.dim)


def timestep_embedding(t: Tensor, size: int) -> Tensor:
    """Sinusoid of t in [0, 1000], float64 inside, laid out [cos | sin], frequencies 10000^(-i / (size / 2))."""
    half = size // 2
    frequency = 10_000.0 ** (-torch.arange(half, dtype=torch.float64, device=t.device) / half)
    theta = t.to(torch.float64)[..., None] * frequency
    return torch.cat([theta.cos(), theta.sin()], dim=-1).float()


class RMSNorm(nn.Module):
    """Root-mean-square norm over the whole model width (Wan normalises q and k before splitting heads)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """The projections shared by self- and cross-attention."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        dim = config.dim
        self.heads = config.num_heads
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.o = nn.Linear(dim, dim)
        self.norm_q = RMSNorm(dim, config.eps)
        self.norm_k = RMSNorm(dim, config.eps)

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """K and V [B, S, heads, head_dim] of x [B, S, D]."""
        return self.split(self.norm_k(self.k(x))), self.split(self.v(x))

    def queries(self, x: Tensor) -> Tensor:
        return self.split(self.norm_q(self.q(x)))


class Block(nn.Module):
    """Self-attention, cross-attention and feed-forward, modulated by the time embedding."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        dim, eps = config.dim, config.eps
        self.norm1 = nn.LayerNorm(dim, eps, elementwise_affine=False)
        self.self_attn = Attention(config)
        self.norm3 = nn.LayerNorm(dim, eps)
        self.cross_attn = Attention(config)
        self.norm2 = nn.LayerNorm(dim, eps, elementwise_affine=False)
        self.ffn = nn.Sequential(
            nn.Linear(dim, config.ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(config.ffn_dim, dim)
        )
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(self, x: Tensor, e: Tensor, text: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        """x [B, S, D], e [B, F, 6, D], text K and V [G, L, heads, head_dim] -> [B, S, D].

        G is B, or a multiple of it: then each row of x is split into G / B runs of equal length, each with its own
        text.
        """
        frames = e.shape[1]
        modulation = self.modulation.to(e.dtype) + e
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.unsqueeze(2).unbind(3)

        def modulate(y: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
            return (y.unflatten(1, (frames, -1)) * (1 + scale) + shift).flatten(1, 2)

        def gated(y: Tensor, gate: Tensor) -> Tensor:
            return (y.unflatten(1, (frames, -1)) * gate).flatten(1, 2)

        y = modulate(self.norm1(x), scale1, shift1)
        q = self.self_attn.queries(y)
        k, v = self.self_attn.keys_values(y)
        x = x + gated(self.self_attn.o(attend(q, k, v).flatten(2)), gate1)

        text_k, text_v = text
        q = self.cross_attn.queries(self.norm3(x)).reshape(len(text_k), -1, *text_k.shape[2:])
        x = x + self.cross_attn.o(attention(q, text_k, text_v).reshape(x.shape))

        return x + gated(self.ffn(modulate(self.norm2(x), scale2, shift2)), gate2)


class Head(nn.Module):
    """The last modulated norm and projection to patches."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        patch = config.patch[0] * config.patch[1] * config.patch[2]
        self.norm = nn.LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.head = nn.Linear(config.dim, patch * config.out_channels)
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim**0.5)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        """x [B, S, D], e [B, F, D] -> [B, S, patch * channels]."""
        shift, scale = (self.modulation.to(e.dtype) + e.unsqueeze(2)).unsqueeze(2).unbind(3)
        x = self.norm(x).unflatten(1, (e.shape[1], -1)) * (1 + scale) + shift
        return self.head(x).flatten(1, 2)


@dataclass(frozen=True)
class Embedded:
    """Latents, noise levels and pooled text in the form that the blocks take."""

    tokens: Tensor
    """[B, S, D]"""
    time: Tensor
    """[B, F, D]: time embedding plus pooled text."""
    modulation: Tensor
    """[B, F, 6, D]: its projection to shift, scale and gate of both halves of a block."""
    grid: tuple[int, int, int]
    """Frames, rows and columns of patches; S is their product."""


class CausalWan(nn.Module):
    """Predicts the flow v = noise - x0 of latent frames, each at its own noise level.

    The architecture is Wan 2.1's (Wan-Video/Wan2.1, `wan/modules/model.py`); causality comes from `self_attend`. It is
    a `Transformer` (`engine.stream.rollout`) as it is.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.patch_embedding = nn.Conv3d(config.in_channels, dim, config.patch, stride=config.patch)
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.text_pool = nn.Linear(config.text_dim, dim, bias=False) if config.pooled_text else NoPooledText(dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.head = Head(config)

    def encode_text(self, text: Tensor) -> TextContext:
        """The context of text [G, L, text_dim], whose padding positions are zero."""
        context = self.text_embedding(text)
        layers = [block.cross_attn.keys_values(context) for block in cast(Iterable[Block], self.blocks)]
        return TextContext(layers, self.text_pool(pool_text(text)), text_lengths(text))

    def forward(self, x: Tensor, t: Tensor, text: TextContext, self_attend: SelfAttend) -> Tensor:
        """The flow of every frame.

        Args:
            x: [B, in_channels, F, H, W] noisy latents.
            t: [B, F] noise level times 1000, one value a latent frame.
            text: from `encode_text`, one row per row of x, or per equal run of a row's frames.
            self_attend: what each token may see, and where it stands.

        Returns:
            [B, out_channels, F, H, W].
        """
        return self.finish(self.begin(x, t, text, self_attend), text, self_attend)

    def embed(self, x: Tensor, t: Tensor, text: TextContext) -> Embedded:
        """What comes before the blocks; arguments as in `forward`."""
        patches, grid = self.patchify(x)
        # A matrix product, not the convolution that it equals: torch 2.13 computes bfloat16 convolutions with a kernel
        # and a stride of 4 wrongly on CPUs with AMX (relative error 1.2).
        weight = self.patch_embedding.weight
        tokens = F.linear(patches, weight.flatten(1), self.patch_embedding.bias)
        time = self.time_embedding(timestep_embedding(t, self.config.freq_dim).to(tokens.dtype))
        runs = len(text.pooled) // len(x)
        time = time + text.pooled.unflatten(0, (-1, runs)).repeat_interleave(time.shape[1] // runs, dim=1)
        modulation = self.time_projection(time).unflatten(-1, (6, -1))
        return Embedded(tokens, time, modulation, grid)

    def begin(self, x: Tensor, t: Tensor, text: TextContext, self_attend: SelfAttend) -> Embedded:
        """`forward` up to and including the last block, so that all keys and values have been passed on."""
        embedded = self.embed(x, t, text)
        tokens = embedded.tokens
        for layer, block in enumerate(self.blocks):
            tokens = block(tokens, embedded.modulation, text.layers[layer], self_attend.at(layer))
        return replace(embedded, tokens=tokens)

    def finish(self, begun: Embedded, text: TextContext, self_attend: SelfAttend) -> Tensor:
        """The flow, from what `begin` returned for the same text."""
        return self.unpatchify(self.head(begun.tokens, begun.time), *begun.grid)

    def commit(self, x: Tensor, t: Tensor, text: TextContext, self_attend: SelfAttend) -> None:
        """Pass the keys and values of x to `self_attend`, as `forward` does, and compute no flow."""
        self.begin(x, t, text, self_attend)

    def refresh(self) -> None:
        """Does nothing: no copies of weights are kept."""

    def prepare(self, cache: object) -> bool:
        """False: nothing is prepared per cache."""
        return False

    def patchify(self, x: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
        """[B, C, F, H, W] -> [B, frames * rows * columns, C * pt * ph * pw] and (frames, rows, columns)."""
        batch, channels, *sizes = x.shape
        frames, rows, columns = (size // step for size, step in zip(sizes, self.config.patch, strict=True))
        pt, ph, pw = self.config.patch
        x = x.reshape(batch, channels, frames, pt, rows, ph, columns, pw)
        return x.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(batch, frames * rows * columns, -1), (frames, rows, columns)

    def unpatchify(self, tokens: Tensor, frames: int, rows: int, columns: int) -> Tensor:
        """[B, F * rows * columns, pt * ph * pw * C] (channel last in a patch) -> [B, C, F * pt, ...]."""
        pt, ph, pw = self.config.patch
        x = tokens.reshape(-1, frames, rows, columns, pt, ph, pw, self.config.out_channels)
        x = x.permute(0, 7, 1, 4, 2, 5, 3, 6)
        return x.reshape(len(x), self.config.out_channels, frames * pt, rows * ph, columns * pw)
