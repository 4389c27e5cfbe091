"""Streaming decode against whole-clip decode."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from engine.models.config import LIGHT_TAEW21, TAEW21, TAEW22, LightVAEConfig
from engine.models.light_vae import LightDecoder, MemBlock, TGrow

SMALL_TAEHV = replace(TAEW22, latent_channels=4, widths=(16, 12, 8, 8))
CONFIGS = pytest.mark.parametrize("config", [LightVAEConfig(), SMALL_TAEHV], ids=["mini", "taehv"])


def decoder(config: LightVAEConfig | None = None) -> LightDecoder:
    torch.manual_seed(0)
    return LightDecoder(config or LightVAEConfig()).requires_grad_(False).eval()


@CONFIGS
@pytest.mark.parametrize("cuts", [[3, 3, 3, 3], [1] * 12, [5, 1, 6]], ids=str)
def test_chunked_decode_equals_whole_clip(config: LightVAEConfig, cuts: list[int]) -> None:
    light = decoder(config)
    z = torch.randn(2, 12, config.latent_channels, 8, 8)
    whole, _ = light(z)
    memories, parts, at = None, [], 0
    for cut in cuts:
        frames, memories = light(z[:, at : at + cut], memories)
        parts.append(frames)
        at += cut
    assert (torch.cat(parts, dim=1) - whole).abs().max() < 1e-5


@CONFIGS
def test_whole_clip_equals_frame_by_frame(config: LightVAEConfig) -> None:
    """The definition, one frame at a time through the list of layers: batching over time changes nothing."""
    light = decoder(config)
    z = torch.randn(1, 3, config.latent_channels, 8, 8)
    memory: dict[int, Tensor] = {}
    frames: list[Tensor] = []

    def run(x: Tensor, at: int) -> None:
        if at == len(light.decoder):
            frames.append(torch.pixel_shuffle(x, config.pixel_shuffle))
            return
        layer = light.decoder[at]
        if isinstance(layer, MemBlock):
            past, memory[at] = memory.get(at, torch.zeros_like(x)), x
            run(layer(x, past), at + 1)
        elif isinstance(layer, TGrow):
            for part in layer.conv(x).chunk(layer.growth, dim=1):
                run(part, at + 1)
        else:
            run(layer(x), at + 1)

    for latent in z.unbind(1):
        run(latent, 0)
    assert (torch.stack(frames, dim=1) - light(z)[0]).abs().max() < 1e-5


def test_public_checkpoints_have_their_shapes() -> None:
    """At the real sizes: the layers of TAEHV's decoder by index."""
    block = {0: 2, 2: 1, 4: 1}  # inputs of a memory block's convolutions, in widths
    with torch.device("meta"):
        tensors = {config: LightDecoder(config).state_dict() for config in (TAEW21, TAEW22)}
    for config, patch in ((TAEW21, 1), (TAEW22, 2)):
        shapes = {name.removeprefix("decoder."): tuple(t.shape) for name, t in tensors[config].items()}
        assert shapes.pop("1.weight") == (256, config.latent_channels, 3, 3)
        assert shapes.pop("22.weight") == (3 * patch**2, 64, 3, 3)
        assert (shapes.pop("1.bias"), shapes.pop("22.bias")) == ((256,), (3 * patch**2,))
        for at, grown, width, narrowed in ((7, 256, 256, 128), (13, 256, 128, 64), (19, 128, 64, 64)):
            assert shapes.pop(f"{at}.conv.weight") == (grown, width, 1, 1)
            assert shapes.pop(f"{at + 1}.weight") == (narrowed, width, 3, 3)
        for width, first in ((256, 3), (128, 9), (64, 15)):
            for at in range(first, first + 3):
                for layer, inputs in block.items():
                    assert shapes.pop(f"{at}.conv.{layer}.weight") == (width, inputs * width, 3, 3)
                    assert shapes.pop(f"{at}.conv.{layer}.bias") == (width,)
        assert not shapes
    assert sum(t.numel() for t in tensors[TAEW21].values()) == 9_844_611
    assert (TAEW21.normalised, TAEW22.normalised, LIGHT_TAEW21.normalised) == (True, True, False)


@pytest.mark.parametrize(("config", "rows", "columns"), [(TAEW21, 60, 104), (TAEW22, 30, 52)], ids=["2.1", "2.2"])
def test_public_checkpoints_at_480p(config: LightVAEConfig, rows: int, columns: int) -> None:
    with torch.device("meta"):
        frames, memories = LightDecoder(config)(torch.empty(1, 2, config.latent_channels, rows, columns))
    assert config.temporal_stride == 4
    assert frames.shape == (1, 8, 3, 480, 832)
    assert len(memories) == 9


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


def test_levels_must_agree() -> None:
    with pytest.raises(ValueError, match="levels"):
        LightVAEConfig(blocks=(1, 1))
