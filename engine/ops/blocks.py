"""Matrix products in block formats, where every few neighbours along K share a scale: MXFP8 and NVFP4.

    MXFP8   32 values in E4M3 times a power of two (E8M0): OCP Microscaling Formats 1.0, 2023
    NVFP4   16 values in E2M1, two to a byte, times an E4M3 scale, times one float32 for the whole matrix:
            NVIDIA, "Introducing NVFP4", 2025

Compute capability 10.0 has units for both; whether PyTorch reaches them is asked of the device with a product whose
result is known. Elsewhere matrices are restored and multiplied in the dtype of the model: right, and not fast.
"""

from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.ops.linear import LARGEST, STORED, first_line

BlockFormat = Literal["mxfp8", "nvfp4"]
BLOCK: dict[BlockFormat, int] = {"mxfp8": 32, "nvfp4": 16}
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The magnitudes of a 4-bit value by its lower three bits; the fourth is the sign."""
_UP_TO_EVEN = ((0.25, False), (0.75, True), (1.25, False), (1.75, True), (2.5, False), (3.5, True), (5.0, False))
"""Where one magnitude ends and the next begins, and whether the next has the middle itself: ties go to even codes."""


@dataclass(frozen=True)
class Blocks:
    """A matrix [..., K] in a block format.

    data: float8 e4m3 [..., K], or uint8 [..., K / 2] with the first of two values in the lower half.
    scale: [..., K / block] in float8 e8m0 or e4m3. tensor: float32 [1], by which all is multiplied.
    """

    format: BlockFormat
    data: Tensor
    scale: Tensor
    tensor: Tensor

    def restore(self) -> Tensor:
        """float32 [..., K]."""
        values = self.data.float() if self.format == "mxfp8" else _unpack(self.data)
        scale = _powers(self.scale) if self.format == "mxfp8" else self.scale.float()
        blocks = values.unflatten(-1, (-1, BLOCK[self.format])) * scale[..., None]
        return blocks.flatten(-2) * self.tensor


def quantise_blocks(x: Tensor, to: BlockFormat, tensor: Tensor | None = None) -> Blocks:
    """x [..., K]; `tensor` is the scale of the whole matrix in NVFP4, float32 [1], by default from its largest value.

    On a GPU that knows float8 a kernel does it in one pass, after one for the largest value where that is asked for.

    MXFP8's power of two is rounded up, so that nothing is clipped (Mishra et al. 2025, arXiv 2506.08027); the
    specification's own rule, rounded down, clips values above 7/8 of the next power.

    Raises:
        ValueError: K is no multiple of the block.
    """
    size = BLOCK[to]
    if x.shape[-1] % size:
        raise ValueError(f"{to} needs rows of a multiple of {size}, got {x.shape[-1]}")
    if to == "mxfp8":
        tensor = torch.ones(1, device=x.device)
    elif tensor is None:
        whole = torch.linalg.vector_norm(x.flatten(), float("inf"), dtype=torch.float32)
        tensor = whole.clamp(min=1e-12)[None] / (LARGEST["fp8"] * E2M1[-1])
    if x.is_cuda and torch.cuda.get_device_capability(x.device) >= (8, 9):
        from engine.ops.triton.blocks import round_to_blocks

        return Blocks(to, *round_to_blocks(x.contiguous(), to, tensor), tensor)
    wide = x.float().unflatten(-1, (-1, size))
    largest = wide.abs().amax(dim=-1, keepdim=True)
    if to == "mxfp8":
        mantissa, exponent = torch.frexp((largest / LARGEST["fp8"]).clamp(min=2.0**-126))  # mantissa in [0.5, 1)
        exponent = exponent - (mantissa == 0.5).int() + 127
        scale = exponent[..., 0].clamp(max=254).to(torch.uint8).view(torch.float8_e8m0fnu)
        values = (wide / _powers(scale)[..., None]).clamp(-LARGEST["fp8"], LARGEST["fp8"])
        return Blocks(to, values.to(STORED["fp8"]).flatten(-2), scale, tensor)
    coarse = (largest / (E2M1[-1] * tensor)).clamp(max=LARGEST["fp8"]).to(STORED["fp8"])
    values = wide / (coarse.float() * tensor).clamp(min=1e-30)  # a scale of zero restores to zeros whatever they are
    return Blocks(to, _pack(values.flatten(-2)), coarse[..., 0], tensor)


def _pack(values: Tensor) -> Tensor:
    """float32 [..., K], rounded to E2M1 with ties to even and clipped at 6, two to a byte."""
    magnitude = values.abs()
    code = torch.zeros_like(values, dtype=torch.uint8)
    for bound, inclusive in _UP_TO_EVEN:
        code += (magnitude >= bound) if inclusive else (magnitude > bound)
    code |= torch.signbit(values).to(torch.uint8) << 3
    return code[..., ::2] | code[..., 1::2] << 4


def _unpack(packed: Tensor) -> Tensor:
    code = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2).int()
    # by arithmetic: a table would have to be brought to the device, which CUDA graphs forbid
    exponent, mantissa = (code >> 1) & 3, (code & 1).float()
    magnitude = (mantissa + 2 * exponent.clamp(max=1)) * (1 << exponent.clamp(min=1)).float() / 4
    return magnitude * (1 - 2 * (code >> 3)).float()


def _powers(scale: Tensor) -> Tensor:
    """float32 of E8M0: its byte is float32's exponent, save for 2^-127, which is not normal there."""
    exponent = scale.view(torch.uint8).int()
    return (exponent << 23).clamp(min=1 << 22).view(torch.float32)


