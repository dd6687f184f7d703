"""Self-attention of vision transformers, on the attention core that all parts of the model share."""

from timm.layers import Attention
from torch import Tensor

from meter_fast.kernels.cross_attention.reference import attention


class SelfAttention(Attention):
    """timm's self-attention with its names and weights, on the attention core that all parts of the model share."""

    def forward(self, x: Tensor, attn_mask: None = None, is_causal: bool = False) -> Tensor:
        """x [B,V,D] -> [B,V,D]."""
        assert attn_mask is None and not is_causal  # the tokens of a picture all see each other
        packed = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        return self.proj(attention(*packed.unbind(0)).transpose(1, 2).flatten(2))
