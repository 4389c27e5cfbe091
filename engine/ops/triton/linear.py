"""Kernels beside the hardware's 8-bit products; their references are in `engine.ops.quant`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.ops.quant import QuantTensor


@triton.jit
def _rescale(x, rows, columns, out, width, row_step, column_step, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
             BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = at < width
    value = tl.load(x + row * width + at, mask=mask, other=0.0).to(tl.float32)
    if ROWS:
        value *= tl.load(rows + row * row_step)
    if COLUMNS:
        value *= tl.load(columns + at * column_step, mask=mask, other=0.0)
    tl.store(out + row * width + at, value.to(out.dtype.element_ty), mask=mask)


def rescale(x: Tensor, rows: Tensor | None, columns: Tensor | None, dtype: torch.dtype) -> Tensor:
    """See `engine.ops.quant.rescale`. x is contiguous."""
    assert x.is_contiguous()
    height, width = x.shape
    out = x if x.dtype == dtype else torch.empty(x.shape, dtype=dtype, device=x.device)
    block = min(2048, triton.next_power_of_2(width))
    _rescale[(height, triton.cdiv(width, block))](
        x, rows, columns, out, width,
        0 if rows is None or rows.numel() == 1 else 1, 0 if columns is None or columns.numel() == 1 else 1,
        ROWS=rows is not None, COLUMNS=columns is not None, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def _small_batch_linear(
    x, weight, scale, out, height, width, depth, scale_step,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """All rows of x times COLUMNS rows of the weight, which are read once and dequantised in registers."""
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, depth, DEPTH):
        at = start + tl.arange(0, DEPTH)
        a = tl.load(
            x + row[:, None].to(tl.int64) * depth + at[None, :],
            mask=(row < height)[:, None] & (at < depth)[None, :], other=0.0,
        )  # fmt: skip
        b = tl.load(
            weight + column[None, :].to(tl.int64) * depth + at[:, None],
            mask=(column < width)[None, :] & (at < depth)[:, None], other=0.0,
        )  # fmt: skip
        total = tl.dot(a, b.to(a.dtype), total, input_precision="ieee")
    total *= tl.load(scale + column * scale_step, mask=column < width, other=0.0)[None, :]
    tl.store(
        out + row[:, None].to(tl.int64) * width + column[None, :], total.to(out.dtype.element_ty),
        mask=(row < height)[:, None] & (column < width)[None, :],
    )  # fmt: skip


def small_batch_linear(x: Tensor, weight: QuantTensor) -> Tensor:
    """See `engine.ops.quant.small_batch_linear`."""
    height, depth = x.shape
    width = len(weight.data)
    x = x.contiguous()
    out = torch.empty(height, width, dtype=x.dtype, device=x.device)
    rows = min(64, max(16, triton.next_power_of_2(height)))
    columns = 32 if width >= 8192 else 16  # enough programs for every multiprocessor
    _small_batch_linear[(triton.cdiv(width, columns), triton.cdiv(height, rows))](
        x, weight.data, weight.scale, out, height, width, depth, 0 if weight.per_tensor else 1,
        ROWS=rows, COLUMNS=columns, DEPTH=128, num_warps=4, num_stages=4,
    )  # fmt: skip
    return out
