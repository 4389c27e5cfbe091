"""Muon for the matrices inside a network, AdamW for everything else, and steps that run as CUDA graphs.

Parameters, gradients and averages each lie in one flat buffer, matrices of one shape side by side: an exchange between
ranks is one call, and Newton-Schulz takes all matrices of a shape at once. Coefficients and the 0.2 sqrt(max dimension)
scale, which lets both parts share a learning rate: Jordan et al. 2024 and Liu et al. 2025 (arXiv 2502.16982).
Convolutions count as matrices of [outputs, everything else].
"""

from collections import defaultdict, deque
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from engine.recipes.run import Run, learning_rate

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
BETAS = (0.9, 0.98)
MOMENTUM = 0.95
WEIGHT_DECAY = 0.01
"""Of the matrices; nothing else decays."""


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


def convolutions(parameters: Mapping[str, nn.Parameter]) -> set[str]:
    """Names of the convolutions that Muon takes: all but those that draw the picture itself."""
    return {name for name, p in parameters.items() if p.ndim >= 4 and len(p) > 12 and p.numel() > 2000}


class Optimiser:
    """Takes over the memory of `parameters`: their values and gradients become views of its buffers.

    A step is `schedule`, then `clear`, a backward pass, `exchange`, `update`.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        matrices: set[str],
        lr: float,
        *,
        decay: float = 0.998,
        averaged: int = 0,
        clip: float = 1.0,
    ) -> None:
        """`decay`: of the moving average of the values, shorter at first unless `averaged` steps are behind it."""
        self.lr, self.decay, self.steps, self.clip = lr, decay, averaged, clip
        shapes: dict[tuple[int, int], list[str]] = defaultdict(list)
        for name in parameters:
            if name in matrices:
                rows = len(parameters[name])
                shapes[rows, parameters[name].numel() // rows].append(name)
        rest = [name for name in parameters if name not in matrices]
        order = [name for names in shapes.values() for name in names] + rest
        device = next(iter(parameters.values())).device
        size = sum(p.numel() for p in parameters.values())
        self.values, self.gradient = torch.empty(size, device=device), torch.zeros(size, device=device)
        self.average = torch.empty(size, device=device)
        self.averages: dict[str, Tensor] = {}
        """The moving average of each parameter, by name."""
        offset = 0
        for name in order:
            p = parameters[name]
            views = [
                flat.as_strided(p.shape, p.stride(), offset) for flat in (self.values, self.gradient, self.average)
            ]
            views[0].copy_(p.detach())
            p.data, p.grad, self.averages[name] = views
            offset += p.numel()
        self.average.copy_(self.values)
        self.groups: list[tuple[int, tuple[int, int, int]]] = []
        start = 0
        for (rows, columns), names in shapes.items():
            self.groups.append((start, (len(names), rows, columns)))
            start += len(names) * rows * columns
        self.momentum = torch.zeros(start, device=device)
        self.moments = torch.zeros(2, size - start, device=device)
        self.rate = torch.zeros((), device=device)
        self.weight = torch.ones((), device=device)
        self.count = torch.zeros((), device=device)

    def schedule(self, factor: float) -> None:
        """Set the factor on the learning rate for the step that follows."""
        self.rate.fill_(self.lr * factor)
        self.weight.fill_(1 - min(self.decay, (1 + self.steps) / (10 + self.steps)))
        self.steps += 1

    def clear(self) -> None:
        self.gradient.zero_()

    def exchange(self) -> None:
        """Average the gradients over the ranks of a distributed run."""
        if dist.is_initialized():
            dist.all_reduce(self.gradient)
            self.gradient /= dist.get_world_size()

    @torch.no_grad()
    def update(self) -> Tensor:
        """Clip the gradient, move the values and their average; returns the gradient's norm before clipping."""
        norm = self.gradient.norm()
        self.gradient *= (self.clip / (norm + 1e-6)).clamp(max=1)
        for start, shape in self.groups:
            span = slice(start, start + shape[0] * shape[1] * shape[2])
            values, gradient, momentum = (x[span].view(shape) for x in (self.values, self.gradient, self.momentum))
            momentum.lerp_(gradient, 1 - MOMENTUM)
            direction = orthogonalise(gradient.lerp(momentum, MOMENTUM)).float()
            values *= 1 - WEIGHT_DECAY * self.rate
            values -= direction * (self.rate * 0.2 * max(shape[1:]) ** 0.5)
        rest = slice(len(self.momentum), None)
        self.count += 1
        mean, square = self.moments
        mean.lerp_(self.gradient[rest], 1 - BETAS[0])
        square.lerp_(self.gradient[rest].square(), 1 - BETAS[1])
        spread = (square / (1 - BETAS[1] ** self.count)).sqrt() + 1e-8
        self.values[rest] -= self.rate * mean / (1 - BETAS[0] ** self.count) / spread
        self.average.lerp_(self.values, self.weight)
        return norm


class Replay:
    """Calls functions over and over; on a GPU each is recorded as a CUDA graph and then costs one launch.

    A recorded function must do the same work every time, on tensors that stay where they are. What it returns is
    overwritten by its next call. The stream must not be the default one (`Run` sees to that).
    """

    WARM_UP = 2
    """Calls before recording: compilation and the choice of algorithms happen there."""
    AHEAD = 2
    """Calls that the CPU may be ahead of the GPU."""

    def __init__(self, device: torch.device) -> None:
        self.graphs: dict[str, tuple[torch.cuda.CUDAGraph, Tensor] | None] = {}
        self.calls: dict[str, int] = defaultdict(int)
        self.cuda = device.type == "cuda"
        self.pool = torch.cuda.graph_pool_handle() if self.cuda else None
        self.pending: deque[torch.cuda.Event] = deque()

    def __call__(self, name: str, function: Callable[[], Tensor]) -> Tensor:
        if not self.cuda:
            return function()
        self.calls[name] += 1
        if self.calls[name] <= self.WARM_UP:
            return function()
        if name not in self.graphs:
            self.graphs[name] = self._record(name, function)
        recorded = self.graphs[name]
        if recorded is None:
            return function()
        graph, out = recorded
        graph.replay()
        event = torch.cuda.Event()
        event.record()
        self.pending.append(event)
        if len(self.pending) > self.AHEAD:
            self.pending.popleft().synchronize()
        return out

    def _record(self, name: str, function: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor] | None:
        graph = torch.cuda.CUDAGraph()
        # thread_local: NCCL's watchdog asks after its own events meanwhile
        scope = torch.cuda.graph(
            graph, pool=self.pool, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"
        )
        try:
            with scope:
                out = function()
        except RuntimeError as error:
            print(f"'{name}' cannot be recorded and runs more slowly: {str(error).splitlines()[0]}", flush=True)
            return None
        return graph, out


def fit(run: Run, optimiser: Optimiser, loss_of: Callable[[], Tensor], decay_from: float = 0.4) -> str:
    """Descend until the run's time is over, and say how that went: what one network with one loss needs."""

    def descend() -> Tensor:
        optimiser.clear()
        with torch.autocast(run.device.type, torch.bfloat16):
            loss = loss_of()
        loss.backward()
        return torch.stack([loss.detach(), optimiser.update()])

    replay, step = Replay(run.device), 0
    while step == 0 or run.progress() < 1:
        optimiser.schedule(learning_rate(run.progress(), step, decay_from=decay_from))
        loss, norm = replay(run.name, descend)
        step += 1
        run.log(step, {"loss": loss, "norm": norm})
    return f"{step} steps, loss {float(loss):.3f}"
