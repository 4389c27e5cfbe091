"""What stands between the matrix products of a transformer block, each a single pass over memory on a GPU.

Every function runs its kernel (`engine.ops.triton.fused`) on a GPU and the plain form, below it, elsewhere: the same
sums in float32, rounded once. Where a product in 8 bits follows, `into` names its format, and the scale if that is
fixed, and the result comes quantised: a pass of its own for that would cost most of what the format gains.

Shapes: R rows (tokens), D model width, G groups of R / G rows each (the frames, each with a modulation of its own).
"""

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
    """How keys and values are stored in float8: (k - key_mean) / key, v / value.

    The mean of a head's keys is taken off before they are rounded: it adds the same to all scores of a query, which
    softmax does not see, and it takes up range (Zhang et al. 2024, SageAttention, arXiv 2410.02367).
    key_mean float32 [B, heads, head_dim]; key, value float32 [B, heads].
    """

    key_mean: Tensor
    key: Tensor
    value: Tensor

    def calibrate(self, keys: Tensor, values: Tensor, headroom: float = 16.0) -> None:
        """Set to what keys and values [B, S, heads, head_dim] need, and much more.

        Later chunks have larger ones, and what is clipped is lost: with half as much again above the first chunk's,
        `mini` went astray within three chunks. Room costs nothing until values fall below 2^-6, since float8 rounds
        in proportion.
        """
        mean = keys.float().mean(dim=1)
        self.key_mean.copy_(mean)
        for scale, largest in (
            (self.key, (keys.float() - mean[:, None]).abs().amax(dim=(1, 3))),
            (self.value, values.float().abs().amax(dim=(1, 3))),
        ):
            scale.copy_(largest.clamp(min=1e-12) * (headroom / LARGEST["fp8"]))


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
    scales: Scales | None = None,
) -> tuple[Tensor, Tensor | None]:
    """From the joint projection to attention's operands: norm q and k over the width, rotate, store.

    Args:
        qkv: [B, S, 3 D]; bias: [3 D] or None; norm_q, norm_k: [D], the RMS norms' weights.
        angles: float32 [S, head_dim / 2, 2], (cos, sin) of every token's rotation.
        keys, values: [B, S, heads, head_dim], where to write the rotated keys and the values: the chunk's slot of a
            cache. raw_keys: where to write the keys before rotation too (a sink), or None.
        scales: how to store where `keys` and `values` are float8.

    Returns:
        The rotated queries [B, S, heads, head_dim]; with `scales` in float8, each vector with a scale of its own,
        float32 [B, S, heads].
    """
    if qkv.is_cuda:
        from engine.ops.triton import fused

        return fused.heads(qkv, bias, norm_q, norm_k, eps, angles, keys, values, raw_keys=raw_keys, scales=scales)
    wide = qkv.float() if bias is None else qkv.float() + bias.float()
    shape = keys.shape[2:]
    q, k, v = wide.chunk(3, dim=-1)
    q, k = (F.rms_norm(x, (x.shape[-1],), w.float(), eps) for x, w in ((q, norm_q), (k, norm_k)))
    q, k, v = (x.unflatten(-1, shape) for x in (q, k, v))
    if raw_keys is not None:
        raw_keys.copy_(k)
    store(rotate(k, angles), keys, None if scales is None else scales.key, None if scales is None else scales.key_mean)
    store(v, values, None if scales is None else scales.value)
    if scales is None:
        return rotate(q, angles).to(qkv.dtype), None
    rows = quantise(rotate(q, angles), "fp8")
    return rows.data, rows.scale[..., 0]


def store(x: Tensor, out: Tensor, scale: Tensor | None, mean: Tensor | None = None) -> None:
    """Write x to `out`, both [B, S, heads, head_dim]; in float8 as (x - mean) / scale, clamped to its range."""
    if scale is None:
        out.copy_(x)
        return
    wide = x.float() if mean is None else x.float() - mean[:, None]
    out.copy_((wide / scale[:, None, :, None]).clamp(-LARGEST["fp8"], LARGEST["fp8"]).to(out.dtype))


def store_turned(
    x: Tensor, angles: Tensor, out: Tensor, scale: Tensor | None = None, mean: Tensor | None = None
) -> None:
    """`store` of x rotated by angles float32 [S, head_dim / 2, 2]; all of [B, S, heads, head_dim]."""
    if x.is_cuda:
        from engine.ops.triton import fused

        fused.store_turned(x, angles, out, scale, mean)
        return
    store(rotate(x, angles), out, scale, mean)
