"""LayerNorm(residual + dropout(x + bias)), plain form: the end of every part of a post-norm transformer layer.

Shape letters: N rows, D width. Source: Vaswani et al. 2017, section 3.1; Ba et al. 2016, "Layer normalization".
"""

import torch
from torch import Tensor

from ..dropout import STREAM_RESIDUAL, keep_mask


def residual_norm(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    shift: Tensor,
    eps: float,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """[..., D] in x's dtype, computed in float32 or wider. x, residual [..., D]; bias, weight, shift [D]; seed int64
    [1], needed if dropout > 0."""
    return forward(x, bias, residual, weight, shift, eps, dropout, seed)[0]


def forward(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    shift: Tensor,
    eps: float,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same with what a backward needs: normalised values in x's dtype and 1 / standard deviation [...]."""
    wide = torch.promote_types(x.dtype, torch.float32)
    value = x.to(wide) if bias is None else x.to(wide) + bias
    value = residual + _dropped(value, dropout, seed)
    variance, mean = torch.var_mean(value, dim=-1, correction=0, keepdim=True)
    rstd = torch.rsqrt(variance + eps)
    normalised = (value - mean) * rstd
    return (normalised * weight + shift).to(x.dtype), normalised.to(x.dtype), rstd.squeeze(-1)


def backward(
    grad: Tensor, normalised: Tensor, rstd: Tensor, weight: Tensor, dropout: float, seed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of residual and x [N,D], and of weight, shift and bias [3,D], from y's and what `forward` returns, all
    as rows [N,D]."""
    wide = torch.promote_types(normalised.dtype, torch.float32)
    grad, normalised = grad.to(wide), normalised.to(wide)
    slope = grad * weight
    along = (slope * normalised).mean(-1, keepdim=True)
    grad_residual = (slope - slope.mean(-1, keepdim=True) - normalised * along) * rstd[:, None]
    grad_x = _dropped(grad_residual, dropout, seed)
    return grad_residual, grad_x, torch.stack([(grad * normalised).sum(0), grad.sum(0), grad_x.sum(0)])


def _dropped(x: Tensor, dropout: float, seed: Tensor | None) -> Tensor:
    """Dropout of x [..., D] by its row and column."""
    if not dropout:
        return x
    rows = x.numel() // x.shape[-1]
    kept = keep_mask(seed, 1, rows, x.shape[-1], STREAM_RESIDUAL, dropout).view(x.shape)
    return torch.where(kept, x / (1 - dropout), 0)
