"""Quantised types: what is rounded, and what a dequantised tensor is."""

import pytest
import torch
from torch import Tensor

from engine.ops.quant import (
    FORMAT_DTYPE,
    FORMAT_MAX,
    BlockQuantTensor,
    FixedScale,
    Format,
    QuantTensor,
    Sparse24,
    block_tensor_scale,
    quantise,
    quantise_blocks,
    round_to_format,
    tensor_scale,
    tensors_of,
)

FORMATS: tuple[Format, ...] = ("fp8", "int8")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


@pytest.mark.parametrize("to", FORMATS)
def test_each_row_gets_the_scale_of_its_largest_magnitude(to: Format) -> None:
    x = random(2, 5, 32) * torch.logspace(-3, 3, 5)[:, None]
    found = quantise(x, to)
    assert found.format == to and not found.per_tensor
    assert found.data.dtype == FORMAT_DTYPE[to] and found.scale.shape == (2, 5, 1)
    assert torch.equal(found.scale, x.abs().amax(-1, keepdim=True) / FORMAT_MAX[to])
    assert torch.equal(found.data.float().abs().amax(-1), torch.full((2, 5), FORMAT_MAX[to]))
    assert (found.dequantise() - x).norm() / x.norm() < {"fp8": 0.04, "int8": 0.01}[to]


@pytest.mark.parametrize("to", FORMATS)
def test_zeros_stay_zeros(to: Format) -> None:
    found = quantise(torch.zeros(2, 8), to)
    assert not found.dequantise().any() and torch.isfinite(found.scale).all()


@pytest.mark.parametrize("to", FORMATS)
def test_a_fixed_scale_broadcasts(to: Format) -> None:
    """One for a tensor, or one for each channel; the 8-bit KV cache and packed values round by the latter."""
    x = 3 * random(4, 6, 2, 8)
    scale = torch.rand(4, 1, 2, 1, generator=torch.Generator().manual_seed(1)) + 0.01
    found = quantise(x, FixedScale(to, scale))
    expected = torch.stack([round_to_format(x[i], scale[i], to).float() for i in range(4)])
    assert torch.equal(found.data.float(), expected)
    assert found.data.float().abs().max() <= FORMAT_MAX[to]


def test_integers_round_to_the_nearest_with_ties_to_even() -> None:
    x = torch.tensor([0.4, 0.5, 0.6, 1.5, 2.5, -0.5, -1.5, 126.6, 127.4, 500.0, -500.0])
    assert round_to_format(x, torch.ones(1), "int8").tolist() == [0, 0, 1, 2, 2, 0, -2, 127, 127, 127, -127]


def test_the_inverse_of_a_fixed_scale() -> None:
    fixed = FixedScale("fp8", torch.tensor([0.25]))
    assert fixed.inverse.tolist() == [4.0] and fixed.inverse is fixed.inverse


def test_tensor_scale_fits_the_largest_value_of_all() -> None:
    x = random(3, 16)
    found = quantise(x, tensor_scale(x, "int8"))
    assert found.per_tensor and int(found.data.abs().max()) == 127


def test_a_known_block_scale_is_taken_in_nvfp4_alone() -> None:
    x, known = random(2, 64), torch.tensor([0.5])
    assert block_tensor_scale(x, "nvfp4", known) is known
    assert block_tensor_scale(x, "mxfp8", known).tolist() == [1.0]
    assert float(block_tensor_scale(x, "nvfp4")) == pytest.approx(float(x.abs().max()) / (448 * 6))
    with pytest.raises(ValueError, match="multiple of 32, got 40"):
        block_tensor_scale(random(2, 40), "mxfp8", known)


def test_tensors_of_every_kind_of_weight() -> None:
    weight = random(4, 32)
    rows, blocks = quantise(weight, "int8"), quantise_blocks(weight, "nvfp4")
    assert isinstance(blocks, BlockQuantTensor) and isinstance(rows, QuantTensor)
    for kind, count in ((weight, 1), (rows, 2), (blocks, 3), (Sparse24(weight, None, (4, 32), compressed=False), 1)):
        assert len(tensors_of(kind)) == count
