"""Train the causal VAE together with its light decoder, then the light decoder alone.

Both decoders read the same latents; the light decoder's error reaches the encoder too, so that the latents suit the
decoder that serves. In the second stage the encoder stands still and the light decoder gets every step. Latents are
normalised by running statistics that are stored with the weights and applied by nobody else.

Cost on one H100: about 4 minutes. Result: see `engine.recipes.evaluate`.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.config import MINI, Preset
from engine.models.light_vae import LightDecoder
from engine.models.vae import CausalVAE
from engine.recipes import world
from engine.recipes.optimizer import average_gradients
from engine.recipes.run import EMA, Run, arguments, channels_last, learning_rate

FRAMES = 9
CLIPS = 32
CROP = 192
"""Training sees random squares of this side, in pixels: the networks are convolutional."""
FULL_EVERY = 4
"""The VAE's own decoder, which does not serve, takes part in one step of so many."""
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

    def follow(self, latents: Tensor, decay: float) -> Tensor:
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


def gradient_energy(x: Tensor) -> Tensor:
    """Mean squared difference between neighbouring pixels."""
    across, down = differences(x)
    return across.square().mean() + down.square().mean()


def pixel_loss(out: Tensor, target: Tensor) -> Tensor:
    """Distance of frames [B, T, 3, H, W] in [0, 1]: pixels, edges, motion, and how sharp the edges are on the whole.

    The last term punishes ringing and blur alike: the gradient energy should be the target's.
    """
    error = out - target
    loss = error.abs().mean() + 4 * error.square().mean()
    for along in differences(error):
        loss = loss + 0.5 * along.abs().mean()
    if out.shape[1] > 1:
        loss = loss + 0.5 * (error[:, 1:] - error[:, :-1]).abs().mean()
    wanted = gradient_energy(target)
    return loss + 0.02 * ((gradient_energy(out) - wanted) / wanted).abs()


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


def train(run: Run, preset: Preset, light_share: float, clips: int = CLIPS) -> None:
    resumed = run.has("vae")
    run.seed(10 + int(resumed))
    bundle = Bundle(preset).to(run.device)
    if resumed:
        bundle.load_state_dict(run.load("vae"))
    for half in (bundle.vae.encoder, bundle.vae.decoder):
        half.middle[1].requires_grad_(False)  # attention starts as nothing and stays so: crops would mislead it
    channels_last(bundle)
    if run.device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    generator = run.generator(100 + int(resumed))
    joint_until = 1 - light_share
    if joint_until > 0:
        train_jointly(run, bundle, generator, clips, joint_until)
        run.save("vae", bundle.state_dict(), torch.float16)
    if light_share > 0:
        train_light(run, bundle, generator, clips, joint_until)
        run.save("vae", bundle.state_dict(), torch.float16)


def train_jointly(run: Run, bundle: Bundle, generator: torch.Generator, clips: int, until: float) -> None:
    """Encoder and both decoders, until this share of the budget."""
    parameters = [p for p in bundle.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.98), weight_decay=1e-4)
    ema = EMA(bundle, 0.998)
    batches = frame_batches(clips, FRAMES, generator)
    step = 0
    while step == 0 or run.progress() < until:
        factor = learning_rate(run.progress() / until, step, warmup=200, decay_from=0.5)
        for group in optimiser.param_groups:
            group["lr"] = 1e-3 * factor
        frames = random_crop(next(batches), CROP)
        target = frames.float() / 255
        with torch.autocast(run.device.type, torch.bfloat16):
            latents = bundle.vae.encode(to_pixels(frames)).float()
            normal = bundle.statistics.follow(latents, min(0.99, 0.5 + step / 100))
            noisy = normal + LATENT_NOISE * torch.randn_like(normal)
            loss = light_loss = pixel_loss(light_frames(bundle.light, noisy, bundle.stride).float(), target)
            if step % FULL_EVERY == 0:
                full = bundle.vae.decode(bundle.statistics.restore(noisy)).float().transpose(1, 2) / 2 + 0.5
                full_loss = pixel_loss(full, target)
                loss = light_loss + full_loss
        loss.backward()
        average_gradients(parameters)
        norm = nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        ema.update(step)
        step += 1
        run.log(step, {"light": light_loss, "full": full_loss, "norm": norm})
    bundle.load_state_dict(dict(bundle.state_dict()) | ema.average)
    run.say(f"joint stage: {step} steps")


def train_light(run: Run, bundle: Bundle, generator: torch.Generator, clips: int, begun: float) -> None:
    """The light decoder alone, from this share of the budget to its end."""
    optimiser = torch.optim.AdamW(bundle.light.parameters(), lr=1.5e-3, betas=(0.9, 0.98), weight_decay=0.0)
    ema = EMA(bundle.light, 0.998)
    bundle.vae.requires_grad_(False)
    batches = frame_batches(clips, FRAMES + 4, generator)
    step = 0
    while step == 0 or run.progress() < 1:
        share = (run.progress() - begun) / (1 - begun)
        for group in optimiser.param_groups:
            group["lr"] = 1.5e-3 * learning_rate(share, step, decay_from=0.3)
        frames = random_crop(next(batches), CROP)
        target = frames.float() / 255
        with torch.autocast(run.device.type, torch.bfloat16):
            normal = bundle.encode(frames)
            amount = LATENT_NOISE * torch.rand(len(normal), 1, 1, 1, 1, device=normal.device)
            out = light_frames(bundle.light, normal + amount * torch.randn_like(normal), bundle.stride).float()
            loss = pixel_loss(out, target)
        loss.backward()
        average_gradients(list(bundle.light.parameters()))
        nn.utils.clip_grad_norm_(bundle.light.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        ema.update(step)
        step += 1
        if step % 50 == 0:
            with torch.no_grad():
                psnr = psnr_per_clip(out.clamp(0, 1), target)
                energy = gradient_energy(out) / gradient_energy(target)
            run.log(step, {"loss": loss, "psnr": psnr.mean(), "worst": psnr.min(), "energy": energy})
    bundle.light.load_state_dict(ema.average)
    run.say(f"light stage: {step} steps")


def psnr_per_clip(out: Tensor, target: Tensor) -> Tensor:
    """dB for each clip of frames [B, T, 3, H, W] in [0, 1]."""
    return -10 * F.mse_loss(out, target, reduction="none").mean(dim=(1, 2, 3, 4)).log10()


def main() -> None:
    parser = arguments(__doc__, 240)
    parser.add_argument("--light-share", type=float, default=0.45, help="share of the time for the light decoder alone")
    parser.add_argument("--clips", type=int, default=CLIPS, help="clips a step")
    options = parser.parse_args()
    train(Run("vae", options.folder, options.seconds), MINI, options.light_share, options.clips)


if __name__ == "__main__":
    main()
