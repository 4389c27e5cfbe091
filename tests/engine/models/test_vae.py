"""The causal VAE: against diffusers' on whole clips, and in chunks against whole."""

from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from engine.checkpoints.wan_vae import from_diffusers
from engine.models.config import WAN21, WAN21_STATISTICS, WAN22, WAN22_STATISTICS, LatentStatistics, VAEConfig
from engine.models.vae import CausalVAE, State

MINI = VAEConfig(encoder_widths=(8, 16, 24), decoder_widths=(8, 16, 24), decoder_inputs=(8, 16))
SMALL21 = replace(
    WAN21, encoder_widths=(8, 16, 32, 32), decoder_widths=(8, 16, 32, 32), decoder_inputs=(8, 16, 16), latent_channels=4
)
SMALL22 = replace(
    WAN22,
    encoder_widths=(8, 16, 32, 32),
    decoder_widths=(12, 24, 48, 48),
    decoder_inputs=(24, 48, 48),
    latent_channels=4,
)
THEIRS = {
    SMALL21: {"base_dim": 8, "z_dim": 4},
    SMALL22: {
        "base_dim": 8, "decoder_base_dim": 12, "z_dim": 4, "is_residual": True, "in_channels": 12, "out_channels": 12,
        "patch_size": 2, "scale_factor_spatial": 16,
    },
}  # fmt: skip
CONFIGS = pytest.mark.parametrize("config", [MINI, SMALL21, SMALL22], ids=["mini", "wan21", "wan22"])


def vae(config: VAEConfig = MINI) -> CausalVAE:
    torch.manual_seed(0)
    model = CausalVAE(config).requires_grad_(False).eval()
    for half in (model.encoder, model.decoder):
        torch.nn.init.normal_(half.middle[1].proj.weight, std=0.1)  # or the attention would go untested
    return model


def pixels(frames: int) -> Tensor:
    return torch.rand(2, 3, frames, 32, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1


def decode_in(model: CausalVAE, latents: Tensor, cuts: list[int]) -> Tensor:
    state, parts = None, []
    for part in latents.split(cuts, dim=2):
        frames, state = model.decode_chunk(part, state)
        parts.append(frames)
    return torch.cat(parts, dim=2)


def encode_in(model: CausalVAE, clip: Tensor, cuts: list[int]) -> Tensor:
    state, parts = None, []
    for part in clip.split([4 * cut - 3 * (i == 0) for i, cut in enumerate(cuts)], dim=2):
        latents, state = model.encode_chunk(part, state)
        parts.append(latents)
    return torch.cat(parts, dim=2)


def relative(ours: Tensor, reference: Tensor) -> float:
    return float((ours - reference).abs().max() / reference.abs().max())


def test_first_frame_is_coded_alone() -> None:
    model, clip = vae(), pixels(13)
    latents = model.encode(clip)
    assert latents.shape == (2, 16, 4, 4, 6)
    assert model.decode(latents).shape == clip.shape
    assert torch.allclose(model.encode(clip[:, :, :1]), latents[:, :, :1], atol=1e-5)


@CONFIGS
def test_encoder_and_decoder_are_causal(config: VAEConfig) -> None:
    model, clip = vae(config), pixels(13)
    latents = model.encode(clip)
    later = clip.clone()
    later[:, :, 5:] = 0
    assert torch.allclose(model.encode(later)[:, :, :2], latents[:, :, :2], atol=1e-5)
    frames = model.decode(latents)
    changed = latents.clone()
    changed[:, :, 2:] = 0
    assert torch.allclose(model.decode(changed)[:, :, :5], frames[:, :, :5], atol=1e-5)


@pytest.mark.parametrize("config", [SMALL21, SMALL22], ids=["wan21", "wan22"])
def test_streams_as_diffusers_codes_whole_clips(config: VAEConfig) -> None:
    torch.manual_seed(0)
    reference = AutoencoderKLWan(**THEIRS[config]).requires_grad_(False).eval()
    tensors = reference.state_dict()
    for tensor in tensors.values():
        tensor.add_(torch.randn_like(tensor) * 0.05)  # gains and biases too
    tensors["decoder.conv_out.weight"].mul_(0.1)  # diffusers clamps pixels: none may meet the bound
    model = vae(config)
    model.load_state_dict({name: tensors[theirs] for theirs, name in from_diffusers(tensors).items()})
    clip, one_by_one = pixels(17), [1] * 5
    latents = reference.encode(clip).latent_dist.mode()
    frames = reference.decode(latents).sample
    assert frames.abs().max() < 1
    assert relative(encode_in(model, clip, one_by_one), latents) < 1e-4
    assert relative(decode_in(model, latents, one_by_one), frames) < 1e-4
    assert relative(model.encode(clip), latents) < 1e-4
    assert relative(model.decode(latents), frames) < 1e-4
    mean, log_variance = model.posterior(clip)
    assert relative(log_variance, reference.encode(clip).latent_dist.logvar) < 1e-4
    assert torch.equal(mean, model.encode(clip))


@CONFIGS
@pytest.mark.parametrize("cuts", [[1] * 7, [3, 3, 1], [2, 1, 4]], ids=str)
def test_chunks_equal_the_whole_clip(config: VAEConfig, cuts: list[int]) -> None:
    """In float64: what is left is rounding, not a rule of Wan's that holds at one cut only."""
    model, clip = vae(config).double(), pixels(25)[..., :16, :16].double()
    latents = model.encode(clip)
    assert relative(encode_in(model, clip, cuts), latents) < 1e-12
    assert relative(decode_in(model, latents, cuts), model.decode(latents)) < 1e-12


@CONFIGS
def test_chunks_in_float32(config: VAEConfig) -> None:
    model, clip = vae(config), pixels(25)
    latents = model.encode(clip)
    assert relative(encode_in(model, clip, [2, 1, 4]), latents) < 1e-5
    assert relative(decode_in(model, latents, [2, 1, 4]), model.decode(latents)) < 1e-5


def test_a_clip_can_be_continued_twice_and_moved() -> None:
    model, latents = vae(SMALL21), torch.randn(1, 4, 6, 4, 6)
    _, state = model.decode_chunk(latents[:, :, :3])
    saved = [tensor.clone() for tensor in state]
    first, _ = model.decode_chunk(latents[:, :, 3:], state)
    again, _ = model.decode_chunk(latents[:, :, 3:], state)
    assert torch.equal(first, again)
    assert all(torch.equal(a, b) for a, b in zip(state, saved, strict=True))
    assert torch.equal(model.decode_chunk(latents[:, :, 3:], saved)[0], first)
    fresh, _ = model.decode_chunk(latents[:, :, 3:])
    assert fresh.shape[2] == first.shape[2] - 3
    assert relative(fresh, first[:, :, 3:]) > 1e-3


def test_states_are_constant_in_size() -> None:
    model, clip = vae(SMALL22), pixels(17)

    def sizes(state: State) -> list[torch.Size]:
        return [tensor.shape for tensor in state]

    _, early = model.encode_chunk(clip[:, :, :1])
    _, late = model.encode_chunk(clip[:, :, 1:], early)
    assert sizes(early) == sizes(late)
    latents = model.encode(clip)
    _, early = model.decode_chunk(latents[:, :, :1])
    _, late = model.decode_chunk(latents[:, :, 1:], early)
    assert sizes(early) == sizes(late)


def test_state_of_a_480p_stream() -> None:
    """32 convolutions remember two frames each: 944 M values (causal-wan.md 2.7), counted here as float16."""
    with torch.device("meta"):
        model = CausalVAE(WAN21).half()
        frames, state = model.decode_chunk(torch.empty(1, 16, 1, 60, 104, dtype=torch.float16))
    assert frames.shape == (1, 3, 1, 480, 832)
    assert len(state) == 32
    assert sum(tensor.nbytes for tensor in state) == pytest.approx(1.9e9, rel=0.03)
    assert all(tensor.is_contiguous() for tensor in state)


@CONFIGS
def test_channels_last_weights_change_nothing(config: VAEConfig) -> None:
    model, clip = vae(config), pixels(9)
    latents = encode_in(model, clip, [1, 2])
    frames = decode_in(model, latents, [1, 2])
    for parameter in model.parameters():
        if parameter.ndim == 5:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last_3d)
    last = torch.channels_last_3d
    assert relative(encode_in(model, clip.contiguous(memory_format=last), [1, 2]), latents) < 1e-5
    assert relative(decode_in(model, latents.contiguous(memory_format=last), [1, 2]), frames) < 1e-5


