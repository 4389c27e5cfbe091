"""Linear layers with their weights alone in 8 bits, of a module that works on few rows at once or is short of memory.

For a text encoder: half the memory, and half of what `--text-encoder offload` brings to the device for every prompt.
Its products are faster where the weights are most of what they read: on an H100 up to 16 tokens, by up to a third; with
64 and more they take longer than exact ones.
"""

import torch
from torch import Tensor, nn

from engine.ops.linear import Format, QuantTensor, linear_weights8, quantise


class Linear8(nn.Module):
    """Called as the linear layer that it is made from."""

    def __init__(self, layer: nn.Linear, form: Format) -> None:
        super().__init__()
        rows = quantise(layer.weight.detach(), form)
        # parameters, so that they move with the module; but they are never cast: `.to(dtype)` comes before
        self.rows = nn.Parameter(rows.data, requires_grad=False)
        self.scale = nn.Parameter(rows.scale, requires_grad=False)
        self.bias = layer.bias

    @property
    def weight(self) -> QuantTensor:
        """No tensor: the UMT5 of transformers would cast its activations to the dtype of one."""
        return QuantTensor(self.rows, self.scale)

    def forward(self, x: Tensor) -> Tensor:
        out = linear_weights8(x, self.weight)
        return out if self.bias is None else out + self.bias


@torch.no_grad()
def weights_in_8_bits(module: nn.Module, form: Format) -> None:
    """Put a `Linear8` in the place of every linear layer, at any depth."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, Linear8(child, form))
        else:
            weights_in_8_bits(child, form)
