"""Linear layers with 2:4 sparse weights, two of every four zero: half the multiplications, on NVIDIA's sparse units.

    y = x (w * mask)^T,   two of every four neighbours along K kept

Mishra et al. 2021 (arXiv 2104.08378). cuSPARSELt, which PyTorch includes, multiplies compressed weights; elsewhere
the weight is multiplied with its zeros, which is the reference. Weights may be float8 with row scales; these and the
scales of x are applied in a pass over the result, since on Hopper the library takes no vector of scales for float8
("operation not supported", CUDA 13.0).
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.ops.dispatch import on_gpu, rescale
from engine.ops.linear import first_line, quantised_linear
from engine.ops.quant import SPARSE_ROWS, QuantTensor, Sparse24, quantise


def prune(weight: Tensor) -> Tensor:
    """weight [N, K] with the two smaller magnitudes of every four along K set to zero; of equal ones the later.

    Raises:
        ValueError: K is not a multiple of four.
    """
    if weight.shape[-1] % 4:
        raise ValueError(f"2:4 sparsity needs rows of a multiple of 4, got {weight.shape[-1]}")
    groups = weight.unflatten(-1, (-1, 4))
    smaller = groups.abs().argsort(dim=-1, descending=True, stable=True)[..., 2:]
    return groups.scatter(-1, smaller, 0.0).flatten(-2)


def is_pruned(weight: Tensor) -> bool:
    """Whether at most two of every four along K are nonzero."""
    return weight.shape[-1] % 4 == 0 and bool(((weight.unflatten(-1, (-1, 4)) != 0).sum(-1) <= 2).all())


@cache
def sparse_unsupported_reason(device: torch.device, *, fp8: bool) -> str | None:
    """Why this device has no product of 2:4 weights in bfloat16, or float8; None if it has one. Tried once."""
    if not on_gpu(device):
        return "needs a GPU"
    x = torch.arange(64.0, device=device)[:, None] % 5 + torch.arange(64.0, device=device) % 3
    weight = prune((torch.arange(64.0, device=device)[:, None] % 3 + 1) * (torch.arange(64.0, device=device) % 7 - 3))
    try:
        if fp8:
            rows = quantise(weight, "fp8")
            compressed = Sparse24(torch._cslt_compress(rows.data), rows.scale, (64, 64), compressed=True)
            out = sparse_linear(quantise(x, "fp8"), compressed, torch.bfloat16)
        else:
            compressed = Sparse24(torch._cslt_compress(weight.bfloat16()), None, (64, 64), compressed=True)
            out = sparse_linear(x.bfloat16(), compressed, torch.bfloat16)
        expected = x @ weight.t()
        difference = float((out.float() - expected).norm() / expected.norm())
    except RuntimeError as error:
        return first_line(error)
    return None if difference < 0.1 else f"wrong result (error {difference:.2g})"


def compress(weight: Tensor, fp8: bool) -> Sparse24:
    """A pruned weight [N, K], in float8 if `fp8`, compressed where the device and the shape allow."""
    shape = weight.shape[0], weight.shape[1]
    data, scale = weight, None
    if fp8:
        rows = quantise(weight, "fp8")
        data, scale = rows.data, rows.scale
    # the sparse units give bfloat16
    fits = weight.dtype == torch.bfloat16 and shape[0] % 32 == shape[1] % 32 == 0
    if fits and sparse_unsupported_reason(weight.device, fp8=fp8) is None:
        return Sparse24(torch._cslt_compress(data.contiguous()), scale, shape, compressed=True)
    return Sparse24(data, scale, shape, compressed=False)


def sparse_linear(x: Tensor | QuantTensor, weight: Sparse24, dtype: torch.dtype) -> Tensor:
    """x [..., K] times weight [N, K] transposed: [..., N] in `dtype`. x is float8 where the weight is."""
    if isinstance(x, QuantTensor):
        assert weight.scale is not None
        if not weight.compressed:
            return quantised_linear(x, QuantTensor(weight.data, weight.scale), None, dtype)
        rows = x.data.flatten(0, -2)
        out = _product(weight.data, pad_rows(rows, SPARSE_ROWS), dtype)[: len(rows)]
        return rescale(out, x.scale.reshape(-1, 1), weight.scale.reshape(1, -1), dtype).unflatten(0, x.data.shape[:-1])
    if not weight.compressed:
        return F.linear(x, weight.data)
    rows = x.flatten(0, -2).contiguous()  # the library takes no strides
    out = _product(weight.data, pad_rows(rows, SPARSE_ROWS // 8), None)[: len(rows)]
    return out.unflatten(0, x.shape[:-1])


def pad_rows(rows: Tensor, multiple: int) -> Tensor:
    """rows [R, K], padded so that R is a multiple; the values of the added rows are arbitrary.

    Does not copy if the memory behind `rows` is large enough, as the kernels that quantise allocate it.
    """
    height, width = rows.shape
    wanted = -(-height // multiple) * multiple
    if wanted == height:
        return rows
    room = rows.untyped_storage().nbytes() // rows.element_size() - rows.storage_offset()
    if rows.is_contiguous() and room >= wanted * width:
        return rows.as_strided((wanted, width), (width, 1))
    return F.pad(rows, (0, 0, 0, wanted - height))


def _product(compressed: Tensor, x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """x [R, K] times the weight transposed: [R, N], by the algorithm that was fastest when the shape was first used.

    dtype: of the result for float8; otherwise the result has x's.
    """
    key = compressed.device, compressed.dtype, compressed.numel(), x.shape
    if key not in _algorithms:
        if torch.cuda.is_current_stream_capturing():
            return torch._cslt_sparse_mm(compressed, x.t(), out_dtype=dtype, transpose_result=True)
        _algorithms[key] = _search(compressed, x, dtype)
    algorithm, parts, mode = _algorithms[key]
    return torch._cslt_sparse_mm(compressed, x.t(), None, None, dtype, True, algorithm, parts, mode)


_algorithms: dict[tuple[torch.device, torch.dtype, int, torch.Size], tuple[int, int, int]] = {}


def _search(compressed: Tensor, x: Tensor, dtype: torch.dtype | None) -> tuple[int, int, int]:
    """An algorithm's number, the number of parts it splits K into, and how it sums them.

    The library's default if its search finds none, or one with a different result.
    """
    library: Any = getattr(torch._C, "_cusparselt", None)
    default = 0, 1, -1
    expected = torch._cslt_sparse_mm(compressed, x.t(), None, None, dtype, True, *default)
    try:
        algorithm, parts, mode, _ = library.mm_search(compressed, x.t(), None, None, dtype, True)
        found = torch._cslt_sparse_mm(compressed, x.t(), None, None, dtype, True, algorithm, parts, mode)
    except (AttributeError, TypeError, RuntimeError):
        return default
    close = torch.isclose(found, expected, rtol=0.02, atol=0.01 * float(expected.abs().nanmean()), equal_nan=True)
    return (algorithm, parts, mode) if float(close.float().mean()) > 0.999 else default
