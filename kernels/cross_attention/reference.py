"""Attention core, plain form: softmax(Q Kᵀ / √K + mask) V. Knows tensors only, no modules.

Shape letters: B pairs, H heads, T query tokens, U key tokens, K head size.
Source: Vaswani et al. 2017, section 3.2.1; used for both attentions of a fusion layer (METER, section 3.2).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dropout import STREAM_IMAGE_TO_TEXT, STREAM_TEXT_TO_IMAGE, keep_mask
from ..dropout import dropout as drop
from ..segments import Segments
from .blocked import blocked_attention

# On a CPU the plain form is the faster one up to this many scores per head (2 cores with AVX-512, torch 2.14).
PLAIN_UP_TO = 64 * 64
MATRIX_UNITS = bool(
    getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16")
)  # older versions of torch are silent


def attention_form(device_type: str, queries: int, keys: int, slow_bf16: bool, dropout: float) -> str:
    """How `attention` computes: "fused", torch's operator: always off the CPU; "plain" for short sequences; "blocked".

    torch's fused operator of a CPU has no dropout (it would write all scores out), and loses in bfloat16 where
    `fused_is_slow`; in float32 without dropout it is the faster one, by a fifth to a third.
    """
    if device_type != "cpu" or not (torch.compiler.is_compiling() or torch.backends.cuda.flash_sdp_enabled()):
        return "fused"  # without its fused operators, where the caller's sdpa_kernel() says so: torch's plain one
    if queries * keys <= PLAIN_UP_TO:
        return "plain"
    return "blocked" if dropout or slow_bf16 else "fused"


def fused_is_slow(query: Tensor) -> bool:
    """Whether torch's fused operator of a CPU loses against the blocked form in bfloat16: in training, as its backward
    takes 1.6 times as long, and on processors without matrix units (AMX), where its forward takes twice as long."""
    return query.dtype == torch.bfloat16 and (query.requires_grad or not MATRIX_UNITS)


def attention(
    query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """Weighted values [B,H,T,K], in the inputs' dtype.

    query [B,H,T,K], key and value [B,H,U,K], one floating dtype; key_mask bool, broadcastable to [B,H,T,U], True
    where a key may be read (None: all); dropout: share of the weights that are dropped.
    """
    form = attention_form(query.device.type, query.shape[-2], key.shape[-2], fused_is_slow(query), dropout)
    if form == "fused":
        return F.scaled_dot_product_attention(query, key, value, attn_mask=key_mask, dropout_p=dropout)
    if form == "blocked":
        return blocked_attention(query, key, value, key_mask, dropout)
    weights = attention_weights(query, key, key_mask).to(value.dtype)
    return (drop(weights, dropout) if dropout else weights) @ value


def attention_weights(query: Tensor, key: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """softmax(Q Kᵀ / √K + mask) itself [B,H,T,U], float32 or wider, rows sum to 1; arguments as above."""
    scores = (query @ key.transpose(-1, -2)) * query.shape[-1] ** -0.5
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask, float("-inf"))
    return torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))


def ragged_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_segments: Segments,
    key_segments: Segments,
    short: str,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """What `op.cross_attention` computes, on any device and differentiable by torch: each sequence is padded to the
    longest of its side. Arguments as there; also float64, any head size, any length of the short side."""
    rows, key_rows = _padded_rows(query_segments, len(query)), _padded_rows(key_segments, len(key))
    count, query, key, value = len(query), _pad(query, rows), _pad(key, key_rows), _pad(value, key_rows)
    weights, scale = _ragged_weights(query, key, key_segments), _dropout_scale(query, key, short, dropout, seed)
    return _unpad((weights * scale).to(value.dtype) @ value, rows, count)


def ragged_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_segments: Segments,
    key_segments: Segments,
    short: str,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value by hand; the weights are computed again. grad [Nq,H,K]; the rest as above."""
    rows, key_rows = _padded_rows(query_segments, len(query)), _padded_rows(key_segments, len(key))
    counts = len(query), len(key)
    grad, query, key, value = _pad(grad, rows), _pad(query, rows), _pad(key, key_rows), _pad(value, key_rows)
    weights, scale = _ragged_weights(query, key, key_segments), _dropout_scale(query, key, short, dropout, seed)
    d_value = (weights * scale).to(grad.dtype).transpose(-1, -2) @ grad
    d_weights = (grad @ value.transpose(-1, -2)) * scale
    d_scores = weights * (d_weights - (weights * d_weights).sum(-1, keepdim=True)) * query.shape[-1] ** -0.5
    d_query, d_key = d_scores.to(key.dtype) @ key, d_scores.to(key.dtype).transpose(-1, -2) @ query
    return _unpad(d_query, rows, counts[0]), _unpad(d_key, key_rows, counts[1]), _unpad(d_value, key_rows, counts[1])


def _padded_rows(segments: Segments, rows: int) -> Tensor:
    """int64 [B,longest]: the rows of each sequence, then `rows`, which is the one behind all."""
    place = torch.arange(segments.longest, device=segments.starts.device)
    return torch.where(place < segments.lengths[:, None], segments.starts[:, None] + place, rows)


def _pad(x: Tensor, rows: Tensor) -> Tensor:
    """[N,H,K] -> [B,H,longest,K], zeros behind each sequence."""
    return F.pad(x, (0, 0, 0, 0, 0, 1))[rows].transpose(1, 2)


def _unpad(x: Tensor, rows: Tensor, count: int) -> Tensor:
    """[B,H,longest,K] -> [count,H,K], zeros in rows of no sequence."""
    out = x.new_zeros(count + 1, x.shape[1], x.shape[3])
    return out.index_put((rows,), x.transpose(1, 2))[:count].contiguous()


def _ragged_weights(query: Tensor, key: Tensor, key_segments: Segments) -> Tensor:
    """[B,H,T,U], float32 or wider. Where there is no key, the weights go to padding: values of zero."""
    lengths = key_segments.lengths[:, None]
    mask = (torch.arange(key.shape[2], device=key.device) < lengths) | (lengths == 0)
    return attention_weights(query, key, mask[:, None, None])


def _dropout_scale(query: Tensor, key: Tensor, short: str, dropout: float, seed: Tensor | None) -> Tensor | float:
    """1 / (1 - dropout) where a weight is kept, 0 where it is dropped: [B,H,T,U]. Rows of the mask are image tokens,
    its columns text tokens, whichever side reads."""
    if dropout == 0:
        return 1.0
    batch, heads, queries, _ = query.shape
    planes, keys, scale = batch * heads, key.shape[2], 1 / (1 - dropout)
    if short == "key":
        mask = keep_mask(seed, planes, queries, keys, STREAM_IMAGE_TO_TEXT, dropout)
    else:
        mask = keep_mask(seed, planes, keys, queries, STREAM_TEXT_TO_IMAGE, dropout).transpose(1, 2)
    return mask.unflatten(0, (batch, heads)).to(torch.promote_types(query.dtype, torch.float32)) * scale
