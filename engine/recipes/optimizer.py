"""Muon for the matrices of transformer blocks, AdamW for everything else.

torch.optim.Muon orthogonalises one matrix at a time, which is bound by launches at our sizes; here matrices of one
shape go through Newton-Schulz together. Coefficients and the 0.2 sqrt(max dimension) scale, which lets both
optimisers share a learning rate: Jordan et al. 2024 and Liu et al. 2025 (arXiv 2502.16982).
"""

from collections import defaultdict

import torch
import torch.distributed as dist
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalise(g: Tensor, iterations: int = 5) -> Tensor:
    """Newton-Schulz towards the nearest semi-orthogonal matrix, for a stack [N, rows, columns]."""
    a, b, c = COEFFICIENTS
    x = g.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Mean over the ranks of a distributed run, in one exchange; nothing where there is one rank."""
    if not dist.is_initialized():
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    torch._foreach_copy_(
        gradients,
        [part.view_as(g) for part, g in zip(flat.split([g.numel() for g in gradients]), gradients, strict=True)],
    )


class MuonAdamW:
    """One step over both groups; `factor` scales the shared learning rate."""

    def __init__(
        self,
        modules: list[nn.Module],
        matrices: set[int],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
    ) -> None:
        """`matrices`: ids of the 2-D parameters that Muon takes."""
        parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        groups: dict[torch.Size, list[Tensor]] = defaultdict(list)
        for p in parameters:
            if id(p) in matrices:
                groups[p.shape].append(p)
        self.groups = list(groups.values())
        self.buffers = [torch.zeros(len(g), *g[0].shape, device=g[0].device) for g in self.groups]
        rest = [p for p in parameters if id(p) not in matrices]
        self.adamw = torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.0, fused=rest[0].is_cuda)
        self.parameters = parameters

    @torch.no_grad()
    def step(self, factor: float, clip: float = 1.0) -> Tensor:
        """Average the gradients over the ranks, clip, update, clear them; returns the gradient norm."""
        average_gradients(self.parameters)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, clip)
        for group in self.adamw.param_groups:
            group["lr"] = self.lr * factor
        self.adamw.step()
        lr = self.lr * factor
        for parameters, buffer in zip(self.groups, self.buffers, strict=True):
            gradient = torch.stack([torch.zeros_like(p) if p.grad is None else p.grad for p in parameters])
            buffer.lerp_(gradient, 1 - self.momentum)
            update = orthogonalise(gradient.lerp(buffer, self.momentum)).float()
            update *= 0.2 * max(update.shape[-2:]) ** 0.5
            torch._foreach_mul_(parameters, 1 - lr * self.weight_decay)
            torch._foreach_add_(parameters, list(update.unbind()), alpha=-lr)
        for p in self.parameters:
            p.grad = None
        return norm
