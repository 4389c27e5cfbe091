"""Quantised tensors: their types, rounding to them, and restoring them. Plain torch on any device.

    fp8, int8   8-bit values with a float32 scale for each row, or one for the whole matrix. Float8 is E4M3:
                Micikevicius et al. 2022, arXiv 2209.05433. Row scales: Dettmers et al. 2022, arXiv 2208.07339
    mxfp8       32 E4M3 values share a power of two (E8M0): OCP Microscaling Formats 1.0, 2023
    nvfp4       16 E2M1 values, two to a byte, share an E4M3 scale; one float32 scale for the whole matrix:
                NVIDIA, "Introducing NVFP4", 2025

Everything that quantises calls this module: weights, activations, the KV cache and checkpoints. `engine.ops.dispatch`
replaces `quantise`, `quantise_blocks` and `rescale` by kernels on a GPU.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.ops.rope import axis_pairs

Format = Literal["fp8", "int8"]
FORMAT_MAX: dict[Format, float] = {"fp8": 448.0, "int8": 127.0}
"""Largest magnitude that is used of each format."""
FORMAT_DTYPE: dict[Format, torch.dtype] = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}

BlockFormat = Literal["mxfp8", "nvfp4"]
BLOCK_SIZE: dict[BlockFormat, int] = {"mxfp8": 32, "nvfp4": 16}
"""Neighbours along K that share a scale."""
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes of a 4-bit value by its lower three bits; the fourth bit is the sign."""
_E2M1_BOUNDS = ((0.25, False), (0.75, True), (1.25, False), (1.75, True), (2.5, False), (3.5, True), (5.0, False))
"""Midpoints between neighbouring magnitudes, and whether the midpoint itself rounds up: ties go to even codes."""

SPARSE_ROWS = 64
"""Inputs of 2:4 sparse products are padded to a multiple of so many rows: cuSPARSELt takes 16, its tiles are larger."""


@dataclass(frozen=True)
class FixedScale:
    """A format and a known scale for a whole tensor: quantising by it need not find the largest magnitude first.

    scale: float32 [1], or any shape that broadcasts to the tensor's.
    """

    format: Format
    scale: Tensor

    @cached_property
    def inverse(self) -> Tensor:
        """1 / scale. Computed on first use, so use it once before a CUDA graph is captured."""
        return self.scale.reciprocal()


OutputFormat = Format | FixedScale
"""What to quantise to: a format, with the scale of each row found from the data, or a format with a fixed scale."""


@dataclass(frozen=True)
class QuantTensor:
    """An 8-bit tensor: data float8 e4m3 or int8 [..., K]; scale float32 [..., 1] by row, or [1] for all.

    The value is data * scale.
    """

    data: Tensor
    scale: Tensor

    @property
    def format(self) -> Format:
        return "int8" if self.data.dtype == torch.int8 else "fp8"

    @property
    def per_tensor(self) -> bool:
        """Whether one scale holds for the whole tensor."""
        return self.scale.ndim == 1

    def dequantise(self) -> Tensor:
        """float32 [..., K]."""
        return self.data.float() * self.scale


Activation = Tensor | QuantTensor
"""The input of a linear layer, possibly quantised by the kernel that computed it."""


def round_to_format(x: Tensor, scale: Tensor, to: Format) -> Tensor:
    """x / scale, clipped to the format's range and rounded to it; `scale` broadcasts to x."""
    scaled = (x.float() / scale).clamp(-FORMAT_MAX[to], FORMAT_MAX[to])
    return (scaled.round() if to == "int8" else scaled).to(FORMAT_DTYPE[to])


def quantise(x: Tensor, to: OutputFormat) -> QuantTensor:
    """x [..., K] in 8 bits. Without a fixed scale, each row's largest magnitude becomes the format's largest."""
    if isinstance(to, FixedScale):
        return QuantTensor(round_to_format(x, to.scale, to.format), to.scale)
    scale = x.float().abs().amax(dim=-1, keepdim=True).clamp(min=1e-12) / FORMAT_MAX[to]
    return QuantTensor(round_to_format(x, scale, to), scale)


def tensor_scale(x: Tensor, to: Format) -> FixedScale:
    """The scale by which the largest magnitude in all of x becomes the format's largest."""
    return FixedScale(to, _largest(x) / FORMAT_MAX[to])


