"""The linear layers of a transformer block in fewer bits, or 2:4 sparse, or unchanged, as a `Policy` says."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.config import QuantScheme, Role
from engine.models.dit import Block
from engine.ops import dispatch
from engine.ops.blocks import block_linear, blocks_unsupported_reason
from engine.ops.cublas import linear_gelu_fp8
from engine.ops.linear import fp8_unsupported_reason, quantised_linear, weight_only_linear
from engine.ops.quant import (
    E2M1,
    FORMAT_MAX,
    Activation,
    BlockQuantTensor,
    FixedScale,
    Format,
    OutputFormat,
    QuantTensor,
    Sparse24,
    Weight,
    quantise,
    tensor_scale,
    tensors_of,
)
from engine.ops.sparse import compress, prune, sparse_linear, sparse_unsupported_reason

HEADROOM: dict[Format, float] = {"fp8": 4.0, "int8": 1.25}
"""Factor of a fixed scale above the largest magnitude seen. Float8 rounds relative to magnitude, so headroom costs it
nothing."""


@dataclass(frozen=True)
class WeightFormat:
    """How the weight of a linear layer is stored: quantised by a scheme or not, 2:4 sparse or not.

    Raises:
        ValueError: there is no 2:4 sparse product for the scheme.
    """

    scheme: QuantScheme | None = None
    sparse: bool = False

    def __post_init__(self) -> None:
        if self.sparse and self.scheme not in (None, "fp8"):
            raise ValueError(f"2:4 sparse weights are multiplied as they are or in fp8, not in {self.scheme}")

    @property
    def input_format(self) -> Format | None:
        """The 8-bit format that inputs are quantised to; None where they are not, or in blocks."""
        match self.scheme:
            case "fp8" | "fp8-tensor":
                return "fp8"
            case "int8":
                return "int8"
            case _:
                return None

    @property
    def scales_inputs(self) -> bool:
        """Whether inputs have a scale that calibration can fix."""
        return self.input_format is not None or self.scheme == "nvfp4"


def unsupported_reason(weight_format: WeightFormat, device: torch.device) -> str | None:
    """Why this device has no hardware product for the format, so that it is emulated; None if it has one."""
    if weight_format.sparse:
        return sparse_unsupported_reason(device, fp8=weight_format.scheme is not None)
    match weight_format.scheme:
        case "fp8":
            return fp8_unsupported_reason(device, "rows") and fp8_unsupported_reason(device, "tensor")
        case "fp8-tensor":
            return fp8_unsupported_reason(device, "tensor")
        case "mxfp8" | "nvfp4" as block_format:
            return blocks_unsupported_reason(device, block_format)
        case _:
            return None


@dataclass(frozen=True)
class Policy:
    """Which linear layers of the blocks are quantised, and which are 2:4 sparse.

    Layers outside the blocks are never changed: they are small, and their errors reach every token. `exact` names roles
    that are unchanged in every block, `exact_blocks` blocks that are unchanged altogether.
    """

    scheme: QuantScheme | None = None
    exact: frozenset[Role] = field(default_factory=frozenset)
    exact_blocks: frozenset[int] = field(default_factory=frozenset)
    sparse: frozenset[Role] = field(default_factory=frozenset)

    def of(self, block: int, role: Role) -> WeightFormat:
        """The weight format of a role in the block-th block."""
        if role in self.exact or block in self.exact_blocks:
            return WeightFormat()
        return WeightFormat(self.scheme, role in self.sparse)


def layers_of(block: Block) -> dict[Role, list[nn.Linear]]:
    """The linear layers of each role; those of one role read the same input and are joined."""
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
    """One or more linear layers over the same input as one product, without their bias.

    An unchanged weight is joined in place: the layers' weights become views of it, so memory is not doubled and a
    change of theirs (a LoRA) takes effect here. In any other format the joined weight is a copy, which `refresh`
    computes again.
    """

    def __init__(self, layers: Sequence[nn.Linear], weight_format: WeightFormat | None = None) -> None:
        self._layers, self.weight_format = layers, weight_format or WeightFormat()
        self.bias: Tensor | None = self._join([x.bias for x in layers]) if layers[0].bias is not None else None
        self.weight: Weight
        if self.weight_format == WeightFormat():
            self.weight = self._join([x.weight for x in layers])
        else:
            self.weight = self._convert(torch.cat([x.weight.detach() for x in layers]))
        self.scale: Tensor | None = None
        """Of the input, float32 [1], once calibrated; before, every input's scales are computed from its values."""
        self._fixed: FixedScale | None = None
        self._largest_input: Tensor | None = None
        """Largest magnitude during calibration; None outside it."""

    @classmethod
    def from_weight(cls, weight: Tensor, weight_format: WeightFormat, bias: Tensor | None = None) -> "Projection":
        """A projection of one weight [N, K], which it takes over."""
        with torch.device("meta"):
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            layer.bias = nn.Parameter(bias, requires_grad=False)
        return cls([layer], weight_format)

    def _join(self, parts: Sequence[Tensor]) -> Tensor:
        if len(parts) == 1:
            return parts[0].detach()
        joint = torch.cat([x.detach() for x in parts])
        for part, view in zip(parts, joint.split([len(x) for x in parts]), strict=True):
            part.data = view
        return joint

    def _convert(self, weight: Tensor) -> Weight:
        """weight [N, K] in the weight format."""
        scheme = self.weight_format.scheme
        if self.weight_format.sparse:
            return compress(prune(weight), scheme is not None)
        match scheme:
            case "fp8" | "fp8-weights":
                return quantise(weight, "fp8")
            case "int8" | "int8-weights":
                return quantise(weight, "int8")
            case "fp8-tensor":
                return quantise(weight, tensor_scale(weight, "fp8"))
            case "mxfp8" | "nvfp4":
                return dispatch.quantise_blocks(weight, scheme)
            case None:
                return weight

    def release(self, *, keep_on_host: bool) -> None:
        """Free the device memory of the layers' own weights, which the converted copy replaces."""
        if self.weight_format == WeightFormat():
            return
        for layer in self._layers:
            moved = layer.weight.detach().to("cpu" if keep_on_host else "meta")
            layer.weight = nn.Parameter(moved, requires_grad=False)

    def refresh(self) -> None:
        """Convert the layers' changed weights again, in place. Sparse ones are pruned again."""
        if self.weight_format == WeightFormat():
            return
        old = tensors_of(self.weight)
        new = self._convert(torch.cat([x.weight.detach().to(old[0].device) for x in self._layers]))
        for target, source in zip(old, tensors_of(new), strict=True):
            target.copy_(source)

    @property
    def input_format(self) -> OutputFormat | None:
        """The output format for the kernel that computes the input, so that quantising needs no pass of its own."""
        to = self.weight_format.input_format
        if to is None or self._largest_input is not None:
            return None
        if self._fixed is not None:
            return self._fixed
        return None if self.weight_format.scheme == "fp8-tensor" else to

    def start_calibration(self) -> None:
        """Record the largest magnitude of the inputs until `finish_calibration`."""
        if self.weight_format.scales_inputs:
            self._largest_input = torch.zeros(1, device=tensors_of(self.weight)[0].device)

    def finish_calibration(self) -> None:
        """Fix the input's scale; if no input came, scales are computed from each input as before."""
        largest, self._largest_input = self._largest_input, None
        if largest is None or not float(largest):
            return
        to = self.weight_format.input_format
        if to is not None:
            self.scale = largest * (HEADROOM[to] / FORMAT_MAX[to])
            self._fixed = FixedScale(to, self.scale)
        else:
            self.scale = largest * (HEADROOM["fp8"] / (FORMAT_MAX["fp8"] * E2M1[-1]))

    def __call__(self, x: Activation) -> Tensor:
        """x [R, K] -> [R, N], in the dtype of the activations. x is best in `input_format`, but need not be."""
        weight = self.weight
        if self._largest_input is not None:
            assert isinstance(x, Tensor)
            torch.maximum(self._largest_input, x.abs().amax().float(), out=self._largest_input)
        if isinstance(weight, Sparse24):
            return sparse_linear(x if weight.scale is None else self.quantised(x), weight, self.dtype)
        if isinstance(weight, QuantTensor) and self.weight_format.input_format is not None:
            return quantised_linear(self.quantised(x), weight, None, self.dtype)
        assert isinstance(x, Tensor)
        if isinstance(weight, QuantTensor):
            return weight_only_linear(x, weight)
        if isinstance(weight, BlockQuantTensor):
            scale = self.scale if weight.format == "nvfp4" else None
            return block_linear(dispatch.quantise_blocks(x, weight.format, scale), weight, self.dtype)
        return F.linear(x, weight)

    def quantised(self, x: Activation) -> QuantTensor:
        """The input in 8 bits. If it is not yet, that is one pass over it, or two if its one scale must be found."""
        if isinstance(x, QuantTensor):
            return x
        to = self.weight_format.input_format
        assert to is not None
        one_scale = self.weight_format.scheme == "fp8-tensor"
        return dispatch.quantise(x, self.input_format or (tensor_scale(x, to) if one_scale else to))

    def gelu(self, x: Activation, output_format: OutputFormat | None) -> Activation:
        """GELU of the product plus the bias, in the epilogue of the product where the device can do that."""
        weight, bias = self.weight, self.bias
        if isinstance(weight, Tensor) and output_format is None and bias is not None:
            assert isinstance(x, Tensor)
            return dispatch.linear_gelu(x, weight, bias)
        match weight, x, bias, output_format:
            case QuantTensor(), QuantTensor(), Tensor(), FixedScale():
                activated = linear_gelu_fp8(x, weight, bias, output_format)
                if activated is not None:
                    return activated
        return dispatch.gelu(self(x), bias, output_format)

    @property
    def dtype(self) -> torch.dtype:
        return self._layers[0].weight.dtype


def bytes_of(projections: Mapping[str, Projection]) -> int:
    """Device memory of the weights of these projections."""
    return sum(x.nbytes for projection in projections.values() for x in tensors_of(projection.weight))
