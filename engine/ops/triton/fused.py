"""The passes of `engine.ops.fused` as Triton kernels: one program a row, which is in registers from load to store."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.ops.fused import Activation, Scales
from engine.ops.linear import LARGEST, STORED, Fixed, Into, Rows8
from engine.ops.sparse import UNIT


def _form(into: Into | None) -> dict[str, float]:
    """For a kernel: 0 is as it is, 1 and 2 are fp8 and int8 with a scale a row, 3 and 4 the same with a fixed one."""
    if into is None:
        return {"FORMAT": 0, "LARGEST": 0.0}
    fixed = isinstance(into, Fixed)
    name = into.format if isinstance(into, Fixed) else into
    return {"FORMAT": (1 if name == "fp8" else 2) + (2 if fixed else 0), "LARGEST": LARGEST[name]}


def _warps(width: int) -> int:
    return 4 if width <= 2048 else 8 if width <= 8192 else 16


@triton.jit
def _fitted(value, factor, FORMAT: tl.constexpr, LARGEST: tl.constexpr):
    """value times factor, ready to be stored in 8 bits."""
    scaled = value * factor
    if FORMAT > 2:
        scaled = tl.minimum(tl.maximum(scaled, -LARGEST), LARGEST)
    if FORMAT % 2 == 0:
        scaled = tl.floor(scaled + 0.5)
    return scaled


@triton.jit
def _write_row(out, scales, row, width, at, mask, value, FORMAT: tl.constexpr, LARGEST: tl.constexpr):
    """One row as it is, or in 8 bits: with the scale that brings its largest magnitude to the format's, or the one
    that is there."""
    if FORMAT == 0:
        tl.store(out + row * width + at, value.to(out.dtype.element_ty), mask=mask)
    else:
        if FORMAT > 2:
            factor = 1.0 / tl.load(scales)
        else:
            largest = tl.maximum(tl.max(tl.where(mask, tl.abs(value), 0.0), axis=0), 1e-12)
            factor = LARGEST / largest
            tl.store(scales + row, largest / LARGEST)
        scaled = _fitted(value, factor, FORMAT, LARGEST)
        tl.store(out + row * width + at, scaled.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _add_norm(
    x, y, bias, gate, scale, shift, total, out, scales,
    width, group, gate_group, gate_stride, scale_stride, shift_stride, eps,
    ADD: tl.constexpr, BIAS: tl.constexpr, GATE: tl.constexpr, FORMAT: tl.constexpr, LARGEST: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    mask = at < width
    value = tl.load(x + row * width + at, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        added = tl.load(y + row * width + at, mask=mask, other=0.0).to(tl.float32)
        if BIAS:
            added += tl.load(bias + at, mask=mask, other=0.0).to(tl.float32)
        if GATE:
            added *= tl.load(gate + (row // gate_group) * gate_stride + at, mask=mask, other=0.0).to(tl.float32)
        value += added
        tl.store(total + row * width + at, value.to(total.dtype.element_ty), mask=mask)
    mean = tl.sum(value, axis=0) / width
    centred = tl.where(mask, value - mean, 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / width + eps)
    a = tl.load(scale + (row // group) * scale_stride + at, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(shift + (row // group) * shift_stride + at, mask=mask, other=0.0).to(tl.float32)
    _write_row(out, scales, row, width, at, mask, centred * inverse * a + b, FORMAT, LARGEST)


@triton.jit
def _activated(x, bias, at, mask, BIAS: tl.constexpr, GELU: tl.constexpr, APPROXIMATE: tl.constexpr):
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    if BIAS:
        value += tl.load(bias + at, mask=mask, other=0.0).to(tl.float32)
    if GELU:
        u = 0.7978845608028654 * (value + 0.044715 * value * value * value)
        if APPROXIMATE:
            # one instruction, right to 2^-11: finer than what the result is rounded to
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
    """A row in two parts, each a power of two wide: 8960 would else take the registers and the time of 16384."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    mask = at < width
    value = _activated(x + row * width, bias, at, mask, BIAS, GELU, APPROXIMATE)
    if REST == 0:
        _write_row(out, scales, row, width, at, mask, value, FORMAT, LARGEST)
    else:
        at_rest = BLOCK + tl.arange(0, REST)
        mask_rest = at_rest < width
        rest = _activated(x + row * width, bias, at_rest, mask_rest, BIAS, GELU, APPROXIMATE)
        if FORMAT != 0:
            if FORMAT > 2:
                factor = 1.0 / tl.load(scales)
            else:
                largest = tl.maximum(tl.max(tl.abs(value), axis=0), tl.max(tl.abs(rest), axis=0))
                largest = tl.maximum(largest, 1e-12)
                factor = LARGEST / largest
                tl.store(scales + row, largest / LARGEST)
            value = _fitted(value, factor, FORMAT, LARGEST)
            rest = _fitted(rest, factor, FORMAT, LARGEST)
        tl.store(out + row * width + at, value.to(out.dtype.element_ty))
        tl.store(out + row * width + at_rest, rest.to(out.dtype.element_ty), mask=mask_rest)


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
    """Adjacent pairs of [HEADS, 2 PAIRS] turned by the token's angles."""
    pair = angles + token * 2 * PAIRS + 2 * tl.arange(0, PAIRS)
    c, s = tl.load(pair)[None, :], tl.load(pair + 1)[None, :]
    even, odd = tl.split(tl.reshape(x, (HEADS, PAIRS, 2)))
    return tl.reshape(tl.join(even * c - odd * s, even * s + odd * c), (HEADS, 2 * PAIRS))


