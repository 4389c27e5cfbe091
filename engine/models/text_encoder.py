"""The text encoder: transformers' UMT5 with this project's tokenizer in front of it.

Positions past the end of the prompt are zeroed, not masked, as Wan was trained: cross-attention sees the full
length, and the zeros act as a constant that it may rest on.
"""

from dataclasses import dataclass

from torch import Tensor, nn
from transformers import UMT5Config, UMT5EncoderModel


@dataclass(frozen=True)
class TextConfig:
    """Sizes of a UMT5 encoder and the fixed length of a prompt in tokens."""

    vocab_size: int
    dim: int
    ffn_dim: int
    num_heads: int
    head_dim: int
    num_layers: int
    length: int


UMT5_XXL = TextConfig(
    vocab_size=256_384, dim=4096, ffn_dim=10_240, num_heads=64, head_dim=64, num_layers=24, length=512
)
"""The encoder of every public Wan model (Wan-Video/Wan2.1, `wan/modules/t5.py` and `wan/configs`)."""


class TextEncoder(nn.Module):
    """Token ids to the context that `CausalWan.encode_text` takes."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        # the encoder stack itself: the model around it only ties its embedding to a second name
        self.umt5 = UMT5EncoderModel(
            UMT5Config(
                vocab_size=config.vocab_size,
                d_model=config.dim,
                d_kv=config.head_dim,
                d_ff=config.ffn_dim,
                num_heads=config.num_heads,
                num_layers=config.num_layers,
                dropout_rate=0.0,
                pad_token_id=0,
                eos_token_id=1,
                feed_forward_proj="gated-gelu",
                is_encoder_decoder=False,
                use_cache=False,
            )
        ).encoder

    def forward(self, ids: Tensor) -> Tensor:
        """ids int64 [B, length], 0 past the end -> [B, length, dim], zero past the end."""
        mask = ids != 0
        hidden: Tensor = self.umt5(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        return hidden * mask.unsqueeze(-1).to(hidden.dtype)
