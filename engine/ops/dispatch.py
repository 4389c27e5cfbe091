"""The operators that have a kernel: the reference on a CPU, the Triton or Hopper kernel on a GPU.

This is the one place that chooses by device. A reference and its kernel have one name and one signature
(tests/engine/ops/test_dispatch.py holds them together), so the names below document themselves in the reference.
References import no kernels, and kernels import from the references only records and constants.
"""

import importlib
from collections.abc import Callable
from functools import cache, wraps
from types import ModuleType
from typing import ParamSpec, Protocol, TypeVar, cast

import torch
from torch import Tensor

from engine.ops import attention, fused, quant
from engine.ops.attention import AttentionOperands
from engine.ops.quant import QuantTensor

P = ParamSpec("P")
T = TypeVar("T")


class _Operand(Protocol):
    @property
    def device(self) -> torch.device: ...


def on_gpu(device: torch.device) -> bool:
    """Whether kernels run on this device."""
    return device.type == "cuda"


@cache
def converts_fp8(device: torch.device) -> bool:
    """Whether Triton can convert float8 e4m3 on this device: from compute capability 8.9 on."""
    return on_gpu(device) and torch.cuda.get_device_capability(device) >= (8, 9)


@cache
def is_hopper(device: torch.device) -> bool:
    return on_gpu(device) and torch.cuda.get_device_capability(device)[0] == 9


@cache
def kernels(name: str) -> ModuleType:
    """A module of `engine.ops.triton`, imported on first use: a CPU installation has no triton."""
    return importlib.import_module(f"engine.ops.triton.{name}")


def _by_device(reference: Callable[P, T], module: str, has_kernel: Callable[..., bool] | None = None) -> Callable[P, T]:
    """`reference`, or the kernel of its name in `engine.ops.triton.<module>` if the first operand is on a GPU.

    has_kernel: called with the operator's arguments where that is not enough to know.
    """

    @wraps(reference)
    def dispatched(*args: P.args, **kwargs: P.kwargs) -> T:
        if has_kernel(*args, **kwargs) if has_kernel else on_gpu(cast(_Operand, args[0]).device):
            kernel: Callable[P, T] = getattr(kernels(module), reference.__name__)
            return kernel(*args, **kwargs)
        return reference(*args, **kwargs)

    return dispatched


def _rescale_has_kernel(x: Tensor, *_: object) -> bool:
    return converts_fp8(x.device) if x.dtype == quant.FORMAT_DTYPE["fp8"] else on_gpu(x.device)


def _small_batch_linear_has_kernel(x: Tensor, weight: QuantTensor) -> bool:
    return on_gpu(x.device) if weight.format == "int8" else converts_fp8(x.device)


def _quantise_blocks_has_kernel(x: Tensor, *_: object) -> bool:
    return converts_fp8(x.device)


add_norm = _by_device(fused.add_norm, "fused")
gelu = _by_device(fused.gelu, "fused")
quantise = _by_device(quant.quantise, "fused")
rms_norm = _by_device(fused.rms_norm, "fused")
qk_norm_rope = _by_device(fused.qk_norm_rope, "fused")
qk_norm_rope_int8 = _by_device(fused.qk_norm_rope_int8, "fused")
store_rotated = _by_device(fused.store_rotated, "fused")

rescale = _by_device(quant.rescale, "linear", _rescale_has_kernel)
small_batch_linear = _by_device(quant.small_batch_linear, "linear", _small_batch_linear_has_kernel)
quantise_blocks = _by_device(quant.quantise_blocks, "blocks", _quantise_blocks_has_kernel)

padded_attention = _by_device(attention.padded_attention, "attention")
pool_blocks = _by_device(attention.pool_blocks, "attention")
choose_blocks = _by_device(attention.choose_blocks, "attention")
pack_values = _by_device(attention.pack_values, "attention")
_attend = _by_device(attention.attend, "attention")


def attend(operands: AttentionOperands) -> Tensor:
    """`engine.ops.attention.attend`; plain dense attention goes to PyTorch except on Hopper.

    There our kernel takes three quarters of the time of PyTorch's best (docs/benchmarks.md).
    """
    if operands.plain and not is_hopper(operands.device):
        return attention.attention(operands.q, operands.k, operands.v)
    return _attend(operands)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`engine.ops.fused.linear_gelu`; on a GPU GELU is computed in the epilogue of cuBLAS's product."""
    if on_gpu(x.device):
        return torch._addmm_activation(bias, x, weight.t(), use_gelu=True)
    return fused.linear_gelu(x, weight, bias)
