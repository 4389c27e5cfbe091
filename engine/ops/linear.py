"""Matrix products in 8 bits: each row with its own scale, or a matrix with one; products in the hardware's units.

    y = (x8 w8^T) * x_scale * w_scale + bias

with x8 [R, K] and w8 [N, K] in float8 e4m3 or int8, float32 scales, accumulated in float32 or int32. Micikevicius et
al. 2022 (arXiv 2209.05433) for the formats, Dettmers et al. 2022 (arXiv 2208.07339) for a scale a row.
`linear_weights8` rounds the weights alone.
"""

from dataclasses import dataclass
from functools import cache, cached_property
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Format = Literal["fp8", "int8"]
LARGEST: dict[Format, float] = {"fp8": 448.0, "int8": 127.0}
STORED: dict[Format, torch.dtype] = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}


@dataclass(frozen=True)
class Fixed:
    """A format with one scale for a whole matrix that is known beforehand: no largest magnitude has to be found."""

    format: Format
    scale: Tensor
    """float32 [1]."""

    @cached_property
    def inverse(self) -> Tensor:
        """1 / scale. First asked for before a graph is recorded, it is no part of it."""
        return self.scale.reciprocal()


OutputFormat = Format | Fixed


@dataclass(frozen=True)
class QuantTensor:
    """A matrix in 8 bits: data [..., K], and what to multiply each row by, float32 [..., 1], or all of it by, [1]."""

    data: Tensor
    scale: Tensor

    @property
    def format(self) -> Format:
        return "int8" if self.data.dtype == torch.int8 else "fp8"

    @property
    def one_scale(self) -> bool:
        return self.scale.ndim == 1

    def restore(self) -> Tensor:
        """float32 [..., K]."""
        return self.data.float() * self.scale


def quantise(x: Tensor, to: OutputFormat) -> QuantTensor:
    """x [..., K], each row scaled so that its largest magnitude is the format's largest; or all by a fixed scale."""
    wide = x.float()
    if isinstance(to, Fixed):
        form, scale = to.format, to.scale
        scaled = (wide / scale).clamp(-LARGEST[form], LARGEST[form])
    else:
        form = to
        scale = wide.abs().amax(dim=-1, keepdim=True).clamp(min=1e-12) / LARGEST[form]
        scaled = wide / scale
    return QuantTensor((scaled.round() if form == "int8" else scaled).to(STORED[form]), scale)


def one_scale(x: Tensor, form: Format) -> Fixed:
    """The scale that brings the largest magnitude in all of x to the format's largest."""
    largest = torch.linalg.vector_norm(x.flatten(), float("inf"), dtype=torch.float32)
    return Fixed(form, largest.clamp(min=1e-12)[None] / LARGEST[form])


@cache
def fp8_unsupported_reason(device: torch.device, scales: Literal["rows", "tensor"]) -> str | None:
    """Why this device does not multiply float8 matrices with a scale a row, or one for each matrix; None if it does.

    Asked of the device itself, once, with a product whose result is known.
    """
    if device.type != "cuda":
        return "needs a GPU"
    a = torch.ones(16, 32, device=device).to(STORED["fp8"])
    scale = torch.full((16, 1) if scales == "rows" else (1, 1), 0.5, device=device)
    try:
        out = torch._scaled_mm(a, a.t(), scale_a=scale, scale_b=scale.t(), out_dtype=torch.bfloat16)
        right = bool((out == 8).all())
    except RuntimeError as error:
        return first_line(error)
    return None if right else "wrong result"


def first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:100]


def fp8_rows_supported(device: torch.device) -> bool:
    return fp8_unsupported_reason(device, "rows") is None


def linear8(x: QuantTensor, weight: QuantTensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x [..., K] times weight [N, K] transposed, plus bias [N]: [..., N] in `dtype`.

    Float8 goes through whichever product the device has: with a scale a row, or without scales, which are then applied
    to the result. Where it has none the rows are restored and multiplied in `dtype`, and so they are in float32, which
    the units do not give.
    """
    rows, device = x.data.flatten(0, -2), x.data.device
    a, b = x.scale.reshape(-1, 1), weight.scale.reshape(1, -1)
    native = dtype == torch.bfloat16 and x.format == "fp8"
    by_row = native and fp8_unsupported_reason(device, "rows") is None
    by_tensor = native and fp8_unsupported_reason(device, "tensor") is None
    if by_tensor and x.one_scale and weight.one_scale:
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
        out = F.linear((rows.float() * a).to(dtype), weight.restore().to(dtype))
    if bias is not None:
        out = out + bias.to(dtype)
    return out.unflatten(0, x.data.shape[:-1])


SMALL_BATCH = 64
"""Rows up to which a product waits for its weights: there they are rounded back as they arrive, in one kernel."""


def linear_weights8(x: Tensor, weight: QuantTensor) -> Tensor:
    """x [..., K] times weight [N, K] transposed, with nothing but the weights in 8 bits: [..., N] in x's dtype.

    Above `SMALL_BATCH` rows the weights are restored first, which saves memory and costs a little time.
    """
    rows = x.flatten(0, -2)
    if rows.is_cuda and len(rows) <= SMALL_BATCH and _kernel_reads(weight):
        from engine.ops.triton import linear

        out = linear.linear_weights8(rows, weight)
    else:
        out = F.linear(rows, rescale(weight.data, weight.scale, None, x.dtype))
    return out.unflatten(0, x.shape[:-1])


def _kernel_reads(weight: QuantTensor) -> bool:
    """Triton converts float8 e4m3 from compute capability 8.9 on."""
    return weight.format == "int8" or torch.cuda.get_device_capability(weight.data.device) >= (8, 9)


def rescale(x: Tensor, rows: Tensor | None, columns: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x [R, N] times rows [R, 1] times columns [1, N], in float32 and rounded once to `dtype`.

    Either may be of one element, for all, or None. On a GPU one pass over memory, in place where the dtype allows.
    """
    if x.is_cuda and (x.dtype != STORED["fp8"] or torch.cuda.get_device_capability(x.device) >= (8, 9)):
        from engine.ops.triton import linear

        return linear.rescale(x, rows, columns, dtype)
    wide = x.float()
    if rows is not None:
        wide = wide * rows
    if columns is not None:
        wide = wide * columns
    return wide.to(dtype)
