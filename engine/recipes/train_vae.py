"""Train the causal VAE together with the light decoder that serves.

The latents are made for the light decoder: its error alone reaches the encoder. The VAE's own decoder learns beside it,
seldom, from latents as they are. Latents are normalised by statistics that are stored with the weights.

Cost on one H100: about 5 minutes, one of them compilation. Result: see `engine.recipes.evaluate`.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.config import MINI, Preset
from engine.models.light_vae import LightDecoder
from engine.models.vae import CausalVAE
from engine.recipes import world
from engine.recipes.optimizer import Optimiser, Replay, convolutions
from engine.recipes.run import Run, arguments, channels_last, learning_rate

FRAMES = 13
CLIPS = 16
CROP = 192
"""Training sees random squares of this side, in pixels: the networks are convolutional."""
RATE = 1.5e-3
OWN_EVERY = 8
"""The VAE's own decoder, which does not serve, learns in one step of so many."""
LATENT_NOISE = 0.1
"""Standard deviation of the noise on normalised latents while decoders train: generated latents are not exact."""


class Statistics(nn.Module):
    """Mean and standard deviation of each latent channel, [C], followed as running averages."""

    mean: Tensor
    std: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))

    def follow(self, latents: Tensor, decay: float = 0.99) -> Tensor:
        """Normalise latents [B, C, T, h, w] by their own statistics, and move the averages towards these.

        Normalised by averages, which lag, an encoder gains by growing without end: the noise then counts for less.
        """
        std, mean = torch.std_mean(latents, dim=(0, 2, 3, 4))
        with torch.no_grad():
            self.mean.lerp_(mean, 1 - decay)
            self.std.lerp_(std, 1 - decay)
        shape = (1, -1, 1, 1, 1)
        return (latents - mean.view(shape)) / (std.view(shape) + 1e-3)

    def normalise(self, latents: Tensor) -> Tensor:
        shape = (1, -1, 1, 1, 1)
        return (latents - self.mean.view(shape)) / self.std.view(shape)

    def restore(self, latents: Tensor) -> Tensor:
        shape = (1, -1, 1, 1, 1)
        return latents * self.std.view(shape) + self.mean.view(shape)


def frame_batches(clips: int, frames: int, generator: torch.Generator, ahead: int = 64) -> Iterator[Tensor]:
    """Endless batches uint8 [clips, frames, 3, H, W] of random training scenes, half of them steered inside the clip.

    The parameters of `ahead` batches are worked out at once: that takes a thousand small kernels however many clips
    there are, which would otherwise be most of a training step.
    """
    count, device = clips * ahead, generator.device
    while True:
        before = world.sample_scenes(count, generator, split="train", count_weights=(0.5, 0.3, 0.2))
        after = world.steer_scenes(before, generator, split="train")
        start = torch.rand(count, generator=generator, device=device) * 60
        change = torch.randint(-12, 2 * frames, (count,), generator=generator, device=device).float()
        params = world.clip_params(before, after, change, world.sample_variation(count, generator), frames, start)
        for part in params.split(clips):
            yield world.render(part.flatten(0, 1)).unflatten(0, (clips, frames))


def differences(x: Tensor) -> tuple[Tensor, Tensor]:
    """Horizontal and vertical differences of [..., H, W]."""
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


def gradient_energy(x: Tensor, cell: int = 8) -> Tensor:
    """Squared differences between neighbouring pixels, mean over cells: [B, T, 3, H, W] -> [B, T, H / 8, W / 8]."""
    across, down = differences(x)
    energy = F.pad(across.square(), (0, 1)) + F.pad(down.square(), (0, 0, 0, 1))
    return F.avg_pool2d(energy.mean(dim=2), cell)


def sharpness_loss(out: Tensor, target: Tensor) -> Tensor:
    """How far the gradient energy of [B, T, 3, H, W] is from the target's: it punishes ringing and blur alike.

    It must hold cell by cell: asked for over a whole clip, a decoder made up for its blur by a dotted line along one
    row. A cell counts by its energy, as in the clip's: edges, where blur is, and not the many flat places. Cells alone
    would settle below the target on the whole, as medians do; so the clip's counts too, but less, and a line that
    served it would cost more than it gains.
    """
    wanted = gradient_energy(target)
    apart = gradient_energy(out) - wanted
    cells, clip = apart.abs().mean(dim=(1, 2, 3)), apart.mean(dim=(1, 2, 3)).abs()
    return ((cells + 0.7 * clip) / (wanted.mean(dim=(1, 2, 3)) + 1e-4)).mean()


