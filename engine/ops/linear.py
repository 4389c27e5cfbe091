"""Matrix products in 8 bits: rows quantised each by its own scale, products in the hardware's 8-bit units.

    y = (x8 w8^T) * x_scale * w_scale + bias

with x8 [R, K] and w8 [N, K] in float8 e4m3 or int8, one float32 scale a row of each, accumulated in float32 or int32.
Micikevicius et al. 2022 (arXiv 2209.05433) for the formats, Dettmers et al. 2022 (arXiv 2208.07339) for a scale a row.
"""

from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Format = Literal["fp8", "int8"]
LARGEST: dict[Format, float] = {"fp8": 448.0, "int8": 127.0}
STORED: dict[Format, torch.dtype] = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}


@dataclass(frozen=True)
class Rows8:
    """A matrix in 8 bits: data [..., K], and what to multiply each row by, float32 [..., 1]."""

    data: Tensor
    scale: Tensor

    @property
    def format(self) -> Format:
        return "int8" if self.data.dtype == torch.int8 else "fp8"

    def restore(self) -> Tensor:
        """float32 [..., K]."""
        return self.data.float() * self.scale


def quantise(x: Tensor, to: Format) -> Rows8:
    """x [..., K], each row scaled so that its largest magnitude is the format's largest."""
    wide = x.float()
    scale = wide.abs().amax(dim=-1, keepdim=True).clamp(min=1e-12) / LARGEST[to]
    scaled = wide / scale
    return Rows8((scaled.round() if to == "int8" else scaled).to(STORED[to]), scale)


@cache
def fp8_rows_supported(device: torch.device) -> bool:
    """Whether this GPU multiplies float8 matrices with a scale a row: asked of the GPU itself, once."""
    if device.type != "cuda":
        return False
    a = torch.ones(16, 32, device=device).to(torch.float8_e4m3fn)
    scale = torch.full((16, 1), 0.5, device=device)
    try:
        out = torch._scaled_mm(a, a.t(), scale_a=scale, scale_b=scale.t(), out_dtype=torch.bfloat16)
    except RuntimeError:
        return False
    return bool((out == 8).all())


def linear8(x: Rows8, weight: Rows8, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x [..., K] times weight [N, K] transposed, plus bias [N]: [..., N] in `dtype`.

    Where the hardware has no unit for it, the rows are restored and multiplied in `dtype`.
    """
    rows, device = x.data.flatten(0, -2), x.data.device
    scale = x.scale.reshape(-1, 1)
    if x.format == "fp8" and fp8_rows_supported(device):
        out = torch._scaled_mm(
            rows, weight.data.t(), scale_a=scale, scale_b=weight.scale.t(), out_dtype=dtype, use_fast_accum=True
        )
    elif x.format == "int8" and len(rows) > 16 and rows.shape[1] % 8 == 0 and len(weight.data) % 8 == 0:
        out = (torch._int_mm(rows, weight.data.t()) * scale * weight.scale.t()).to(dtype)
    else:
        out = F.linear(Rows8(rows, scale).restore().to(dtype), weight.restore().to(dtype))
    if bias is not None:
        out = out + bias.to(dtype)
    return out.unflatten(0, x.data.shape[:-1])
