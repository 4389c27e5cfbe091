"""A product in 8 bits whose result comes activated and in 8 bits, which PyTorch has no call for: cuBLASLt's epilogue.

    y8 = round(gelu((x8 w8^T) x_scale w_scale + bias) / scale)

all in float8 e4m3 with one scale a matrix, so that the widest activations of a transformer never reach memory in 16
bits. NVIDIA's manual of cuBLAS, "cublasLtMatmul", names the attributes that are set here by number.
"""

import ctypes
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.ops.linear import STORED, Fixed, QuantTensor, first_line

WORKSPACE_BYTES = 32 << 20
COMPUTE_32F, REAL_32F, REAL_16BF, REAL_8F_E4M3 = 68, 0, 14, 28
TRANSPOSED, EPILOGUE, BIAS_POINTER, A_SCALE, B_SCALE, D_SCALE, FAST_ACCUM, BIAS_TYPE = 3, 7, 8, 17, 18, 20, 25, 26
GELU_BIAS = 36
MAX_WORKSPACE = 1


class _Heuristic(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = (
        ("algorithm", ctypes.c_uint64 * 8),
        ("workspace", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    )


@cache
def _library() -> ctypes.CDLL:
    """The one that PyTorch has loaded."""
    return ctypes.CDLL(f"libcublasLt.so.{str(torch.version.cuda).split('.')[0]}")


def _call(name: str, *arguments: object) -> None:
    """Raises RuntimeError, with cuBLAS's status."""
    if status := getattr(_library(), name)(*arguments):
        raise RuntimeError(f"{name} returned status {status}")


def _made(name: str, *arguments: object) -> ctypes.c_void_p:
    out = ctypes.c_void_p()
    _call(name, ctypes.byref(out), *arguments)
    return out


class _Plan:
    """Descriptors of one shape, [rows, depth] by [width, depth], and the algorithm that cuBLASLt proposes for it."""

    def __init__(self, rows: int, width: int, depth: int) -> None:
        self.handle = _made("cublasLtCreate")
        self.product = _made("cublasLtMatmulDescCreate", COMPUTE_32F, REAL_32F)
        self.set(TRANSPOSED, ctypes.c_int32(1))
        self.set(FAST_ACCUM, ctypes.c_int8(1))
        self.set(EPILOGUE, ctypes.c_int32(GELU_BIAS))
        self.set(BIAS_TYPE, ctypes.c_int32(REAL_16BF))
        # cuBLAS counts along columns: what is [rows, depth] here is [depth, rows] there
        self.weight, self.x = self._layout(REAL_8F_E4M3, depth, width), self._layout(REAL_8F_E4M3, depth, rows)
        self.unread, self.out = self._layout(REAL_16BF, width, rows), self._layout(REAL_8F_E4M3, width, rows)
        preference = _made("cublasLtMatmulPreferenceCreate")
        most = ctypes.c_size_t(WORKSPACE_BYTES)
        attribute = (preference, MAX_WORKSPACE, ctypes.byref(most), ctypes.c_size_t(ctypes.sizeof(most)))
        _call("cublasLtMatmulPreferenceSetAttribute", *attribute)
        self.found, count = _Heuristic(), ctypes.c_int()
        layouts = (self.weight, self.x, self.unread, self.out)
        request = (self.handle, self.product, *layouts, preference, 1, ctypes.byref(self.found), ctypes.byref(count))
        _call("cublasLtMatmulAlgoGetHeuristic", *request)
        _call("cublasLtMatmulPreferenceDestroy", preference)
        if not count.value:
            raise RuntimeError("cuBLASLt has no algorithm")

    @staticmethod
    def _layout(kind: int, rows: int, columns: int) -> ctypes.c_void_p:
        sizes = (ctypes.c_uint64(rows), ctypes.c_uint64(columns), ctypes.c_int64(rows))
        return _made("cublasLtMatrixLayoutCreate", kind, *sizes)

    def set(self, attribute: int, value: ctypes.c_int8 | ctypes.c_int32 | ctypes.c_uint64) -> None:
        size = ctypes.c_size_t(ctypes.sizeof(value))
        _call("cublasLtMatmulDescSetAttribute", self.product, attribute, ctypes.byref(value), size)


@cache
def _plan(device: torch.device, rows: int, width: int, depth: int) -> _Plan:
    """Kept for good: shapes are few, and descriptors are small and of the host."""
    with torch.cuda.device(device):
        return _Plan(rows, width, depth)


def _launch(x: Tensor, weight: Tensor, bias: Tensor, scales: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """The product, [rows, width] in float8; scales of x and of the weight, and what the result is multiplied by."""
    (rows, depth), width = x.shape, len(weight)
    plan = _plan(x.device, rows, width, depth)
    out = torch.empty(rows, width, dtype=STORED["fp8"], device=x.device)
    workspace = torch.empty(plan.found.workspace, dtype=torch.uint8, device=x.device)
    pointers = {A_SCALE: scales[1], B_SCALE: scales[0], D_SCALE: scales[2], BIAS_POINTER: bias}
    for attribute, tensor in pointers.items():
        plan.set(attribute, ctypes.c_uint64(tensor.data_ptr()))
    one, zero = ctypes.c_float(1), ctypes.c_float(0)
    at = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (weight, x, bias, out, workspace)]
    _call(
        "cublasLtMatmul",
        *(plan.handle, plan.product, ctypes.byref(one), at[0], plan.weight, at[1], plan.x, ctypes.byref(zero)),
        # times zero, so never read, but it must not be the result's place
        *(at[2], plan.unread, at[3], plan.out, ctypes.byref(plan.found.algorithm)),
        *(at[4], ctypes.c_size_t(plan.found.workspace)),
        ctypes.c_void_p(torch.cuda.current_stream(x.device).cuda_stream),
    )
    return out


@cache
def gelu_unsupported_reason(device: torch.device) -> str | None:
    """Why there is no such product on this device; None if there is. Asked of the device, once."""
    if device.type != "cuda":
        return "needs a GPU"
    try:
        x = torch.full((16, 32), 2.0, device=device).to(STORED["fp8"])
        bias = torch.linspace(-70, 10, 16, device=device, dtype=torch.bfloat16)
        scale = torch.full((1,), 0.5, device=device)
        out = _launch(x, x, bias, (scale, scale, 1 / scale)).float() * scale
    except (OSError, RuntimeError) as error:
        return first_line(error)
    expected = F.gelu(32.0 + bias.float(), approximate="tanh").expand_as(out)
    return None if torch.allclose(out, expected, rtol=0.07, atol=0.1) else "wrong result"


def gelu_product(x: QuantTensor, weight: QuantTensor, bias: Tensor, into: Fixed) -> QuantTensor | None:
    """GELU (tanh form) of x [R, K] times weight [N, K] transposed plus bias bfloat16 [N], rounded to float8: [R, N].

    None where it cannot be had: another format, a scale a row, sizes that are no multiple of 16, another device.
    """
    fits = x.one_scale and weight.one_scale and {x.format, weight.format, into.format} == {"fp8"}
    sizes = not any(size % 16 for size in weight.data.shape) and x.data.is_contiguous()
    if not (fits and sizes and bias.dtype == torch.bfloat16) or gelu_unsupported_reason(x.data.device) is not None:
        return None
    return QuantTensor(_launch(x.data, weight.data, bias, (x.scale, weight.scale, into.inverse)), into.scale)