@triton.jit
def _rounded_keys(k, mean, scale, batch, head, at, mask, COUNT: tl.constexpr, SIZE: tl.constexpr):
    """Keys of one token as `Scales` says that they are stored."""
    k -= tl.load(mean + batch * COUNT * SIZE + at, mask=mask, other=0.0)
    k /= tl.load(scale + batch * COUNT + head, mask=head < COUNT, other=1.0)[:, None]
    return tl.minimum(tl.maximum(k, -448.0), 448.0)


@triton.jit
def _heads(
    qkv, bias, norm_q, norm_k, angles, queries, query_scales, keys, values, raw, key_mean, key_scale, value_scale,
    tokens, width, eps, key_batch, key_token, value_batch, value_token, raw_batch, raw_token,
    BIAS: tl.constexpr, RAW: tl.constexpr, FP8: tl.constexpr, COUNT: tl.constexpr, HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
):  # fmt: skip
    """One token: COUNT heads of 2 PAIRS, laid out in HEADS, the next power of two."""
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // tokens, row % tokens
    size: tl.constexpr = 2 * PAIRS
    head = tl.arange(0, HEADS)
    at = head[:, None] * size + tl.arange(0, size)[None, :]
    mask = (head < COUNT)[:, None]
    base = qkv + row * 3 * width

    q = tl.load(base + at, mask=mask, other=0.0).to(tl.float32)
    if BIAS:
        q += tl.load(bias + at, mask=mask, other=0.0).to(tl.float32)
    q *= 1.0 / tl.sqrt(tl.sum(tl.sum(q * q, axis=1), axis=0) / width + eps)
    q *= tl.load(norm_q + at, mask=mask, other=0.0).to(tl.float32)
    q = _rotated(q, angles, token, HEADS, PAIRS)
    if FP8:
        largest = tl.maximum(tl.max(tl.abs(q), axis=1), 1e-12)
        tl.store(queries + row * width + at, (q * (448.0 / largest)[:, None]).to(tl.float8e4nv), mask=mask)
        tl.store(query_scales + row * COUNT + head, largest / 448.0, mask=head < COUNT)
    else:
        tl.store(queries + row * width + at, q.to(queries.dtype.element_ty), mask=mask)

    k = tl.load(base + width + at, mask=mask, other=0.0).to(tl.float32)
    if BIAS:
        k += tl.load(bias + width + at, mask=mask, other=0.0).to(tl.float32)
    k *= 1.0 / tl.sqrt(tl.sum(tl.sum(k * k, axis=1), axis=0) / width + eps)
    k *= tl.load(norm_k + at, mask=mask, other=0.0).to(tl.float32)
    if RAW:
        tl.store(raw + batch * raw_batch + token * raw_token + at, k.to(raw.dtype.element_ty), mask=mask)
    k = _rotated(k, angles, token, HEADS, PAIRS)
    v = tl.load(base + 2 * width + at, mask=mask, other=0.0).to(tl.float32)
    if BIAS:
        v += tl.load(bias + 2 * width + at, mask=mask, other=0.0).to(tl.float32)
    if FP8:
        k = _rounded_keys(k, key_mean, key_scale, batch, head, at, mask, COUNT, size)
        v /= tl.load(value_scale + batch * COUNT + head, mask=head < COUNT, other=1.0)[:, None]
        v = tl.minimum(tl.maximum(v, -448.0), 448.0)
    tl.store(keys + batch * key_batch + token * key_token + at, k.to(keys.dtype.element_ty), mask=mask)
    tl.store(values + batch * value_batch + token * value_token + at, v.to(values.dtype.element_ty), mask=mask)


