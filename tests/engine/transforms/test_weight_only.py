"""A text encoder with its weights in 8 bits, wherever it lives."""

import copy

import pytest
import torch
from torch import nn

from engine.config import TextPlacement
from engine.models.text_encoder import TextEncoder
from engine.offload.text import place_text_encoder
from engine.ops.quant import Format
from engine.transforms.weight_only import WeightOnlyLinear, quantise_weights

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 9, 30, 1] + [0] * 8, [7, 1] + [0] * 10])


def bytes_of(module: nn.Module) -> int:
    return sum(p.nbytes for p in module.parameters())


@pytest.mark.parametrize("place", ["resident", "offload", "cpu"])
@pytest.mark.parametrize(("form", "limit"), [("fp8", 0.06), ("int8", 0.02)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_encodes_nearly_the_same(
    encoder: TextEncoder, place: TextPlacement, form: Format, limit: float, dtype: torch.dtype
) -> None:
    expected = encoder(IDS)
    encoder.to(dtype)
    before = bytes_of(encoder)
    quantise_weights(encoder, form)
    assert not any(isinstance(module, nn.Linear) for module in encoder.modules())
    assert bytes_of(encoder) < 0.75 * before
    found = place_text_encoder(copy.deepcopy(encoder), place, CPU)(IDS)
    assert found.dtype == dtype
    apart = (found.float() - expected).norm() / expected.norm()
    assert 1e-4 < apart < limit + (0.01 if dtype == torch.bfloat16 else 0)


@pytest.mark.parametrize("bias", [False, True])
def test_a_layer(bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(32, 20, bias=bias)
    x = torch.randn(2, 5, 32)
    found, expected = WeightOnlyLinear(layer, "int8")(x), layer(x)
    assert found.shape == expected.shape
    assert (found - expected).norm() / expected.norm() < 0.01


@pytest.mark.gpu
@pytest.mark.parametrize("place", ["resident", "offload"])
@pytest.mark.parametrize("form", ["fp8", "int8"])
def test_on_a_gpu(encoder: TextEncoder, place: TextPlacement, form: Format) -> None:
    expected = encoder(IDS)
    encoder.to(torch.bfloat16)
    quantise_weights(encoder, form)
    placed = place_text_encoder(encoder, place, torch.device("cuda"))
    found = placed(IDS.cuda()).float().cpu()
    assert (found - expected).norm() / expected.norm() < 0.07
    if place == "offload":
        assert all(p.is_pinned() for p in placed.parameters())
