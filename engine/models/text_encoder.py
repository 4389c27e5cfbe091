"""The text encoder: the UMT5 encoder stack of transformers.

Positions past the end of the prompt are zeroed, not masked, as in Wan's training: cross-attention sees the full length,
and the zeros act as a constant that it can attend to.
"""

from torch import Tensor, nn
from transformers import UMT5Config, UMT5EncoderModel

from engine.models.config import TextConfig


class TextEncoder(nn.Module):
    """Token ids to the encoding that `CausalWan.encode_text` takes."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        # only the stack: the model around it adds a second name for the embedding
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
