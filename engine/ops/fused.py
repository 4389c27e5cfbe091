"""The passes between the matrix products of a transformer block: references of `engine.ops.triton.fused`.

Each kernel reads and writes memory once. Both forms sum in float32 and round once. Where an 8-bit product follows,
`output_format` says how to quantise the result, which would otherwise take a pass of its own and cost most of what the
format gains.

Shapes: R rows (tokens), D model width, G groups of R / G rows each (frames, each with its own modulation).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.ops.quant import Activation, KVScales, OutputFormat, quantise
from engine.ops.rope import rotate


def _output(x: Tensor, output_format: OutputFormat | None, dtype: torch.dtype) -> Activation:
    return x.to(dtype) if output_format is None else quantise(x, output_format)


def add_norm(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    *,
    y: Tensor | None = None,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    output_format: OutputFormat | None = None,
) -> tuple[Tensor, Activation]:
    """The residual sum x' = x + gate (y + bias), and layer_norm(x') scale + shift.

    Args:
        x: [R, D]; y: [R, D], output of the layer before, or None for nothing.
        scale, shift: [G, D]; gate: [G, D] or None for 1; bias: [D] or None for 0.

    Returns:
        x' [R, D] in x's dtype (x itself without y), and the norm [R, D].
    """
    groups = len(scale)

    def grouped(value: Tensor) -> Tensor:
        return value.float().repeat_interleave(len(x) // len(value), dim=0)

    total = x.float()
    if y is not None:
        added = y.float() if bias is None else y.float() + bias.float()
        total = total + (added if gate is None else added * grouped(gate))
    assert len(x) % groups == 0
    out = F.layer_norm(total, (x.shape[1],), eps=eps) * grouped(scale) + grouped(shift)
    return (x if y is None else total.to(x.dtype)), _output(out, output_format, x.dtype)


def gelu(x: Tensor, bias: Tensor | None, output_format: OutputFormat | None = None) -> Activation:
    """GELU (tanh form) of x + bias: x [R, F], bias [F] or None, result [R, F]."""
    wide = x.float() if bias is None else x.float() + bias.float()
    return _output(F.gelu(wide, approximate="tanh"), output_format, x.dtype)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GELU (tanh form) of x [R, K] times weight [N, K] transposed plus bias [N]: [R, N]."""
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


def rms_norm(x: Tensor, bias: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """RMS norm of x + bias over the whole width, times weight: x [R, D], bias and weight [D], result [R, D]."""
    wide = x.float() if bias is None else x.float() + bias.float()
    return F.rms_norm(wide, (x.shape[-1],), weight.float(), eps).to(x.dtype)


@dataclass(frozen=True)
class QKVProjection:
    """A chunk's joint query, key and value projection, and how queries and keys are normalised and rotated.

    qkv: [B, S, 3 D]; bias: [3 D] or None; norm_q, norm_k: [D], weights of the RMS norms; angles: float32
    [S, head_dim / 2, 2], (cos, sin) of each token's rotation.
    """

    qkv: Tensor
    bias: Tensor | None
    norm_q: Tensor
    norm_k: Tensor
    eps: float
    angles: Tensor

    @property
    def device(self) -> torch.device:
        return self.qkv.device


def qk_norm_rope(projection: QKVProjection, keys: Tensor, values: Tensor, *, raw_keys: Tensor | None = None) -> Tensor:
    """Normalise queries and keys over the whole width, rotate them, and store keys and values.

    Args:
        keys, values: [B, S, heads, head_dim], where rotated keys and values are written: the chunk's slot of a cache.
        raw_keys: of the same shape, where keys are written before rotation (for the sink), or None.

    Returns:
        The rotated queries, [B, S, heads, head_dim].
    """
    q, k, v = _normalised(projection, keys.shape[2:])
    if raw_keys is not None:
        raw_keys.copy_(k)
    keys.copy_(rotate(k, projection.angles))
    values.copy_(v)
    return rotate(q, projection.angles).to(projection.qkv.dtype)


def qk_norm_rope_int8(
    projection: QKVProjection, keys: Tensor, scales: KVScales, *, raw_keys: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`qk_norm_rope` with int8 queries and keys; values are left to `pack_values`.

    Args:
        keys: int8 [B, S, heads, head_dim], where rotated keys are written. `raw_keys` as in `qk_norm_rope`.

    Returns:
        The rotated queries times `scales.key_gain`, int8 [B, S, heads, head_dim], and their scales, one for each
        vector, float32 [B, S, heads].
    """
    q, k, _ = _normalised(projection, keys.shape[2:])
    if raw_keys is not None:
        raw_keys.copy_(k)
    scales.quantise_keys(rotate(k, projection.angles), keys)
    queries = quantise(rotate(q, projection.angles) * scales.key_gain[:, None], "int8")
    return queries.data, queries.scale[..., 0]


def _normalised(projection: QKVProjection, head_shape: Sequence[int]) -> list[Tensor]:
    """Queries, keys and values, float32 [B, S, heads, head_dim], the first two normalised."""
    wide = projection.qkv.float() if projection.bias is None else projection.qkv.float() + projection.bias.float()
    q, k, v = wide.chunk(3, dim=-1)
    weights = (q, projection.norm_q), (k, projection.norm_k)
    q, k = (F.rms_norm(x, (x.shape[-1],), weight.float(), projection.eps) for x, weight in weights)
    return [x.unflatten(-1, head_shape) for x in (q, k, v)]


def store_rotated(x: Tensor, angles: Tensor, out: Tensor, scales: KVScales | None = None) -> None:
    """Write x rotated by angles float32 [S, head_dim / 2, 2] to `out`, both [B, S, heads, head_dim].

    With `scales`, `out` is int8 and x are keys.
    """
    if scales is None:
        out.copy_(rotate(x, angles))
    else:
        scales.quantise_keys(rotate(x, angles), out)
