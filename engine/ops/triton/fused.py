"""Kernels of `engine.ops.fused`: a program keeps its rows in registers from load to store."""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.ops.fused import QKVProjection
from engine.ops.quant import (
    FORMAT_DTYPE,
    FORMAT_MAX,
    SPARSE_ROWS,
    Activation,
    FixedScale,
    KVScales,
    OutputFormat,
    QuantTensor,
)

ADD_NORM_ROWS = 12
"""The most rows that one program processes."""


def _parts(width: int) -> dict[str, int]:
    """A row as two power-of-two parts: as one part, 5120 would take the registers and the time of 8192."""
    block = max(triton.next_power_of_2(width) // 2, 1)
    return {"BLOCK": block, "REST": triton.next_power_of_2(max(width - block, 1))}


def _rows_per_program(rows: int, limit: int) -> int:
    """The largest divisor of `rows` that is at most `limit`."""
    return next(count for count in range(min(rows, limit), 0, -1) if rows % count == 0)


def _format_constants(output_format: OutputFormat | None) -> dict[str, float]:
    """A kernel's FORMAT: 0 not quantised, 1 and 2 fp8 and int8 with row scales, 3 and 4 the same with a fixed scale."""
    if output_format is None:
        return {"FORMAT": 0, "LARGEST": 0.0}
    fixed = isinstance(output_format, FixedScale)
    name = output_format.format if isinstance(output_format, FixedScale) else output_format
    return {"FORMAT": (1 if name == "fp8" else 2) + (2 if fixed else 0), "LARGEST": FORMAT_MAX[name]}


def _warps(width: int) -> int:
    """The fastest on an H200 at widths 1536, 5120, 8960 and 13824."""
    return 1 if width <= 2048 else 4 if width <= 10240 else 8


@triton.jit
def _scaled(value, factor, FORMAT: tl.constexpr, LARGEST: tl.constexpr):
    """value times factor, clipped and rounded where storing in 8 bits would not do it."""
    scaled = value * factor
    if FORMAT > 2:
        scaled = tl.minimum(tl.maximum(scaled, -LARGEST), LARGEST)
    if FORMAT % 2 == 0:
        scaled = tl.floor(scaled + 0.5)
    return scaled


@triton.jit
def _row_factor(scales, row, largest, FORMAT: tl.constexpr, LARGEST: tl.constexpr):
    """The factor that a row is multiplied by to be stored: the inverse of the fixed scale; or the one that brings the
    row's largest magnitude to the format's, whose inverse is stored as the row's scale."""
    if FORMAT > 2:
        return 1.0 / tl.load(scales)
    else:
        largest = tl.maximum(largest, 1e-12)
        tl.store(scales + row, largest / LARGEST)
        return LARGEST / largest


@triton.jit
def _vector(x, column, within, GIVEN: tl.constexpr):
    """A vector that all rows of a program share, loaded once."""
    if GIVEN:
        return tl.load(x + column, mask=within, other=0.0).to(tl.float32)
    else:
        return tl.zeros(column.shape, tl.float32)


@triton.jit
def _fetched(x, row, width, column, within, GIVEN: tl.constexpr):
    if GIVEN:
        return tl.load(x + row * width + column, mask=within, other=0.0)
    else:
        return tl.zeros(column.shape, tl.float32)


@triton.jit
def _added(
    x, y, bias, gate, total, row, width, column, within, ADD: tl.constexpr, BIAS: tl.constexpr, GATE: tl.constexpr
):  # fmt: skip
    value = x.to(tl.float32)
    if ADD:
        added = y.to(tl.float32)
        if BIAS:
            added += bias
        if GATE:
            added *= gate
        value += added
        tl.store(total + row * width + column, value.to(total.dtype.element_ty), mask=within)
    return value


@triton.jit
def _add_norm(
    x, y, bias, gate, scale, shift, total, out, scales,
    width, group, gate_group, gate_stride, scale_stride, shift_stride, eps,
    ADD: tl.constexpr, BIAS: tl.constexpr, GATE: tl.constexpr, FORMAT: tl.constexpr, LARGEST: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """ROWS rows that share gate, scale and shift, each in two power-of-two parts. The next row is loaded while
    one is processed."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    if GATE:
        gate += (first // gate_group) * gate_stride
    scale += (first // group) * scale_stride
    shift += (first // group) * shift_stride
    column, column_r = tl.arange(0, BLOCK), BLOCK + tl.arange(0, REST)
    within, within_r = column < width, column_r < width
    bias_, bias_r = _vector(bias, column, within, BIAS), _vector(bias, column_r, within_r, BIAS)
    gate_, gate_r = _vector(gate, column, within, GATE), _vector(gate, column_r, within_r, GATE)
    scale_, scale_r = _vector(scale, column, within, True), _vector(scale, column_r, within_r, True)
    shift_, shift_r = _vector(shift, column, within, True), _vector(shift, column_r, within_r, True)
    x_, x_r = _fetched(x, first, width, column, within, True), _fetched(x, first, width, column_r, within_r, True)
    y_, y_r = _fetched(y, first, width, column, within, ADD), _fetched(y, first, width, column_r, within_r, ADD)
    for i in range(ROWS):
        row = first + i
        value = _added(x_, y_, bias_, gate_, total, row, width, column, within, ADD, BIAS, GATE)
        rest = _added(x_r, y_r, bias_r, gate_r, total, row, width, column_r, within_r, ADD, BIAS, GATE)
        more = i + 1 < ROWS
        x_ = _fetched(x, row + 1, width, column, within & more, True)
        x_r = _fetched(x, row + 1, width, column_r, within_r & more, True)
        y_ = _fetched(y, row + 1, width, column, within & more, ADD)
        y_r = _fetched(y, row + 1, width, column_r, within_r & more, ADD)
        mean = (tl.sum(value, axis=0) + tl.sum(rest, axis=0)) / width
        value = tl.where(within, value - mean, 0.0)
        rest = tl.where(within_r, rest - mean, 0.0)
        inverse = 1.0 / tl.sqrt((tl.sum(value * value, axis=0) + tl.sum(rest * rest, axis=0)) / width + eps)
        value = value * inverse * scale_ + shift_
        rest = rest * inverse * scale_r + shift_r
        _write_row(out, scales, row, width, value, column, within, rest, column_r, within_r, FORMAT, LARGEST)


@triton.jit
def _write_row(
    out, scales, row, width, value, column, within, rest, column_r, within_r,
    FORMAT: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """Store both parts of a row, which are 0 past its end, quantised or not."""
    if FORMAT != 0:
        largest = tl.maximum(tl.max(tl.abs(value), axis=0), tl.max(tl.abs(rest), axis=0))
        factor = _row_factor(scales, row, largest, FORMAT, LARGEST)
        value = _scaled(value, factor, FORMAT, LARGEST)
        rest = _scaled(rest, factor, FORMAT, LARGEST)
    tl.store(out + row * width + column, value.to(out.dtype.element_ty), mask=within)
    tl.store(out + row * width + column_r, rest.to(out.dtype.element_ty), mask=within_r)


@triton.jit
def _activated(
    x, bias, row, width, column, within, BIAS: tl.constexpr, GELU: tl.constexpr, APPROXIMATE: tl.constexpr
):  # fmt: skip
    value = tl.load(x + row * width + column, mask=within, other=0.0).to(tl.float32)
    if BIAS:
        value += tl.load(bias + column, mask=within, other=0.0).to(tl.float32)
    if GELU:
        u = 0.7978845608028654 * (value + 0.044715 * value * value * value)
        if APPROXIMATE:
            # one instruction, accurate to 2^-11: finer than the rounding of the result
            bent = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [u], tl.float32, is_pure=True, pack=1)
        else:
            bent = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * u))
        value = 0.5 * value * (1.0 + bent)
    return value


@triton.jit
def _gelu(
    x, bias, out, scales, width,
    BIAS: tl.constexpr, GELU: tl.constexpr, APPROXIMATE: tl.constexpr, FORMAT: tl.constexpr, LARGEST: tl.constexpr,
    BLOCK: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column, column_r = tl.arange(0, BLOCK), BLOCK + tl.arange(0, REST)
    within, within_r = column < width, column_r < width
    value = _activated(x, bias, row, width, column, within, BIAS, GELU, APPROXIMATE)
    rest = _activated(x, bias, row, width, column_r, within_r, BIAS, GELU, APPROXIMATE)
    _write_row(out, scales, row, width, value, column, within, rest, column_r, within_r, FORMAT, LARGEST)


@triton.jit
def _rms_norm(x, bias, weight, out, width, eps, BIAS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    mask = at < width
    value = tl.load(x + row * width + at, mask=mask, other=0.0).to(tl.float32)
    if BIAS:
        value += tl.load(bias + at, mask=mask, other=0.0).to(tl.float32)
    value *= 1.0 / tl.sqrt(tl.sum(value * value, axis=0) / width + eps)
    value *= tl.load(weight + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * width + at, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _rotated(x, angles, token, HEADS: tl.constexpr, PAIRS: tl.constexpr):
    """Adjacent pairs of [HEADS, 2 PAIRS] rotated by the token's angles."""
    pair = angles + token * 2 * PAIRS + 2 * tl.arange(0, PAIRS)
    c, s = tl.load(pair)[None, :], tl.load(pair + 1)[None, :]
    even, odd = tl.split(tl.reshape(x, (HEADS, PAIRS, 2)))
    return tl.reshape(tl.join(even * c - odd * s, even * s + odd * c), (HEADS, 2 * PAIRS))


@triton.jit
def _int8_keys(k, mean, gain, batch, at, mask, COUNT: tl.constexpr, SIZE: tl.constexpr):
    """Keys of one token, quantised by `KVScales` but still in float32."""
    k -= tl.load(mean + batch * COUNT * SIZE + at, mask=mask, other=0.0)
    k = tl.floor(k / tl.load(gain + batch * COUNT * SIZE + at, mask=mask, other=1.0) + 0.5)
    return tl.minimum(tl.maximum(k, -127.0), 127.0)


@triton.jit
def _normalised(
    x, bias, norm, width, eps, at, at_r, mask, mask_r, BIAS: tl.constexpr
):  # fmt: skip
    """Both parts of a token's heads, divided by their root mean square over all of them and weighted."""
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    rest = tl.load(x + at_r, mask=mask_r, other=0.0).to(tl.float32)
    if BIAS:
        value += tl.load(bias + at, mask=mask, other=0.0).to(tl.float32)
        rest += tl.load(bias + at_r, mask=mask_r, other=0.0).to(tl.float32)
    squares = tl.sum(tl.sum(value * value, axis=1), axis=0) + tl.sum(tl.sum(rest * rest, axis=1), axis=0)
    inverse = 1.0 / tl.sqrt(squares / width + eps)
    value *= inverse * tl.load(norm + at, mask=mask, other=0.0).to(tl.float32)
    rest *= inverse * tl.load(norm + at_r, mask=mask_r, other=0.0).to(tl.float32)
    return value, rest


@triton.jit
def _store_queries(
    q, queries, query_scales, gain, row, width, batch, head, at, mask, EIGHT: tl.constexpr, COUNT: tl.constexpr
):  # fmt: skip
    if EIGHT:
        q *= tl.load(gain + batch * width + at, mask=mask, other=0.0)
        largest = tl.maximum(tl.max(tl.abs(q), axis=1), 1e-12)
        q = tl.floor(q * (127.0 / largest)[:, None] + 0.5)
        tl.store(query_scales + row * COUNT + head, largest / 127.0, mask=head < COUNT)
    tl.store(queries + row * width + at, q.to(queries.dtype.element_ty), mask=mask)


@triton.jit
def _store_keys(
    k, keys, raw, angles, token, key_mean, key_gain, batch, at, mask,
    RAW: tl.constexpr, EIGHT: tl.constexpr, COUNT: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    if RAW:
        tl.store(raw + at, k.to(raw.dtype.element_ty), mask=mask)
    k = _rotated(k, angles, token, HEADS, PAIRS)
    if EIGHT:
        k = _int8_keys(k, key_mean, key_gain, batch, at, mask, COUNT, 2 * PAIRS)
    tl.store(keys + at, k.to(keys.dtype.element_ty), mask=mask)


@triton.jit
def _store_values(x, bias, values, at, mask, BIAS: tl.constexpr):
    v = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    if BIAS:
        v += tl.load(bias + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(values + at, v.to(values.dtype.element_ty), mask=mask)


@triton.jit
def _qk_norm_rope(
    qkv, bias, norm_q, norm_k, angles, queries, query_scales, keys, values, raw, key_mean, key_gain,
    tokens, width, eps, key_batch, key_token, value_batch, value_token, raw_batch, raw_token,
    BIAS: tl.constexpr, RAW: tl.constexpr, EIGHT: tl.constexpr, COUNT: tl.constexpr, HEADS: tl.constexpr,
    REST: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """One token: COUNT heads of 2 PAIRS, in two parts of HEADS and REST heads, each a power of two. In 8 bits (EIGHT)
    values are not stored."""
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // tokens, row % tokens
    size: tl.constexpr = 2 * PAIRS
    head, head_r = tl.arange(0, HEADS), HEADS + tl.arange(0, REST)
    at = head[:, None] * size + tl.arange(0, size)[None, :]
    at_r = head_r[:, None] * size + tl.arange(0, size)[None, :]
    mask, mask_r = (head < COUNT)[:, None], (head_r < COUNT)[:, None]
    base = qkv + row * 3 * width

    q, q_r = _normalised(base, bias, norm_q, width, eps, at, at_r, mask, mask_r, BIAS)
    q = _rotated(q, angles, token, HEADS, PAIRS)
    q_r = _rotated(q_r, angles, token, REST, PAIRS)
    _store_queries(q, queries, query_scales, key_gain, row, width, batch, head, at, mask, EIGHT, COUNT)
    _store_queries(q_r, queries, query_scales, key_gain, row, width, batch, head_r, at_r, mask_r, EIGHT, COUNT)

    bias_k, bias_v = bias, bias
    if BIAS:
        bias_k, bias_v = bias + width, bias + 2 * width
    if RAW:
        raw += batch * raw_batch + token * raw_token
    k, k_r = _normalised(base + width, bias_k, norm_k, width, eps, at, at_r, mask, mask_r, BIAS)
    keys += batch * key_batch + token * key_token
    _store_keys(
        k, keys, raw, angles, token, key_mean, key_gain, batch, at, mask,
        RAW, EIGHT, COUNT, HEADS, PAIRS,
    )  # fmt: skip
    _store_keys(
        k_r, keys, raw, angles, token, key_mean, key_gain, batch, at_r, mask_r,
        RAW, EIGHT, COUNT, REST, PAIRS,
    )  # fmt: skip
    if not EIGHT:
        values += batch * value_batch + token * value_token
        _store_values(base + 2 * width, bias_v, values, at, mask, BIAS)
        _store_values(base + 2 * width, bias_v, values, at_r, mask_r, BIAS)


@triton.jit
def _store_rotated(
    x, angles, out, mean, gain, x_batch, x_token, out_batch, out_token,
    EIGHT: tl.constexpr, COUNT: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    token, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    size: tl.constexpr = 2 * PAIRS
    head = tl.arange(0, HEADS)
    at = head[:, None] * size + tl.arange(0, size)[None, :]
    mask = (head < COUNT)[:, None]
    k = tl.load(x + batch * x_batch + token * x_token + at, mask=mask, other=0.0).to(tl.float32)
    k = _rotated(k, angles, token, HEADS, PAIRS)
    if EIGHT:
        k = _int8_keys(k, mean, gain, batch, at, mask, COUNT, size)
    tl.store(out + batch * out_batch + token * out_token + at, k.to(out.dtype.element_ty), mask=mask)


def _empty(x: Tensor, output_format: OutputFormat | None) -> tuple[Tensor, Tensor]:
    """Memory for a result like x [R, D] in the output format, and for its scales, or the fixed scale.

    8-bit results are allocated with as many rows as sparse products read, so that `pad_rows` need not copy.
    """
    if output_format is None:
        return torch.empty_like(x), torch.empty(0, device=x.device)
    name = output_format.format if isinstance(output_format, FixedScale) else output_format
    rows = -(-len(x) // SPARSE_ROWS) * SPARSE_ROWS
    out = torch.empty(rows, x.shape[1], dtype=FORMAT_DTYPE[name], device=x.device)[: len(x)]
    scales = output_format.scale if isinstance(output_format, FixedScale) else torch.empty(len(x), 1, device=x.device)
    return out, scales


def _activation(out: Tensor, scales: Tensor, output_format: OutputFormat | None) -> Activation:
    return out if output_format is None else QuantTensor(out, scales)


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
    """See `engine.ops.fused.add_norm`. x and y are contiguous."""
    rows, width = x.shape
    out, scales = _empty(x, output_format)
    total = x if y is None else torch.empty_like(x)
    assert x.is_contiguous() and (y is None or y.is_contiguous()) and scale.stride(1) == shift.stride(1) == 1
    group, gate_group = rows // len(scale), rows if gate is None else rows // len(gate)
    share = _rows_per_program(math.gcd(group, gate_group), ADD_NORM_ROWS)
    _add_norm[(rows // share,)](
        x, y, bias, gate, scale, shift, total, out, scales,
        width, group, gate_group, 0 if gate is None else gate.stride(0),
        scale.stride(0), shift.stride(0), eps,
        ADD=y is not None, BIAS=bias is not None, GATE=gate is not None, **_format_constants(output_format),
        ROWS=share, **_parts(width), num_warps=4,
    )  # fmt: skip
    return total, _activation(out, scales, output_format)


def _pointwise(x: Tensor, bias: Tensor | None, output_format: OutputFormat | None, *, activate: bool) -> Activation:
    rows, width = x.shape
    out, scales = _empty(x, output_format)
    assert x.is_contiguous()
    _gelu[(rows,)](
        x, bias, out, scales, width, BIAS=bias is not None, GELU=activate,
        APPROXIMATE=not triton.knobs.runtime.interpret and x.dtype != torch.float32, **_format_constants(output_format),
        **_parts(width), num_warps=_warps(width),
    )  # fmt: skip
    return _activation(out, scales, output_format)


def gelu(x: Tensor, bias: Tensor | None, output_format: OutputFormat | None = None) -> Activation:
    """See `engine.ops.fused.gelu`. x is contiguous."""
    return _pointwise(x, bias, output_format, activate=True)


def quantise(x: Tensor, to: OutputFormat) -> QuantTensor:
    """See `engine.ops.quant.quantise`. x is contiguous [R, D]; a fixed scale has one element."""
    out = _pointwise(x, None, to, activate=False)
    assert isinstance(out, QuantTensor)
    return out


def rms_norm(x: Tensor, bias: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """See `engine.ops.fused.rms_norm`. x is contiguous."""
    rows, width = x.shape
    out = torch.empty_like(x)
    assert x.is_contiguous()
    _rms_norm[(rows,)](
        x, bias, weight, out, width, eps, BIAS=bias is not None, BLOCK=triton.next_power_of_2(width),
        num_warps=_warps(width),
    )  # fmt: skip
    return out


def _key_scales(scales: KVScales | None) -> tuple[Any, Any]:
    if scales is None:
        return None, None
    assert scales.key_mean.is_contiguous() and scales.key_gain.is_contiguous()
    return scales.key_mean, scales.key_gain


def _launch_qk_norm_rope(
    projection: QKVProjection,
    queries: Tensor,
    keys: Tensor,
    values: Tensor | None,
    raw_keys: Tensor | None,
    int8: tuple[Tensor, KVScales] | None,
) -> None:
    """`int8`: where the scales of the queries are written, and the scales of the keys; None for no quantisation."""
    batch, tokens, count, size = keys.shape
    for x in (keys, values, raw_keys):
        assert x is None or (x.stride(3) == 1 and x.stride(2) == size)
    assert projection.qkv.is_contiguous() and projection.angles.is_contiguous()
    query_scales, scales = int8 or (None, None)
    mean, gain = _key_scales(scales)
    strides = [(0, 0) if x is None else (x.stride(0), x.stride(1)) for x in (keys, values, raw_keys)]
    _qk_norm_rope[(batch * tokens,)](
        projection.qkv, projection.bias, projection.norm_q, projection.norm_k, projection.angles,
        queries, query_scales, keys, values, raw_keys, mean, gain,
        tokens, count * size, projection.eps, *(stride for pair in strides for stride in pair),
        BIAS=projection.bias is not None, RAW=raw_keys is not None, EIGHT=int8 is not None, COUNT=count,
        HEADS=_parts(count)["BLOCK"], REST=_parts(count)["REST"], PAIRS=size // 2, num_warps=_warps(count * size),
    )  # fmt: skip


def qk_norm_rope(projection: QKVProjection, keys: Tensor, values: Tensor, *, raw_keys: Tensor | None = None) -> Tensor:
    """See `engine.ops.fused.qk_norm_rope`."""
    queries = torch.empty(keys.shape, dtype=projection.qkv.dtype, device=projection.qkv.device)
    _launch_qk_norm_rope(projection, queries, keys, values, raw_keys, None)
    return queries


def qk_norm_rope_int8(
    projection: QKVProjection, keys: Tensor, scales: KVScales, *, raw_keys: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See `engine.ops.fused.qk_norm_rope_int8`."""
    queries = torch.empty(keys.shape, dtype=FORMAT_DTYPE["int8"], device=projection.qkv.device)
    query_scales = torch.empty(keys.shape[:3], device=projection.qkv.device)
    _launch_qk_norm_rope(projection, queries, keys, None, raw_keys, (query_scales, scales))
    return queries, query_scales


def store_rotated(x: Tensor, angles: Tensor, out: Tensor, scales: KVScales | None = None) -> None:
    """See `engine.ops.fused.store_rotated`."""
    batch, tokens, count, size = x.shape
    for part in (x, out):
        assert part.stride(3) == 1 and part.stride(2) == size
    assert angles.is_contiguous()
    _store_rotated[(tokens, batch)](
        x, angles, out, *_key_scales(scales), x.stride(0), x.stride(1), out.stride(0), out.stride(1),
        EIGHT=scales is not None, COUNT=count, HEADS=triton.next_power_of_2(count), PAIRS=size // 2,
        num_warps=_warps(count * size),
    )  # fmt: skip
