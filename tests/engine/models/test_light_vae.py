"""Streaming decode against whole-clip decode."""

import pytest
import torch

from engine.models.light_vae import LightDecoder, LightVAEConfig


def decoder() -> LightDecoder:
    torch.manual_seed(0)
    return LightDecoder(LightVAEConfig()).requires_grad_(False).eval()


@pytest.mark.parametrize("cuts", [[3, 3, 3, 3], [1] * 12, [5, 1, 6]])
def test_chunked_decode_equals_whole_clip(cuts: list[int]) -> None:
    light = decoder()
    z = torch.randn(2, 12, 16, 8, 8)
    whole, _ = light(z)
    memories, parts, at = None, [], 0
    for cut in cuts:
        frames, memories = light(z[:, at : at + cut], memories)
        parts.append(frames)
        at += cut
    assert (torch.cat(parts, dim=1) - whole).abs().max() < 1e-5


def test_shapes_and_causality() -> None:
    light = decoder()
    z = torch.randn(1, 4, 16, 8, 8)
    whole, memories = light(z)
    assert whole.shape == (1, 16, 3, 64, 64)
    assert len(memories) == sum(light.config.blocks)
    later = z.clone()
    later[:, 2:] += 1
    changed, _ = light(later)
    assert torch.equal(changed[:, :8], whole[:, :8])
    assert not torch.equal(changed[:, 8:], whole[:, 8:])


def test_memory_reaches_across_the_cut() -> None:
    """A test of the test above: without the memories a chunk decodes differently."""
    light = decoder()
    z = torch.randn(1, 6, 16, 8, 8)
    _, memories = light(z[:, :3])
    assert (light(z[:, 3:], memories)[0] - light(z[:, 3:])[0]).abs().max() > 1e-3
