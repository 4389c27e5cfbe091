import torch

from engine.models.vae import CausalVAE, VAEConfig


def vae() -> CausalVAE:
    torch.manual_seed(0)
    return CausalVAE(VAEConfig(widths=(8, 16, 24))).requires_grad_(False).eval()


def test_first_frame_is_coded_alone() -> None:
    model, pixels = vae(), torch.randn(1, 3, 13, 32, 32)
    latents = model.encode(pixels)
    assert latents.shape == (1, 16, 4, 4, 4)
    assert model.decode(latents).shape == pixels.shape
    assert torch.allclose(model.encode(pixels[:, :, :1]), latents[:, :, :1], atol=1e-5)


def test_encoder_and_decoder_are_causal() -> None:
    model, pixels = vae(), torch.randn(1, 3, 13, 32, 32)
    latents = model.encode(pixels)
    later = pixels.clone()
    later[:, :, 5:] = 0
    assert torch.allclose(model.encode(later)[:, :, :2], latents[:, :, :2], atol=1e-5)
    frames = model.decode(latents)
    changed = latents.clone()
    changed[:, :, 2:] = 0
    assert torch.allclose(model.decode(changed)[:, :, :5], frames[:, :, :5], atol=1e-5)


def test_upsampled_frames_never_see_the_first() -> None:
    """Wan's rule: the temporal upsamplers run from the second frame on, with zero history."""
    upsample = vae().decoder.upsamples[2]
    x = torch.randn(1, 24, 3, 4, 4)
    other = x.clone()
    other[:, :, 0] = 7
    out, changed = upsample(x), upsample(other)
    assert out.shape[2] == 5
    assert torch.equal(out[:, :, 1:], changed[:, :, 1:])
    assert not torch.equal(out[:, :, 0], changed[:, :, 0])
