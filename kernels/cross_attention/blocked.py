"""Attention on a CPU, a pair at a time: softmax(Q Kᵀ / √K + mask) V with scores that stay in the cache.

Only the inputs are saved; backward computes the scores again, and draws the same dropout from the same seed. So the
memory that attention takes grows with one pair's scores, not with all of them, and each of the passes over the scores
reads from the cache. Both forms give the numbers of the plain one.

Shape letters: B pairs, H heads, T query tokens, U key tokens, K head size.
Source: the recomputation of FlashAttention (Dao et al. 2022, section 3.1), with whole rows of scores.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..dropout import HOST_STEPS, draw_seed, host_generator, host_mask, host_share

BLOCK = 1 << 21  # scores at once: as many heads of a pair as fit


def blocked_attention(
    query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """Weighted values [B,H,T,K], a view of [B,T,H,K], in the inputs' dtype.

    query [B,H,T,K], key and value [B,H,U,K], one floating dtype, on a CPU; key_mask bool, broadcastable to [B,H,T,U],
    True where a key may be read; dropout: share of the weights that are dropped, drawn from torch's generator. Raises
    ValueError for a share below 0 or of 1 and above.
    """
    seed = draw_seed(query.device) if host_share(dropout) else None
    return _forward(query, key, value, key_mask, seed, float(dropout))


@torch.library.custom_op("meter_fast::blocked_attention", mutates_args=())
def _forward(
    query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, seed: Tensor | None, dropout: float
) -> Tensor:
    out = _like(query)
    for at, _, weights, kept in _blocks(query, key, key_mask, seed, dropout):
        if kept is not None:
            weights.mul_(kept)
        torch.bmm(weights, value[at], out=out[at])
    return out.mul_(_scale(seed, dropout)) if seed is not None else out


@_forward.register_fake
def _(query, key, value, key_mask, seed, dropout):
    return _like(query)


@torch.library.custom_op("meter_fast::blocked_attention_backward", mutates_args=())
def _backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    seed: Tensor | None,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    gradients = tuple(_like(x) for x in (query, key, value))
    if seed is not None:
        gradient = gradient * _scale(seed, dropout)
    for at, scaled, weights, kept in _blocks(query, key, key_mask, seed, dropout):
        weights_gradient = torch.bmm(gradient[at], value[at].transpose(1, 2))
        read = weights
        if kept is not None:
            weights_gradient.mul_(kept)
            read = weights * kept
        torch.bmm(read.transpose(1, 2), gradient[at], out=gradients[2][at])
        scores = torch._softmax_backward_data(weights_gradient, weights, -1, weights.dtype)
        torch.bmm(scores, key[at], out=gradients[0][at])
        torch.bmm(scores.transpose(1, 2), scaled, out=gradients[1][at])
    gradients[0].mul_(query.shape[-1] ** -0.5)
    return gradients


@_backward.register_fake
def _(gradient, query, key, value, key_mask, seed, dropout):
    return tuple(_like(x) for x in (query, key, value))


def _context(ctx, inputs, output):
    *tensors, ctx.dropout = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx, gradient):
    return *_backward(gradient, *ctx.saved_tensors, ctx.dropout), None, None, None


_forward.register_autograd(_autograd, setup_context=_context)

Block = tuple[tuple[int, slice], Tensor, Tensor, Tensor | None]


def _blocks(
    query: Tensor, key: Tensor, key_mask: Tensor | None, seed: Tensor | None, dropout: float
) -> Iterator[Block]:
    """Pair by pair and heads by heads: where they are, the scaled queries, softmax of the scores, and which of these
    are kept (uint8; None: all)."""
    pairs, heads, queries, size = query.shape
    keys = key.shape[2]
    if key_mask is not None:
        hidden = ~key_mask.expand(pairs, heads, *key_mask.shape[2:])
    generator = None if seed is None else host_generator(seed)
    at_once = max(1, min(heads, BLOCK // (queries * keys)))
    for pair in range(pairs):
        for begin in range(0, heads, at_once):
            at = (pair, slice(begin, begin + at_once))
            scaled = query[at] * size**-0.5
            scores = torch.bmm(scaled, key[at].transpose(1, 2))
            if key_mask is not None:
                scores.masked_fill_(hidden[at], float("-inf"))
            kept = None
            if generator is not None:
                kept = host_mask(generator, scores.shape, dropout).view(torch.uint8)
            yield at, scaled, torch.softmax(scores, -1), kept


def _scale(seed: Tensor, dropout: float) -> float:
    return HOST_STEPS / (HOST_STEPS - host_share(dropout))


def _like(x: Tensor) -> Tensor:
    """[B,H,T,K] whose heads lie inside tokens, as projections have them."""
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)
