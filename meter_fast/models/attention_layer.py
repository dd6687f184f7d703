"""Self-attention layers of vision encoders: timm's, with their names and weights, in our arithmetic.

On the attention core that all parts of the model share, or, with biases of relative positions, in the same two forms;
scores in float32 whatever the dtype, and every parameter used by the module that owns it, as ZeRO-3 needs. Buffers may
be wider than parameters: engines cast parameters only. Shape letters: B pictures, W windows, H heads, T tokens, K head
size, D width.
"""

import torch
import torch.nn.functional as F
from timm.layers import Attention
from timm.models.beit import Attention as TimmBeitAttention
from timm.models.swin_transformer import WindowAttention as TimmWindowAttention
from torch import Tensor

from meter_fast.kernels.cross_attention.reference import attention, attention_form


class SelfAttention(Attention):
    """Of ViT, CLIP and DeiT."""

    def forward(self, x: Tensor, attn_mask: None = None, is_causal: bool = False) -> Tensor:
        """x [B,V,D] -> [B,V,D]."""
        assert attn_mask is None and not is_causal  # the tokens of a picture all see each other
        packed = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        return self.proj(attention(*packed.unbind(0)).transpose(1, 2).flatten(2))


class WindowAttention(TimmWindowAttention):
    """Of Swin."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x [B*W,T,D], mask [W,T,T] added to the scores, 0 or -100 -> [B*W,T,D]."""
        split = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        bias = self._get_rel_pos_bias()
        if mask is not None:  # windows beside heads, so that one bias serves all pictures
            split = split.unflatten(1, (-1, len(mask))).flatten(2, 3)
            bias = (bias + mask[:, None]).flatten(0, 1)[None]
        read = biased_attention(*split.unbind(0), bias)
        return self.proj(read.reshape(len(x), self.num_heads, x.shape[1], -1).transpose(1, 2).flatten(2))


class BeitAttention(TimmBeitAttention):
    """Of BEiT: keys have no bias."""

    def forward(self, x: Tensor, shared_rel_pos_bias: None = None) -> Tensor:
        """x [B,T,D] -> [B,T,D]."""
        assert shared_rel_pos_bias is None  # each block has biases of its own
        biases = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        split = (self.qkv(x) + biases).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(biased_attention(*split.unbind(0), self._get_rel_pos_bias()).transpose(1, 2).flatten(2))


def biased_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """softmax(Q Kᵀ / √K + bias) V: query, key, value [B,H,T,K], bias [1,H,T,T] -> [B,H,T,K], in the dtype of value."""
    bf16_training = query.dtype == torch.bfloat16 and query.requires_grad
    if attention_form(query.device.type, query.shape[-2], key.shape[-2], bf16_training, 0.0) == "fused":
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias.to(query.dtype))
    scores = (query @ key.transpose(-1, -2)) * query.shape[-1] ** -0.5 + bias
    return scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype) @ value
