"""Softmax over the segments of folded scores, plain form: the oracle, and what runs on a CPU.

Shape letters: B pairs, V image tokens, T text tokens, H heads. Scores lie as [B,V,T,H], heads innermost: text rows
(b, t) and folded columns (t, h) then both have one stride, so neither the per-head products that make the folded
matrices nor the batched products that use them copy anything, and an odd V is nowhere the contiguous dimension.
"""

import torch
from torch import Tensor

from ..dropout import STREAM_IMAGE_TO_TEXT, STREAM_TEXT_TO_IMAGE, keep_mask

SOFTMAX_DIM = {"key": 2, "query": 1}  # text is read: softmax over text tokens; text reads: over image tokens
STREAM = {"key": STREAM_IMAGE_TO_TEXT, "query": STREAM_TEXT_TO_IMAGE}


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def forward(
    scores: Tensor, text_lengths: Tensor, text_is: str, scale: float, bias: Tensor | None, dropout: float, seed: Tensor
) -> tuple[Tensor, Tensor]:
    """(probabilities, probabilities after dropout), both [B,V,T,H] in the dtype of `scores`; one tensor twice if
    dropout is 0. Arguments as in `op.segmented_softmax`."""
    exact = scores.to(accumulation_dtype(scores.dtype))
    if bias is not None:
        exact = exact + bias[:, None]
    exists = torch.arange(scores.shape[2], device=scores.device) < text_lengths[:, None]  # [B,T]
    exists = exists[:, None, :, None]
    lowest = torch.finfo(exact.dtype).min  # not -inf: an empty text would give NaN
    probabilities = torch.softmax((exact * scale).masked_fill(~exists, lowest), SOFTMAX_DIM[text_is])
    probabilities = probabilities.masked_fill(~exists, 0).to(scores.dtype)
    return probabilities, drop(probabilities, text_is, dropout, seed)


def backward(
    probabilities: Tensor,
    gradient: Tensor,
    text_is: str,
    scale: float,
    delta: Tensor | None,
    shift: Tensor | None,
    dropout: float,
    seed: Tensor,
) -> tuple[Tensor, Tensor]:
    """(gradient of the scores, probabilities after dropout) from the probabilities and the gradient of the dropped
    ones, all [B,V,T,H].

    shift [B,T,H]: added to the gradient. delta [B,T,H]: sum over V of probability times gradient, if the caller knows
    it (only where text_is "query"); None: it is computed here.
    """
    exact = gradient.to(accumulation_dtype(gradient.dtype))
    if shift is not None:
        exact = exact + shift[:, None]
    exact = drop(exact, text_is, dropout, seed)
    if delta is None:
        total = (probabilities * exact).sum(SOFTMAX_DIM[text_is], keepdim=True)
    else:
        total = delta[:, None]
    scores_gradient = (probabilities * (exact - total) * scale).to(gradient.dtype)
    return scores_gradient, drop(probabilities, text_is, dropout, seed)


def drop(x: Tensor, text_is: str, dropout: float, seed: Tensor) -> Tensor:
    """x [B,V,T,H] with the weights dropped that the counters choose, the others scaled by 1 / (1 - dropout)."""
    if dropout == 0:
        return x
    pairs, image, text, heads = x.shape
    kept = keep_mask(seed, pairs * heads, image, text, STREAM[text_is], dropout)
    return x * kept.view(pairs, heads, image, text).permute(0, 2, 3, 1) * (1 / (1 - dropout))
