"""The projections of a transformer block in fewer bits, or 2:4 sparse, or as they are: which is data, see `Policy`."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.config import QuantScheme, Role
from engine.models.dit import Block
from engine.ops.blocks import E2M1, Blocks, blocks_unsupported_reason, linear_blocks, quantise_blocks
from engine.ops.cublas import gelu_product
from engine.ops.fused import Activation, gelu, to_rows8
from engine.ops.linear import (
    LARGEST,
    Fixed,
    Format,
    OutputFormat,
    QuantTensor,
    fp8_unsupported_reason,
    linear8,
    linear_weights8,
    one_scale,
    quantise,
)
from engine.ops.sparse import Sparse24, compress, linear_sparse, prune, sparse_unsupported_reason

Weight = Tensor | QuantTensor | Sparse24 | Blocks
HEADROOM: dict[Format, float] = {"fp8": 4.0, "int8": 1.25}
"""What a fixed scale leaves above the largest magnitude seen. Float8 rounds in proportion, so room costs it nothing."""


@dataclass(frozen=True)
class WeightFormat:
    """How the weights of a projection are kept.

    Raises:
        ValueError: there are no sparse products in this form.
    """

    form: QuantScheme | None = None
    sparse: bool = False

    def __post_init__(self) -> None:
        if self.sparse and self.form not in (None, "fp8"):
            raise ValueError(f"2:4 sparse weights are multiplied as they are or in fp8, not in {self.form}")

    @property
    def rows(self) -> Format | None:
        """The format of the other operand, where that is in 8 bits."""
        match self.form:
            case "fp8" | "fp8-tensor":
                return "fp8"
            case "int8":
                return "int8"
            case _:
                return None

    @property
    def scales_inputs(self) -> bool:
        """Whether there is a scale of inputs that could be fixed."""
        return self.rows is not None or self.form == "nvfp4"


def unsupported_reason(held: WeightFormat, device: torch.device) -> str | None:
    """Why this device has no product of its own for this form, so that it is emulated; None if it has."""
    if held.sparse:
        return sparse_unsupported_reason(device, fp8=held.form is not None)
    match held.form:
        case "fp8":
            return fp8_unsupported_reason(device, "rows") and fp8_unsupported_reason(device, "tensor")
        case "fp8-tensor":
            return fp8_unsupported_reason(device, "tensor")
        case "mxfp8" | "nvfp4" as form:
            return blocks_unsupported_reason(device, form)
        case _:
            return None


@dataclass(frozen=True)
class Policy:
    """What is in fewer bits, and what is sparse. Everything outside the blocks stays as it is: it is small, and errors
    there reach all.

    `exact` names the roles that stay as they are in every block, `exact_blocks` whole blocks.
    """

    form: QuantScheme | None = None
    exact: frozenset[Role] = field(default_factory=frozenset)
    exact_blocks: frozenset[int] = field(default_factory=frozenset)
    sparse: frozenset[Role] = field(default_factory=frozenset)

    def of(self, block: int, role: Role) -> WeightFormat:
        if role in self.exact or block in self.exact_blocks:
            return WeightFormat()
        return WeightFormat(self.form, role in self.sparse)


def layers_of(block: Block) -> dict[Role, list[nn.Linear]]:
    """The linear layers of each role, which read the same input and are joined."""
    own, cross = block.self_attn, block.cross_attn
    return {
        "qkv": [own.q, own.k, own.v],
        "o": [own.o],
        "cross_q": [cross.q],
        "cross_o": [cross.o],
        "up": [cast(nn.Linear, block.ffn[0])],
        "down": [cast(nn.Linear, block.ffn[2])],
    }


class Projection:
    """One or more linear layers over the same input, side by side, without their bias.

    As they are, the layers' weights become views of the joint one, so nothing is held twice and a change of theirs (a
    LoRA) is a change here. In any other way the joint weight is a copy: `refresh` makes it again.
    """

    def __init__(self, layers: Sequence[nn.Linear], held: WeightFormat | None = None) -> None:
        self._layers, self.held = layers, held or WeightFormat()
        self.bias: Tensor | None = self._join([x.bias for x in layers]) if layers[0].bias is not None else None
        self.weight: Weight
        if self.held == WeightFormat():
            self.weight = self._join([x.weight for x in layers])
        else:
            self.weight = self._make(torch.cat([x.weight.detach() for x in layers]))
        self.scale: Tensor | None = None
        """Of the input, float32 [1], where it was calibrated; without it each input's own is looked for."""
        self._fixed: Fixed | None = None
        self._seen: Tensor | None = None

    @classmethod
    def of(cls, weight: Tensor, held: WeightFormat, bias: Tensor | None = None) -> "Projection":
        """A weight [N, K] by itself, which is taken over."""
        with torch.device("meta"):
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            layer.bias = nn.Parameter(bias, requires_grad=False)
        return cls([layer], held)

    def _join(self, parts: Sequence[Tensor]) -> Tensor:
        if len(parts) == 1:
            return parts[0].detach()
        joint = torch.cat([x.detach() for x in parts])
        for part, view in zip(parts, joint.split([len(x) for x in parts]), strict=True):
            part.data = view
        return joint

    def _make(self, weight: Tensor) -> Weight:
        if self.held.sparse:
            return compress(prune(weight), self.held.form is not None)
        match self.held.form:
            case "fp8" | "fp8-weights":
                return quantise(weight, "fp8")
            case "int8" | "int8-weights":
                return quantise(weight, "int8")
            case "fp8-tensor":
                return quantise(weight, one_scale(weight, "fp8"))
            case "mxfp8" | "nvfp4" as form:
                return quantise_blocks(weight, form)
            case None:
                return weight

    def release(self, *, keep_on_host: bool) -> None:
        """Give back the layers' own memory on the device, now that the copy serves."""
        if self.held == WeightFormat():
            return
        for layer in self._layers:
            moved = layer.weight.detach().to("cpu" if keep_on_host else "meta")
            layer.weight = nn.Parameter(moved, requires_grad=False)

    def refresh(self) -> None:
        """Take the layers' changed weights over, in place. Sparse ones are pruned anew."""
        if self.held == WeightFormat():
            return
        old = tensors(self.weight)
        fresh = self._make(torch.cat([x.weight.detach().to(old[0].device) for x in self._layers]))
        for mine, new in zip(old, tensors(fresh), strict=True):
            mine.copy_(new)

    @property
    def into(self) -> OutputFormat | None:
        """What the kernel that makes the input is to round it to, so that no other pass has to."""
        form = self.held.rows
        if form is None or self._seen is not None:
            return None
        if self._fixed is not None:
            return self._fixed
        return None if self.held.form == "fp8-tensor" else form

    def watch(self) -> None:
        """From now on note the largest magnitude of the input, until `settle`."""
        if self.held.scales_inputs:
            self._seen = torch.zeros(1, device=tensors(self.weight)[0].device)

    def settle(self) -> None:
        """Fix the input's scale by what was seen; where nothing was, each input's own is looked for as before."""
        seen, self._seen = self._seen, None
        if seen is None or not float(seen):
            return
        form = self.held.rows
        if form is not None:
            self.scale = seen * (HEADROOM[form] / LARGEST[form])
            self._fixed = Fixed(form, self.scale)
        else:
            self.scale = seen * (HEADROOM["fp8"] / (LARGEST["fp8"] * E2M1[-1]))

    def __call__(self, x: Activation) -> Tensor:
        """x [R, K] -> [R, N], in the dtype of the activations. It is best given as `into` says."""
        weight = self.weight
        if self._seen is not None:
            assert isinstance(x, Tensor)
            torch.maximum(self._seen, x.abs().amax().float(), out=self._seen)
        if isinstance(weight, Sparse24):
            return linear_sparse(x if self.held.form is None else self.rounded(x), weight, self.dtype)
        if isinstance(weight, QuantTensor) and self.held.rows is not None:
            return linear8(self.rounded(x), weight, None, self.dtype)
        assert isinstance(x, Tensor)
        if isinstance(weight, QuantTensor):
            return linear_weights8(x, weight)
        if isinstance(weight, Blocks):
            return linear_blocks(quantise_blocks(x, weight.format, self._block_scale()), weight, self.dtype)
        return F.linear(x, weight)

    def _block_scale(self) -> Tensor | None:
        return self.scale if self.held.form == "nvfp4" else None

    def rounded(self, x: Activation) -> QuantTensor:
        """The input in 8 bits, where it is not yet: a pass over it, or two where its one scale has to be found."""
        if isinstance(x, QuantTensor):
            return x
        form = cast(Format, self.held.rows)
        return to_rows8(x, self.into or (one_scale(x, form) if self.held.form == "fp8-tensor" else form))

    def gelu(self, x: Activation, into: OutputFormat | None) -> Activation:
        """GELU of the product plus the bias, as `into` says: in the product's own epilogue where that can be had."""
        weight, bias = self.weight, self.bias
        if isinstance(weight, Tensor) and into is None and bias is not None:
            assert isinstance(x, Tensor)
            if x.is_cuda:
                return torch._addmm_activation(bias, x, weight.t(), use_gelu=True)
            return F.gelu(F.linear(x, weight, bias), approximate="tanh")
        if (
            isinstance(weight, QuantTensor)
            and isinstance(x, QuantTensor)
            and isinstance(into, Fixed)
            and bias is not None
        ):
            made = gelu_product(x, weight, bias, into)
            if made is not None:
                return made
        return gelu(self(x), bias, into)

    @property
    def dtype(self) -> torch.dtype:
        return self._layers[0].weight.dtype


def tensors(weight: Weight) -> list[Tensor]:
    """What a weight consists of."""
    parts: Iterable[object] = (weight,) if isinstance(weight, Tensor) else vars(weight).values()
    return [x for x in parts if isinstance(x, Tensor)]


def bytes_of(projections: Mapping[str, Projection]) -> int:
    """Device memory of the weights of these projections."""
    return sum(x.nbytes for projection in projections.values() for x in tensors(projection.weight))
