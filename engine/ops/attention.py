"""Attention. `attention` is what the model calls; the other functions are references of kernels.

The kernels have the same names in `engine.ops.triton.attention`; `engine.ops.dispatch` chooses between the two.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.ops.quant import round_to_format

BLOCK = 128
"""Tokens in a block of queries or keys: the granularity of block-sparse attention."""


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v.

    Args:
        q: [B, Sq, heads, head_dim]; k, v: [B, Skv, heads, head_dim].
        mask: bool [Sq, Skv], true where a query attends to a key; None for everywhere.

    Returns:
        [B, Sq, heads, head_dim].
    """
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
    return out.transpose(1, 2)


def _packed_order(tokens: int, device: torch.device) -> Tensor:
    """Column of each token in packed values, int64 [tokens]: within 16 tokens, token 8h + 2t + e is at 4t + 2h + e.

    In Hopper's matrix unit a thread holds columns 2t and 2t + 1 of every 8 of a product, and 4 neighbouring columns of
    an 8-bit operand. In this order these are the same, so probabilities become an operand without moving between
    threads.
    """
    at = torch.arange(tokens, device=device)
    return (at & ~15) | ((at & 6) << 1) | ((at & 8) >> 2) | (at & 1)


def pack_values(
    v: Tensor,
    out: Tensor | None = None,
    start: int = 0,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Values in the layout that the FP8 kernels read: transposed, and reordered within each 16 tokens.

    Args:
        v: [B, S, heads, head_dim].
        out: [B, heads, head_dim, T] to write into, T a multiple of 16 and at least start + S; None allocates one with
            zeros after the last token.
        start: token of `out` that v[:, 0] becomes.
        scale: float32 [B, heads]; if given, values are divided by it and rounded to float8_e4m3fn.
        bias: [heads * head_dim], added before that; only with `scale`.

    Returns:
        `out`, of v's dtype or float8_e4m3fn.
    """
    if bias is not None:
        v = v.float() + bias.float().view(v.shape[2:])
    if scale is not None:
        v = round_to_format(v, scale[:, None, :, None], "fp8")
    tokens = v.shape[1]
    if out is None:
        out = v.new_zeros(v.shape[0], v.shape[2], v.shape[3], (start + tokens + 15) // 16 * 16)
    order = _packed_order(start + tokens, v.device)[start:]
    # torch cannot index 8-bit floats
    raw = (lambda x: x.view(torch.uint8)) if v.element_size() == 1 else (lambda x: x)
    raw(out)[..., order] = raw(v).permute(0, 2, 3, 1)
    return out


def unpack_values(packed: Tensor, tokens: int) -> Tensor:
    """The inverse of `pack_values`: the first `tokens` values, [B, tokens, heads, head_dim]."""
    order = _packed_order(tokens, packed.device)
    raw = packed.view(torch.uint8) if packed.element_size() == 1 else packed
    return raw[..., order].permute(0, 3, 1, 2).contiguous().view(packed.dtype)


def exp2_fp8(x: Tensor) -> Tensor:
    """2^x for x [..., N] as float8 e4m3 [..., N], each row scaled so that its largest becomes 2^8; -inf gives 0.

    An e4m3 number with bits b is 2^(b / 8 - 7) where b is a multiple of 8, and nearly so between: the three bits of
    mantissa interpolate linearly. So b is 8 (x + 7) rounded to the nearest integer, and 0 below 0.
    """
    eighths = (8 * x.float()).round()
    bits = (eighths - eighths.amax(dim=-1, keepdim=True) + 8 * (8 + 7)).clamp(min=0)
    return bits.to(torch.uint8).view(torch.float8_e4m3fn)


@dataclass(frozen=True)
class BlockLists:
    """Block-sparse attention: which blocks of 128 keys each block of 128 queries visits.

    index: int32 [B, heads, ceil(Sq / 128), K], contiguous, distinct block numbers. If Skv is not a multiple of 128 and
        the last block is listed, it must be first: the kernel masks the end of the keys only there.
    visits: for each head, how many of its K blocks are visited, counted from the first, at least 1; None for all.
        Known on the host, so that the kernel can share the work evenly.
    """

    index: Tensor
    visits: Sequence[int] | None = None


@dataclass(frozen=True)
class AttentionOperands:
    """What `attend` reads, and the type of its result.

    q: [B, Sq, heads, head_dim], bfloat16, float16, float32 or int8.
    k, v: [B, Skv, heads, head_dim], of q's dtype; beside int8 v is float8_e4m3fn. Any strides, but the last is 1.
    q_scale: float32 [B, Sq, heads], by which 8-bit queries are multiplied; None for 1.
    k_scale, v_scale: float32 [B, heads], the same for keys and values.
    packed: v is [B, heads, head_dim, tokens], as `pack_values` makes it.
    blocks: the key blocks that are visited; None for all.
    out_dtype: of the result; by default q's, and bfloat16 for 8-bit q.
    out_scale: float32 [1]; if given, the result is float8_e4m3fn and must be multiplied by it.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    q_scale: Tensor | None = None
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None
    packed: bool = False
    blocks: BlockLists | None = None
    out_dtype: torch.dtype | None = None
    out_scale: Tensor | None = None

    @property
    def device(self) -> torch.device:
        return self.q.device

    @property
    def eight_bit(self) -> bool:
        return self.q.element_size() == 1

    @property
    def plain(self) -> bool:
        """Whether `attention` of q, k and v gives the result: nothing is quantised, no block is left out."""
        rest = self.q_scale, self.k_scale, self.v_scale, self.blocks, self.out_dtype, self.out_scale
        return not (self.eight_bit or self.packed) and all(x is None for x in rest)

    @property
    def result_dtype(self) -> torch.dtype:
        if self.out_scale is not None:
            return torch.float8_e4m3fn
        return self.out_dtype or (torch.bfloat16 if self.eight_bit else self.q.dtype)


def attend(operands: AttentionOperands) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v over all keys, or over the listed blocks of them.

    The reference dequantises, computes in float32 and rounds once; in 8 bits it rounds probabilities as Hopper's kernel
    does.

    Returns:
        [B, Sq, heads, head_dim], contiguous, of `operands.result_dtype`.
    """
    q, k, v = operands.q, operands.k, operands.v
    mask = None if operands.blocks is None else _block_mask(operands.blocks, q.shape[1], k.shape[1])
    v = unpack_values(v, k.shape[1]) if operands.packed else v
    q, k, v = q.float(), k.float(), v.float()
    q = q if operands.q_scale is None else q * operands.q_scale[..., None]
    k = k if operands.k_scale is None else k * operands.k_scale[:, None, :, None]
    v = v if operands.v_scale is None else v * operands.v_scale[:, None, :, None]
    softmax = _attention_fp8 if operands.eight_bit else F.scaled_dot_product_attention
    out = softmax(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask).transpose(1, 2).contiguous()
    if operands.out_scale is not None:
        return round_to_format(out, operands.out_scale, "fp8")
    return out.to(operands.result_dtype)


def _attention_fp8(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention with float8 probabilities, as Hopper's kernel sums it; q, k, v [B, heads, S, head_dim] in float32.

    They differ in what is rounded to 0: here relative to the largest of all keys, there to that of the keys so far.
    """
    x = q @ k.transpose(-1, -2) * (math.log2(math.e) * q.shape[-1] ** -0.5)
    p = exp2_fp8(x if mask is None else x.masked_fill(~mask, -math.inf)).float()
    return p @ v / p.sum(dim=-1, keepdim=True)


def _block_mask(lists: BlockLists, queries: int, keys: int) -> Tensor:
    """bool [B, heads, queries, keys], true where a listed block is visited."""
    index, blocks = lists.index, -(-keys // BLOCK)
    listed = torch.ones_like(index, dtype=torch.bool)
    if lists.visits is not None:
        listed &= torch.arange(index.shape[-1], device=index.device) < index.new_tensor(lists.visits)[:, None, None]
    kept = torch.zeros(*index.shape[:-1], blocks + 1, dtype=torch.bool, device=index.device)
    kept.scatter_(-1, index.long().where(listed, torch.full_like(index, blocks, dtype=torch.long)), True)
    kept = kept[..., :blocks]
    return kept.repeat_interleave(BLOCK, 2)[:, :, :queries].repeat_interleave(BLOCK, 3)[..., :keys]


def padded_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, out_scale: Tensor | None = None) -> Tensor:
    """Attention over text whose keys and values past its end are all equal, as padding makes them.

    The kernel visits one padding token and weights it by their number, which gives the same sum: for 100 tokens of 512
    a fifth of the work.

    Args:
        q: [B, Sq, heads, head_dim]; k, v: [B, L, heads, head_dim].
        lengths: int32 [B], tokens before the padding.
        out_scale: as in `AttentionOperands`.

    Returns:
        [B, Sq, heads, head_dim].
    """
    out = attention(q, k, v)
    return out if out_scale is None else round_to_format(out, out_scale, "fp8")


def pool_blocks(x: Tensor, block: int = BLOCK) -> Tensor:
    """Mean of each block of tokens; the last block may be shorter.

    Args:
        x: [B, S, heads, head_dim]; any strides, but the last is 1.

    Returns:
        float32 [B, ceil(S / block), heads, head_dim].
    """
    return torch.cat([part.float().mean(1, keepdim=True) for part in x.split(block, 1)], 1)


def choose_blocks(pooled_q: Tensor, pooled_k: Tensor, always: Tensor, keep: int, dense: int) -> Tensor:
    """The key blocks that each block of queries visits: those in `always`, and the `keep` best others.

    A block's score is the product of the means, as in block-sparse attention by pooled scores (MInference, 2407.02490;
    VSA, 2505.13389). Among equal scores the lower number wins.

    Args:
        pooled_q: float32 [B, nq, heads, head_dim]; pooled_k: float32 [B, nk, heads, head_dim].
        always: bool [nk].
        keep: how many blocks besides those in `always`.
        dense: how many blocks `always` contains; an argument, because reading it from the device would stall the host.

    Returns:
        int32 [B, heads, nq, dense + keep], each list in descending order, as `BlockLists.index` requires.
    """
    scores = torch.einsum("bqhd,bkhd->bhqk", pooled_q.float(), pooled_k.float())
    scores = scores.masked_fill(always, float("inf"))
    best = scores.sort(dim=-1, descending=True, stable=True).indices[..., : dense + keep]
    return best.sort(-1, descending=True).values.int()