def pixel_loss(out: Tensor, target: Tensor) -> Tensor:
    """Distance of frames [B, T, 3, H, W] in [0, 1]: pixels, edges, motion, and how sharp every place is."""
    error = out - target
    loss = error.abs().mean() + 4 * error.square().mean()
    for along in differences(error):
        loss = loss + 0.5 * along.abs().mean()
    if out.shape[1] > 1:
        loss = loss + 0.5 * (error[:, 1:] - error[:, :-1]).abs().mean()
    return loss + 0.3 * sharpness_loss(out, target)


def light_frames(decoder: nn.Module, latents: Tensor, stride: int) -> Tensor:
    """Whole-clip decode of normalised latents [B, C, T, h, w] -> [B, 1 + stride (T - 1), 3, H, W]."""
    frames: Tensor = decoder(latents.transpose(1, 2))[0]
    return frames[:, stride - 1 :]


def to_pixels(frames: Tensor) -> Tensor:
    """uint8 [B, T, 3, H, W] -> float32 [B, 3, T, H, W] in [-1, 1], channels last in memory."""
    return (frames.transpose(1, 2).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last_3d)


class Bundle(nn.Module):
    """What the recipe saves: the VAE, its light decoder and the latent statistics."""

    def __init__(self, preset: Preset) -> None:
        super().__init__()
        self.vae = CausalVAE(preset.vae)
        self.light = LightDecoder(preset.light_vae)
        self.statistics = Statistics(preset.vae.latent_channels)
        self.stride = preset.temporal_stride

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """uint8 [B, T, 3, H, W] -> normalised latents [B, C, 1 + (T - 1) / 4, h, w]."""
        pixels = to_pixels(frames).to(self.vae.conv1.weight.dtype)
        return self.statistics.normalise(self.vae.encode(pixels).float())


def load(run: Run, preset: Preset = MINI) -> Bundle:
    bundle = Bundle(preset).to(run.device)
    bundle.load_state_dict(run.load("vae"))
    if run.device.type == "cuda":
        bundle.vae.bfloat16()
    channels_last(bundle)
    return bundle.eval().requires_grad_(False)


def random_crop(frames: Tensor, side: int) -> Tensor:
    """The same random square of every frame of [B, T, 3, H, W]."""
    y, x = (int(v) for v in torch.randint(0, frames.shape[-1] - side + 1, (2,)))
    return frames[..., y : y + side, x : x + side]


def training_loss(bundle: Bundle, frames: Tensor) -> Tensor:
    """Of encoder and light decoder, on uint8 frames [B, T, 3, H, W]."""
    normal = bundle.statistics.follow(bundle.vae.encode(to_pixels(frames)).float())
    noisy = normal + LATENT_NOISE * torch.randn_like(normal)
    return pixel_loss(light_frames(bundle.light, noisy, bundle.stride).float(), frames.float() / 255)


def light_loss(bundle: Bundle, frames: Tensor) -> Tensor:
    """Of the light decoder, on latents that it does not change."""
    with torch.no_grad():
        normal = bundle.statistics.normalise(bundle.vae.encode(to_pixels(frames)).float())
        noisy = normal + LATENT_NOISE * torch.randn_like(normal)
    return pixel_loss(light_frames(bundle.light, noisy, bundle.stride).float(), frames.float() / 255)


def own_decoder_loss(bundle: Bundle, frames: Tensor) -> Tensor:
    """Of the VAE's own decoder, on latents that it does not change."""
    with torch.no_grad():
        latents = bundle.vae.encode(to_pixels(frames)).float()
        latents += LATENT_NOISE * bundle.statistics.std.view(1, -1, 1, 1, 1) * torch.randn_like(latents)
    out = bundle.vae.decode(latents).float().transpose(1, 2) / 2 + 0.5
    return pixel_loss(out, frames.float() / 255)


