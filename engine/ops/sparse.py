"""Products with weights of which two in every four are zero, 2:4: half the multiplications, on NVIDIA's sparse units.

    y = x (w * mask)^T,   two of each four neighbours along K kept

Mishra et al. 2021 (arXiv 2104.08378). The kept values and their places go through cuSPARSELt, which PyTorch carries;
elsewhere the matrix is multiplied with its zeros, which is the reference. Weights may be in float8 with a scale a row;
these and the scales of x are applied in a pass over the result, since the library takes no vector of scales for float8
on Hopper ("operation not supported", CUDA 13.0).
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.ops.linear import QuantTensor, first_line, linear8, quantise, rescale

UNIT = 64
"""Rows of x are filled up to a multiple: cuSPARSELt takes 16, and its tiles are larger."""


@dataclass(frozen=True)
class Sparse24:
    """A weight [N, K] with its zeros, or compressed by cuSPARSELt."""

    data: Tensor
    scale: Tensor | None
    """float32 [N, 1], in float8."""
    shape: tuple[int, int]
    compressed: bool


def prune(weight: Tensor) -> Tensor:
    """weight [N, K] with the two smaller magnitudes of each four along K set to zero; of equal ones the later.

    Raises:
        ValueError: K is no multiple of four.
    """
    if weight.shape[-1] % 4:
        raise ValueError(f"2:4 sparsity needs rows of a multiple of 4, got {weight.shape[-1]}")
    groups = weight.unflatten(-1, (-1, 4))
    lesser = groups.abs().argsort(dim=-1, descending=True, stable=True)[..., 2:]
    return groups.scatter(-1, lesser, 0.0).flatten(-2)


def is_pruned(weight: Tensor) -> bool:
    """Whether at most two of each four along K differ from zero."""
    return weight.shape[-1] % 4 == 0 and bool(((weight.unflatten(-1, (-1, 4)) != 0).sum(-1) <= 2).all())


@cache
def sparse_unsupported_reason(device: torch.device, *, fp8: bool) -> str | None:
    """Why this device has no product of 2:4 weights in bfloat16, or float8; None if it has. Asked of itself, once."""
    if device.type != "cuda":
        return "needs a GPU"
    x = torch.arange(64.0, device=device)[:, None] % 5 + torch.arange(64.0, device=device) % 3
    weight = prune((torch.arange(64.0, device=device)[:, None] % 3 + 1) * (torch.arange(64.0, device=device) % 7 - 3))
    try:
        if fp8:
            rows = quantise(weight, "fp8")
            packed = Sparse24(torch._cslt_compress(rows.data), rows.scale, (64, 64), compressed=True)
            out = linear_sparse(quantise(x, "fp8"), packed, torch.bfloat16)
        else:
            packed = Sparse24(torch._cslt_compress(weight.bfloat16()), None, (64, 64), compressed=True)
            out = linear_sparse(x.bfloat16(), packed, torch.bfloat16)
        expected = x @ weight.t()
        apart = float((out.float() - expected).norm() / expected.norm())
    except RuntimeError as error:
        return first_line(error)
    return None if apart < 0.1 else f"wrong result (error {apart:.2g})"


def compress(weight: Tensor, fp8: bool) -> Sparse24:
    """A pruned weight [N, K] as it will be multiplied: compressed where the device and the shape allow."""
    shape = weight.shape[0], weight.shape[1]
    data, scale = weight, None
    if fp8:
        rows = quantise(weight, "fp8")
        data, scale = rows.data, rows.scale
    # the units' results are bfloat16
    fits = weight.dtype == torch.bfloat16 and shape[0] % 32 == shape[1] % 32 == 0
    if fits and sparse_unsupported_reason(weight.device, fp8=fp8) is None:
        return Sparse24(torch._cslt_compress(data.contiguous()), scale, shape, compressed=True)
    return Sparse24(data, scale, shape, compressed=False)


def linear_sparse(x: Tensor | QuantTensor, weight: Sparse24, dtype: torch.dtype) -> Tensor:
    """x [..., K] times weight [N, K] transposed: [..., N] in `dtype`. x is in float8 where the weight is."""
    if isinstance(x, QuantTensor):
        assert weight.scale is not None
        if not weight.compressed:
            return linear8(x, QuantTensor(weight.data, weight.scale), None, dtype)
        rows = x.data.flatten(0, -2)
        out = _product(weight.data, filled(rows, UNIT), dtype)[: len(rows)]
        return rescale(out, x.scale.reshape(-1, 1), weight.scale.reshape(1, -1), dtype).unflatten(0, x.data.shape[:-1])
    if not weight.compressed:
        return F.linear(x, weight.data)
    rows = x.flatten(0, -2).contiguous()  # the library is told no strides
    out = _product(weight.data, filled(rows, UNIT // 8), None)[: len(rows)]
    return out.unflatten(0, x.shape[:-1])


def filled(rows: Tensor, unit: int) -> Tensor:
    """rows [R, K] with as many more as make R a multiple of `unit`, whatever these hold.

    Without a copy where the memory goes on that far, as the kernels that round to 8 bits leave it.
    """
    height, width = rows.shape
    wanted = -(-height // unit) * unit
    if wanted == height:
        return rows
    room = rows.untyped_storage().nbytes() // rows.element_size() - rows.storage_offset()
    if rows.is_contiguous() and room >= wanted * width:
        return rows.as_strided((wanted, width), (width, 1))
    return F.pad(rows, (0, 0, 0, wanted - height))


def _product(packed: Tensor, x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """x [R, K] times the weight transposed: [R, N], by the algorithm that was fastest when the shape was first met.

    dtype: of the result of float8; otherwise it is x's.
    """
    key = packed.device, packed.dtype, packed.numel(), x.shape
    if key not in _algorithms:
        if torch.cuda.is_current_stream_capturing():
            return torch._cslt_sparse_mm(packed, x.t(), out_dtype=dtype, transpose_result=True)
        _algorithms[key] = _search(packed, x, dtype)
    algorithm, parts, mode = _algorithms[key]
    return torch._cslt_sparse_mm(packed, x.t(), None, None, dtype, True, algorithm, parts, mode)


_algorithms: dict[tuple[torch.device, torch.dtype, int, torch.Size], tuple[int, int, int]] = {}


def _search(packed: Tensor, x: Tensor, dtype: torch.dtype | None) -> tuple[int, int, int]:
    """An algorithm's number, into how many parts it cuts K, and how it sums them; the library's default where it finds
    none, or one that gives another result."""
    library: Any = getattr(torch._C, "_cusparselt", None)
    usual = 0, 1, -1
    expected = torch._cslt_sparse_mm(packed, x.t(), None, None, dtype, True, *usual)
    try:
        algorithm, parts, mode, _ = library.mm_search(packed, x.t(), None, None, dtype, True)
        found = torch._cslt_sparse_mm(packed, x.t(), None, None, dtype, True, algorithm, parts, mode)
    except (AttributeError, TypeError, RuntimeError):
        return usual
    close = torch.isclose(found, expected, rtol=0.02, atol=0.01 * float(expected.abs().nanmean()), equal_nan=True)
    return (algorithm, parts, mode) if float(close.float().mean()) > 0.999 else usual
