"""Products in 8 bits: scales a row or a matrix, found or fixed, both operands or the weights alone."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.config import QuantScheme
from engine.ops import linear
from engine.ops.cublas import gelu_unsupported_reason
from engine.ops.dispatch import rescale
from engine.ops.linear import fp8_unsupported_reason, quantised_linear, weight_only_linear
from engine.ops.quant import (
    FORMAT_MAX,
    FixedScale,
    Format,
    OutputFormat,
    QuantTensor,
    quantise,
    tensor_scale,
)
from engine.transforms.low_bit import Projection, WeightFormat

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
FORMATS: tuple[Format, ...] = ("fp8", "int8")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(DEVICE)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


def output_format(to: Format, x: Tensor, kind: str) -> OutputFormat:
    """`rows`; `tensor`, which fits; or `fixed`, which leaves room above."""
    if kind == "rows":
        return to
    found = tensor_scale(x, to)
    return FixedScale(to, found.scale * (1.5 if kind == "fixed" else 1.0))


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("of_x", ["rows", "tensor", "fixed"])
@pytest.mark.parametrize("of_weight", ["rows", "tensor"])
def test_product_is_that_of_the_restored_operands(to: Format, of_x: str, of_weight: str) -> None:
    x, weight, bias = random(2, 32, 64), random(48, 64, seed=1), random(48, seed=2)
    a, b = quantise(x, output_format(to, x, of_x)), quantise(weight, output_format(to, weight, of_weight))
    assert (a.per_tensor, b.per_tensor) == (of_x != "rows", of_weight != "rows")
    found = quantised_linear(a, b, bias, DTYPE)
    assert found.shape == (2, 32, 48)
    assert error(found, a.dequantise() @ b.dequantise().t() + bias) < (1e-2 if ON_GPU else 1e-5)
    assert error(found, x @ weight.t() + bias) < {"fp8": 0.05, "int8": 0.04}[to]


@pytest.mark.parametrize("to", FORMATS)
def test_a_fixed_scale_clips_what_goes_beyond(to: Format) -> None:
    x = torch.tensor([[0.5, -1.0, 3.0, -100.0]])
    found = quantise(x, FixedScale(to, torch.tensor([1 / FORMAT_MAX[to]]))).dequantise()
    torch.testing.assert_close(found, torch.tensor([[0.5, -1.0, 1.0, -1.0]]), rtol=0.02, atol=0)


def test_tensor_scale_is_the_largest_magnitude() -> None:
    x = random(3, 5, 16)
    assert float(tensor_scale(x, "int8").scale) == pytest.approx(float(x.abs().max()) / 127)
    assert float(tensor_scale(torch.zeros(2, 4), "fp8").scale) > 0


@pytest.mark.parametrize("rows", [3, 16, 40, 100])
@pytest.mark.parametrize("to", FORMATS)
def test_weights_alone(to: Format, rows: int) -> None:
    x, weight = random(rows, 200).to(DTYPE), quantise(random(72, 200, seed=1), to)
    found = weight_only_linear(x[None], weight)
    assert found.shape == (1, rows, 72) and found.dtype == DTYPE
    assert error(found[0], x.float() @ weight.dequantise().t()) < (1e-2 if ON_GPU else 1e-5)


@pytest.mark.parametrize("height", [3, 40])
@pytest.mark.parametrize("to", FORMATS if ON_GPU else ["int8"])  # the interpreter reads no float8
def test_kernel_for_few_rows(to: Format, height: int) -> None:
    from engine.ops.triton import linear as kernels

    x, weight = random(height, 200), quantise(random(72, 200, seed=1), to)
    assert error(kernels.small_batch_linear(x, weight), x @ weight.dequantise().t()) < 1e-4
    whole = quantise(weight.dequantise(), output_format(to, weight.dequantise(), "tensor"))
    assert error(kernels.small_batch_linear(x, whole), x @ whole.dequantise().t()) < 1e-4


@pytest.mark.parametrize("shape", [(5, 70), (3, 5000)])
@pytest.mark.parametrize(("rows", "columns"), [("each", "each"), ("one", "each"), ("each", None), (None, "one")])
@pytest.mark.parametrize("dtype", [torch.int32, torch.float32])
def test_rescale(shape: tuple[int, int], rows: str | None, columns: str | None, dtype: torch.dtype) -> None:
    from engine.ops.triton import linear as kernels

    x = (100 * random(*shape)).to(dtype)
    a = None if rows is None else random(shape[0] if rows == "each" else 1, 1, seed=1)
    b = None if columns is None else random(1, shape[1] if columns == "each" else 1, seed=2)
    expected = x.float() * (1 if a is None else a) * (1 if b is None else b)
    plain = rescale(x.cpu(), *(None if s is None else s.cpu() for s in (a, b)), torch.float32)
    torch.testing.assert_close(plain, expected.cpu())
    torch.testing.assert_close(kernels.rescale(x, a, b, torch.float32), expected)


def test_a_device_without_rows_applies_their_scales_to_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that multiplies float8 with one scale only. Its product without scales is made here by hand."""

    def product(a: Tensor, b: Tensor, *, scale_a: Tensor, scale_b: Tensor, out_dtype: torch.dtype, **_: bool) -> Tensor:
        assert scale_a.numel() == scale_b.numel() == 1, "it was told that there are no scales a row"
        return ((a.float() @ b.float()) * scale_a * scale_b).to(out_dtype)

    monkeypatch.setattr(linear, "fp8_unsupported_reason", lambda _, scales: "no" if scales == "rows" else None)
    monkeypatch.setattr(torch, "_scaled_mm", product)
    x, weight = random(32, 64), random(48, 64, seed=1)
    for of_x in ("rows", "fixed"):
        for of_weight in ("rows", "tensor"):
            a, b = quantise(x, output_format("fp8", x, of_x)), quantise(weight, output_format("fp8", weight, of_weight))
            assert error(quantised_linear(a, b, None, torch.bfloat16), a.dequantise() @ b.dequantise().t()) < 1e-2


