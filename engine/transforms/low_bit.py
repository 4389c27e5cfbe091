"""The projections of a transformer block in 8 bits, or as they are: which is data, see `Policy`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.ops.fused import Activation, to_rows8
from engine.ops.linear import Format, Rows8, linear8, quantise

Role = Literal["qkv", "o", "cross_q", "cross_o", "up", "down"]
ROLES: tuple[Role, ...] = ("qkv", "o", "cross_q", "cross_o", "up", "down")


@dataclass(frozen=True)
class Policy:
    """What is in 8 bits. Everything outside the blocks stays as it is: it is small, and errors there reach all.

    `exact` names the roles that stay as they are in every block, `exact_blocks` whole blocks.
    """

    format: Format | None = None
    exact: frozenset[Role] = field(default_factory=frozenset)
    exact_blocks: frozenset[int] = field(default_factory=frozenset)

    def of(self, block: int, role: Role) -> Format | None:
        return None if role in self.exact or block in self.exact_blocks else self.format


class Projection:
    """One or more linear layers over the same input, side by side, without their bias.

    As they are, the layers' weights become views of the joint one, so nothing is held twice and a change of theirs (a
    LoRA) is a change here. In 8 bits the joint weight is a copy: `refresh` makes it again.
    """

    def __init__(self, layers: Sequence[nn.Linear], to: Format | None) -> None:
        self._layers, self.format = layers, to
        self.bias: Tensor | None = self._join([x.bias for x in layers]) if layers[0].bias is not None else None
        self.weight: Tensor | Rows8
        if to is None:
            self.weight = self._join([x.weight for x in layers])
        else:
            self.weight = quantise(torch.cat([x.weight.detach() for x in layers]), to)

    def _join(self, parts: Sequence[Tensor]) -> Tensor:
        if len(parts) == 1:
            return parts[0].detach()
        joint = torch.cat([x.detach() for x in parts])
        for part, view in zip(parts, joint.split([len(x) for x in parts]), strict=True):
            part.data = view
        return joint

    def release(self, *, keep_on_host: bool) -> None:
        """Give back the layers' own memory on the device, now that the copy in 8 bits serves."""
        if self.format is None:
            return
        for layer in self._layers:
            moved = layer.weight.detach().to("cpu" if keep_on_host else "meta")
            layer.weight = nn.Parameter(moved, requires_grad=False)

    def refresh(self) -> None:
        """Take the layers' changed weights over, in place."""
        if isinstance(self.weight, Rows8):
            device = self.weight.data.device
            fresh = quantise(torch.cat([x.weight.detach().to(device) for x in self._layers]), self.format or "fp8")
            self.weight.data.copy_(fresh.data)
            self.weight.scale.copy_(fresh.scale)

    def __call__(self, x: Activation) -> Tensor:
        """x [..., K] -> [..., N], in the dtype of the activations. In 8 bits x is best given quantised already."""
        if isinstance(self.weight, Tensor):
            assert isinstance(x, Tensor)
            return F.linear(x, self.weight)
        rows = x if isinstance(x, Rows8) else to_rows8(x, self.weight.format)
        return linear8(rows, self.weight, None, self.dtype)

    def gelu(self, x: Tensor) -> Tensor:
        """GELU of the product plus the bias: the library's own epilogue where there is one."""
        assert isinstance(self.weight, Tensor) and self.bias is not None
        if x.is_cuda:
            return torch._addmm_activation(self.bias, x, self.weight.t(), use_gelu=True)
        return F.gelu(F.linear(x, self.weight, self.bias), approximate="tanh")

    @property
    def dtype(self) -> torch.dtype:
        return self._layers[0].weight.dtype


def bytes_of(projections: Mapping[str, Projection]) -> int:
    """Device memory of the weights of these projections."""
    total = 0
    for projection in projections.values():
        parts = (
            (projection.weight.data, projection.weight.scale)
            if isinstance(projection.weight, Rows8)
            else (projection.weight,)
        )
        total += sum(x.nbytes for x in parts)
    return total
