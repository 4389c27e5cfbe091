"""Projections by themselves: what they hold, what they want their input rounded to, and fixed scales."""

import pytest
import torch
from torch import Tensor, nn

from engine.config import QuantScheme
from engine.ops.quant import FixedScale, QuantTensor
from engine.transforms.low_bit import HEADROOM, Policy, Projection, WeightFormat, bytes_of

SCHEMES: tuple[QuantScheme | None, ...] = (
    None, "fp8", "fp8-tensor", "int8", "mxfp8", "nvfp4", "fp8-weights", "int8-weights",
)  # fmt: skip


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def layer(width: int = 96, depth: int = 64, seed: int = 1) -> nn.Linear:
    made = nn.Linear(depth, width)
    with torch.no_grad():
        made.weight.copy_(random(width, depth, seed=seed))
    return made.requires_grad_(False)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("sparse", [False, True])
def test_a_changed_weight_arrives_by_refresh_in_place(scheme: QuantScheme | None, sparse: bool) -> None:
    if sparse and scheme not in (None, "fp8"):
        return
    x, linear = random(20, 64), layer()
    projection = Projection([linear], WeightFormat(scheme, sparse))
    weight = projection.weight
    projection.release(keep_on_host=True)
    with torch.no_grad():
        linear.weight.copy_(random(96, 64, seed=5))
    projection.refresh()
    assert projection.weight is weight
    expected = Projection([layer(seed=5)], WeightFormat(scheme, sparse))(x)
    assert torch.equal(projection(x), expected)


def test_what_the_kernel_before_rounds_to() -> None:
    formats = {scheme: Projection([layer()], WeightFormat(scheme)).input_format for scheme in SCHEMES}
    assert formats == {scheme: scheme if scheme in ("fp8", "int8") else None for scheme in SCHEMES}


@pytest.mark.parametrize("scheme", ["fp8", "fp8-tensor", "int8"])
def test_a_fixed_scale_is_that_of_the_largest_input_seen_with_room(scheme: QuantScheme) -> None:
    projection, largest = Projection([layer()], WeightFormat(scheme)), 0.0
    projection.start_calibration()
    assert projection.input_format is None, "to be watched, inputs must come as they are"
    for seed in range(3):
        x = random(20, 64, seed=seed)
        largest = max(largest, float(x.abs().max()))
        projection(x)
    projection.finish_calibration()
    fixed = projection.input_format
    assert isinstance(fixed, FixedScale) and fixed.scale.shape == (1,)
    assert float(fixed.scale) == pytest.approx(
        largest * HEADROOM[fixed.format] / {"fp8": 448, "int8": 127}[fixed.format], rel=1e-6
    )
    x = random(20, 64, seed=7)
    rounded = projection.quantised(x)
    assert rounded.per_tensor and torch.equal(projection(rounded), projection(x))
    expected = x @ layer().weight.t()
    assert (projection(x) - expected).norm() / expected.norm() < 0.05


def test_a_fixed_scale_in_nvfp4() -> None:
    projection, x = Projection([layer()], WeightFormat("nvfp4")), random(20, 64)
    found = projection(x)
    projection.start_calibration()
    projection(x)
    projection.finish_calibration()
    fixed, expected = projection(x), x @ layer().weight.t()
    assert not torch.equal(found, fixed)
    assert (fixed - expected).norm() / expected.norm() < 0.2


@pytest.mark.parametrize("scheme", [None, "mxfp8", "fp8-weights"])
def test_nothing_is_watched_where_inputs_have_no_scale(scheme: QuantScheme | None) -> None:
    projection = Projection([layer()], WeightFormat(scheme))
    projection.start_calibration()
    before = projection(random(4, 64))
    projection.finish_calibration()
    assert projection.scale is None and torch.equal(projection(random(4, 64)), before)


def test_without_an_input_seen_scales_stay_each_inputs_own() -> None:
    projection = Projection([layer()], WeightFormat("fp8"))
    projection.start_calibration()
    projection.finish_calibration()
    assert projection.input_format == "fp8"
    assert not projection.quantised(random(4, 64)).per_tensor


def test_one_scale_for_the_matrix() -> None:
    weight = Projection([layer()], WeightFormat("fp8-tensor")).weight
    assert isinstance(weight, QuantTensor) and weight.per_tensor


@pytest.mark.parametrize(
    ("scheme", "bits"), [(None, 32), ("fp8", 8), ("mxfp8", 8 + 8 / 32), ("nvfp4", 4 + 8 / 16), ("int8-weights", 8)]
)
def test_memory(scheme: QuantScheme | None, bits: float) -> None:
    projection = Projection([layer()], WeightFormat(scheme))
    scales = 4 * 96 if scheme in ("fp8", "int8-weights") else 4 if scheme in ("mxfp8", "nvfp4") else 0
    assert bytes_of({"x": projection}) == 96 * 64 * bits / 8 + scales


@pytest.mark.parametrize("scheme", ["int8", "fp8-tensor", "nvfp4", "fp8-weights"])
def test_sparse_weights_are_as_they_are_or_in_fp8(scheme: QuantScheme) -> None:
    with pytest.raises(ValueError, match=f"not in {scheme}"):
        Policy(scheme, sparse=frozenset({"up"})).of(0, "up")


def test_what_a_weight_format_says_of_inputs() -> None:
    assert WeightFormat("fp8-tensor").input_format == WeightFormat("fp8").input_format == "fp8"
    assert WeightFormat("int8").input_format == "int8"
    assert (
        WeightFormat().input_format is WeightFormat("int8-weights").input_format is WeightFormat("nvfp4").input_format
    )
    assert WeightFormat("nvfp4").scales_inputs and not WeightFormat("mxfp8").scales_inputs