def _largest(x: Tensor) -> Tensor:
    """Largest magnitude in x, at least 1e-12, float32 [1]."""
    return torch.linalg.vector_norm(x.flatten(), float("inf"), dtype=torch.float32).clamp(min=1e-12)[None]


def rescale(x: Tensor, rows: Tensor | None, columns: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x [R, N] times rows [R, 1] times columns [1, N], computed in float32 and rounded once to `dtype`.

    Either may have one element, for all, or be None. The kernel writes in place where the dtype allows.
    """
    wide = x.float()
    if rows is not None:
        wide = wide * rows
    if columns is not None:
        wide = wide * columns
    return wide.to(dtype)


def small_batch_linear(x: Tensor, weight: QuantTensor) -> Tensor:
    """x [R, K] times weight [N, K] transposed, for small R: [R, N] in x's dtype.

    The kernel reads the 8-bit weights once and dequantises them in registers.
    """
    return F.linear(x, rescale(weight.data, weight.scale, None, x.dtype))


@dataclass(frozen=True)
class BlockQuantTensor:
    """A matrix [..., K] in a block format; the value is data * scale * tensor_scale.

    data: float8 e4m3 [..., K]; in nvfp4 uint8 [..., K / 2], the first of two values in the lower half.
    scale: [..., K / block], float8 e8m0 (mxfp8) or e4m3 (nvfp4). tensor_scale: float32 [1], 1 in mxfp8.
    """

    format: BlockFormat
    data: Tensor
    scale: Tensor
    tensor_scale: Tensor

    def dequantise(self) -> Tensor:
        """float32 [..., K]."""
        values = self.data.float() if self.format == "mxfp8" else _unpack_e2m1(self.data)
        scale = _e8m0_to_float(self.scale) if self.format == "mxfp8" else self.scale.float()
        blocks = values.unflatten(-1, (-1, BLOCK_SIZE[self.format])) * scale[..., None]
        return blocks.flatten(-2) * self.tensor_scale


def block_tensor_scale(x: Tensor, to: BlockFormat, known: Tensor | None = None) -> Tensor:
    """The scale of a whole matrix x [..., K], float32 [1]: 1 in mxfp8; in nvfp4 `known`, or from the largest magnitude.

    Raises:
        ValueError: K is not a multiple of the block size.
    """
    if x.shape[-1] % BLOCK_SIZE[to]:
        raise ValueError(f"{to} needs rows of a multiple of {BLOCK_SIZE[to]}, got {x.shape[-1]}")
    if to == "mxfp8":
        return torch.ones(1, device=x.device)
    return _largest(x) / (FORMAT_MAX["fp8"] * E2M1[-1]) if known is None else known


def quantise_blocks(x: Tensor, to: BlockFormat, tensor_scale: Tensor | None = None) -> BlockQuantTensor:
    """x [..., K] in a block format.

    Args:
        tensor_scale: nvfp4's scale of the whole matrix, float32 [1]; by default from the largest magnitude of x.

    MXFP8's power of two is rounded up, so that nothing is clipped (Mishra et al. 2025, arXiv 2506.08027). The
    specification rounds it down, which clips values above 7/8 of the next power.

    Raises:
        ValueError: K is not a multiple of the block size.
    """
    tensor_scale = block_tensor_scale(x, to, tensor_scale)
    wide = x.float().unflatten(-1, (-1, BLOCK_SIZE[to]))
    largest = wide.abs().amax(dim=-1, keepdim=True)
    if to == "mxfp8":
        mantissa, exponent = torch.frexp((largest / FORMAT_MAX["fp8"]).clamp(min=2.0**-126))  # mantissa in [0.5, 1)
        exponent = exponent - (mantissa == 0.5).int() + 127
        scale = exponent[..., 0].clamp(max=254).to(torch.uint8).view(torch.float8_e8m0fnu)
        values = round_to_format(wide, _e8m0_to_float(scale)[..., None], "fp8")
        return BlockQuantTensor(to, values.flatten(-2), scale, tensor_scale)
    coarse = (largest / (E2M1[-1] * tensor_scale)).clamp(max=FORMAT_MAX["fp8"]).to(FORMAT_DTYPE["fp8"])
    values = wide / (coarse.float() * tensor_scale).clamp(min=1e-30)  # a scale of zero restores zeros in any case
    return BlockQuantTensor(to, _pack_e2m1(values.flatten(-2)), coarse[..., 0], tensor_scale)


def _pack_e2m1(values: Tensor) -> Tensor:
    """float32 [..., K] rounded to E2M1 with ties to even, clipped at 6, two to a byte."""
    magnitude = values.abs()
    code = torch.zeros_like(values, dtype=torch.uint8)
    for bound, inclusive in _E2M1_BOUNDS:
        code += (magnitude >= bound) if inclusive else (magnitude > bound)
    code |= torch.signbit(values).to(torch.uint8) << 3
    return code[..., ::2] | code[..., 1::2] << 4


def _unpack_e2m1(packed: Tensor) -> Tensor:
    code = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2).int()
    # arithmetic instead of a table: copying a table to the device is forbidden in CUDA graphs
    exponent, mantissa = (code >> 1) & 3, (code & 1).float()
    magnitude = (mantissa + 2 * exponent.clamp(max=1)) * (1 << exponent.clamp(min=1)).float() / 4
    return magnitude * (1 - 2 * (code >> 3)).float()


def _e8m0_to_float(scale: Tensor) -> Tensor:
    """E8M0 as float32: its byte is float32's exponent, except 2^-127, which is subnormal there."""
    exponent = scale.view(torch.uint8).int()
    return (exponent << 23).clamp(min=1 << 22).view(torch.float32)


@dataclass(frozen=True)
class Sparse24:
    """A 2:4 sparse weight [N, K]: with its zeros, or compressed by cuSPARSELt.

    scale: float32 [N, 1] where data is float8, else None. shape: (N, K).
    """

    data: Tensor
    scale: Tensor | None
    shape: tuple[int, int]
    compressed: bool


Weight = Tensor | QuantTensor | Sparse24 | BlockQuantTensor


def tensors_of(weight: Weight) -> list[Tensor]:
    """The tensors that a weight consists of."""
    parts: Iterable[object] = (weight,) if isinstance(weight, Tensor) else vars(weight).values()
    return [x for x in parts if isinstance(x, Tensor)]


KEY_HEADROOM = 1.5
"""How much larger than in a scene's first chunk keys may become before they are clipped."""
VALUE_HEADROOM = 16.0


@dataclass(frozen=True)
class KVScales:
    """The scales of one scene's 8-bit KV cache: (k - key_mean) / key_gain in int8, v / value in float8 e4m3.

    Subtracting a head's mean key adds the same to all scores of a query, which softmax ignores, and narrows the range
    (Zhang et al. 2024, SageAttention, arXiv 2410.02367). Queries are multiplied by key_gain, so that a strong channel
    does not cost the others precision (Xiao et al. 2022, SmoothQuant, arXiv 2211.10438).

    The scales apply to rotated keys and must hold for all later chunks. Therefore channels that rotate with time keep
    their mean, and the two channels of a rotated pair share one gain.

    key_mean, key_gain: float32 [B, heads, head_dim]; value: float32 [B, heads].
    """

    key_mean: Tensor
    key_gain: Tensor
    value: Tensor

    def calibrate(self, keys: Tensor, values: Tensor) -> None:
        """Set the scales from rotated keys and values [B, S, heads, head_dim], with headroom for later chunks.

        Headroom costs values nothing until they fall below 2^-6, since float8 rounds relative to magnitude. It costs
        keys one bit per doubling.
        """
        keys = keys.float()
        mean = keys.mean(dim=1)
        mean[..., : 2 * axis_pairs(keys.shape[-1])[0]] = 0
        pairs = (keys - mean[:, None]).unflatten(-1, (-1, 2)).norm(dim=-1).amax(dim=1)
        self.key_mean.copy_(mean)
        gain = pairs.clamp(min=1e-12).repeat_interleave(2, dim=-1) * (KEY_HEADROOM / FORMAT_MAX["int8"])
        self.key_gain.copy_(gain)
        largest = values.float().abs().amax(dim=(1, 3))
        self.value.copy_(largest.clamp(min=1e-12) * (VALUE_HEADROOM / FORMAT_MAX["fp8"]))

    def quantise_keys(self, keys: Tensor, out: Tensor) -> None:
        """Write rotated keys to int8 `out`, both [B, S, heads, head_dim]."""
        out.copy_(round_to_format(keys.float() - self.key_mean[:, None], self.key_gain[:, None], "int8"))
