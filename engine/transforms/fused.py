"""The transformer as it serves on a GPU: the sums of `CausalWan`, in as few passes over memory as they take.

Between two matrix products stands one kernel (`engine.ops.fused`): residual sum, norm and modulation; norm, rotation
and the write into the cache; activation. The kernel that makes a product's input also quantises it, where the
projection is in 8 bits. The model's own modules hold the weights; this is another way through them, which a test holds
to theirs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from engine.models.dit import Block, CausalWan, TextContext, timestep_embedding
from engine.ops.dispatch import add_norm, padded_attention, rms_norm
from engine.ops.quant import Activation, FixedScale, OutputFormat, QuantTensor
from engine.stream.fused_cache import FusedCache, Queries
from engine.transforms.low_bit import Policy, Projection, layers_of


def fixed_fp8(output_format: OutputFormat | None) -> Tensor | None:
    """The scale by which attention itself can round its result for the projection that follows."""
    if isinstance(output_format, FixedScale) and output_format.format == "fp8":
        return output_format.scale
    return None


def activation(x: Tensor, output_format: OutputFormat | None) -> Activation:
    """What attention made, which may be in 8 bits already."""
    if x.element_size() > 1:
        return x
    assert isinstance(output_format, FixedScale)
    return QuantTensor(x, output_format.scale)


class FusedBlock:
    """The projections of one block, joined and perhaps in 8 bits, and the small parameters beside them."""

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
    """What a block's last product adds to the residual: gate (y + bias), which the next kernel sums."""

    y: Tensor | None = None
    bias: Tensor | None = None
    gate: Tensor | None = None


@dataclass
class ForwardState:
    """A forward between two blocks, or within one."""

    residual: Tensor
    added: Added
    asked: Queries | None
    """Of the block whose keys and values are written."""
    modulation: Tensor
    e: Tensor
    batch: int
    grid: Sequence[int]


class FusedWan(nn.Module):
    """Called as `CausalWan` is, with a `FusedCache`; inference only."""

    modulation: Tensor

    def __init__(self, wan: CausalWan, policy: Policy | None = None, *, keep_on_host: bool = False) -> None:
        """`keep_on_host`: hold the exact weights of what is in 8 bits in host memory, so that LoRAs can change them."""
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
        """Every block's own part of shift, scale and gate, twice, and the one of "1 + scale": [blocks, 1, 6, dim]."""
        one = torch.tensor([0.0, 1, 0, 0, 1, 0], device=self.wan.head.modulation.device)[:, None]
        blocks = [cast(Block, block).modulation.detach() for block in self.wan.blocks]
        return torch.stack([block.float() + one for block in blocks])

    @property
    def patch_embedding(self) -> nn.Conv3d:
        return self.wan.patch_embedding

    def encode_text(self, text: Tensor) -> TextContext:
        return self.wan.encode_text(text)

    def refresh(self) -> None:
        """The model's weights have changed: take over what is held apart from them."""
        self.modulation.copy_(self._modulation())
        for block in self.blocks:
            for projection in block.projections.values():
                projection.refresh()

    def forward(self, x: Tensor, t: Tensor, text: TextContext, cache: FusedCache) -> Tensor:
        """As `CausalWan.forward`."""
        return self.finish(self.begin(x, t, text, cache), text, cache)

    def commit(self, x: Tensor, t: Tensor, text: TextContext, cache: FusedCache) -> None:
        """As `CausalWan.commit`: what comes after the last layer's keys and values is left out."""
        self.begin(x, t, text, cache)

    def begin(self, x: Tensor, t: Tensor, text: TextContext, cache: FusedCache) -> ForwardState:
        """The forward, until the last layer's keys and values are written."""
        wan = self.wan
        patches = wan.patch_embedding(x)
        batch = len(x)
        residual = patches.flatten(2).transpose(1, 2).flatten(0, 1).contiguous()
        e = wan.time_embedding(timestep_embedding(t, self.config.freq_dim).to(patches.dtype))
        runs = len(text.pooled) // batch
        e = e + text.pooled.unflatten(0, (-1, runs)).repeat_interleave(e.shape[1] // runs, dim=1)
        e6 = wan.time_projection(e).unflatten(-1, (6, -1)).flatten(0, 1).float()
        begun = ForwardState(residual, Added(), None, self.modulation + e6, e.flatten(0, 1), batch, patches.shape[2:])
        for layer in range(len(self.blocks)):
            if layer:
                self._attend(layer - 1, begun, text, cache)
            self._write(layer, begun, cache)
        return begun

    def finish(self, begun: ForwardState, text: TextContext, cache: FusedCache) -> Tensor:
        """What `begin` left of the forward."""
        wan = self.wan
        self._attend(len(self.blocks) - 1, begun, text, cache)
        shift, scale = (wan.head.modulation.float() + begun.e[:, None].float()).unbind(1)
        added = begun.added
        _, h = add_norm(begun.residual, scale + 1, shift, self.config.eps, y=added.y, bias=added.bias, gate=added.gate)
        assert isinstance(h, Tensor)
        return wan.unpatchify(wan.head.head(h).unflatten(0, (begun.batch, -1)), *begun.grid)

    def _write(self, layer: int, begun: ForwardState, cache: FusedCache) -> None:
        """A block until its keys and values are in the cache."""
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
        begun.asked = cache.write(layer, qkv, block.qkv.bias, block.norm_q, block.norm_k, eps)

    def _attend(self, layer: int, begun: ForwardState, text: TextContext, cache: FusedCache) -> None:
        """The rest of the block."""
        block, eps, residual = self.blocks[layer], self.config.eps, begun.residual
        _, _, gate1, shift2, scale2, gate2 = begun.modulation[layer].unbind(1)
        output_format = block.o.input_format
        assert begun.asked is not None
        own = cache.attend(layer, begun.asked, fixed_fp8(output_format))
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
