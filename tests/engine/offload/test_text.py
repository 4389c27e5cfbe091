"""The text encoder gives the same wherever it lives, and is where it should be."""

import copy

import pytest
import torch
from torch import nn

from engine.config import TextPlacement
from engine.models.text_encoder import TextEncoder
from engine.offload.text import place_text_encoder

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 9, 30, 1] + [0] * 8, [7, 1] + [0] * 10])


@pytest.mark.parametrize("place", ["resident", "offload", "cpu"])
def test_every_place_gives_the_same(encoder: TextEncoder, place: TextPlacement) -> None:
    expected = encoder(IDS)
    placed = place_text_encoder(copy.deepcopy(encoder), place, CPU)
    for _ in range(2):
        found = placed(IDS)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        assert found.shape == expected.shape and not found[0, 4:].any() and not found[1, 2:].any()
    assert sum(p.numel() for p in placed.parameters()) == sum(p.numel() for p in encoder.parameters())


def test_offload_has_one_layer_on_the_device_at_a_time(encoder: TextEncoder) -> None:
    host = {name: p.data_ptr() for name, p in encoder.named_parameters()}
    placed = place_text_encoder(encoder, "offload", CPU)
    moved: list[set[str]] = []

    def record(*_: object) -> None:
        moved.append({name for name, p in encoder.named_parameters() if p.data_ptr() != host[name]})

    stack = encoder.umt5
    layers = {"embed_tokens": stack.embed_tokens, "final_layer_norm": stack.final_layer_norm}
    layers |= {f"block.{index}": block for index, block in enumerate(stack.block)}
    for layer in layers.values():
        assert isinstance(layer, nn.Module)
        layer.register_forward_pre_hook(record)  # runs after the hook that fetches
    placed(IDS)
    expected = ["embed_tokens", "block.0", "block.1", "block.2", "final_layer_norm"]
    assert [{name.removeprefix("umt5.").startswith(layer + ".") for name in names} for names, layer in
            zip(moved, expected, strict=True)] == [{True}] * 5  # fmt: skip
    assert {name for names in moved for name in names} == host.keys()
    record()
    assert moved[-1] == set()  # and nothing stays there


def test_offload_leaves_nothing_behind_when_it_fails(encoder: TextEncoder) -> None:
    host = {name: p.data_ptr() for name, p in encoder.named_parameters()}
    placed = place_text_encoder(encoder, "offload", CPU)
    with pytest.raises(IndexError):
        placed(torch.full((1, 3), 99))
    assert {name: p.data_ptr() for name, p in encoder.named_parameters()} == host


def test_cpu_sends_the_result_to_the_model(encoder: TextEncoder) -> None:
    """The meta device stands for a GPU: the encoder is never on it, its output is."""
    placed = place_text_encoder(encoder, "cpu", torch.device("meta"))
    assert placed(IDS).device.type == "meta"
    assert {p.device.type for p in placed.parameters()} == {"cpu"}


@pytest.mark.gpu
@pytest.mark.parametrize("place", ["resident", "offload", "cpu"])
def test_on_a_gpu(encoder: TextEncoder, place: TextPlacement) -> None:
    expected = encoder(IDS)
    placed = place_text_encoder(encoder, place, torch.device("cuda"))
    found = placed(IDS.cuda())
    assert found.device.type == "cuda"
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=1e-5)
    on_gpu = {p.is_cuda for p in placed.parameters()}
    assert on_gpu == {place == "resident"}
    if place == "offload":
        assert all(p.is_pinned() for p in placed.parameters())
