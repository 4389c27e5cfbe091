"""Where the text encoder lives: UMT5-XXL takes 11 GB, and works for a moment whenever a prompt changes.

Three places. `resident` keeps it on the device. `offload` keeps it in host memory (pinned, where the device is a GPU)
and brings one layer at a time to the device, so what it needs there is its largest layer, the embedding. `cpu`
encodes on the host and sends the result over.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.config import TextPlacement
from engine.models.text_encoder import TextEncoder


def place_text_encoder(encoder: TextEncoder, placement: TextPlacement, device: torch.device) -> nn.Module:
    """The encoder, to be called as before: ids int64 [B, length] to [B, length, dim] on `device`.

    The weights are taken over: with `offload` and `cpu` they move to the host. These two encode no more positions
    than the longest prompt has, since the others are masked and come out as zeros anyhow.
    """
    if placement == "resident":
        return encoder.to(device)
    if placement == "offload":
        _offload(encoder, device)
        return _Placed(encoder, device, device)
    return _Placed(encoder.to("cpu"), torch.device("cpu"), device)


class _Placed(nn.Module):
    """An encoder that works on one device for a model on another."""

    def __init__(self, encoder: TextEncoder, works_on: torch.device, device: torch.device) -> None:
        super().__init__()
        self.encoder = encoder
        self.works_on = works_on
        self.device = device

    def forward(self, ids: Tensor) -> Tensor:
        used = max(1, int((ids != 0).sum(dim=1).max()))
        encoded: Tensor = self.encoder(ids[:, :used].to(self.works_on)).to(self.device)
        return F.pad(encoded, (0, 0, 0, ids.shape[1] - used))


def _offload(encoder: TextEncoder, device: torch.device) -> None:
    """Move the weights to the host, and let every layer fetch its own before it runs and drop them after."""
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
                parameter.data = data  # frozen weights: nothing has to be copied back

        layer.register_forward_pre_hook(fetch)
        layer.register_forward_hook(drop, always_call=True)
