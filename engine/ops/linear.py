"""Linear layers in 8 bits, by whichever product the device has.

    y = (x8 w8^T) * x_scale * w_scale + bias

with x8 [R, K] and w8 [N, K] in float8 e4m3 or int8, float32 scales, accumulated in float32 or int32.
"""

from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.ops.dispatch import on_gpu, rescale, small_batch_linear
from engine.ops.quant import FORMAT_DTYPE, QuantTensor

SMALL_BATCH = 64
"""Rows up to which a product is limited by reading its weights: one kernel then dequantises them as they arrive."""


def first_line(error: Exception) -> str:
    """The first line of an error's message, at most 100 characters."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:100]


@cache
def fp8_unsupported_reason(device: torch.device, scales: Literal["rows", "tensor"]) -> str | None:
    """Why this device cannot multiply float8 matrices with row scales, or with one scale each; None if it can.

    Found once, by a product whose result is known.
    """
    if not on_gpu(device):
        return "needs a GPU"
    a = torch.ones(16, 32, device=device).to(FORMAT_DTYPE["fp8"])
    scale = torch.full((16, 1) if scales == "rows" else (1, 1), 0.5, device=device)
    try:
        out = torch._scaled_mm(a, a.t(), scale_a=scale, scale_b=scale.t(), out_dtype=torch.bfloat16)
        right = bool((out == 8).all())
    except RuntimeError as error:
        return first_line(error)
    return None if right else "wrong result"


def fp8_rows_supported(device: torch.device) -> bool:
    return fp8_unsupported_reason(device, "rows") is None


def quantised_linear(x: QuantTensor, weight: QuantTensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x [..., K] times weight [N, K] transposed, plus bias [N]: [..., N] in `dtype`.

    Float8 uses the product that the device has: with row scales, or without scales, which are then applied to the
    result. Without either, and in float32, which the hardware's products do not give, both operands are dequantised
    and multiplied in `dtype`.
    """
    rows, device = x.data.flatten(0, -2), x.data.device
    a, b = x.scale.reshape(-1, 1), weight.scale.reshape(1, -1)
    native = dtype == torch.bfloat16 and x.format == "fp8"
    by_row = native and fp8_unsupported_reason(device, "rows") is None
    by_tensor = native and fp8_unsupported_reason(device, "tensor") is None
    if by_tensor and x.per_tensor and weight.per_tensor:
        out = torch._scaled_mm(rows, weight.data.t(), scale_a=a, scale_b=b, out_dtype=dtype, use_fast_accum=True)
    elif by_row:
        a, b = a.expand(len(rows), 1).contiguous(), b.expand(1, len(weight.data)).contiguous()
        out = torch._scaled_mm(rows, weight.data.t(), scale_a=a, scale_b=b, out_dtype=dtype, use_fast_accum=True)
    elif by_tensor:
        one = torch.ones(1, 1, device=device)
        out = torch._scaled_mm(rows, weight.data.t(), scale_a=one, scale_b=one, out_dtype=dtype, use_fast_accum=True)
        out = rescale(out, a, b, dtype)
    elif x.format == "int8" and len(rows) > 16 and rows.shape[1] % 8 == 0 and len(weight.data) % 8 == 0:
        out = rescale(torch._int_mm(rows, weight.data.t()), a, b, dtype)
    else:
        out = F.linear((rows.float() * a).to(dtype), weight.dequantise().to(dtype))
    if bias is not None:
        out = out + bias.to(dtype)
    return out.unflatten(0, x.data.shape[:-1])


def weight_only_linear(x: Tensor, weight: QuantTensor) -> Tensor:
    """x [..., K] times weight [N, K] transposed, with only the weight in 8 bits: [..., N] in x's dtype.

    Above `SMALL_BATCH` rows the weight is dequantised first, which saves memory and costs a little time.
    """
    rows = x.flatten(0, -2)
    if len(rows) <= SMALL_BATCH:
        out = small_batch_linear(rows, weight)
    else:
        out = F.linear(rows, rescale(weight.data, weight.scale, None, x.dtype))
    return out.unflatten(0, x.shape[:-1])
