"""The transformer as it serves on a GPU: what `CausalWan` computes, in as few passes over memory as possible.

Between two matrix products runs one kernel (`engine.ops.fused`): residual sum, norm and modulation; or norm, rotation
and the write into the cache; or activation. The kernel that computes a product's input also quantises it, where the
projection is in 8 bits. The weights stay in the model's own modules, and a test compares the results with theirs.
"""

from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from engine.models.dit import Block, CausalWan, TextContext
from engine.ops.dispatch import add_norm, padded_attention, rms_norm
from engine.ops.quant import Activation, FixedScale, OutputFormat, QuantTensor
from engine.stream.batch import FusedRollingCache
from engine.transforms.low_bit import Policy, Projection, layers_of


def fixed_fp8(output_format: OutputFormat | None) -> Tensor | None:
    """The fixed float8 scale of the next projection's input, by which attention quantises its output; or None."""
    if isinstance(output_format, FixedScale) and output_format.format == "fp8":
        return output_format.scale
    return None


def activation(x: Tensor, output_format: OutputFormat | None) -> Activation:
    """Attention's output as the next projection takes it; attention may have quantised it already."""
    if x.element_size() > 1:
        return x
    assert isinstance(output_format, FixedScale)
    return QuantTensor(x, output_format.scale)


class FusedBlock:
    """One block's projections, q, k and v joined, each in the format of the policy; and its small parameters."""

    def __init__(self, block: Block, index: int, policy: Policy) -> None:
        own, cross = block.self_attn, block.cross_attn
        made = {role: Projection(layers, policy.of(index, role)) for role, layers in layers_of(block).items()}
        self.qkv, self.o = made["qkv"], made["o"]
        self.cross_q, self.cross_o = made["cross_q"], made["cross_o"]
        self.up, self.down = made["up"], made["down"]
        self.norm_q, self.norm_k = own.norm_q.weight, own.norm_k.weight
        self.cross_norm = cross.norm_q.weight
        self.text_norm = block.norm3
        self.heads = own.heads

    @property
    def projections(self) -> dict[str, Projection]:
        return {name: x for name, x in vars(self).items() if isinstance(x, Projection)}


@dataclass(frozen=True)
class Added:
    """What the block before adds to the residual, gate * (y + bias); the next kernel computes the sum."""

    y: Tensor | None = None
    bias: Tensor | None = None
    gate: Tensor | None = None


@dataclass
class ForwardState:
    """A forward between two blocks, or within one. Rows are the tokens of the whole batch, R = B * S."""

    residual: Tensor
    """[R, D], without `added`."""
    modulation: Tensor
    """float32 [layers, B * F, 6, D]"""
    time: Tensor
    """[B * F, D]"""
    batch: int
    grid: tuple[int, int, int]
    added: Added = field(default_factory=Added)
    queries: Any = None
    """The current block's, from the cache's `write`."""


