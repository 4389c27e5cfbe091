"""Three-axis rotary position embedding, as in Wan (adjacent pairs, split over time, height and width).

Angles are computed on demand in float64 for any int64 frame index, so there is no table that a long stream could
run out of.
"""

import torch
from torch import Tensor


def axis_pairs(head_dim: int) -> tuple[int, int, int]:
    """Complex pairs given to (time, height, width): 22, 21, 21 of 64 at head_dim 128."""
    pairs = head_dim // 2
    return pairs - 2 * (pairs // 3), pairs // 3, pairs // 3


def rope_angles(frames: Tensor, height: int, width: int, head_dim: int) -> Tensor:
    """Rotations of every token of the given latent frames.

    Args:
        frames: int64 [F], absolute latent frame indices.
        height, width: tokens in a frame.
        head_dim: size of an attention head.

    Returns:
        float32 [F * height * width, head_dim // 2, 2], the (cos, sin) of theta = position * 10000^(-2j/d) for each
        axis's own d.
    """
    positions = (
        frames.to(torch.float64),
        torch.arange(height, dtype=torch.float64, device=frames.device),
        torch.arange(width, dtype=torch.float64, device=frames.device),
    )
    per_axis = []
    for position, pairs in zip(positions, axis_pairs(head_dim), strict=True):
        frequency = 10_000.0 ** (-torch.arange(pairs, dtype=torch.float64, device=frames.device) / pairs)
        per_axis.append(position[:, None] * frequency)
    time, rows, columns = per_axis
    shape = (len(frames), height, width, -1)
    theta = torch.cat(
        [
            time[:, None, None].expand(shape),
            rows[None, :, None].expand(shape),
            columns[None, None, :].expand(shape),
        ],
        dim=-1,
    ).flatten(0, 2)
    return torch.stack([theta.cos(), theta.sin()], dim=-1).float()


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate adjacent pairs (2i, 2i + 1) of x [B, S, heads, head_dim] by angles [S, head_dim // 2, 2]."""
    pairs = x.float().unflatten(-1, (-1, 2))
    even, odd = pairs[..., 0], pairs[..., 1]
    cos, sin = angles[:, None, :, 0], angles[:, None, :, 1]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)