def swizzled(scale: Tensor) -> Tensor:
    """Block scales [R, C] as the units read them: tiles of 128 rows by 4, in which row r stands at 16 (r mod 32) + 4
    (r div 32), filled up with zeros (cuBLAS, "1D block scaling factors layout"); flat."""
    rows, columns = -(-scale.shape[0] // 128), -(-scale.shape[1] // 4)
    padded = torch.zeros(128 * rows, 4 * columns, dtype=torch.uint8, device=scale.device)
    padded[: scale.shape[0], : scale.shape[1]] = scale.view(torch.uint8)
    return padded.view(rows, 4, 32, columns, 4).permute(0, 3, 2, 1, 4).flatten().view(scale.dtype)


@cache
def blocks_unsupported_reason(device: torch.device, form: BlockFormat) -> str | None:
    """Why this device has no product in this format; None if it has. Asked of itself, once."""
    if device.type != "cuda":
        return "needs a GPU"
    if torch.cuda.get_device_capability(device) < (10, 0):
        return "needs compute capability 10.0"
    a, b = (torch.randn(size, 256, device=device) for size in (128, 64))
    a, b = a * torch.arange(1.0, 129, device=device)[:, None], b * torch.arange(1.0, 257, device=device)
    x, weight = quantise_blocks(a, form), quantise_blocks(b, form)
    try:
        out = _product(x, weight, torch.bfloat16).float()
    except (RuntimeError, TypeError) as error:
        return first_line(error)
    expected = x.restore() @ weight.restore().t()
    apart = float((out - expected).norm() / expected.norm())
    return None if apart < 1e-2 else f"wrong result (error {apart:.2g})"


def linear_blocks(x: Blocks, weight: Blocks, dtype: torch.dtype) -> Tensor:
    """x [..., K] times weight [N, K] transposed: [..., N] in `dtype`."""
    if dtype == torch.bfloat16 and blocks_unsupported_reason(x.data.device, x.format) is None:
        flat = Blocks(x.format, x.data.flatten(0, -2), x.scale.flatten(0, -2), x.tensor)
        return _product(flat, weight, dtype).unflatten(0, x.data.shape[:-1])
    return F.linear(x.restore().to(dtype), weight.restore().to(dtype))


def _product(x: Blocks, weight: Blocks, dtype: torch.dtype) -> Tensor:
    a, b = x.data, weight.data
    if x.format == "nvfp4":
        a, b = a.view(torch.float4_e2m1fn_x2), b.view(torch.float4_e2m1fn_x2)
    out = torch._scaled_mm(a, b.t(), scale_a=swizzled(x.scale), scale_b=swizzled(weight.scale), out_dtype=dtype)
    return out * (x.tensor * weight.tensor).to(dtype) if x.format == "nvfp4" else out