def train(run: Run, preset: Preset, clips: int = CLIPS, *, decoders_only: bool = False) -> None:
    """`decoders_only`: the latents stay as they are, because models have been trained on them."""
    resumed = run.has("vae")
    run.seed(10 + int(resumed))
    bundle = Bundle(preset).to(run.device)
    if resumed:
        bundle.load_state_dict(run.load("vae"))
    for half in (bundle.vae.encoder, bundle.vae.decoder):
        half.middle[1].requires_grad_(False)  # attention starts as nothing and stays so: crops would mislead it
    channels_last(bundle)
    if decoders_only:
        for part in (bundle.vae.encoder, bundle.vae.conv1):
            part.requires_grad_(False)
    parameters = {name: p for name, p in bundle.named_parameters() if p.requires_grad}
    own = {name: p for name, p in parameters.items() if name.startswith(("vae.decoder", "vae.conv2"))}
    served = {name: p for name, p in parameters.items() if name not in own}
    serving = Optimiser(served, convolutions(served), RATE)
    decoder = Optimiser(own, convolutions(own), RATE)
    loss_of = light_loss if decoders_only else training_loss
    if run.device.type == "cuda" and not decoders_only:  # for one decoder it would take longer than it saves
        loss_of = torch.compile(loss_of, dynamic=False)
    replay = Replay(run.device)
    generator = run.generator(100 + int(resumed))
    batches = frame_batches(clips, FRAMES, generator)
    frames = torch.empty((clips, FRAMES, 3, CROP, CROP), dtype=torch.uint8, device=run.device)

    def descend(optimiser: Optimiser, loss_of: Callable[[Bundle, Tensor], Tensor]) -> Tensor:
        optimiser.clear()
        with torch.autocast(run.device.type, torch.bfloat16):
            loss = loss_of(bundle, frames)
        loss.backward()
        return torch.stack([loss.detach(), optimiser.update()])

    step = 0
    while step == 0 or run.progress() < 1:
        factor = learning_rate(run.progress(), step, warmup=200, decay_from=0.5)
        frames.copy_(random_crop(next(batches), CROP))
        serving.schedule(factor)
        light = replay("light", lambda: descend(serving, loss_of))
        if step % OWN_EVERY == 0:
            decoder.schedule(factor)
            full = replay("own", lambda: descend(decoder, own_decoder_loss))
        step += 1
        run.log(step, {"light": light[0], "norm": light[1], "own": full[0]})
        if step == 1:
            run.say(f"compiled after {run.elapsed():.0f} s")
    bundle.load_state_dict(bundle.state_dict() | serving.averages | decoder.averages)
    fresh = [next(batches) for _ in range(16)]
    if not decoders_only:
        measure_statistics(bundle, fresh)
    run.save("vae", bundle.state_dict(), torch.float16)
    psnr, energy = quality(bundle, fresh)
    run.say(f"{step} steps: {psnr.mean():.1f} dB, worst clip {psnr.min():.1f}, gradient energy {energy.mean():.2f}")


@torch.no_grad()
def measure_statistics(bundle: Bundle, batches: list[Tensor]) -> None:
    """Replace the running statistics by those of the finished encoder."""
    with torch.autocast(batches[0].device.type, torch.bfloat16):
        latents = torch.cat([bundle.vae.encode(to_pixels(frames)).float() for frames in batches])
    std, mean = torch.std_mean(latents, dim=(0, 2, 3, 4))
    bundle.statistics.mean.copy_(mean)
    bundle.statistics.std.copy_(std)


@torch.no_grad()
def quality(bundle: Bundle, batches: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The light decoder's PSNR (dB) and gradient energy, as a share of the render's, of every clip."""
    psnr, energy = [], []
    for frames in batches:
        target = frames.float() / 255
        with torch.autocast(frames.device.type, torch.bfloat16):
            out = light_frames(bundle.light, bundle.encode(frames), bundle.stride).float().clamp(0, 1)
        psnr.append(psnr_per_clip(out, target))
        energy.append(energy_ratio(out, target))
    return torch.cat(psnr), torch.cat(energy)


def energy_ratio(out: Tensor, target: Tensor) -> Tensor:
    """Gradient energy of each clip [B, T, 3, H, W] as a share of the target's: 1 is as sharp, more is ringing."""
    return gradient_energy(out).mean(dim=(1, 2, 3)) / gradient_energy(target).mean(dim=(1, 2, 3))


def psnr_per_clip(out: Tensor, target: Tensor) -> Tensor:
    """dB for each clip of frames [B, T, 3, H, W] in [0, 1]."""
    return -10 * F.mse_loss(out, target, reduction="none").mean(dim=(1, 2, 3, 4)).log10()


def main() -> None:
    parser = arguments(__doc__, 320)
    parser.add_argument("--decoders-only", action="store_true", help="leave the latents as they are")
    options = parser.parse_args()
    train(Run("vae", options.folder, options.seconds), MINI, decoders_only=options.decoders_only)


if __name__ == "__main__":
    main()
