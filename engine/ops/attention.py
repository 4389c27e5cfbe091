"""The attention core: one signature for the reference and for any faster form.

`attention` is what the model calls. `dense`, `block_sparse`, `pool`, `choose_blocks` and `pack_values` are the
references, in plain torch, of the kernels of the same names in `engine.ops.triton.attention`.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.ops.linear import Fixed, quantise

BLOCK = 128
"""Tokens of a block of queries or keys: what sparsity is decided by."""


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v.

    Args:
        q: [B, Sq, heads, head_dim]; k, v: [B, Skv, heads, head_dim].
        mask: bool [Sq, Skv], true where a query may look; None lets every query see every key.

    Returns:
        [B, Sq, heads, head_dim].
    """
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
    return out.transpose(1, 2)


def _packed_order(tokens: int, device: torch.device) -> Tensor:
    """Column of each token in packed values, int64 [tokens]: within 16 tokens, 8h + 2t + e stands at 4t + 2h + e.

    A thread of Hopper's matrix unit owns columns 2t and 2t + 1 of each 8 of a product, and must hold 4 neighbours of
    an 8-bit operand. In this order they are the same ones, so probabilities become an operand without moving.
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
    """Values as the FP8 kernels read them: transposed, and reordered within each 16 tokens.

    Args:
        v: [B, S, heads, head_dim].
        out: [B, heads, head_dim, at least start + S, a multiple of 16] to write into; None makes one with zeros after
            the last token.
        start: token of `out` that v[:, 0] becomes.
        scale: float32 [B, heads], what the packed values are to be multiplied by; given, they become float8_e4m3fn.
        bias: [heads head_dim], what is added before that; only with `scale`.

    Returns:
        `out`, of v's dtype or float8_e4m3fn.
    """
    if bias is not None:
        v = v.float() + bias.float().view(v.shape[2:])
    if scale is not None:
        v = (v.float() / scale[:, None, :, None]).clamp(-448, 448).to(torch.float8_e4m3fn)
    tokens = v.shape[1]
    if out is None:
        out = v.new_zeros(v.shape[0], v.shape[2], v.shape[3], (start + tokens + 15) // 16 * 16)
    order = _packed_order(start + tokens, v.device)[start:]
    # indexing is not implemented for 8-bit floats
    raw = (lambda x: x.view(torch.uint8)) if v.element_size() == 1 else (lambda x: x)
    raw(out)[..., order] = raw(v).permute(0, 2, 3, 1)
    return out


def unpack_values(packed: Tensor, tokens: int) -> Tensor:
    """The first `tokens` of what `pack_values` made, [B, tokens, heads, head_dim]."""
    order = _packed_order(tokens, packed.device)
    raw = packed.view(torch.uint8) if packed.element_size() == 1 else packed
    return raw[..., order].permute(0, 3, 1, 2).contiguous().view(packed.dtype)


def powers8(x: Tensor) -> Tensor:
    """2^x for x [..., N], each row's largest raised to 2^8, as float8 e4m3 [..., N]; -inf gives 0.

    An e4m3 number of bits b is 2^(b / 8 - 7) where b is a multiple of 8, and nearly so between: its three bits of
    mantissa lie on a line. So b is the nearest whole number to 8 (x + 7), and 0 below that.
    """
    eighths = (8 * x.float()).round()
    bits = (eighths - eighths.amax(dim=-1, keepdim=True) + 8 * (8 + 7)).clamp(min=0)
    return bits.to(torch.uint8).view(torch.float8_e4m3fn)


def _look_in_8_bits(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """As Hopper's kernel sums it, up to what lies below the largest of all keys and above that of a tile."""
    x = q @ k.transpose(-1, -2) * (math.log2(math.e) * q.shape[-1] ** -0.5)
    p = powers8(x if mask is None else x.masked_fill(~mask, -math.inf)).float()
    return p @ v / p.sum(dim=-1, keepdim=True)


def _exact(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_scale: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    packed: bool,
    mask: Tensor | None,
    out_dtype: torch.dtype | None,
    out_scale: Tensor | None,
) -> Tensor:
    """Attention in float32 on dequantised inputs; mask bool [B, heads, Sq, Skv], which lets every query see a key."""
    eight = q.element_size() == 1
    out_dtype = out_dtype or (torch.bfloat16 if eight else q.dtype)
    v = unpack_values(v, k.shape[1]) if packed else v
    q, k, v = q.float(), k.float(), v.float()
    q = q if q_scale is None else q * q_scale[..., None]
    k = k if k_scale is None else k * k_scale[:, None, :, None]
    v = v if v_scale is None else v * v_scale[:, None, :, None]
    look = _look_in_8_bits if eight else F.scaled_dot_product_attention
    out = look(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask).transpose(1, 2).contiguous()
    return out.to(out_dtype) if out_scale is None else quantise(out, Fixed("fp8", out_scale)).data


def dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    q_scale: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    packed: bool = False,
    out_dtype: torch.dtype | None = None,
    out_scale: Tensor | None = None,
) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v over all keys.

    Args:
        q: [B, Sq, heads, head_dim], bfloat16, float16 or int8.
        k, v: [B, Skv, heads, head_dim]; k of q's dtype, v too, but float8_e4m3fn beside int8; any strides but the
            last, which is 1.
        q_scale: float32 [B, Sq, heads], what 8-bit queries are to be multiplied by; None for 1.
        k_scale, v_scale: float32 [B, heads], the same for keys and values.
        packed: v is [B, heads, head_dim, tokens], as `pack_values` made it.
        out_dtype: by default q's, and bfloat16 for 8-bit q.
        out_scale: float32 [1]; given, the result is float8_e4m3fn, to be multiplied by it.

    Returns:
        [B, Sq, heads, head_dim], contiguous.
    """
    return _exact(q, k, v, q_scale, k_scale, v_scale, packed, None, out_dtype, out_scale)


def block_sparse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    *,
    visits: Sequence[int] | None = None,
    q_scale: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    packed: bool = False,
    out_dtype: torch.dtype | None = None,
    out_scale: Tensor | None = None,
) -> Tensor:
    """`dense`, but each block of 128 queries of a head sees only the listed blocks of 128 keys.

    Args:
        index: int32 [B, heads, ceil(Sq / 128), K], different block numbers. If Skv is no multiple of 128 and the last
            block is listed, it stands first: only there is the end of the keys looked at.
        visits: for each head, how many of the K are visited, the first ones, and at least one; None for all. Known on
            the host, so that the kernel can share its work out evenly.
    """
    tokens = k.shape[1]
    blocks = (tokens + BLOCK - 1) // BLOCK
    listed = torch.ones_like(index, dtype=torch.bool)
    if visits is not None:
        listed &= torch.arange(index.shape[-1], device=index.device) < index.new_tensor(visits)[:, None, None]
    kept = torch.zeros(*index.shape[:-1], blocks + 1, dtype=torch.bool, device=index.device)
    kept.scatter_(-1, index.long().where(listed, torch.full_like(index, blocks, dtype=torch.long)), True)
    kept = kept[..., :blocks]
    mask = kept.repeat_interleave(BLOCK, 2)[:, :, : q.shape[1]].repeat_interleave(BLOCK, 3)[..., :tokens]
    return _exact(q, k, v, q_scale, k_scale, v_scale, packed, mask, out_dtype, out_scale)


def padded(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, out_scale: Tensor | None = None) -> Tensor:
    """Attention over text whose keys and values past its end are all alike, as padding makes them.

    The kernel visits one of these and counts it as often as there are such, which is the same sum: with 100 tokens of
    512 a fifth of the work.

    Args:
        q: [B, Sq, heads, head_dim]; k, v: [B, L, heads, head_dim].
        lengths: int32 [B], tokens before the padding.
        out_scale: as in `dense`.

    Returns:
        [B, Sq, heads, head_dim].
    """
    out = attention(q, k, v)
    return out if out_scale is None else quantise(out, Fixed("fp8", out_scale)).data


def pool(x: Tensor, block: int = BLOCK) -> Tensor:
    """Mean of each `block` tokens, the last one over those that are there.

    Args:
        x: [B, S, heads, head_dim]; any strides but the last, which is 1.

    Returns:
        float32 [B, ceil(S / block), heads, head_dim].
    """
    return torch.cat([part.float().mean(1, keepdim=True) for part in x.split(block, 1)], 1)


def choose_blocks(pooled_q: Tensor, pooled_k: Tensor, always: Tensor, keep: int, dense: int) -> Tensor:
    """The key blocks that each block of queries visits: those of `always`, and the `keep` best others.

    A block's score is the product of the means, as in block-sparse attention by pooled scores (MInference, 2407.02490;
    VSA, 2505.13389). Of equal scores the lower number wins.

    Args:
        pooled_q: float32 [B, nq, heads, head_dim]; pooled_k: float32 [B, nk, heads, head_dim].
        always: bool [nk].
        keep: how many blocks beside those of `always`.
        dense: how many `always` holds; given, since asking the device would stall the host.

    Returns:
        int32 [B, heads, nq, dense + keep], each list from the highest number down, as `block_sparse` wants it.
    """
    scores = torch.einsum("bqhd,bkhd->bhqk", pooled_q.float(), pooled_k.float())
    scores = scores.masked_fill(always, float("inf"))
    best = scores.sort(dim=-1, descending=True, stable=True).indices[..., : dense + keep]
    return best.sort(-1, descending=True).values.int()