def test_float32_is_not_given_to_units_that_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "fp8_unsupported_reason", lambda *_: None)
    x, weight = quantise(random(32, 64), "fp8"), quantise(random(48, 64, seed=1), "fp8")
    assert error(quantised_linear(x, weight, None, torch.float32), x.dequantise() @ weight.dequantise().t()) < 1e-5


def test_a_cpu_has_no_float8_products() -> None:
    assert (
        fp8_unsupported_reason(torch.device("cpu"), "rows")
        == fp8_unsupported_reason(torch.device("cpu"), "tensor")
        == "needs a GPU"
    )


@pytest.mark.gpu
def test_a_gpu_with_float8_has_one_of_both() -> None:
    faults = [fp8_unsupported_reason(DEVICE, scales) for scales in ("rows", "tensor")]
    assert (None in faults) == (torch.cuda.get_device_capability() >= (8, 9))


def test_restore_takes_one_scale_or_a_scale_a_row() -> None:
    data = torch.tensor([[1, 2], [3, 4]], dtype=torch.int8)
    assert QuantTensor(data, torch.tensor([[2.0], [0.5]])).dequantise().tolist() == [[2, 4], [1.5, 2]]
    assert QuantTensor(data, torch.tensor([3.0])).dequantise().tolist() == [[3, 6], [9, 12]]


@pytest.mark.parametrize("rows", [16, 40])
@pytest.mark.parametrize("to", ["fp8-tensor", "fp8", "int8"])
def test_a_product_is_activated_and_rounded_as_apart(to: QuantScheme, rows: int) -> None:
    """Where cuBLAS has an epilogue for both, that is what runs."""
    width = 96
    weight, bias = random(width, 64, seed=1).to(DTYPE) / 8, random(width, seed=2).to(DTYPE)
    up = Projection.from_weight(weight, WeightFormat(to), bias)
    x = random(rows, 64).to(DTYPE)
    up.start_calibration()
    up(x)
    up.finish_calibration()
    fixed = up.input_format
    assert isinstance(fixed, FixedScale) and up.bias is not None
    output = FixedScale(fixed.format, torch.full((1,), 8.0 / FORMAT_MAX[fixed.format], device=DEVICE))
    found = up.gelu(up.quantised(x), output)
    assert isinstance(found, QuantTensor) and found.data.shape == (rows, width)
    expected = F.gelu(up(x).float() + up.bias.float(), approximate="tanh")
    assert error(found.dequantise(), expected) < 0.04


def test_a_gpu_with_float8_has_the_epilogue() -> None:
    assert (gelu_unsupported_reason(DEVICE) is None) == (fp8_unsupported_reason(DEVICE, "tensor") is None)
