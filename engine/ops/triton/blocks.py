"""Quantisation to block formats in one pass over memory; the reference is in `engine.ops.quant`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.ops.quant import BLOCK_SIZE, FORMAT_DTYPE, BlockFormat, BlockQuantTensor, block_tensor_scale


@triton.jit
def _e2m1(value):
    """The 4-bit code of a value: how many bounds between magnitudes it exceeds, ties to even, and the sign."""
    size = tl.abs(value)
    code = (size > 0.25).to(tl.int32) + (size >= 0.75).to(tl.int32) + (size > 1.25).to(tl.int32)
    code += (size >= 1.75).to(tl.int32) + (size > 2.5).to(tl.int32) + (size >= 3.5).to(tl.int32)
    code += (size > 5.0).to(tl.int32)
    return code | (value < 0).to(tl.int32) << 3


@triton.jit
def _round(x, data, scales, tensor_scale, width, PACKED: tl.constexpr, SIZE: tl.constexpr, COUNT: tl.constexpr):
    """COUNT blocks of SIZE values of one row."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * COUNT + tl.arange(0, COUNT)
    at = block[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    inside = block < width // SIZE
    value = tl.load(x + row * width + at, mask=inside[:, None], other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(value), axis=1)
    if PACKED:
        whole = tl.load(tensor_scale)
        coarse = tl.minimum(tl.div_rn(largest, tl.full((COUNT,), 6.0 * whole, tl.float32)), 448.0).to(tl.float8e4nv)
        tl.store(scales + row * (width // SIZE) + block, coarse, mask=inside)
        unit = tl.maximum(coarse.to(tl.float32) * whole, 1e-30)
        code = _e2m1(tl.div_rn(value, tl.broadcast_to(unit[:, None], (COUNT, SIZE))))
        low, high = tl.split(tl.reshape(code, (COUNT, SIZE // 2, 2)))
        byte = block[:, None] * (SIZE // 2) + tl.arange(0, SIZE // 2)[None, :]
        tl.store(data + row * (width // 2) + byte, (low | high << 4).to(tl.uint8), mask=inside[:, None])
    else:
        # the exponent of the next power of two, from the bits of a float32
        bits = tl.maximum(tl.div_rn(largest, tl.full((COUNT,), 448.0, tl.float32)), 1.1754943508222875e-38).to(
            tl.int32, bitcast=True
        )
        exponent = (bits >> 23) + ((bits & 0x7FFFFF) > 0).to(tl.int32)
        factor = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
        tl.store(scales + row * (width // SIZE) + block, exponent.to(tl.uint8), mask=inside)
        scaled = tl.minimum(tl.maximum(value * factor[:, None], -448.0), 448.0)
        tl.store(data + row * width + at, scaled.to(tl.float8e4nv), mask=inside[:, None])


def quantise_blocks(x: Tensor, to: BlockFormat, tensor_scale: Tensor | None = None) -> BlockQuantTensor:
    """See `engine.ops.quant.quantise_blocks`. Without a known `tensor_scale`, nvfp4 takes a pass more to find it."""
    tensor_scale = block_tensor_scale(x, to, tensor_scale)
    x = x.contiguous()
    width, size = x.shape[-1], BLOCK_SIZE[to]
    rows, packed = x.numel() // width, to == "nvfp4"
    data = torch.empty(
        *x.shape[:-1],
        width // 2 if packed else width,
        dtype=torch.uint8 if packed else FORMAT_DTYPE["fp8"],
        device=x.device,
    )
    scales = torch.empty(
        *x.shape[:-1], width // size, dtype=FORMAT_DTYPE["fp8"] if packed else torch.uint8, device=x.device
    )
    count = min(128, triton.next_power_of_2(width // size))
    _round[(rows, triton.cdiv(width // size, count))](
        x, data, scales, tensor_scale, width, PACKED=packed, SIZE=size, COUNT=count, num_warps=4
    )
    return BlockQuantTensor(to, data, scales if packed else scales.view(torch.float8_e8m0fnu), tensor_scale)
