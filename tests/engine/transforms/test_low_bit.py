"""Projections by themselves: what they hold, what they want their input rounded to, and fixed scales."""

import pytest
import torch
from torch import Tensor, nn

from engine.config import QuantScheme
from engine.ops.linear import Fixed, QuantTensor
from engine.transforms.low_bit import HEADROOM, Policy, Projection, WeightFormat, bytes_of

FORMS: tuple[QuantScheme | None, ...] = (
    None, "fp8", "fp8-tensor", "int8", "mxfp8", "nvfp4", "fp8-weights", "int8-weights",
)  # fmt: skip


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def layer(width: int = 96, depth: int = 64, seed: int = 1) -> nn.Linear:
    made = nn.Linear(depth, width)
    with torch.no_grad():
        made.weight.copy_(random(width, depth, seed=seed))
    return made.requires_grad_(False)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sparse", [False, True])
def test_a_changed_weight_arrives_by_refresh_in_place(form: QuantScheme | None, sparse: bool) -> None:
    if sparse and form not in (None, "fp8"):
        return
    x, linear = random(20, 64), layer()
    projection = Projection([linear], WeightFormat(form, sparse))
    held = projection.weight
    projection.release(keep_on_host=True)
    with torch.no_grad():
        linear.weight.copy_(random(96, 64, seed=5))
    projection.refresh()
    assert projection.weight is held
    expected = Projection([layer(seed=5)], WeightFormat(form, sparse))(x)
    assert torch.equal(projection(x), expected)


def test_what_the_kernel_before_is_told() -> None:
    told = {form: Projection([layer()], WeightFormat(form)).into for form in FORMS}
    assert told == {form: form if form in ("fp8", "int8") else None for form in FORMS}


@pytest.mark.parametrize("form", ["fp8", "fp8-tensor", "int8"])
def test_a_fixed_scale_is_that_of_the_largest_input_seen_with_room(form: QuantScheme) -> None:
    projection, largest = Projection([layer()], WeightFormat(form)), 0.0
    projection.watch()
    assert projection.into is None, "to be watched, inputs must come as they are"
    for seed in range(3):
        x = random(20, 64, seed=seed)
        largest = max(largest, float(x.abs().max()))
        projection(x)
    projection.settle()
    into = projection.into
    assert isinstance(into, Fixed) and into.scale.shape == (1,)
    assert float(into.scale) == pytest.approx(
        largest * HEADROOM[into.format] / {"fp8": 448, "int8": 127}[into.format], rel=1e-6
    )
    x = random(20, 64, seed=7)
    rounded = projection.rounded(x)
    assert rounded.one_scale and torch.equal(projection(rounded), projection(x))
    expected = x @ layer().weight.t()
    assert (projection(x) - expected).norm() / expected.norm() < 0.05


def test_a_fixed_scale_in_nvfp4() -> None:
    projection, x = Projection([layer()], WeightFormat("nvfp4")), random(20, 64)
    found = projection(x)
    projection.watch()
    projection(x)
    projection.settle()
    fixed, expected = projection(x), x @ layer().weight.t()
    assert not torch.equal(found, fixed)
    assert (fixed - expected).norm() / expected.norm() < 0.2


@pytest.mark.parametrize("form", [None, "mxfp8", "fp8-weights"])
def test_nothing_is_watched_where_inputs_have_no_scale(form: QuantScheme | None) -> None:
    projection = Projection([layer()], WeightFormat(form))
    projection.watch()
    before = projection(random(4, 64))
    projection.settle()
    assert projection.scale is None and torch.equal(projection(random(4, 64)), before)


def test_without_an_input_seen_scales_stay_each_inputs_own() -> None:
    projection = Projection([layer()], WeightFormat("fp8"))
    projection.watch()
    projection.settle()
    assert projection.into == "fp8"
    assert not projection.rounded(random(4, 64)).one_scale


def test_one_scale_for_the_matrix() -> None:
    weight = Projection([layer()], WeightFormat("fp8-tensor")).weight
    assert isinstance(weight, QuantTensor) and weight.one_scale


@pytest.mark.parametrize(
    ("form", "bits"), [(None, 32), ("fp8", 8), ("mxfp8", 8 + 8 / 32), ("nvfp4", 4 + 8 / 16), ("int8-weights", 8)]
)
def test_memory(form: QuantScheme | None, bits: float) -> None:
    projection = Projection([layer()], WeightFormat(form))
    scales = 4 * 96 if form in ("fp8", "int8-weights") else 4 if form in ("mxfp8", "nvfp4") else 0
    assert bytes_of({"x": projection}) == 96 * 64 * bits / 8 + scales


@pytest.mark.parametrize("form", ["int8", "fp8-tensor", "nvfp4", "fp8-weights"])
def test_sparse_weights_are_as_they_are_or_in_fp8(form: QuantScheme) -> None:
    with pytest.raises(ValueError, match=f"not in {form}"):
        Policy(form, sparse=frozenset({"up"})).of(0, "up")
