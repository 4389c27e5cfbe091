"""Names of the diffusers layout at the real sizes, on the meta device."""

import pytest
import torch
from diffusers import AutoencoderKLWan

from engine.checkpoints.wan_vae import from_diffusers
from engine.models.config import WAN21, WAN21_LIGHT, WAN22, VAEConfig
from engine.models.vae import CausalVAE

# What the configurations of Wan 2.1 and of Wan 2.2 TI2V 5B say where it differs from the class's defaults.
THEIRS_22 = {
    "base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "is_residual": True, "in_channels": 12, "out_channels": 12,
    "patch_size": 2, "scale_factor_spatial": 16,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "theirs", "parameters"),
    [(WAN21, {}, 126_892_531), (WAN21_LIGHT, {"base_dim": 24}, 8_035_003), (WAN22, THEIRS_22, 704_688_668)],
)
def test_every_tensor_has_its_place(config: VAEConfig, theirs: dict[str, int], parameters: int) -> None:
    with torch.device("meta"):
        ours, other = CausalVAE(config).state_dict(), AutoencoderKLWan(**theirs).state_dict()
    renamed = from_diffusers(other)
    assert len(set(renamed.values())) == len(renamed)
    assert {renamed[name]: tensor.shape for name, tensor in other.items()} == {
        name: tensor.shape for name, tensor in ours.items()
    }
    assert sum(tensor.numel() for tensor in ours.values()) == parameters


def test_original_names() -> None:
    """As the files of Wan have them: written out, since the renaming above is our own."""
    with torch.device("meta"):
        flat, nested = CausalVAE(WAN21).state_dict(), CausalVAE(WAN22).state_dict()
    for name in (
        "conv1.weight", "conv2.bias", "encoder.conv1.weight", "encoder.downsamples.0.residual.0.gamma",
        "encoder.downsamples.2.resample.1.weight", "encoder.downsamples.3.shortcut.weight",
        "encoder.downsamples.5.time_conv.weight", "encoder.middle.1.to_qkv.weight", "encoder.head.2.bias",
        "decoder.middle.1.norm.gamma", "decoder.upsamples.3.time_conv.bias", "decoder.upsamples.4.shortcut.weight",
        "decoder.upsamples.11.resample.1.weight", "decoder.upsamples.14.residual.6.weight", "decoder.head.0.gamma",
    ):  # fmt: skip
        assert name in flat
    for name in (
        "encoder.downsamples.1.downsamples.0.shortcut.weight", "encoder.downsamples.1.downsamples.2.time_conv.weight",
        "encoder.downsamples.3.downsamples.1.residual.2.weight", "decoder.upsamples.0.upsamples.3.time_conv.weight",
        "decoder.upsamples.2.upsamples.3.resample.1.weight", "decoder.upsamples.3.upsamples.0.shortcut.bias",
    ):  # fmt: skip
        assert name in nested


def test_a_foreign_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"vae\.encoder"):
        from_diffusers(["quant_conv.weight", "vae.encoder.conv_in.weight"])
