"""Exact GELU of x + bias, plain form. Source: Hendrycks and Gimpel 2016, "Gaussian error linear units"."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """gelu(x + bias) [..., D] in x's dtype, computed in float32 or wider. x [..., D], bias [D]."""
    return F.gelu(_wide(x) + bias).to(x.dtype)


def backward(grad: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x [N,D] in its dtype and of bias [D] from the output's, [N,D]."""
    value = _wide(x) + bias
    density = torch.exp(-0.5 * value**2) / math.sqrt(2 * math.pi)
    slope = _wide(grad) * (0.5 + 0.5 * torch.erf(value / math.sqrt(2)) + value * density)
    return slope.to(x.dtype), slope.sum(0)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