def test_upsampled_frames_never_see_the_first() -> None:
    """Wan's rule: the temporal upsamplers run from the second latent frame on, with zero history."""
    model, latents = vae(SMALL21), torch.randn(1, 4, 1, 4, 6)
    other = model.decode_chunk(latents + 7)[1]
    state = model.decode_chunk(latents)[1]
    same = [torch.equal(a, b) for a, b in zip(state, other, strict=True)]
    assert same.count(True) == 2
    assert all(not tensor.any() for tensor, kept in zip(state, same, strict=True) if kept)


@pytest.mark.parametrize(("frames", "begun"), [(0, False), (4, False), (5, True), (2, True)])
def test_frames_that_make_no_latent_frame_are_refused(frames: int, begun: bool) -> None:
    model = vae()
    state = model.encode_chunk(pixels(1))[1] if begun else None
    with pytest.raises(ValueError, match=f"{frames} frames cannot be encoded"):
        model.encode_chunk(pixels(frames), state)


def test_float16_norms_survive_large_and_empty_frames() -> None:
    norm = vae().decoder.head[0].half()
    x = torch.full((1, 8, 1, 2, 2), 300.0, dtype=torch.float16)
    assert torch.allclose(norm(x).float(), torch.ones(1))
    assert not norm(x * 0).any()


def test_levels_must_agree() -> None:
    with pytest.raises(ValueError, match="levels"):
        VAEConfig(decoder_widths=(16, 48))
    with pytest.raises(ValueError, match="one per step"):
        VAEConfig(halve_time=(True,))


@pytest.mark.parametrize("statistics", [WAN21_STATISTICS, WAN22_STATISTICS])
def test_statistics_undo_themselves(statistics: LatentStatistics) -> None:
    channels = len(statistics.mean)
    assert len(statistics.std) == channels
    latents = torch.randn(1, channels, 2, 3, 3)
    assert torch.allclose(statistics.restore(statistics.normalise(latents)), latents, atol=1e-6)
