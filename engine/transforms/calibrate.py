"""Calibration: fixed scales for the inputs of 8-bit projections, from a few chunks that are generated and discarded.

With a fixed scale, a kernel that quantises its result need not find each row's largest magnitude first, and a product
takes one scale for all rows, the only kind that some devices support. Values above `HEADROOM` times the largest one
seen are clipped.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.config import Preset
from engine.stream.rollout import commit_chunk, denoise_chunk
from engine.transforms.apply import Served

PROMPTS = (
    "A shiny red cube bounces on grass at sunset, a small blue ball rolls past, the camera orbits",
    "A crowded night market in the rain, neon signs reflected in puddles, handheld camera, shallow depth of field",
)
CHUNKS = 3


@torch.inference_mode()
def calibrate(served: Served, preset: Preset, texts: Sequence[Tensor], chunks: int = CHUNKS) -> None:
    """Fix the input scales of `served` from its first chunks under each encoded prompt, [batch, L, text_dim].

    Must precede the capture of CUDA graphs.

    Raises:
        ValueError: the model is not fused.
    """
    model = served.fused
    if model is None:
        raise ValueError("fixed scales can only be used together with the fused model")
    projections = [x for block in model.blocks for x in block.projections.values()]
    for projection in projections:
        projection.start_calibration()
    rollout = preset.rollout()
    for seed, text in enumerate(texts):
        cache, seeds = served.new_cache(), [seed] * len(text)
        context = model.encode_text(text)
        for index in range(chunks):
            rows = [(seed, index) for seed in seeds]
            latents = denoise_chunk(model, rollout, cache, context, rows)
            commit_chunk(model, rollout, cache, context, latents, rows, context_pass=served.context_pass)
    for projection in projections:
        projection.finish_calibration()
