"""Attention core, plain form: softmax(Q Kᵀ / √K + mask) V. Knows tensors only, no modules.

Shape letters: B pairs, H heads, T query tokens, U key tokens, K head size.
Source: Vaswani et al. 2017, section 3.2.1; used for both attentions of a fusion layer (METER, section 3.2).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# On a CPU the plain form is the faster one up to this many scores per head (2 cores with AVX-512, torch 2.14): torch's
# fused operator takes 1.5 to 6 times as long on short sequences, and its backward in bfloat16 up to 11 times.
PLAIN_UP_TO = 64 * 64
PLAIN_UP_TO_BF16_TRAINING = 512 * 512


def is_fused(device_type: str, queries: int, keys: int, bf16_training: bool) -> bool:
    """Whether `attention` calls torch's fused operator: always off the CPU, and on it for long sequences."""
    return device_type != "cpu" or queries * keys > (PLAIN_UP_TO_BF16_TRAINING if bf16_training else PLAIN_UP_TO)


def attention(
    query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """Weighted values [B,H,T,K], in the inputs' dtype.

    query [B,H,T,K], key and value [B,H,U,K], one floating dtype; key_mask bool, broadcastable to [B,H,T,U], True
    where a key may be read (None: all); dropout: share of the weights that are dropped.
    """
    bf16_training = query.dtype == torch.bfloat16 and query.requires_grad
    if is_fused(query.device.type, query.shape[-2], key.shape[-2], bf16_training):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=key_mask, dropout_p=dropout)
    weights = attention_weights(query, key, key_mask).to(value.dtype)
    return F.dropout(weights, dropout, dropout > 0) @ value


def attention_weights(query: Tensor, key: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """softmax(Q Kᵀ / √K + mask) itself [B,H,T,U], float32 or wider, rows sum to 1; arguments as above."""
    scores = (query @ key.transpose(-1, -2)) * query.shape[-1] ** -0.5
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask, float("-inf"))
    return torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
