"""An 8-bit product with GELU and quantisation in cuBLASLt's epilogue, for which PyTorch has no call.

    y8 = round(gelu((x8 w8^T) x_scale w_scale + bias) / scale)

all in float8 e4m3 with one scale per matrix, so that the widest activations of a transformer are never written in 16
bits. The attributes set here by number are named in NVIDIA's cuBLAS manual, "cublasLtMatmul".
"""

import ctypes
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.ops.dispatch import on_gpu
from engine.ops.linear import first_line
from engine.ops.quant import FORMAT_DTYPE, FixedScale, QuantTensor

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
    """The library that PyTorch has loaded."""
    return ctypes.CDLL(f"libcublasLt.so.{str(torch.version.cuda).split('.')[0]}")


def _call(name: str, *arguments: object) -> None:
    """Raises RuntimeError, with cuBLAS's status."""
    if status := getattr(_library(), name)(*arguments):
        raise RuntimeError(f"{name} returned status {status}")


def _create(name: str, *arguments: object) -> ctypes.c_void_p:
    created = ctypes.c_void_p()
    _call(name, ctypes.byref(created), *arguments)
    return created


class _Plan:
    """Descriptors for x [rows, depth] and a weight [width, depth], and the algorithm that cuBLASLt proposes."""

    def __init__(self, rows: int, width: int, depth: int) -> None:
        self.handle = _create("cublasLtCreate")
        self.product = _create("cublasLtMatmulDescCreate", COMPUTE_32F, REAL_32F)
        self.set(TRANSPOSED, ctypes.c_int32(1))
        self.set(FAST_ACCUM, ctypes.c_int8(1))
        self.set(EPILOGUE, ctypes.c_int32(GELU_BIAS))
        self.set(BIAS_TYPE, ctypes.c_int32(REAL_16BF))
        # cuBLAS is column-major: what is [rows, depth] here is [depth, rows] there
        self.weight, self.x = self._layout(REAL_8F_E4M3, depth, width), self._layout(REAL_8F_E4M3, depth, rows)
        self.unread, self.out = self._layout(REAL_16BF, width, rows), self._layout(REAL_8F_E4M3, width, rows)
        preference = _create("cublasLtMatmulPreferenceCreate")
        limit = ctypes.c_size_t(WORKSPACE_BYTES)
        attribute = (preference, MAX_WORKSPACE, ctypes.byref(limit), ctypes.c_size_t(ctypes.sizeof(limit)))
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
        return _create("cublasLtMatrixLayoutCreate", kind, *sizes)

    def set(self, attribute: int, value: ctypes.c_int8 | ctypes.c_int32 | ctypes.c_uint64) -> None:
        size = ctypes.c_size_t(ctypes.sizeof(value))
        _call("cublasLtMatmulDescSetAttribute", self.product, attribute, ctypes.byref(value), size)


@cache
def _plan(device: torch.device, rows: int, width: int, depth: int) -> _Plan:
    """Never freed: shapes are few, and descriptors are small and in host memory."""
    with torch.cuda.device(device):
        return _Plan(rows, width, depth)


def _launch(x: Tensor, weight: Tensor, bias: Tensor, scales: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """The product, [rows, width] in float8.

    scales: of x, of the weight, and the factor of the result, float32 [1] each.
    """
    (rows, depth), width = x.shape, len(weight)
    plan = _plan(x.device, rows, width, depth)
    out = torch.empty(rows, width, dtype=FORMAT_DTYPE["fp8"], device=x.device)
    workspace = torch.empty(plan.found.workspace, dtype=torch.uint8, device=x.device)
    pointers = {A_SCALE: scales[1], B_SCALE: scales[0], D_SCALE: scales[2], BIAS_POINTER: bias}
    for attribute, tensor in pointers.items():
        plan.set(attribute, ctypes.c_uint64(tensor.data_ptr()))
    one, zero = ctypes.c_float(1), ctypes.c_float(0)
    at = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (weight, x, bias, out, workspace)]
    _call(
        "cublasLtMatmul",
        *(plan.handle, plan.product, ctypes.byref(one), at[0], plan.weight, at[1], plan.x, ctypes.byref(zero)),
        # multiplied by zero and never read, but it must not alias the result
        *(at[2], plan.unread, at[3], plan.out, ctypes.byref(plan.found.algorithm)),
        *(at[4], ctypes.c_size_t(plan.found.workspace)),
        ctypes.c_void_p(torch.cuda.current_stream(x.device).cuda_stream),
    )
    return out


@cache
def gelu_unsupported_reason(device: torch.device) -> str | None:
    """Why this device has no such product; None if it has one. Found once, by trying."""
    if not on_gpu(device):
        return "needs a GPU"
    try:
        x = torch.full((16, 32), 2.0, device=device).to(FORMAT_DTYPE["fp8"])
        bias = torch.linspace(-70, 10, 16, device=device, dtype=torch.bfloat16)
        scale = torch.full((1,), 0.5, device=device)
        out = _launch(x, x, bias, (scale, scale, 1 / scale)).float() * scale
    except (OSError, RuntimeError) as error:
        return first_line(error)
    expected = F.gelu(32.0 + bias.float(), approximate="tanh").expand_as(out)
    return None if torch.allclose(out, expected, rtol=0.07, atol=0.1) else "wrong result"


def linear_gelu_fp8(x: QuantTensor, weight: QuantTensor, bias: Tensor, output: FixedScale) -> QuantTensor | None:
    """GELU (tanh form) of x [R, K] times weight [N, K] transposed plus bias bfloat16 [N], in float8: [R, N].

    None where cuBLASLt cannot do it: other formats, row scales, sizes not a multiple of 16, other devices.
    """
    fits = x.per_tensor and weight.per_tensor and {x.format, weight.format, output.format} == {"fp8"}
    sizes = not any(size % 16 for size in weight.data.shape) and x.data.is_contiguous()
    if not (fits and sizes and bias.dtype == torch.bfloat16) or gelu_unsupported_reason(x.data.device) is not None:
        return None
    return QuantTensor(_launch(x.data, weight.data, bias, (x.scale, weight.scale, output.inverse)), output.scale)
