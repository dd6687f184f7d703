"""A linear layer of an activation, act(x) Wᵀ + b, of which backward keeps x alone: the end of a feed-forward network.

act(x) and its gradient are the widest tensors of a model. On a CPU neither of the two is ever whole: rows go through
activation and product block by block, in backward, too; the gradient of the weight, a sum over all rows, is made column
by column block. Each number is the same dot product as without blocks. Knows tensors and linear layers, no models.

Shape letters: N rows, I inputs, O outputs. Source: selective recomputation, Korthikanti et al. 2022, section 5.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from meter_fast.kernels.launch import autocasts

ROWS = 2048  # of a block on a CPU: 512 to 4096 take the same time
COLUMN_BLOCKS = 4
SLOPE = 1.702  # of QuickGELU


@dataclass(frozen=True)
class Activation:
    """A function of every value. function: differentiable, keeps x alone. gradient(g, x, out): writes g act'(x)."""

    function: Callable[[Tensor], Tensor]
    gradient: Callable[[Tensor, Tensor, Tensor], object]

    def __call__(self, x: Tensor) -> Tensor:
        return self.function(x)


class _QuickGelu(torch.autograd.Function):
    """x · sigmoid(1.702 x), written as silu(1.702 x) / 1.702, for which torch has one kernel in each direction."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return F.silu(x * SLOPE, inplace=True).mul_(1 / SLOPE)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.ops.aten.silu_backward(gradient, x * SLOPE)


def _quick_gelu_gradient(gradient: Tensor, x: Tensor, out: Tensor) -> None:
    torch.mul(x, SLOPE, out=out)
    torch.ops.aten.silu_backward(gradient, out, grad_input=out)


def _gelu_gradient(gradient: Tensor, x: Tensor, out: Tensor) -> None:
    torch.ops.aten.gelu_backward(gradient, x, grad_input=out)


GELU = Activation(F.gelu, _gelu_gradient)
QUICK_GELU = Activation(_QuickGelu.apply, _quick_gelu_gradient)


class _ActivatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation) -> Tensor:
        """x [N,I] -> [N,O]."""
        ctx.save_for_backward(x, weight)
        ctx.activation = activation
        out = x.new_empty(len(x), len(weight))
        for rows in _blocks(len(x), ROWS, x):
            hidden = activation(x[rows])
            if bias is None:
                torch.mm(hidden, weight.t(), out=out[rows])
            else:
                torch.addmm(bias, hidden, weight.t(), out=out[rows])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """gradient [N,O]."""
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[1]:
            grad_weight = torch.empty_like(weight)
            for columns in _blocks(x.shape[1], -(-x.shape[1] // COLUMN_BLOCKS), x):
                grad_weight[:, columns] = gradient.t() @ ctx.activation(x[:, columns])
        if ctx.needs_input_grad[2]:
            grad_bias = gradient.sum(0)
        if ctx.needs_input_grad[0]:
            grad_x = torch.empty_like(x)
            for rows in _blocks(len(x), ROWS, x):
                ctx.activation.gradient(gradient[rows] @ weight, x[rows], grad_x[rows])
        return grad_x, grad_weight, grad_bias, None


def _blocks(count: int, size: int, x: Tensor) -> Iterator[slice]:
    """Slices of `size` that make up `count`; one where there is a GPU, whose products want to be large."""
    size = count if x.is_cuda else size
    return (slice(begin, min(begin + size, count)) for begin in range(0, count, max(1, size)))


class ActivatedLinear(nn.Linear):
    """act(x) Wᵀ + b as a layer; without an activation a linear layer.

    Backward keeps x alone, unless `keep` is set, under autocast, where it would compute in another dtype, and where a
    compiler decides what is kept. Within a checkpoint it does the same, so that a run with it gives the same bits.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool, activation: Activation | None) -> None:
        super().__init__(inputs, outputs, bias)
        self.activation, self.keep = activation, False

    def forward(self, x: Tensor) -> Tensor:
        """[..., I], before the activation -> [..., O]."""
        return self.product(x, self.bias)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The same with another bias, or none."""
        if self.activation is None:
            return F.linear(x, self.weight, bias)
        again = torch.is_grad_enabled() and x.requires_grad and not self.keep
        if not again or torch.compiler.is_compiling() or autocasts(x):
            return F.linear(self.activation(x), self.weight, bias)
        out = _ActivatedLinear.apply(x.flatten(0, -2), self.weight, bias, self.activation)
        return out.view(*x.shape[:-1], len(self.weight))
