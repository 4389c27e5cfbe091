"""Names of the tensors of Wan's VAE in checkpoints of the diffusers layout."""

import re
from collections import Counter
from collections.abc import Collection

# Whole levels of Wan 2.2 and the decoder of 2.1 in diffusers; the encoder of 2.1 is a flat list in both layouts.
_STEP = re.compile(
    r"(?P<half>encoder|decoder)\.(?P<way>down|up)_blocks\.(?P<level>\d+)\."
    r"(?:resnets\.(?P<block>\d+)|downsampler|upsampler|upsamplers\.0)\."
)
_FLAT = re.compile(r"encoder\.down_blocks\.(\d+)\.")
_PLACES = {"quant_conv.": "conv1.", "post_quant_conv.": "conv2."} | {
    f"{half}.{theirs}.": f"{half}.{ours}."
    for half in ("encoder", "decoder")
    for theirs, ours in {
        "conv_in": "conv1",
        "mid_block.resnets.0": "middle.0",
        "mid_block.attentions.0": "middle.1",
        "mid_block.resnets.1": "middle.2",
        "norm_out": "head.0",
        "conv_out": "head.2",
    }.items()
}
_BLOCK = {
    "norm1": "residual.0",
    "conv1": "residual.2",
    "norm2": "residual.3",
    "conv2": "residual.6",
    "conv_shortcut": "shortcut",
}


def from_diffusers(names: Collection[str]) -> dict[str, str]:
    """The original name, which is `CausalVAE`'s, of every tensor of an `AutoencoderKLWan`, for Wan 2.1 and 2.2.

    The layout follows from the names, so all names of a checkpoint are needed at once.

    Raises:
        ValueError: a name does not belong to an `AutoencoderKLWan`.
    """
    steps = [match for match in map(_STEP.match, names) if match]
    blocks = Counter((m["half"], int(m["level"])) for m in {m[0]: m for m in steps if m["block"]}.values())
    nested = any(half == "encoder" for half, _ in blocks)

    def place(name: str) -> tuple[str, str]:
        """Where a tensor's module stands in the original, and the rest of the tensor's name."""
        if match := _STEP.match(name):
            half, samples, level = match["half"], match["way"] + "samples", int(match["level"])
            at = int(match["block"] or blocks[half, level])
            if nested:
                return f"{half}.{samples}.{level}.{samples}.{at}.", name[match.end() :]
            at += sum(blocks[half, below] + 1 for below in range(level))
            return f"{half}.{samples}.{at}.", name[match.end() :]
        if match := _FLAT.match(name):
            return f"encoder.downsamples.{match[1]}.", name[match.end() :]
        for theirs, ours in _PLACES.items():
            if name.startswith(theirs):
                return ours, name.removeprefix(theirs)
        raise ValueError(f"{name} is no tensor of an AutoencoderKLWan")

    renamed = {}
    for name in names:
        where, rest = place(name)
        first, dot, last = rest.partition(".")
        renamed[name] = where + _BLOCK.get(first, first) + dot + last
    return renamed
