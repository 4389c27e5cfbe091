"""Where the text encoder lives: UMT5-XXL takes 11 GB, and runs only for a moment when a prompt changes.

There are three placements. `resident` keeps it on the device. `offload` keeps it in host memory (pinned, if the device
is a GPU) and copies one layer at a time to the device, which then needs room for the largest one, the embedding. `cpu`
encodes on the host and copies the result to the device.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.config import TextPlacement
from engine.models.text_encoder import TextEncoder


def place_text_encoder(encoder: TextEncoder, placement: TextPlacement, device: torch.device) -> nn.Module:
    """The encoder as a module from ids int64 [B, length] to [B, length, dim] on `device`.

    It takes ownership of the weights; with `offload` and `cpu` they move to host memory. These two encode only as many
    positions as the longest prompt has: the others are masked, and their results are zero.
    """
    if placement == "resident":
        return encoder.to(device)
    if placement == "offload":
        _offload(encoder, device)
        return _Placed(encoder, device, device)
    return _Placed(encoder.to("cpu"), torch.device("cpu"), device)


class _Placed(nn.Module):
    """An encoder that runs on one device for a model on another."""

    def __init__(self, encoder: TextEncoder, runs_on: torch.device, device: torch.device) -> None:
        super().__init__()
        self.encoder = encoder
        self.runs_on = runs_on
        self.device = device

    def forward(self, ids: Tensor) -> Tensor:
        used = max(1, int((ids != 0).sum(dim=1).max()))
        encoded: Tensor = self.encoder(ids[:, :used].to(self.runs_on)).to(self.device)
        return F.pad(encoded, (0, 0, 0, ids.shape[1] - used))


def _offload(encoder: TextEncoder, device: torch.device) -> None:
    """Move the weights to the host; hooks copy each layer's to the device before it runs, and free them after."""
    stack = encoder.umt5
    layers = [stack.embed_tokens, *stack.block, stack.final_layer_norm]
    assert sum(1 for layer in layers for _ in layer.parameters()) == sum(1 for _ in encoder.parameters())
    for layer in layers:
        host = {}
        for parameter in layer.parameters():
            data = parameter.data.to("cpu")
            host[parameter] = data.pin_memory() if device.type == "cuda" else data
            parameter.data = host[parameter]

        def fetch(_layer: nn.Module, _inputs: object, host: dict[nn.Parameter, Tensor] = host) -> None:
            for parameter, data in host.items():
                parameter.data = data.to(device, non_blocking=True, copy=True)

        def drop(_layer: nn.Module, _inputs: object, _output: object, host: dict[nn.Parameter, Tensor] = host) -> None:
            for parameter, data in host.items():
                parameter.data = data  # the weights are frozen: nothing to copy back

        layer.register_forward_pre_hook(fetch)
        layer.register_forward_hook(drop, always_call=True)
