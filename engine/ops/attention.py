"""The attention core: one signature for the reference and for any faster form."""

import torch.nn.functional as F
from torch import Tensor


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