@triton.jit
def _store_turned(
    x, angles, out, mean, scale, x_batch, x_token, out_batch, out_token,
    FP8: tl.constexpr, COUNT: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    token, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    size: tl.constexpr = 2 * PAIRS
    head = tl.arange(0, HEADS)
    at = head[:, None] * size + tl.arange(0, size)[None, :]
    mask = (head < COUNT)[:, None]
    k = tl.load(x + batch * x_batch + token * x_token + at, mask=mask, other=0.0).to(tl.float32)
    k = _rotated(k, angles, token, HEADS, PAIRS)
    if FP8:
        k = _rounded_keys(k, mean, scale, batch, head, at, mask, COUNT, size)
    tl.store(out + batch * out_batch + token * out_token + at, k.to(out.dtype.element_ty), mask=mask)


def _empty(x: Tensor, into: Into | None) -> tuple[Tensor, Tensor]:
    """Where to write rows like x's, and their scales: those of a fixed scale are there.

    In 8 bits the memory goes on to a multiple of the rows that sparse products take.
    """
    if into is None:
        return torch.empty_like(x), torch.empty(0, device=x.device)
    name = into.format if isinstance(into, Fixed) else into
    out = torch.empty(-(-len(x) // UNIT) * UNIT, x.shape[1], dtype=STORED[name], device=x.device)[: len(x)]
    return out, into.scale if isinstance(into, Fixed) else torch.empty(len(x), 1, device=x.device)


def _activation(out: Tensor, scales: Tensor, into: Into | None) -> Activation:
    return out if into is None else Rows8(out, scales)


def add_norm(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    *,
    y: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    into: Into | None,
) -> tuple[Tensor, Activation]:
    rows, width = x.shape
    out, scales = _empty(x, into)
    total = x if y is None else torch.empty_like(x)
    assert x.is_contiguous() and (y is None or y.is_contiguous()) and scale.stride(1) == shift.stride(1) == 1
    _add_norm[(rows,)](
        x, y, bias, gate, scale, shift, total, out, scales,
        width, rows // len(scale), 1 if gate is None else rows // len(gate), 0 if gate is None else gate.stride(0),
        scale.stride(0), shift.stride(0), eps,
        ADD=y is not None, BIAS=bias is not None, GATE=gate is not None, **_form(into),
        BLOCK=triton.next_power_of_2(width), num_warps=_warps(width),
    )  # fmt: skip
    return total, _activation(out, scales, into)


def _pointwise(x: Tensor, bias: Tensor | None, into: Into | None, *, activate: bool) -> Activation:
    rows, width = x.shape
    out, scales = _empty(x, into)
    assert x.is_contiguous()
    block = triton.next_power_of_2(width)
    rest = triton.next_power_of_2(width - block // 2)
    block, rest = (block // 2, rest) if rest < block // 2 else (block, 0)
    _gelu[(rows,)](
        x, bias, out, scales, width, BIAS=bias is not None, GELU=activate,
        APPROXIMATE=x.is_cuda and x.dtype != torch.float32, **_form(into),
        BLOCK=block, REST=rest, num_warps=_warps(width),
    )  # fmt: skip
    return _activation(out, scales, into)


def gelu(x: Tensor, bias: Tensor | None, into: Into | None) -> Activation:
    return _pointwise(x, bias, into, activate=True)


def to_rows8(x: Tensor, into: Into) -> Rows8:
    out = _pointwise(x, None, into, activate=False)
    assert isinstance(out, Rows8)
    return out


def rms_norm(x: Tensor, bias: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    rows, width = x.shape
    out = torch.empty_like(x)
    assert x.is_contiguous()
    _rms_norm[(rows,)](
        x, bias, weight, out, width, eps, BIAS=bias is not None, BLOCK=triton.next_power_of_2(width),
        num_warps=_warps(width),
    )  # fmt: skip
    return out


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
    raw_keys: Tensor | None,
    scales: Scales | None,
) -> tuple[Tensor, Tensor | None]:
    batch, tokens, count, size = keys.shape
    for x in (keys, values, *(() if raw_keys is None else (raw_keys,))):
        assert x.stride(3) == 1 and x.stride(2) == size
    assert qkv.is_contiguous() and angles.is_contiguous()
    queries = torch.empty(
        batch, tokens, count, size, dtype=qkv.dtype if scales is None else STORED["fp8"], device=qkv.device
    )
    query_scales = None if scales is None else torch.empty(batch, tokens, count, device=qkv.device)
    mean: Any = None if scales is None else scales.key_mean
    raw_strides = (0, 0) if raw_keys is None else (raw_keys.stride(0), raw_keys.stride(1))
    _heads[(batch * tokens,)](
        qkv, bias, norm_q, norm_k, angles, queries, query_scales, keys, values, raw_keys,
        mean, None if scales is None else scales.key, None if scales is None else scales.value,
        tokens, count * size, eps, keys.stride(0), keys.stride(1), values.stride(0), values.stride(1), *raw_strides,
        BIAS=bias is not None, RAW=raw_keys is not None, FP8=scales is not None, COUNT=count,
        HEADS=triton.next_power_of_2(count), PAIRS=size // 2, num_warps=_warps(count * size),
    )  # fmt: skip
    return queries, query_scales


def store_turned(x: Tensor, angles: Tensor, out: Tensor, scale: Tensor | None, mean: Tensor | None) -> None:
    batch, tokens, count, size = x.shape
    for part in (x, out):
        assert part.stride(3) == 1 and part.stride(2) == size
    assert angles.is_contiguous() and all(part is None or part.is_contiguous() for part in (scale, mean))
    _store_turned[(tokens, batch)](
        x, angles, out, mean, scale, x.stride(0), x.stride(1), out.stride(0), out.stride(1),
        FP8=scale is not None, COUNT=count, HEADS=triton.next_power_of_2(count), PAIRS=size // 2,
        num_warps=_warps(count * size),
    )  # fmt: skip