class FusedWan(nn.Module):
    """A `Transformer` over the weights of a `CausalWan`, with a `FusedCache` or a batch of them; inference only."""

    modulation: Tensor

    def __init__(self, wan: CausalWan, policy: Policy | None = None, *, keep_on_host: bool = False) -> None:
        """`keep_on_host` keeps exact copies of quantised weights in host memory, so that LoRAs can change them."""
        super().__init__()
        policy = policy or Policy()
        self.wan = wan
        self.config = wan.config
        blocks = [cast(Block, block) for block in wan.blocks]
        self.blocks = [FusedBlock(block, index, policy) for index, block in enumerate(blocks)]
        for fused in self.blocks:
            for projection in fused.projections.values():
                projection.release(keep_on_host=keep_on_host)
        self.register_buffer("modulation", self._modulation(), persistent=False)

    def _modulation(self) -> Tensor:
        """Every block's own shift, scale and gate, with the 1 of "1 + scale" added: float32 [blocks, 1, 6, dim]."""
        one = torch.tensor([0.0, 1, 0, 0, 1, 0], device=self.wan.head.modulation.device)[:, None]
        blocks = [cast(Block, block).modulation.detach() for block in self.wan.blocks]
        return torch.stack([block.float() + one for block in blocks])

    @property
    def patch_embedding(self) -> nn.Conv3d:
        return self.wan.patch_embedding

    def encode_text(self, text: Tensor) -> TextContext:
        return self.wan.encode_text(text)

    def refresh(self) -> None:
        """Copy again what is kept beside the model's weights, which have changed."""
        self.modulation.copy_(self._modulation())
        for block in self.blocks:
            for projection in block.projections.values():
                projection.refresh()

    def prepare(self, cache: object) -> bool:
        """False: nothing is prepared per cache."""
        return False

    def forward(self, x: Tensor, t: Tensor, text: TextContext, cache: FusedRollingCache) -> Tensor:
        """The flow; arguments and result as in `CausalWan.forward`."""
        return self.finish(self.begin(x, t, text, cache), text, cache)

    def commit(self, x: Tensor, t: Tensor, text: TextContext, cache: FusedRollingCache) -> None:
        """Write the keys and values of x to the cache, and skip what comes after the last layer's."""
        self.begin(x, t, text, cache)

    def begin(self, x: Tensor, t: Tensor, text: TextContext, cache: FusedRollingCache) -> ForwardState:
        """`forward` up to the last layer's write of keys and values."""
        embedded = self.wan.embed(x, t, text)
        begun = ForwardState(
            residual=embedded.tokens.flatten(0, 1).contiguous(),
            modulation=self.modulation + embedded.modulation.flatten(0, 1).float(),
            time=embedded.time.flatten(0, 1),
            batch=len(x),
            grid=embedded.grid,
        )
        for layer in range(len(self.blocks)):
            if layer:
                self._attend(layer - 1, begun, text, cache)
            self._write(layer, begun, cache)
        return begun

    def finish(self, begun: ForwardState, text: TextContext, cache: FusedRollingCache) -> Tensor:
        """The rest of `forward`: the last block's attention and feed-forward, and the head. Changes `begun`."""
        wan = self.wan
        self._attend(len(self.blocks) - 1, begun, text, cache)
        shift, scale = (wan.head.modulation.float() + begun.time[:, None].float()).unbind(1)
        added = begun.added
        _, h = add_norm(begun.residual, scale + 1, shift, self.config.eps, y=added.y, bias=added.bias, gate=added.gate)
        assert isinstance(h, Tensor)
        return wan.unpatchify(wan.head.head(h).unflatten(0, (begun.batch, -1)), *begun.grid)

    def _write(self, layer: int, begun: ForwardState, cache: FusedRollingCache) -> None:
        """A block up to its write of keys and values."""
        block, eps, added = self.blocks[layer], self.config.eps, begun.added
        shift, scale = begun.modulation[layer, :, 0], begun.modulation[layer, :, 1]
        begun.residual, h = add_norm(
            begun.residual,
            scale,
            shift,
            eps,
            y=added.y,
            bias=added.bias,
            gate=added.gate,
            output_format=block.qkv.input_format,
        )
        qkv = block.qkv(h).unflatten(0, (begun.batch, -1))
        begun.queries = cache.write(layer, qkv, block.qkv.bias, block.norm_q, block.norm_k, eps)

    def _attend(self, layer: int, begun: ForwardState, text: TextContext, cache: FusedRollingCache) -> None:
        """The rest of the block."""
        block, eps, residual = self.blocks[layer], self.config.eps, begun.residual
        _, _, gate1, shift2, scale2, gate2 = begun.modulation[layer].unbind(1)
        output_format = block.o.input_format
        own = cache.attend(layer, begun.queries, fixed_fp8(output_format))
        y = block.o(activation(own.flatten(0, 1).flatten(1), output_format))
        weight, bias = block.text_norm.weight[None], block.text_norm.bias[None]
        residual, h = add_norm(
            residual, weight, bias, eps, y=y, bias=block.o.bias, gate=gate1, output_format=block.cross_q.input_format
        )
        q = rms_norm(block.cross_q(h), block.cross_q.bias, block.cross_norm, eps)
        text_k, text_v = text.layers[layer]
        q, output_format = q.view(len(text_k), -1, *text_k.shape[2:]), block.cross_o.input_format
        seen = padded_attention(q, text_k, text_v, text.lengths, fixed_fp8(output_format))
        y = block.cross_o(activation(seen.reshape(len(residual), -1), output_format))
        residual, h = add_norm(
            residual, scale2, shift2, eps, y=y, bias=block.cross_o.bias, output_format=block.up.input_format
        )
        y = block.down(block.up.gelu(h, block.down.input_format))
        begun.residual, begun.added = residual, Added(y, block.down.bias, gate2)
