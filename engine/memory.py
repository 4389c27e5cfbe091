"""How much device memory a preset takes, and which options make it fit: arithmetic, without a device or torch."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod

from engine.checkpoints import layouts
from engine.config import Preset

BYTES = 2
"""Of a bfloat16 weight or activation."""

VAE_CACHES = {
    "mini": {},
    "wan2.1": {8: 16 + 11 * 384, 4: 192 + 6 * 384, 2: 6 * 192, 1: 7 * 96},
    "wan2.2": {16: 48 + 11 * 1024, 8: 7 * 1024, 4: 1024 + 5 * 512, 2: 512 + 6 * 256},
}
"""Channels of the frames that the causal convolutions of the VAE's decoder cache, two frames each, by the pixels that a
cell spans. Counted from the layers in Wan-Video/Wan2.1, `wan/modules/vae.py`."""
LIGHT_CACHES = {
    "mini": {8: 2 * 96, 4: 64, 2: 16},
    "wan2.1": {8: 3 * 256, 4: 3 * 128, 2: 3 * 64},
    "wan2.2": {16: 3 * 256, 8: 3 * 128, 4: 3 * 64},
}
"""The same for the light decoder's memories, one frame each."""
WIDEST = {"mini": (16, 2), "wan2.1": (192, 1), "wan2.2": (512, 2)}
LIGHT_WIDEST = {"mini": (16, 2), "wan2.1": (138, 1), "wan2.2": (138, 2)}
"""Channels of a decoder's largest activation, and the pixels that its cell spans. TAEHV's is from a measurement on an
H200: 21 latent frames of 832x480 at once took 17.2 GiB."""


@dataclass(frozen=True)
class Setting:
    """The choices that a preset's memory depends on."""

    width: int
    height: int
    window: int
    text_on_device: bool = True
    exact_text: bool = True
    """False keeps the text encoder's linear layers in 8 bits."""
    exact_cache: bool = True
    """False keeps past keys and values in 8 bits."""
    light_vae: bool = False


def default(preset: Preset) -> Setting:
    return Setting(preset.width, preset.height, preset.window, light_vae=preset.family == "mini")


def parts(preset: Preset, setting: Setting) -> dict[str, int]:
    """Bytes of the weights and of one stream, by what they are for."""
    dit = preset.dit
    _, ph, pw = dit.patch
    cell = preset.spatial_stride
    tokens = (setting.height // cell // ph) * (setting.width // cell // pw)
    area = setting.width * setting.height
    sizes = layouts.expected(preset)
    channels = (LIGHT_CACHES if setting.light_vae else VAE_CACHES)[preset.family]
    frames = 1 if setting.light_vae else 2
    widest, span = (LIGHT_WIDEST if setting.light_vae else WIDEST)[preset.family]
    vectors = dit.num_layers * dit.num_heads * tokens
    turned = preset.sink if preset.turn_sink else 0
    vaes = {"light_vae" if setting.light_vae else "vae"} | ({"vae"} if preset.context == "recompute" else set())
    vector = BYTES * dit.head_dim if setting.exact_cache else dit.head_dim
    return {
        "DiT weights": BYTES * sum(map(prod, sizes["dit"].values())),
        "text encoder": text_encoder(sizes["text_encoder"], setting) if setting.text_on_device else 0,
        # keys and values of the window, and the keys of a sink that turns a second time, unrotated
        "KV cache": vectors * (vector * 2 * setting.window + BYTES * dit.head_dim * turned),
        "text keys and values": BYTES * dit.num_layers * dit.dim * 2 * preset.text.length,
        "VAE weights": BYTES * sum(prod(shape) for name in vaes for shape in sizes[name].values()),
        "VAE caches": BYTES * frames * sum(count * area // size**2 for size, count in channels.items()),
        "activations": max(
            # the peak within a block: the hidden layer twice, and x, y, q, k, v and their rotated copies
            preset.chunk * tokens * (2 * dit.ffn_dim + 10 * dit.dim),
            # input and output of the decoder's widest layer: a chunk at once in the light one, a latent in the full one
            (preset.chunk if setting.light_vae else 1) * 4 * widest * area // span**2 * 2,
        )
        * BYTES,
    }


def text_encoder(shapes: dict[str, tuple[int, ...]], setting: Setting) -> int:
    """Bytes of a text encoder with parameters of these shapes."""
    linear = [
        shape
        for name, shape in shapes.items()
        if len(shape) == 2 and "embed_tokens" not in name and "relative_attention_bias" not in name
    ]
    exact = BYTES * sum(map(prod, shapes.values()))
    saved = sum((BYTES - 1) * prod(shape) - 4 * shape[0] for shape in linear)  # 4: a float32 scale per row
    return exact if setting.exact_text else exact - saved


def total(preset: Preset, setting: Setting) -> int:
    return sum(parts(preset, setting).values())


def _windows(preset: Preset, setting: Setting) -> Iterator[Setting]:
    """Shorter windows, longest first, down to the sink, one past chunk and the current one."""
    for window in range(setting.window - preset.chunk, preset.sink + 2 * preset.chunk - 1, -preset.chunk):
        yield replace(setting, window=window)


def _resolutions(preset: Preset, setting: Setting) -> Iterator[Setting]:
    """Smaller resolutions of about the same aspect ratio, largest first, down to half of each side."""
    unit = preset.spatial_stride * preset.dit.patch[1]
    for eighths in (7, 6, 5, 4):
        width, height = (side * eighths // 8 // unit * unit for side in (setting.width, setting.height))
        yield replace(setting, width=width, height=height)


def remedies(preset: Preset, setting: Setting, limit: int) -> list[list[str]]:
    """The options that make a setting fit into `limit` bytes: each that does so alone, and one combination.

    The combination adds options in the order of what they cost in quality, cheapest first. Empty if nothing fits.
    """
    options = {
        "--text-encoder cpu": lambda s: iter([replace(s, text_on_device=False)] if s.text_on_device else []),
        "--text-encoder-weights int8": lambda s: iter(
            [replace(s, exact_text=False)] if s.exact_text and s.text_on_device else []
        ),
        "--low-bit-attention": lambda s: iter([replace(s, exact_cache=False)] if s.exact_cache else []),
        "--decoder light": lambda s: iter([] if s.light_vae else [replace(s, light_vae=True)]),
        "shorter window": lambda s: _windows(preset, s),
        "smaller resolution": lambda s: _resolutions(preset, s),
    }

    def label(option: str, s: Setting) -> str:
        values = {"shorter window": f" of {s.window}", "smaller resolution": f" of {s.width}x{s.height}"}
        return option + values.get(option, "")

    singles = []
    for option, choices in options.items():
        chosen = next((s for s in choices(setting) if total(preset, s) <= limit), None)
        if chosen is not None:
            singles.append([label(option, chosen)])
    together: list[str] = []
    for option, choices in options.items():
        tried = list(choices(setting))
        chosen = next((s for s in tried if total(preset, s) <= limit), tried[-1] if tried else setting)
        if total(preset, chosen) >= total(preset, setting):
            continue
        together.append(label(option, chosen))
        setting = chosen
        if total(preset, setting) <= limit:
            return singles if together in singles else [*singles, together]
    return singles
