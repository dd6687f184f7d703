"""gelu(x + bias): the operator.

What it saves over `F.gelu(F.linear(x, weight, bias))` is in the backward: the gradient of a linear's bias is a sum over
all rows of the gradient that GELU passes on, and a compiler reads that gradient from memory again for it (8 bytes per
bfloat16 value in all). Here both come from one pass (6 bytes). Shape letters: N rows, D width.
"""

import torch
from torch import Tensor

from ..launch import arch_of, is_interpreted
from . import kernel, reference


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """gelu(x + bias) [..., D], contiguous, in x's dtype: exact GELU, not its tanh form.

    x [..., D] of float32, float16 or bfloat16, finite, as `F.linear(input, weight)` without its bias returns it; bias
    [D], floating, in any dtype. Rows that no single stride describes are copied. Saved for the backward: x and bias.
    Gradients come in the dtypes of what they belong to; bias's is summed in float32. Raises ValueError for anything
    else.
    """
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16) or not x.dim():
        raise ValueError(f"x {x.dtype} {list(x.shape)}: float32, float16 or bfloat16 [..., D] is needed")
    if bias.shape != x.shape[-1:] or not bias.is_floating_point():
        raise ValueError(f"bias {bias.dtype} {list(bias.shape)}: floating [{x.shape[-1]}] is needed, as x has")
    return _forward(x, bias)


@torch.library.custom_op("meter_fast::bias_gelu_forward", mutates_args=())
def _forward(x: Tensor, bias: Tensor) -> Tensor:
    if x.is_cuda or is_interpreted():
        y = kernel.launch_forward(_rows(x), bias, arch_of(x))
    else:
        y = reference.bias_gelu(_rows(x), bias)
    return y.view(x.shape)


@_forward.register_fake
def _(x, bias):
    return x.new_empty(x.shape)


@torch.library.custom_op("meter_fast::bias_gelu_backward", mutates_args=())
def _backward(grad: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and of bias, the latter float32."""
    if x.is_cuda or is_interpreted():
        grad_x, grad_bias = kernel.launch_backward(_rows(grad), _rows(x), bias, arch_of(x))
    else:
        grad_x, grad_bias = reference.backward(_rows(grad), _rows(x), bias)
    return grad_x.view(x.shape), grad_bias


@_backward.register_fake
def _(grad, x, bias):
    return x.new_empty(x.shape), bias.new_empty(bias.shape, dtype=torch.float32)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _gradients(ctx, grad):
    x, bias = ctx.saved_tensors
    grad_x, grad_bias = _backward(grad, x, bias)
    return grad_x, grad_bias.to(bias.dtype)


_forward.register_autograd(_gradients, setup_context=_setup_context)


def _rows(x: Tensor) -> Tensor:
    """[N,D] with neighbouring columns side by side."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()
