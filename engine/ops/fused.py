"""What stands between the matrix products of a transformer block, each a single pass over memory on a GPU.

Every function runs its kernel (`engine.ops.triton.fused`) on a GPU and the plain form, below it, elsewhere: the same
sums in float32, rounded once. Where a product in 8 bits follows, `into` names its format, and the scale if that is
fixed, and the result comes quantised: a pass of its own for that would cost most of what the format gains.

Shapes: R rows (tokens), D model width, G groups of R / G rows each (the frames, each with a modulation of its own).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.ops.linear import LARGEST, Into, Rows8, quantise
from engine.ops.rope import rotate

Activation = Tensor | Rows8


def _into(x: Tensor, into: Into | None, dtype: torch.dtype) -> Activation:
    return x.to(dtype) if into is None else quantise(x, into)


def add_norm(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    *,
    y: Tensor | None = None,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    into: Into | None = None,
) -> tuple[Tensor, Activation]:
    """The residual sum x' = x + gate (y + bias), and layer_norm(x') scale + shift.

    Args:
        x: [R, D]; y: [R, D], what the layer before adds, None for nothing.
        scale, shift: [G, D]; gate: [G, D] or None for one; bias: [D] or None for zero.

    Returns:
        x' [R, D] in x's dtype (x itself without y), and the norm [R, D].
    """
    if x.is_cuda:
        from engine.ops.triton import fused

        return fused.add_norm(x, scale, shift, eps, y=y, bias=bias, gate=gate, into=into)
    groups = len(scale)

    def grouped(value: Tensor) -> Tensor:
        return value.float().repeat_interleave(len(x) // len(value), dim=0)

    total = x.float()
    if y is not None:
        added = y.float() if bias is None else y.float() + bias.float()
        total = total + (added if gate is None else added * grouped(gate))
    assert len(x) % groups == 0
    out = F.layer_norm(total, (x.shape[1],), eps=eps) * grouped(scale) + grouped(shift)
    return (x if y is None else total.to(x.dtype)), _into(out, into, x.dtype)


def gelu(x: Tensor, bias: Tensor | None, into: Into | None = None) -> Activation:
    """GELU (tanh form) of x + bias, [R, F]; bias [F]."""
    if x.is_cuda:
        from engine.ops.triton import fused

        return fused.gelu(x, bias, into)
    wide = x.float() if bias is None else x.float() + bias.float()
    return _into(F.gelu(wide, approximate="tanh"), into, x.dtype)


def to_rows8(x: Tensor, into: Into) -> Rows8:
    """`quantise` of [R, D]."""
    if x.is_cuda:
        from engine.ops.triton import fused

        return fused.to_rows8(x, into)
    return quantise(x, into)


def rms_norm(x: Tensor, bias: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """RMS norm of x + bias over the whole width, times weight: [R, D]."""
    if x.is_cuda:
        from engine.ops.triton import fused

        return fused.rms_norm(x, bias, weight, eps)
    wide = x.float() if bias is None else x.float() + bias.float()
    return F.rms_norm(wide, (x.shape[-1],), weight.float(), eps).to(x.dtype)


@dataclass(frozen=True)
class Scales:
    """How keys and values are stored in 8 bits: (k - key_mean) / (key_gain key) in int8, v / value in float8 e4m3.

    The mean of a head's keys is taken off before they are rounded: it adds the same to all scores of a query, which
    softmax does not see, and it takes up range (Zhang et al. 2024, SageAttention, arXiv 2410.02367). What a channel is
    divided by the queries are multiplied by, so that a strong channel does not cost the others their precision (Xiao
    et al. 2022, SmoothQuant, arXiv 2211.10438).

    key_mean, key_gain float32 [B, heads, head_dim] and value float32 [B, heads] are those of a scene; key float32
    [B, P, heads] has a scale for each chunk of a cache, which is found when its keys are written.
    """

    key_mean: Tensor
    key_gain: Tensor
    key: Tensor
    value: Tensor

    def calibrate(self, keys: Tensor, values: Tensor, headroom: float = 16.0) -> None:
        """Set what is a scene's to what keys and values [B, S, heads, head_dim] need, for values with room.

        Later chunks have larger ones, and what is clipped is lost: with half as much again above the first chunk's,
        `mini` went astray within three chunks. Room costs nothing until values fall below 2^-6, since float8 rounds
        in proportion.
        """
        mean = keys.float().mean(dim=1)
        self.key_mean.copy_(mean)
        self.key_gain.copy_((keys.float() - mean[:, None]).abs().amax(dim=1).clamp(min=1e-12))
        largest = values.float().abs().amax(dim=(1, 3))
        self.value.copy_(largest.clamp(min=1e-12) * (headroom / LARGEST["fp8"]))

    def even(self, keys: Tensor) -> Tensor:
        """(k - key_mean) / key_gain of keys [B, S, heads, head_dim], in float32."""
        return (keys.float() - self.key_mean[:, None]) / self.key_gain[:, None]


@dataclass(frozen=True)
class Operands:
    """What 8-bit attention is made of: queries that are done, and keys whose scale must wait for the last of them.

    q int8 [B, S, heads, head_dim], each vector with q_scale float32 [B, S, heads]; keys [B, S, heads, head_dim], even
    but not yet rounded; largest float32 [B, heads, S], their largest magnitudes.
    """

    q: Tensor
    q_scale: Tensor
    keys: Tensor
    largest: Tensor


def heads(
    qkv: Tensor,
    bias: Tensor | None,
    norm_q: Tensor,
    norm_k: Tensor,
    eps: float,
    angles: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    raw_keys: Tensor | None = None,
) -> Tensor:
    """From the joint projection to attention's operands: norm q and k over the width, rotate, store.

    Args:
        qkv: [B, S, 3 D]; bias: [3 D] or None; norm_q, norm_k: [D], the RMS norms' weights.
        angles: float32 [S, head_dim / 2, 2], (cos, sin) of every token's rotation.
        keys, values: [B, S, heads, head_dim], where to write the rotated keys and the values: the chunk's slot of a
            cache. raw_keys: where to write the keys before rotation too (a sink), or None.

    Returns:
        The rotated queries [B, S, heads, head_dim].
    """
    if qkv.is_cuda:
        from engine.ops.triton import fused

        return fused.heads(qkv, bias, norm_q, norm_k, eps, angles, keys, values, raw_keys=raw_keys)
    q, k, v = _normed(qkv, bias, norm_q, norm_k, eps, keys.shape[2:])
    if raw_keys is not None:
        raw_keys.copy_(k)
    keys.copy_(rotate(k, angles))
    values.copy_(v)
    return rotate(q, angles).to(qkv.dtype)


def heads8(
    qkv: Tensor,
    bias: Tensor | None,
    norm_q: Tensor,
    norm_k: Tensor,
    eps: float,
    angles: Tensor,
    scales: Scales,
    *,
    raw_keys: Tensor | None = None,
) -> Operands:
    """`heads` on the way to 8 bits, values left to `pack_values`; `store_keys` rounds the keys."""
    if qkv.is_cuda:
        from engine.ops.triton import fused

        return fused.heads8(qkv, bias, norm_q, norm_k, eps, angles, scales, raw_keys=raw_keys)
    q, k, _ = _normed(qkv, bias, norm_q, norm_k, eps, scales.key_mean.shape[1:])
    if raw_keys is not None:
        raw_keys.copy_(k)
    rows = quantise(rotate(q, angles) * scales.key_gain[:, None], "int8")
    even = scales.even(rotate(k, angles))
    return Operands(rows.data, rows.scale[..., 0], even.to(qkv.dtype), largest(even))


def _normed(
    qkv: Tensor, bias: Tensor | None, norm_q: Tensor, norm_k: Tensor, eps: float, shape: Sequence[int]
) -> list[Tensor]:
    """Queries, keys and values, float32 [B, S, heads, head_dim], the first two normed."""
    wide = qkv.float() if bias is None else qkv.float() + bias.float()
    q, k, v = wide.chunk(3, dim=-1)
    q, k = (F.rms_norm(x, (x.shape[-1],), w.float(), eps) for x, w in ((q, norm_q), (k, norm_k)))
    return [x.unflatten(-1, shape) for x in (q, k, v)]


def largest(keys: Tensor) -> Tensor:
    """The largest magnitude of each vector of [B, S, heads, head_dim], float32 [B, heads, S]."""
    return keys.float().abs().amax(dim=-1).transpose(1, 2).contiguous()


def store_keys(keys: Tensor, largest: Tensor, out: Tensor, scale: Tensor) -> None:
    """Round even keys [B, S, heads, head_dim] to int8 `out`, and write their scale, float32 [B, heads]: what brings
    the `largest` [B, heads, S] of a head to the format's."""
    if keys.is_cuda:
        from engine.ops.triton import fused

        fused.store_keys(keys, largest, out, scale)
        return
    scale.copy_(largest.amax(dim=-1).clamp(min=1e-12) / LARGEST["int8"])
    # keys may have been rounded since their largest was found
    out.copy_((keys.float() / scale[:, None, :, None]).round().clamp(-LARGEST["int8"], LARGEST["int8"]))


def store_turned(x: Tensor, angles: Tensor, out: Tensor, scales: Scales | None = None, part: int = 0) -> None:
    """Write x rotated by angles float32 [S, head_dim / 2, 2] to `out`; both [B, S, heads, head_dim].

    With `scales` in int8, and its scale to `scales.key[:, part]`.
    """
    if x.is_cuda:
        from engine.ops.triton import fused

        fused.store_turned(x, angles, out, scales, part)
        return
    if scales is None:
        out.copy_(rotate(x, angles))
        return
    even = scales.even(rotate(x, angles))
    store_keys(even, largest(even), out, scales.key[:, part])
