"""Linear layers in block formats: MXFP8 and NVFP4, see `engine.ops.quant`.

Compute capability 10.0 has hardware for both; whether PyTorch reaches it is found by a product whose result is known.
Elsewhere matrices are dequantised and multiplied in the model's dtype, which is correct but not fast.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.ops.dispatch import on_gpu, quantise_blocks
from engine.ops.linear import first_line
from engine.ops.quant import BlockFormat, BlockQuantTensor


def swizzled(scale: Tensor) -> Tensor:
    """Block scales [R, C] in the order that the hardware reads, flat.

    They are padded with zeros to tiles of 128 rows by 4 columns, in which row r and column c are at
    16 (r mod 32) + 4 (r div 32) + c (cuBLAS, "1D block scaling factors layout").
    """
    rows, columns = -(-scale.shape[0] // 128), -(-scale.shape[1] // 4)
    padded = torch.zeros(128 * rows, 4 * columns, dtype=torch.uint8, device=scale.device)
    padded[: scale.shape[0], : scale.shape[1]] = scale.view(torch.uint8)
    return padded.view(rows, 4, 32, columns, 4).permute(0, 3, 2, 1, 4).flatten().view(scale.dtype)


@cache
def blocks_unsupported_reason(device: torch.device, to: BlockFormat) -> str | None:
    """Why this device has no product in this format; None if it has one. Found once, by trying."""
    if not on_gpu(device):
        return "needs a GPU"
    if torch.cuda.get_device_capability(device) < (10, 0):
        return "needs compute capability 10.0"
    a, b = (torch.randn(size, 256, device=device) for size in (128, 64))
    a, b = a * torch.arange(1.0, 129, device=device)[:, None], b * torch.arange(1.0, 257, device=device)
    x, weight = quantise_blocks(a, to), quantise_blocks(b, to)
    try:
        out = _product(x, weight, torch.bfloat16).float()
    except (RuntimeError, TypeError) as error:
        return first_line(error)
    expected = x.dequantise() @ weight.dequantise().t()
    difference = float((out - expected).norm() / expected.norm())
    return None if difference < 1e-2 else f"wrong result (error {difference:.2g})"


def block_linear(x: BlockQuantTensor, weight: BlockQuantTensor, dtype: torch.dtype) -> Tensor:
    """x [..., K] times weight [N, K] transposed: [..., N] in `dtype`."""
    if dtype == torch.bfloat16 and blocks_unsupported_reason(x.data.device, x.format) is None:
        flat = BlockQuantTensor(x.format, x.data.flatten(0, -2), x.scale.flatten(0, -2), x.tensor_scale)
        return _product(flat, weight, dtype).unflatten(0, x.data.shape[:-1])
    return F.linear(x.dequantise().to(dtype), weight.dequantise().to(dtype))


def _product(x: BlockQuantTensor, weight: BlockQuantTensor, dtype: torch.dtype) -> Tensor:
    a, b = x.data, weight.data
    if x.format == "nvfp4":
        a, b = a.view(torch.float4_e2m1fn_x2), b.view(torch.float4_e2m1fn_x2)
    out = torch._scaled_mm(a, b.t(), scale_a=swizzled(x.scale), scale_b=swizzled(weight.scale), out_dtype=dtype)
    return out * (x.tensor_scale * weight.tensor_scale).to(dtype) if x.format == "nvfp4" else out
