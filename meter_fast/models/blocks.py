"""Post-norm blocks that fusion layers are made of. Know tokens and how they lie, nothing of texts and pictures.

Shape letters: P pairs, T and U tokens, H heads, D fusion width. Source: Vaswani et al. 2017, section 3; as in BERT.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from meter_fast.kernels.cross_attention.reference import attention_weights
from meter_fast.kernels.dropout import dropout as drop
from meter_fast.kernels.gelu.op import bias_gelu
from meter_fast.kernels.residual_norm.op import residual_norm
from meter_fast.models.activated_linear import GELU, ActivatedLinear, Activation
from meter_fast.models.config import FusionConfig, KernelsConfig
from meter_fast.models.heads import LAYER_NORM_EPS
from meter_fast.models.recomputed import RecomputedNorm, recomputable
from meter_fast.models.sides import Side, attend_within, split_heads


class PackedLinear(nn.Linear):
    """Several projections of one input kept in one matrix, so that one multiplication does them all."""

    def forward(self, x: Tensor, begin: int = 0, end: int | None = None) -> Tensor:
        """x [..., D] -> outputs begin..end of all outputs."""
        if begin == 0 and end is None:
            return F.linear(x, self.weight, self.bias)
        return F.linear(x, self.weight[begin:end], self.bias[begin:end])


class Projection(ActivatedLinear):
    """A linear layer, of an activation if one is given, that can leave its bias to the kernel that follows."""

    def __init__(self, inputs: int, outputs: int, kernel: str, activation: Activation | None = None) -> None:
        super().__init__(inputs, outputs, True, activation)
        self.apart = kernel == "triton"

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x [..., D] -> (W act(x), bias), or (W act(x) + bias, None)."""
        added, left = (None, self.bias) if self.apart else (self.bias, None)
        return self.product(x, added), left


def add_residual(x: Tensor, residual: Tensor) -> Tensor:
    """residual + x, both [..., D], in the place of x, which nobody else may read; under autocast, where the residual
    may be the wider one, in a place of its own."""
    return x.add_(residual) if x.dtype == residual.dtype else residual + x


class ResidualNorm(RecomputedNorm):
    """LayerNorm(residual + dropout(x + bias)), in one kernel, or in torch's operators, of which backward keeps the sum
    alone."""

    def __init__(self, config: FusionConfig, kernel: str) -> None:
        super().__init__(config.width, eps=LAYER_NORM_EPS)
        self.dropout, self.kernel = config.dropout, kernel

    def forward(self, x: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
        """x and residual [..., D], bias [D] -> [..., D]."""
        if self.kernel == "triton":
            dropout = self.dropout if self.training else 0.0
            return residual_norm(x, bias, residual, self.weight, self.bias, self.eps, dropout)
        x = x if bias is None else x + bias
        dropped = drop(x, self.dropout) if self.training and self.dropout else x
        return super().forward(residual + x if dropped is x else add_residual(dropped, residual))


class SelfAttention(nn.Module):
    """LayerNorm(x + W_o attention(x, x)), for all tokens of a side or for some that are told."""

    def __init__(self, config: FusionConfig, kernels: KernelsConfig) -> None:
        super().__init__()
        self.width, self.heads, self.dropout = (config.width, config.heads, config.dropout)
        self.query_key_value = PackedLinear(config.width, 3 * config.width)
        self.out = Projection(config.width, config.width, kernels.residual_norm)
        self.norm = ResidualNorm(config, kernels.residual_norm)

    def forward(self, x: Tensor, side: Side, own: Tensor | None = None, own_side: Side | None = None) -> Tensor:
        """x [..., D] as `side` lies -> the same, or [P,T,D] like `own`: the tokens that read, if they are not all of
        x. own_side: how they lie, where `side` is packed."""
        if own is None:
            own, own_side = x, side
            query, key, value = self.query_key_value(x).split(self.width, -1)
        else:
            query = self.query_key_value(own, 0, self.width)
            key, value = self.query_key_value(x, self.width).split(self.width, -1)
        dropout = self.dropout if self.training else 0.0
        read = attend_within(query, key, value, own_side or side, side, self.heads, dropout)
        return self.norm(*self.out(read), own)

    def weights(self, x: Tensor, side: Side, own: Tensor) -> Tensor:
        """What `own` [P,T,D] reads of x [P,U,D]: [P,H,T,U] float32 or wider, without dropout. Padded sides only."""
        query = self.query_key_value(own, 0, self.width)
        key = self.query_key_value(x, self.width, 2 * self.width)
        return attention_weights(split_heads(query, self.heads), split_heads(key, self.heads), side.mask)


class FeedForward(nn.Module):
    """LayerNorm(x + W_2 gelu(W_1 x)), 4 x wide."""

    def __init__(self, config: FusionConfig, kernels: KernelsConfig) -> None:
        super().__init__()
        self.up = Projection(config.width, 4 * config.width, kernels.gelu)
        activation = None if self.up.apart else GELU
        self.down = Projection(4 * config.width, config.width, kernels.residual_norm, activation)
        self.norm = ResidualNorm(config, kernels.residual_norm)

    def forward(self, x: Tensor) -> Tensor:
        up, bias = self.up(x)
        if bias is not None:
            up = recomputable(bias_gelu(up, bias), bias_gelu, up, bias)
        return self.norm(*self.down(up), x)
