"""MXFP8 and NVFP4 against the definitions of their formats."""

import math

import pytest
import torch
from torch import Tensor

from engine.ops.blocks import block_linear, blocks_unsupported_reason, swizzled
from engine.ops.dispatch import quantise_blocks
from engine.ops.quant import BLOCK_SIZE, E2M1, BlockFormat, BlockQuantTensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FORMATS: tuple[BlockFormat, ...] = ("mxfp8", "nvfp4")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def e2m1(code: int) -> float:
    """A 4-bit value by the definition: sign, two bits of exponent with bias 1, one of mantissa."""
    sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
    magnitude = mantissa * 0.5 if exponent == 0 else 2.0 ** (exponent - 1) * (1 + mantissa / 2)
    return -magnitude if sign else magnitude


def test_every_code_of_e2m1_is_restored() -> None:
    """Two to a byte, the first in the lower half."""
    codes = torch.arange(16, dtype=torch.uint8)
    packed = (codes[::2] | codes[1::2] << 4)[None]
    one = torch.ones(1, 1).to(torch.float8_e4m3fn)
    restored = BlockQuantTensor("nvfp4", packed, one, torch.ones(1)).dequantise()[0]
    assert restored.tolist() == [e2m1(code) for code in range(16)]
    assert [e2m1(code) for code in range(8)] == list(E2M1)


def test_nvfp4_rounds_to_the_nearest_and_ties_to_even() -> None:
    values = torch.tensor([6.0, 0.2, 0.25, 0.3, 0.75, 1.25, 1.75, 2.5, 3.5, 4.9, 5.0, 5.1, -0.25, -0.75, -5.0, -6.0])
    found = quantise_blocks(values[None], "nvfp4", torch.tensor([1 / 448])).dequantise()[0] * 1.0
    # the block's scale is 6 / 6 / (1 / 448), E4M3's largest, so the values are rounded as they stand
    expected = [6.0, 0.0, 0.0, 0.5, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 4.0, 6.0, 0.0, -1.0, -4.0, -6.0]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_mxfp8_scales_are_powers_of_two_that_clip_nothing() -> None:
    x = random(5, 128) * torch.tensor([1e-6, 1e-3, 1.0, 1e3, 1e6])[:, None]
    blocks = quantise_blocks(x, "mxfp8")
    exponents = blocks.scale.view(torch.uint8).int() - 127
    largest = x.unflatten(1, (-1, 32)).abs().amax(-1)
    for exponent, most in zip(exponents.flatten().tolist(), largest.flatten().tolist(), strict=True):
        assert 224 < most / 2.0**exponent <= 448
    powers = torch.tensor([[2.0**e for e in row] for row in exponents.tolist()])
    expected = (blocks.data.float().unflatten(1, (-1, 32)) * powers[..., None]).flatten(1)
    assert torch.equal(blocks.dequantise(), expected)
    assert ((blocks.dequantise() - x).abs() <= x.abs() / 16 + 2.0**-10 * largest.repeat_interleave(32, 1) / 224).all()


def test_mxfp8_at_a_power_of_two() -> None:
    """448 fits with scale one, a little more does not."""
    x = torch.zeros(2, 32)
    x[0, 3], x[1, 3] = 448.0, 449.0
    assert (quantise_blocks(x, "mxfp8").scale.view(torch.uint8).flatten() - 127).tolist() == [0, 1]


def test_nvfp4_scales_of_blocks_are_relative_to_the_matrix() -> None:
    x = random(4, 64)
    x[0, 0] = 100.0
    blocks = quantise_blocks(x, "nvfp4")
    assert float(blocks.tensor_scale) == pytest.approx(100 / (448 * 6))
    assert float(blocks.scale[0, 0]) == 448
    assert blocks.data.shape == (4, 32) and blocks.scale.shape == (4, 4)
    unit = blocks.scale.float() * blocks.tensor_scale
    largest = x.unflatten(1, (-1, 16)).abs().amax(-1)
    assert ((6 * unit / largest).log2().abs() < math.log2(1 + 1 / 15)).all()


@pytest.mark.parametrize("form", FORMATS)
def test_zeros_stay_zeros(form: BlockFormat) -> None:
    x = random(3, 64)
    x[1] = 0
    assert not quantise_blocks(x, form).dequantise()[1].any()
    assert not quantise_blocks(torch.zeros(2, 32), form).dequantise().any()


