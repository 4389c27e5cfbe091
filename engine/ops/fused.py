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

from engine.ops.linear import LARGEST, OutputFormat, QuantTensor, quantise
from engine.ops.rope import axis_pairs, rotate

Activation = Tensor | QuantTensor


def _into(x: Tensor, into: OutputFormat | None, dtype: torch.dtype) -> Activation:
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
    into: OutputFormat | None = None,
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


def gelu(x: Tensor, bias: Tensor | None, into: OutputFormat | None = None) -> Activation:
    """GELU (tanh form) of x + bias, [R, F]; bias [F]."""
    if x.is_cuda:
        from engine.ops.triton import fused

        return fused.gelu(x, bias, into)
    wide = x.float() if bias is None else x.float() + bias.float()
    return _into(F.gelu(wide, approximate="tanh"), into, x.dtype)


def to_rows8(x: Tensor, into: OutputFormat) -> QuantTensor:
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


KEY_ROOM = 1.5
"""By how much keys may outgrow those of a scene's first chunk before they are clipped."""
VALUE_ROOM = 16.0


@dataclass(frozen=True)
class Scales:
    """How a scene's keys and values are stored in 8 bits: (k - key_mean) / key_gain in int8, v / value in float8 e4m3.

    The mean of a head's keys is taken off before they are rounded: it adds the same to all scores of a query, which
    softmax does not see, and it takes up range (Zhang et al. 2024, SageAttention, arXiv 2410.02367). What a channel is
    divided by the queries are multiplied by, so that a strong channel does not cost the others their precision (Xiao
    et al. 2022, SmoothQuant, arXiv 2211.10438).

    Both are of rotated keys, and must hold for all later ones. So channels that turn with time keep their mean, which
    turns with them, and the two channels that turn into each other have one gain.

    key_mean, key_gain float32 [B, heads, head_dim]; value float32 [B, heads].
    """

    key_mean: Tensor
    key_gain: Tensor
    value: Tensor

    def calibrate(self, keys: Tensor, values: Tensor) -> None:
        """Set to what rotated keys and values [B, S, heads, head_dim] need, and more, since later ones are larger.

        Room costs values nothing until they fall below 2^-6, since float8 rounds in proportion. It costs keys a bit for
        every doubling.
        """
        keys = keys.float()
        mean = keys.mean(dim=1)
        mean[..., : 2 * axis_pairs(keys.shape[-1])[0]] = 0
        pairs = (keys - mean[:, None]).unflatten(-1, (-1, 2)).norm(dim=-1).amax(dim=1)
        self.key_mean.copy_(mean)
        self.key_gain.copy_(pairs.clamp(min=1e-12).repeat_interleave(2, dim=-1) * (KEY_ROOM / LARGEST["int8"]))
        largest = values.float().abs().amax(dim=(1, 3))
        self.value.copy_(largest.clamp(min=1e-12) * (VALUE_ROOM / LARGEST["fp8"]))

    def store_keys(self, keys: Tensor, out: Tensor) -> None:
        """Write rotated keys to int8 `out`, both [B, S, heads, head_dim]."""
        even = (keys.float() - self.key_mean[:, None]) / self.key_gain[:, None]
        out.copy_(even.round().clamp(-LARGEST["int8"], LARGEST["int8"]))


@dataclass(frozen=True)
class Projected:
    """What attention's operands are made of: a chunk's joint projection, and how it is normed and turned.

    qkv [B, S, 3 D]; bias [3 D] or None; norm_q, norm_k [D], the RMS norms' weights; angles float32
    [S, head_dim / 2, 2], (cos, sin) of every token's rotation.
    """

    qkv: Tensor
    bias: Tensor | None
    norm_q: Tensor
    norm_k: Tensor
    eps: float
    angles: Tensor


def heads(
    made: Projected,
    keys: Tensor,
    values: Tensor,
    *,
    raw_keys: Tensor | None = None,
) -> Tensor:
    """From the joint projection to attention's operands: norm q and k over the width, rotate, store.

    Args:
        keys, values: [B, S, heads, head_dim], where to write the rotated keys and the values: the chunk's slot of a
            cache. raw_keys: where to write the keys before rotation too (a sink), or None.

    Returns:
        The rotated queries [B, S, heads, head_dim].
    """
    if made.qkv.is_cuda:
        from engine.ops.triton import fused

        return fused.heads(made, keys, values, raw_keys=raw_keys)
    q, k, v = _normed(made, keys.shape[2:])
    if raw_keys is not None:
        raw_keys.copy_(k)
    keys.copy_(rotate(k, made.angles))
    values.copy_(v)
    return rotate(q, made.angles).to(made.qkv.dtype)


def heads8(
    made: Projected,
    keys: Tensor,
    scales: Scales,
    *,
    raw_keys: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`heads` in 8 bits; values are left to `pack_values`.

    Args:
        keys: int8 [B, S, heads, head_dim], where to write; the others as in `heads`.

    Returns:
        The rotated queries times `scales.key_gain`, int8 [B, S, heads, head_dim], each vector with a scale of its own,
        float32 [B, S, heads].
    """
    if made.qkv.is_cuda:
        from engine.ops.triton import fused

        return fused.heads8(made, keys, scales, raw_keys=raw_keys)
    q, k, _ = _normed(made, keys.shape[2:])
    if raw_keys is not None:
        raw_keys.copy_(k)
    scales.store_keys(rotate(k, made.angles), keys)
    rows = quantise(rotate(q, made.angles) * scales.key_gain[:, None], "int8")
    return rows.data, rows.scale[..., 0]


def _normed(made: Projected, shape: Sequence[int]) -> list[Tensor]:
    """Queries, keys and values, float32 [B, S, heads, head_dim], the first two normed."""
    wide = made.qkv.float() if made.bias is None else made.qkv.float() + made.bias.float()
    q, k, v = wide.chunk(3, dim=-1)
    q, k = (F.rms_norm(x, (x.shape[-1],), w.float(), made.eps) for x, w in ((q, made.norm_q), (k, made.norm_k)))
    return [x.unflatten(-1, shape) for x in (q, k, v)]


def store_turned(x: Tensor, angles: Tensor, out: Tensor, scales: Scales | None = None) -> None:
    """Write x rotated by angles float32 [S, head_dim / 2, 2] to `out`; both [B, S, heads, head_dim]. With `scales` in
    int8."""
    if x.is_cuda:
        from engine.ops.triton import fused

        fused.store_turned(x, angles, out, scales)
    elif scales is None:
        out.copy_(rotate(x, angles))
    else:
        scales.store_keys(rotate(x, angles), out)
