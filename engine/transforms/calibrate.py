"""Fixed scales for the inputs of projections in 8 bits, from a few chunks that are generated and thrown away.

With its scale known, a kernel that rounds its result need not find the largest magnitude of each row first, and a
product takes one scale for all rows, which is what some devices have alone. What is larger than `HEADROOM` times the
largest value seen is clipped.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.config import Preset
from engine.stream.rollout import commit_chunk, denoise_chunk
from engine.transforms.apply import Served
from engine.transforms.cuda_graphs import GraphedWan
from engine.transforms.fused import FusedWan

PROMPTS = (
    "A shiny red cube bounces on grass at sunset, a small blue ball rolls past, the camera orbits",
    "A crowded night market in the rain, neon signs reflected in puddles, handheld camera, shallow depth of field",
)
CHUNKS = 3


@torch.inference_mode()
def calibrate(served: Served, preset: Preset, texts: Sequence[Tensor], chunks: int = CHUNKS) -> None:
    """Fix the scales of `served` by the first chunks under each of the encoded prompts, [batch, L, text_dim].

    Before anything is recorded as a graph.

    Raises:
        ValueError: the model is not the fused one.
    """
    model = served.dit.model if isinstance(served.dit, GraphedWan) else served.dit
    if not isinstance(model, FusedWan):
        raise ValueError("fixed scales can only be used together with the fused model")
    projections = [x for block in model.blocks for x in block.projections.values()]
    for projection in projections:
        projection.watch()
    rollout = preset.rollout()
    for seed, text in enumerate(texts):
        cache, seeds = served.new_cache(), [seed] * len(text)
        context = model.encode_text(text)
        for index in range(chunks):
            rows = [(seed, index) for seed in seeds]
            latents = denoise_chunk(model, rollout, cache, context, rows)
            commit_chunk(model, rollout, cache, context, latents, rows, context_pass=served.context_pass)
    for projection in projections:
        projection.settle()