@pytest.mark.parametrize("form", FORMATS)
def test_what_is_restored_is_rounded_to_itself(form: BlockFormat) -> None:
    once = quantise_blocks(random(6, 96), form)
    again = quantise_blocks(once.dequantise(), form, once.tensor_scale if form == "nvfp4" else None)
    torch.testing.assert_close(again.dequantise(), once.dequantise(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("form", "limit"), [("mxfp8", 0.03), ("nvfp4", 0.1)])
def test_error(form: BlockFormat, limit: float) -> None:
    x = random(2, 16, 256) * torch.logspace(-2, 2, 16)[:, None]
    assert (quantise_blocks(x, form).dequantise() - x).norm() / x.norm() < limit


@pytest.mark.parametrize("form", FORMATS)
def test_product(form: BlockFormat) -> None:
    x, weight = quantise_blocks(random(2, 8, 64), form), quantise_blocks(random(48, 64, seed=1), form)
    out = block_linear(x, weight, torch.float32)
    torch.testing.assert_close(out, x.dequantise() @ weight.dequantise().t())


@pytest.mark.parametrize("form", FORMATS)
def test_width_must_be_whole_blocks(form: BlockFormat) -> None:
    with pytest.raises(ValueError, match=f"multiple of {BLOCK_SIZE[form]}"):
        quantise_blocks(random(2, BLOCK_SIZE[form] + 2), form)


def test_swizzled_scales() -> None:
    """cuBLAS: in a tile of 128 rows and 4 columns, row r and column c stand at 16 (r mod 32) + 4 (r div 32) + c."""
    scale = torch.randint(1, 255, (130, 6), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    flat = swizzled(scale.view(torch.float8_e8m0fnu)).view(torch.uint8)
    assert flat.shape == (4 * 512,)
    for r, c in ((0, 0), (31, 3), (32, 0), (127, 2), (128, 0), (129, 5), (5, 4)):
        tile = 2 * (r // 128) + c // 4
        assert flat[512 * tile + 16 * (r % 32) + 4 * (r % 128 // 32) + c % 4] == scale[r, c]
    assert flat.int().sum() == scale.int().sum()


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("width", [96, 4128])
def test_kernel(form: BlockFormat, width: int) -> None:
    """Bit for bit on a GPU; the interpreter rounds to float8 in another way, so there scales of blocks may differ."""
    from engine.ops.triton import blocks as kernels

    x = random(2, 3, width) * torch.logspace(-3, 3, 3)[:, None]
    x[0, 1, 32:64] = 0
    expected = quantise_blocks(x, form)
    on_device = kernels.quantise_blocks(x.to(DEVICE), form, expected.tensor_scale.to(DEVICE))
    found = BlockQuantTensor(form, on_device.data.cpu(), on_device.scale.cpu(), expected.tensor_scale)
    assert found.data.shape == expected.data.shape and found.scale.shape == expected.scale.shape
    exact = DEVICE.type == "cuda"
    if exact or form == "mxfp8":
        assert torch.equal(found.scale.view(torch.uint8), expected.scale.view(torch.uint8))
    if exact:
        assert (
            found.dequantise() != expected.dequantise()
        ).float().mean() < 1e-3  # a product may be rounded on the way
    apart = (found.dequantise() - expected.dequantise()).norm() / expected.dequantise().norm()
    assert apart < (0.01 if exact else 0.1)
    assert not found.dequantise()[0, 1, 32:64].any()


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMATS)
def test_on_a_gpu(form: BlockFormat) -> None:
    """Through the units where there are any, else restored: the same either way."""
    device = torch.device("cuda")
    if torch.cuda.get_device_capability() < (10, 0):
        assert blocks_unsupported_reason(device, form) == "needs compute capability 10.0"
    x, weight = random(130, 256).cuda(), random(96, 256, seed=1).cuda()
    found = block_linear(quantise_blocks(x, form), quantise_blocks(weight, form), torch.bfloat16)
    expected = quantise_blocks(x.cpu(), form).dequantise() @ quantise_blocks(weight.cpu(), form).dequantise().t()
    assert (found.float().cpu() - expected).norm() / expected.norm() < 1e-2
